// What the TensorRT plugin's operators refuse, over kernels that only count their calls; prints nothing where all is so.
#include "../tensorrt/joined.h"
#include "../tensorrt/products.h"

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

using namespace ivc;

namespace {

int launched = 0;
char memory[64];
IvcEncoder encoder;
ptrdiff_t valuesAt = 0;  // bytes

void require(bool fact, const char* what) {
    if (fact) return;
    std::fprintf(stderr, "it is not so that %s\n", what);
    std::exit(1);
}

}  // namespace

extern "C" {

size_t ivcLinearWorkspace(const IvcLinear*, int32_t) { return 0; }
size_t ivcLinearPackedWorkspace(const IvcLinear*, int32_t) { return 0; }
size_t ivcAttendJoinedWorkspace(const IvcJoined*) { return 0; }
cudaError_t ivcLinear(const IvcLinear*, const void*, const void*, const void*, const void*, const void*, void*, void*,
    cudaStream_t) {
    return ++launched, cudaSuccess;
}
cudaError_t ivcLinearPacked(const IvcLinear*, const IvcPacked*, const void*, const void*, const void*, const void*, void*,
    void*, cudaStream_t) {
    return ++launched, cudaSuccess;
}
cudaError_t ivcTurnHeads(const IvcJoined*, const IvcJoinedRows*, void*, void*, void*, cudaStream_t) {
    return ++launched, cudaSuccess;
}
cudaError_t ivcAttendJoined(const IvcJoined*, const IvcJoinedRows*, void*, void*, const int32_t*, void*, void*, int32_t*,
    cudaStream_t) {
    return ++launched, cudaSuccess;
}
cudaError_t ivcEncodeAttend(
    const IvcEncoder* e, const void*, const void*, const void* v, const int32_t*, void*, cudaStream_t) {
    encoder = *e;
    valuesAt = static_cast<const char*>(v) - memory;
    return ++launched, cudaSuccess;
}
cudaError_t cudaMalloc(void** address, size_t) { return *address = memory, cudaSuccess; }
cudaError_t cudaFree(void*) { return cudaSuccess; }
cudaError_t cudaMemset(void*, int, size_t) { return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

}  // extern "C"

namespace {

PluginTensorDesc tensor(std::initializer_list<int32_t> extents, DataType type = DataType::kHALF) {
    PluginTensorDesc found{};
    for (const int32_t one : extents) found.dims.d[found.dims.nbDims++] = one;
    found.type = type;
    return found;
}

// Whether an operator runs on tensors of these shapes. What it refuses, it must not launch.
template <class Operator>
bool runs(const Attributes& attributes, const std::vector<PluginTensorDesc>& in) {
    const std::vector<const void*> inputs(in.size(), memory);
    void* const outputs[] = {memory, memory, memory};
    const Operator made(attributes);
    const int before = launched;
    const cudaError_t status = made.enqueue(in.data(), inputs.data(), outputs, memory, nullptr);
    require((status == cudaSuccess) == (launched > before), "what is refused is not launched");
    require(status == cudaSuccess || status == cudaErrorInvalidValue, "what does not fit is an invalid value");
    return status == cudaSuccess;
}

// Refused once any one extent of any of `in` but the rows of x is another, or a rank.
template <class Operator>
void refuseOthers(const Attributes& attributes, const std::vector<PluginTensorDesc>& in, const char* what) {
    require(runs<Operator>(attributes, in), what);
    for (size_t i = 0; i < in.size(); ++i) {
        for (int32_t axis = 0; axis < in[i].dims.nbDims; ++axis) {
            auto changed = in;
            changed[i].dims.d[axis] += 2;
            require(!runs<Operator>(attributes, changed), what);
        }
    }
}

const std::vector<int32_t> kNo{0}, kYes{1};

void testLinear() {
    const auto attributes = [](bool gated, bool normed, bool biased, bool summed) {
        const auto flag = [](bool set) { return set ? kYes : kNo; };
        return Attributes{kNo, flag(gated), flag(normed), flag(biased), flag(summed), kNo, kNo, kNo};
    };
    const auto x = tensor({1, 3, 16}), weight = tensor({8, 16}), norm = tensor({16}), bias = tensor({8});
    refuseOthers<FusedLinear>(attributes(false, true, true, true), {x, weight, norm, bias, tensor({1, 3, 8})},
        "FusedLinear takes tensors that fit each other alone");
    for (const int32_t features : {16, 32, 48}) {  // of RMS norms, of layer norms, and of neither
        const std::vector<PluginTensorDesc> in{x, weight, tensor({features}), bias};
        const Attributes given = attributes(false, true, true, false);
        require(runs<FusedLinear>(given, in) == (features < 48), "a norm has a weight for each feature, or a bias too");
        require(Surroundings(given).linear(in.data(), 2).layerNorm == (features == 32), "a layer norm has both");
    }
    require(!runs<FusedLinear>(attributes(false, false, false, true), {x, weight, tensor({3, 8})}), "ranks are compared");
    require(!runs<FusedLinear>(attributes(false, false, false, true), {x, weight, tensor({1, 1, 8})}),
        "a residual is not repeated over rows");
    require(runs<FusedLinear>(attributes(true, true, true, true), {x, weight, norm, bias, tensor({1, 3, 4})}),
        "a gated product has half the columns");
    require(!runs<FusedLinear>(attributes(true, false, false, false), {x, tensor({7, 16})}),
        "gates are as many as what they gate");
    Attributes plain = attributes(false, false, true, false);
    plain.push_back({});  // float_type, which may be missing
    for (const DataType type : {DataType::kHALF, DataType::kFLOAT}) {
        const PluginTensorDesc in[] = {tensor({1, 3, 16}, DataType::kHALF), tensor({8, 16}, DataType::kHALF),
            tensor({8}, DataType::kHALF), tensor({1, 3, 8}, type)};
        require(FusedLinear(plain).supports(3, in) == (type == DataType::kHALF), "y has the type of x");
        require(FusedLinearWide(plain).supports(3, in) == (type == DataType::kFLOAT), "a wide y is float32");
        require(FusedLinearWide(plain).supports(2, in), "what is read by a wide product has the type of x");
    }
}

void testInt4() {
    const Attributes attributes{kNo, kNo, kYes, kYes, kYes, kNo, kNo, kNo, {32}, kYes};
    const auto words = [](std::initializer_list<int32_t> extents) { return tensor(extents, DataType::kINT32); };
    // 80 features are 3 blocks, and each of 8 rows has 2 bytes of zero points
    refuseOthers<FusedLinearInt4>(attributes,
        {tensor({3, 80}), words({8, 3, 4}), tensor({8, 3}), words({4}), tensor({80}), tensor({8}), tensor({3, 8})},
        "FusedLinearInt4 takes tensors that fit each other alone");
    Attributes plain{kNo, kNo, kNo, kNo, kYes, kNo, kNo, kNo, {32}, kNo};
    require(runs<FusedLinearInt4>(plain, {tensor({3, 80}), words({8, 3, 4}), tensor({8, 3}), tensor({3, 8})}),
        "it runs without zero points, norm and bias");
    require(!runs<FusedLinearInt4>(plain, {tensor({3, 80}), words({8, 3, 4}), tensor({8, 3}), tensor({3, 7})}),
        "and then finds the residual, too");
}

void testJoined() {
    const Attributes heads{{4}, {2}, {64}, kNo, kYes, kNo, kYes}, attends{{4}, {2}, {64}, kNo, kYes, kNo, kNo};
    const auto floats = [](std::initializer_list<int32_t> extents) { return tensor(extents, DataType::kFLOAT); };
    std::vector<PluginTensorDesc> in{
        tensor({5, 512}), floats({5, 32}), floats({5, 32}), tensor({64}), tensor({64})};
    refuseOthers<TurnHeads>(heads, in, "TurnHeads takes tensors that fit each other alone");
    require(TurnHeads(heads).outputs() == 3, "TurnHeads gives query, key and value");
    require(TurnHeads({{4}, {2}, {64}, kNo, kYes, kNo, kNo}).outputs() == 2, "or leaves the value where it is");
    for (int i = 0; i < 2; ++i) in.push_back(tensor({1, 2, 100, 64}));
    in.push_back(tensor({1}, DataType::kINT32));
    refuseOthers<AttendJoined>(attends, in, "AttendJoined takes tensors that fit each other alone");
}

void testEncoder() {
    const Attributes attributes{kNo, {2}, kNo, kNo};
    const auto heads = tensor({3, 2, 5, 64});
    const auto runsWith = [&](const PluginTensorDesc& v) { return runs<EncodeAttend>(attributes, {heads, heads, v}); };
    require(runsWith(heads) && valuesAt == 0 && encoder.v.head == 5 * 64 && encoder.v.row == 64, "heads may be split");
    require(runsWith(tensor({15, 128})) && valuesAt == 0 && encoder.v.head == 64 && encoder.v.row == 128, "or be rows");
    require(runsWith(tensor({15, 384})) && valuesAt == 2 * 256 && encoder.v.head == 64 && encoder.v.row == 384 &&
                encoder.v.frame == 5 * 384,
        "or the last columns of rows");
    require(!runsWith(tensor({15, 120})), "rows hold all heads");
    require(!runsWith(tensor({14, 128})), "and are as many as the queries");
}

}  // namespace

int main() {
    testLinear();
    testInt4();
    testJoined();
    testEncoder();
    return 0;
}
