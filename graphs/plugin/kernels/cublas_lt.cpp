#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <exception>
#include <map>
#include <mutex>
#include <tuple>

#include "ivc_linear.h"
#include "linear_extents.h"
#include "remembered.h"

namespace ivc {

namespace {

constexpr uint32_t kMostAlignment = 256;

// Throws a status, which the caller returns.
void require(cublasStatus_t status) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    throw status == CUBLAS_STATUS_NOT_SUPPORTED ? cudaErrorNotSupported : cudaErrorUnknown;
}

// One product.
struct MatMul {
    const IvcLinear& product;
    const void *x, *weight, *bias, *residual;
    void* y;
};

// The cuBLASLt that onnxruntime's CUDA provider has loaded, of any version, or else an installed one. If this library
// were linked to one, a second would be loaded where the provider was built for another CUDA.
void* library() {
    static void* const handle = [] {
        for (const int loaded : {RTLD_NOLOAD, 0}) {
            for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11"}) {
                if (void* found = dlopen(name, RTLD_NOW | loaded)) return found;
            }
        }
        throw cudaErrorSharedObjectInitFailed;
    }();
    return handle;
}

template <class Function>
Function* symbol(const char* name) {
    void* const found = dlsym(library(), name);
    if (!found) throw cudaErrorSharedObjectInitFailed;
    return reinterpret_cast<Function*>(found);
}

#define IVC_CUBLAS_LT(name) decltype(::cublasLt##name)* const name = symbol<decltype(::cublasLt##name)>("cublasLt" #name)

struct Functions {
    IVC_CUBLAS_LT(Create);
    IVC_CUBLAS_LT(Matmul);
    IVC_CUBLAS_LT(MatmulAlgoGetHeuristic);
    IVC_CUBLAS_LT(MatmulDescCreate);
    IVC_CUBLAS_LT(MatmulDescDestroy);
    IVC_CUBLAS_LT(MatmulDescSetAttribute);
    IVC_CUBLAS_LT(MatmulPreferenceCreate);
    IVC_CUBLAS_LT(MatmulPreferenceDestroy);
    IVC_CUBLAS_LT(MatmulPreferenceSetAttribute);
    IVC_CUBLAS_LT(MatrixLayoutCreate);
    IVC_CUBLAS_LT(MatrixLayoutDestroy);
};

const Functions& lt() {
    static const Functions functions;
    return functions;
}

int device() {
    int number = 0;
    if (const cudaError_t status = cudaGetDevice(&number)) throw status;
    return number;
}

// One for each device, for the life of the process.
cublasLtHandle_t handle() {
    static std::mutex mutex;
    static std::map<int, cublasLtHandle_t> handles;
    const std::lock_guard<std::mutex> lock(mutex);
    cublasLtHandle_t& found = handles[device()];
    if (!found) require(lt().Create(&found));
    return found;
}

cudaDataType_t typeOf(const MatMul& m) {
    return m.product.type == IVC_FLOAT32 ? CUDA_R_32F : m.product.type == IVC_FLOAT16 ? CUDA_R_16F : CUDA_R_16BF;
}

cublasLtEpilogue_t epilogueOf(const MatMul& m) {
    if (m.product.activation == IVC_GELU_TANH) return m.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    return m.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
}

uint32_t alignment(const void* data) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data) | kMostAlignment;
    return static_cast<uint32_t>(address & (~address + 1));
}

// Describes a product to cuBLASLt, which reads matrices by columns: y^T = W x^T for tensors in rows.
class Described {
   public:
    explicit Described(const MatMul& m) : Described() {  // so that what is made is given back where this fails
        const IvcLinear& p = m.product;
        const auto type = typeOf(m);
        require(lt().MatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogueOf(m));
        if (m.bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, m.bias);
        layout(&weight, type, p.features, p.out);
        layout(&x, type, p.features, p.rows);
        layout(&y, type, p.out, p.rows);
    }
    ~Described() {
        for (cublasLtMatrixLayout_t one : {weight, x, y}) {
            if (one) lt().MatrixLayoutDestroy(one);
        }
        if (product) lt().MatmulDescDestroy(product);
    }
    Described(const Described&) = delete;
    Described& operator=(const Described&) = delete;

    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t weight = nullptr, x = nullptr, y = nullptr;

