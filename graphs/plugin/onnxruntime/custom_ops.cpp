// The ivc operators for onnxruntime's CUDA provider, as a library of custom operators.
//
// SelectTokens is that of graphs/ops/SelectTokens.onnxtxt; CompactGatherN is what the `ort-cuda-ops` lowering
// (ivc_export/passes/use_custom_ops.py) puts in the place of a graph's many Gather. Both launch on onnxruntime's stream
// and wait for nothing.
#define ORT_API_MANUAL_INIT  // no onnxruntime is linked: the one that loads this library hands itself over
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/ivc_kernels.h"

#if ORT_API_VERSION < 18
#error "onnxruntime 1.18 or later is needed"
#endif

#ifndef IVC_PROVIDER  // tests put kernels that are emulated on the host behind the CPU provider
#define IVC_PROVIDER "CUDAExecutionProvider"
#endif

namespace ivc {

using Type = ONNXTensorElementDataType;
using Shape = std::vector<int64_t>;

constexpr Type kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
constexpr Type kFloat32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr Type kFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr Type kBFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

void check(cudaError_t status, const char* what) {
    if (status) throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(status));
}

// Calls `body`, and makes a status of what it throws: no exception leaves the library.
template <class Body>
OrtStatus* guarded(Body body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
}

Shape shapeOf(const Ort::ConstValue& tensor) { return tensor.GetTensorTypeAndShapeInfo().GetShape(); }

// Elements of a tensor that has one axis.
int32_t lengthOf(const Ort::ConstValue& tensor) {
    const Shape shape = shapeOf(tensor);
    require(shape.size() == 1, "ivc: indices, priorities and counts have one axis");
    return static_cast<int32_t>(shape[0]);
}

// Memory of the session's own arena, beside `tensor`. Given back when the kernels are launched: the arena hands it to
// nobody on another stream before they are done.
class Scratch {
   public:
    Scratch(OrtKernelContext* context, const Ort::ConstValue& tensor, size_t bytes, bool onStream) {
        const auto memory = tensor.GetTensorMemoryInfo();
        const OrtApi& api = Ort::GetApi();
        Ort::ThrowOnError(api.KernelContext_GetAllocator(context, memory, &allocator_));
        if (onStream) {  // where there is none, on a host, this call would look for it all the same
            const Ort::Status status(api.KernelContext_GetScratchBuffer(context, memory, bytes, &data_));
            if (status.IsOK()) return;
            api.ReleaseAllocator(allocator_);
            throw std::runtime_error(status.GetErrorMessage());
        }
        data_ = allocator_->Alloc(allocator_, bytes);
    }
    ~Scratch() {
        allocator_->Free(allocator_, data_);
        Ort::GetApi().ReleaseAllocator(allocator_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* data() const { return data_; }

   private:
    OrtAllocator* allocator_ = nullptr;
    void* data_ = nullptr;
};

class SelectTokens {
   public:
    explicit SelectTokens(const Ort::ConstKernelInfo& node)
        : divisor_(static_cast<int32_t>(node.GetAttribute<int64_t>("seed_divisor"))),
          softmax_(node.GetAttribute<int64_t>("softmax_all") ? IVC_SOFTMAX_ALL : IVC_SOFTMAX_VISUAL) {
        require(divisor_ > 0 && divisor_ % 2 == 0, "SelectTokens: seed_divisor is even and above 0");
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
        return guarded([&] { compute(context, Ort::KernelContext(context)); });
    }

   private:
    void compute(OrtKernelContext* raw, const Ort::KernelContext& context) const {
        const auto input = [&](size_t i) { return context.GetInput(i); };
        const auto ints = [&](size_t i) { return input(i).GetTensorData<int32_t>(); };
        const auto values = input(0);
        const Shape shape = shapeOf(values);
        require(shape.size() == 4 && shape[0] == 1, "SelectTokens: values are [1, kv_heads, S, head_dim]");
        require(lengthOf(input(5)) == 1, "SelectTokens: keep_count has one element");
        const int32_t visual = lengthOf(input(2)), text = lengthOf(input(3)), keepCount = *ints(5);
        require(lengthOf(input(1)) == visual, "SelectTokens: ivc_priority and visual_index differ in length");
        require(visual + text == shape[2], "SelectTokens: visual_index and text_index are not the rows of values");
        require(keepCount > 0 && keepCount <= visual, "SelectTokens: keep_count is not 1 to the visual tokens");
        const auto extent = [&](size_t axis) { return static_cast<int32_t>(shape[axis]); };
        const IvcSelection s{extent(1), extent(2), extent(3), visual, text, lengthOf(input(4)), keepCount, divisor_,
            ivcType(values.GetTensorTypeAndShapeInfo().GetElementType()), softmax_};

        auto keep = context.GetOutput(0, Shape{text + keepCount});
        auto score = context.GetOutput(1, Shape{visual});
        auto seeds = context.GetOutput(2, Shape{ivcSeedCount(visual, divisor_)});
        void* const stream = context.GetGPUComputeStream();
        const Scratch scratch(raw, values, ivcSelectionWorkspace(&s), stream != nullptr);
        check(ivcSelectTokens(&s, values.GetTensorRawData(), input(1).GetTensorData<float>(), ints(2), ints(3), ints(4),
                  keep.GetTensorMutableData<int32_t>(), score.GetTensorMutableData<float>(),
                  seeds.GetTensorMutableData<int32_t>(), scratch.data(), static_cast<cudaStream_t>(stream)),
            "SelectTokens");
    }

    static IvcType ivcType(Type type) {
        return type == kFloat32 ? IVC_FLOAT32 : type == kFloat16 ? IVC_FLOAT16 : IVC_BFLOAT16;
    }

    int32_t divisor_;
    IvcSoftmax softmax_;
};

// CompactGatherN(index int32 [M], x_1 .. x_n) -> y_1 .. y_n: the rows `index` of each x along its axis, which is as
// long in all of them. Attribute: axes, one a tensor.
class CompactGatherN {
   public:
    explicit CompactGatherN(const Ort::ConstKernelInfo& node) : axes_(node.GetAttributes<int64_t>("axes")) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
        return guarded([&] { compute(Ort::KernelContext(context)); });
    }

   private:
    void compute(const Ort::KernelContext& context) const {
        require(context.GetInputCount() == axes_.size() + 1, "CompactGatherN: axes are not one a tensor");
        const auto index = context.GetInput(0);
        const int32_t kept = lengthOf(index);
        std::vector<IvcRows> tensors;
        int64_t rows = -1;
        for (size_t i = 0; i < axes_.size(); ++i) {
            const auto x = context.GetInput(i + 1);
            Shape shape = shapeOf(x);
            const auto axis = static_cast<size_t>(axes_[i]);
            require(axis < shape.size(), "CompactGatherN: an axis is out of range");
            require(rows < 0 || shape[axis] == rows, "CompactGatherN: tensors differ in rows");
            rows = shape[axis];
            IvcRows one{x.GetTensorRawData(), nullptr, 1,
                x.GetTensorTypeAndShapeInfo().GetElementType() == kFloat32 ? 4 : 2};
            for (size_t a = 0; a < axis; ++a) one.outer *= static_cast<int32_t>(shape[a]);
            for (size_t a = axis + 1; a < shape.size(); ++a) one.rowBytes *= static_cast<int32_t>(shape[a]);
            shape[axis] = kept;
            one.target = context.GetOutput(i, shape).GetTensorMutableRawData();
            tensors.push_back(one);
        }
        check(ivcCompactGather(tensors.data(), static_cast<int32_t>(tensors.size()), static_cast<int32_t>(rows),
                  index.GetTensorData<int32_t>(), kept, static_cast<cudaStream_t>(context.GetGPUComputeStream())),
            "CompactGatherN");
    }

    std::vector<int64_t> axes_;
};

// What both operators say of themselves, for one type of values: onnxruntime joins those of one name.
template <class Operator, class Kernel>
struct Description : Ort::CustomOpBase<Operator, Kernel, true> {
    explicit Description(Type values) : values(values) {}

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* node, void** kernel) const {
        return guarded([&] { *kernel = new Kernel(Ort::ConstKernelInfo(node)); });
    }
    const char* GetExecutionProviderType() const { return IVC_PROVIDER; }

