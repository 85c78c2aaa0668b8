// ivcMatMul over a stand-in for cuBLASLt, in float32 on the host; prints nothing where all is so.
#include "../kernels/ivc_linear.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Layout {
    uint64_t rows, columns;
};

struct Description {
    const float* bias;
};

std::atomic<int> asked{0}, multiplied{0}, held{0};
int until = -1;  // descriptions that can still be made; any number if it is below 0

void require(bool fact, const char* what) {
    if (fact) return;
    std::fprintf(stderr, "it is not so that %s\n", what);
    std::exit(1);
}

template <class Kept, class Opaque>
cublasStatus_t keep(Opaque* to, Kept value) {
    if (until == 0) return CUBLAS_STATUS_ALLOC_FAILED;
    if (until > 0) --until;
    ++held;
    *to = reinterpret_cast<Opaque>(new Kept(value));
    return CUBLAS_STATUS_SUCCESS;
}

template <class Kept, class Opaque>
cublasStatus_t drop(Opaque from) {
    --held;
    delete reinterpret_cast<Kept*>(from);
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* number) { return *number = 0, cudaSuccess; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    *handle = reinterpret_cast<cublasLtHandle_t>(new int);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* to, cublasComputeType_t, cudaDataType_t) {
    return keep(to, Description{});
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t from) { return drop<Description>(from); }
cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t to, cublasLtMatmulDescAttributes_t attribute, const void* value, size_t size) {
    if (attribute == CUBLASLT_MATMUL_DESC_BIAS_POINTER) {
        std::memcpy(&reinterpret_cast<Description*>(to)->bias, value, size);
    }
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t* to, cudaDataType, uint64_t rows, uint64_t columns, int64_t) {
    return keep(to, Layout{rows, columns});
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t from) { return drop<Layout>(from); }
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* to) {
    return keep(to, 0);
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t from) { return drop<int>(from); }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
    cublasLtMatmulHeuristicResult_t*, int* count) {
    ++asked;
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t description, const void* alpha, const void* a,
    cublasLtMatrixLayout_t weight, const void* b, cublasLtMatrixLayout_t given, const void* beta, const void* c,
    cublasLtMatrixLayout_t, void* d, cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t) {
    ++multiplied;
    const auto *w = reinterpret_cast<const Layout*>(weight), *x = reinterpret_cast<const Layout*>(given);
    const auto floats = [](const void* tensor) { return static_cast<const float*>(tensor); };
    const float* bias = reinterpret_cast<const Description*>(description)->bias;
    for (uint64_t row = 0; row < x->columns; ++row) {
        for (uint64_t column = 0; column < w->columns; ++column) {
            float sum = 0;
            for (uint64_t k = 0; k < w->rows; ++k) sum += floats(a)[column * w->rows + k] * floats(b)[row * x->rows + k];
            const uint64_t place = row * w->columns + column;
            const float more = *floats(beta) == 0 ? 0 : *floats(beta) * floats(c)[place];
            static_cast<float*>(d)[place] = *floats(alpha) * sum + (bias ? bias[column] : 0) + more;
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

// In the place of a library that is loaded.
void* dlopen(const char*, int) noexcept { return &asked; }
void* dlsym(void*, const char* name) noexcept {
#define IVC_NAMED(function) {#function, reinterpret_cast<void*>(&function)}
    static const std::map<std::string, void*> functions{IVC_NAMED(cublasLtCreate), IVC_NAMED(cublasLtMatmul),
        IVC_NAMED(cublasLtMatmulAlgoGetHeuristic), IVC_NAMED(cublasLtMatmulDescCreate),
        IVC_NAMED(cublasLtMatmulDescDestroy), IVC_NAMED(cublasLtMatmulDescSetAttribute),
        IVC_NAMED(cublasLtMatmulPreferenceCreate), IVC_NAMED(cublasLtMatmulPreferenceDestroy),
        IVC_NAMED(cublasLtMatmulPreferenceSetAttribute), IVC_NAMED(cublasLtMatrixLayoutCreate),
        IVC_NAMED(cublasLtMatrixLayoutDestroy)};
    return functions.at(name);
}

}  // extern "C"

namespace {

IvcLinear product(int32_t rows, int32_t features, int32_t out) {
    return {rows, features, out, IVC_FLOAT32, IVC_NO_ACTIVATION, 0, 0, 1, 0, 0, 0};
}

void testRefusals() {
    std::vector<float> memory(64, 1.0f);
    const auto refused = [&](const IvcLinear& p, bool residual) {
        float* const m = memory.data();
        return ivcMatMul(&p, m, m, nullptr, residual ? m : nullptr, m, nullptr, nullptr) == cudaErrorInvalidValue;
    };
    for (const int32_t extent : {0, -1, INT32_MAX}) {
        require(refused(product(extent, 2, 2), false), "rows that cannot be are refused");
        require(refused(product(2, extent, 2), false), "features that cannot be are refused");
        require(refused(product(2, 2, extent), false), "columns that cannot be are refused");
    }
    IvcLinear gated = product(2, 2, 2), swish = gated, gelu = gated, none = gated;
    gated.gated = 1;
    swish.activation = IVC_SWISH;
    gelu.activation = IVC_GELU_TANH;
    none.activation = static_cast<IvcActivation>(-1);
    require(refused(gated, false) && refused(swish, false) && refused(none, false), "what has no epilogue is refused");
    require(refused(gelu, true) && !refused(gelu, false), "GELU is refused where there is a residual alone");
    require(multiplied == 1, "what is refused is not multiplied");
}

void testProduct() {
    const std::vector<float> x{1, 2, 3, 4, 5, 6}, weight{1, 0, 1, 0, 2, 0}, bias{10, 20}, residual{100, 200, 300, 400};
    std::vector<float> y(4);
    IvcLinear p = product(2, 3, 2);
    p.scale = 2;
    require(ivcMatMul(&p, x.data(), weight.data(), bias.data(), residual.data(), y.data(), nullptr, nullptr) == cudaSuccess,
        "a product is computed");
    require(y == std::vector<float>{118, 228, 330, 440}, "it is scale x W^T + b + r");
}

void testFailures() {
    std::vector<float> memory(64, 1.0f);
    const IvcLinear p = product(3, 5, 7);
    float* const m = memory.data();
    for (int made = 0; made < 5; ++made) {  // the description, three layouts and the preference
        until = made;
        require(ivcMatMul(&p, m, m, nullptr, nullptr, m, nullptr, nullptr) != cudaSuccess, "a description that fails is told");
        require(held == 0, "what was made before it is given back");
    }
    until = -1;
}

// How often cuBLASLt was asked for a way to products of so many rows, one after the other.
int askedFor(int32_t first, int32_t last) {
    alignas(256) static float memory[1 << 16];
    const int before = asked;
    for (int32_t rows = first; rows < last; ++rows) {
        const IvcLinear p = product(rows, 1, 1);
        require(ivcMatMul(&p, memory, memory, nullptr, nullptr, memory + (1 << 15), nullptr, nullptr) == cudaSuccess,
            "products of any number of rows are computed");
    }
    return asked - before;
}

void testWays() {
    require(askedFor(1, 3000) == 2999, "each size is asked for");
    require(askedFor(2500, 3000) == 0, "the last sizes are not asked for again");
    require(askedFor(1, 500) == 499, "those of long ago are");
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 4; ++thread) threads.emplace_back([] { askedFor(3000, 3400); });
    for (std::thread& thread : threads) thread.join();
    require(askedFor(3000, 3400) == 0, "what several threads asked for is known");
    require(held == 0, "what describes products is given back");
}

}  // namespace

int main() {
    testRefusals();
    testProduct();
    testFailures();
    testWays();
    return 0;
}