   private:
    Described() = default;

    template <class Value>
    void set(cublasLtMatmulDescAttributes_t attribute, Value value) {
        require(lt().MatmulDescSetAttribute(product, attribute, &value, sizeof value));
    }
    static void layout(cublasLtMatrixLayout_t* to, cudaDataType_t type, int32_t rows, int32_t columns) {
        const auto extent = [](int32_t x) { return static_cast<uint64_t>(x); };
        require(lt().MatrixLayoutCreate(to, type, extent(rows), extent(columns), rows));
    }
};

class Preference {
   public:
    Preference() { require(lt().MatmulPreferenceCreate(&data)); }
    ~Preference() { lt().MatmulPreferenceDestroy(data); }
    Preference(const Preference&) = delete;
    Preference& operator=(const Preference&) = delete;

    template <class Value>
    void set(cublasLtMatmulPreferenceAttributes_t attribute, Value value) {
        require(lt().MatmulPreferenceSetAttribute(data, attribute, &value, sizeof value));
    }

    cublasLtMatmulPreference_t data = nullptr;
};

struct Way {
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace;
};

using Key = std::tuple<int, int32_t, int32_t, int32_t, int, int, bool, std::array<uint32_t, 4>>;

Key keyOf(const MatMul& m) {
    const IvcLinear& p = m.product;
    const std::array<uint32_t, 4> aligned{
        alignment(m.weight), alignment(m.x), alignment(m.residual ? m.residual : m.y), alignment(m.y)};
    return {device(), p.rows, p.features, p.out, p.type, epilogueOf(m), m.residual != nullptr, aligned};
}

// The first algorithm that cuBLASLt proposes. Sums that several blocks share stay in float32.
Way found(const Described& described, const std::array<uint32_t, 4>& aligned) {
    Preference preference;
    preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, IVC_MATMUL_WORKSPACE);
    preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, aligned[0]);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, aligned[1]);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, aligned[2]);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, aligned[3]);
    cublasLtMatmulHeuristicResult_t result{};
    int count = 0;
    require(lt().MatmulAlgoGetHeuristic(handle(), described.product, described.weight, described.x, described.y,
        described.y, preference.data, 1, &result, &count));
    if (count == 0) throw cudaErrorNotSupported;
    return {result.algo, result.workspaceSize};
}

// Algorithms that were found, by everything that they depend on: a model has a dozen for each number of rows.
Way wayOf(const MatMul& m, const Described& described) {
    static Remembered<Key, Way, 1024> ways;
    const Key key = keyOf(m);
    return ways.get(key, [&] { return found(described, std::get<7>(key)); });
}

void multiply(const MatMul& m, void* workspace, cudaStream_t stream) {
    const Described described(m);
    const Way way = wayOf(m, described);
    const float alpha = m.product.scale, beta = m.residual ? 1.0f : 0.0f;
    require(lt().Matmul(handle(), described.product, &alpha, m.weight, described.weight, m.x, described.x, &beta,
        m.residual ? m.residual : m.y, described.y, m.y, described.y, &way.algorithm, workspace, way.workspace, stream));
}

}  // namespace

}  // namespace ivc

cudaError_t ivcMatMul(const IvcLinear* product, const void* x, const void* weight, const void* bias,
    const void* residual, void* y, void* workspace, cudaStream_t stream) {
    if (!ivc::possible(*product) || !ivc::inEpilogue(*product, residual)) return cudaErrorInvalidValue;
    try {
        ivc::multiply({*product, x, weight, bias, residual, y}, workspace, stream);
        return cudaSuccess;
    } catch (cudaError_t status) {
        return status;
    } catch (const std::exception&) {  // no memory on the host
        return cudaErrorMemoryAllocation;
    }
}