    Type values;
};

struct SelectTokensOperator : Description<SelectTokensOperator, SelectTokens> {
    using Description::Description;

    const char* GetName() const { return "SelectTokens"; }
    size_t GetInputTypeCount() const { return 6; }
    size_t GetOutputTypeCount() const { return 3; }
    Type GetInputType(size_t i) const { return i == 0 ? values : i == 1 ? kFloat32 : kInt32; }
    Type GetOutputType(size_t i) const { return i == 1 ? kFloat32 : kInt32; }
    // keep_count: an output's extent, which the host must know
    OrtMemType GetInputMemoryType(size_t i) const { return i == 5 ? OrtMemTypeCPUInput : OrtMemTypeDefault; }
};

struct CompactGatherNOperator : Description<CompactGatherNOperator, CompactGatherN> {
    using Description::Description;

    const char* GetName() const { return "CompactGatherN"; }
    size_t GetInputTypeCount() const { return 2; }
    size_t GetOutputTypeCount() const { return 1; }
    Type GetInputType(size_t i) const { return i == 0 ? kInt32 : values; }
    Type GetOutputType(size_t) const { return values; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return i == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
    }
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
};

OrtCustomOpDomain* domain() {
    static const SelectTokensOperator select[] = {
        SelectTokensOperator(kFloat32), SelectTokensOperator(kFloat16), SelectTokensOperator(kBFloat16)};
    static const CompactGatherNOperator gather[] = {
        CompactGatherNOperator(kFloat32), CompactGatherNOperator(kFloat16), CompactGatherNOperator(kBFloat16)};
    static const Ort::CustomOpDomain made = [] {
        Ort::CustomOpDomain d("ivc");
        for (const auto& one : select) d.Add(&one);
        for (const auto& one : gather) d.Add(&one);
        return d;
    }();
    return made;
}

}  // namespace ivc

// What SessionOptions.register_custom_ops_library looks for.
extern "C" IVC_API OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(ORT_API_VERSION);
    if (!api) {
        const std::string built = "the library is built for onnxruntime 1." + std::to_string(ORT_API_VERSION) +
                                  " or later, this is " + base->GetVersionString();
        return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, built.c_str());
    }
    Ort::InitApi(api);
    return ivc::guarded([&] { Ort::UnownedSessionOptions(options).Add(ivc::domain()); });
}
