// The ivc operators for onnxruntime's CUDA provider, as a library of custom operators.
//
// SelectTokens is that of graphs/ops/SelectTokens.onnxtxt. The others are what the lowering `ort-cuda-ops`
// (ivc_export/lowering/onnxruntime) puts instead of many Gather nodes, instead of products, and around attention. All
// launch on onnxruntime's stream, and do not wait.
#include "calls.h"
#include "joined.h"
#include "linear.h"
#include "operator.h"
#include "step.h"

#include <vector>

namespace ivc {

class SelectTokens {
   public:
    explicit SelectTokens(const Ort::ConstKernelInfo& node)
        : divisor_(static_cast<int32_t>(node.GetAttribute<int64_t>("seed_divisor"))),
          softmax_(node.GetAttribute<int64_t>("softmax_all") ? IVC_SOFTMAX_ALL : IVC_SOFTMAX_VISUAL) {
        require(divisor_ > 0 && divisor_ % 2 == 0, "SelectTokens: seed_divisor must be even and above 0");
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
        require(shape.size() == 4 && shape[0] == 1, "SelectTokens: values must have the shape [1, kv_heads, S, head_dim]");
        require(lengthOf(input(5)) == 1, "SelectTokens: keep_count must have one element");
        const int32_t visual = lengthOf(input(2)), text = lengthOf(input(3)), keepCount = *ints(5);
        require(lengthOf(input(1)) == visual, "SelectTokens: ivc_priority and visual_index must have the same length");
        require(visual + text == shape[2], "SelectTokens: visual_index and text_index must have as many entries as values has rows");
        require(keepCount > 0 && keepCount <= visual, "SelectTokens: keep_count must be 1 to the number of visual tokens");
        const auto extent = [&](size_t axis) { return static_cast<int32_t>(shape[axis]); };
        const IvcSelection s{extent(1), extent(2), extent(3), visual, text, lengthOf(input(4)), keepCount, divisor_,
            ivcType(values.GetTensorTypeAndShapeInfo().GetElementType()), softmax_};

        auto keep = outputOf(context, 0, Shape{text + keepCount});
        auto score = outputOf(context, 1, Shape{visual});
        auto seeds = outputOf(context, 2, Shape{ivcSeedCount(visual, divisor_)});
        void* const stream = context.GetGPUComputeStream();
        const Scratch scratch(raw, values, ivcSelectionWorkspace(&s), stream != nullptr);
        check(ivcSelectTokens(&s, values.GetTensorRawData(), input(1).GetTensorData<float>(), ints(2), ints(3), ints(4),
                  keep.GetTensorMutableData<int32_t>(), score.GetTensorMutableData<float>(),
                  seeds.GetTensorMutableData<int32_t>(), scratch.data(), static_cast<cudaStream_t>(stream)),
            "SelectTokens");
    }

    int32_t divisor_;
    IvcSoftmax softmax_;
};

// CacheIndex(keep_index int32 [M], total_length int32 [], position_ids int32 [axes, 1, S], cache [1, heads, P, D]) ->
// cache_index int32 [P]: see ivcCacheIndex. total_length is in host memory: the rows of the cache with this run's S.
class CacheIndex {
   public:
    explicit CacheIndex(const Ort::ConstKernelInfo&) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
        return guarded([&] { compute(Ort::KernelContext(context)); });
    }

   private:
    static void compute(const Ort::KernelContext& context) {
        const auto keep = context.GetInput(0), total = context.GetInput(1);
        const Shape positions = shapeOf(context.GetInput(2)), cache = shapeOf(context.GetInput(3));
        require(positions.size() == 3 && cache.size() == 4, "CacheIndex: position_ids must have 3 axes, and a cache 4");
        require(total.GetTensorTypeAndShapeInfo().GetElementCount() == 1, "CacheIndex: total_length must be one number");
        const auto capacity = static_cast<int32_t>(cache[2]);
        const auto past = *total.GetTensorData<int32_t>() - static_cast<int32_t>(positions[2]);
        auto index = outputOf(context, 0, Shape{capacity});
        check(ivcCacheIndex(keep.GetTensorData<int32_t>(), lengthOf(keep), past, capacity,
                  index.GetTensorMutableData<int32_t>(), static_cast<cudaStream_t>(context.GetGPUComputeStream())),
            "CacheIndex");
    }
};

// CompactGatherN(index int32 [M], x_1 .. x_n) -> y_1 .. y_n: the rows `index` of each x along its axis. All x have the
// same length along it. Attribute: axes, one for each tensor.
class CompactGatherN {
   public:
    explicit CompactGatherN(const Ort::ConstKernelInfo& node) : axes_(node.GetAttributes<int64_t>("axes")) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
        return guarded([&] { compute(Ort::KernelContext(context)); });
    }

   private:
    void compute(const Ort::KernelContext& context) const {
        require(context.GetInputCount() == axes_.size() + 1, "CompactGatherN: axes must have one entry for each tensor");
        const auto index = context.GetInput(0);
        const int32_t kept = lengthOf(index);
        require(!axes_.empty(), "CompactGatherN: there must be a tensor");
        const auto type = context.GetInput(1).GetTensorTypeAndShapeInfo().GetElementType();  // of all of them
        const auto size = static_cast<int32_t>(bytesOf(type));
        std::vector<IvcRows> tensors;
        tensors.reserve(axes_.size());
        int64_t rows = -1;
        for (size_t i = 0; i < axes_.size(); ++i) {
            const auto x = context.GetInput(i + 1);
            Shape shape = shapeOf(x);
            const auto axis = static_cast<size_t>(axes_[i]);
            require(axis < shape.size(), "CompactGatherN: an axis is out of range");
            require(rows < 0 || shape[axis] == rows, "CompactGatherN: all tensors must have the same number of rows");
            rows = shape[axis];
            IvcRows one{x.GetTensorRawData(), nullptr, 1, size};
            for (size_t a = 0; a < axis; ++a) one.outer *= static_cast<int32_t>(shape[a]);
            for (size_t a = axis + 1; a < shape.size(); ++a) one.rowBytes *= static_cast<int32_t>(shape[a]);
            shape[axis] = kept;
            one.target = outputOf(context, i, shape).GetTensorMutableRawData();
            tensors.push_back(one);
        }
        check(ivcCompactGather(tensors.data(), static_cast<int32_t>(tensors.size()), static_cast<int32_t>(rows),
                  index.GetTensorData<int32_t>(), kept, static_cast<cudaStream_t>(context.GetGPUComputeStream())),
            "CompactGatherN");
    }

    std::vector<int64_t> axes_;
};

// EncodeAttend(q, k, v [frames, rows, width]) -> y [frames rows, heads D], or with windows of `block_size` places at
// most EncodeAttend(q, k, v, window_of_place int32 [rows]) -> y [frames, rows - 2 block_size, heads D].
// Attributes: scale, heads, head_dim, block_size.
class EncodeAttend {
   public:
    explicit EncodeAttend(const Ort::ConstKernelInfo& node)
        : scale_(node.GetAttribute<float>("scale")),
          heads_(node.GetAttribute<int64_t>("heads")),
          headDim_(node.GetAttribute<int64_t>("head_dim")),
          block_(node.GetAttribute<int64_t>("block_size")) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
        return guarded([&] { compute(Ort::KernelContext(context)); });
    }

   private:
    void compute(const Ort::KernelContext& context) const {
        const auto q = context.GetInput(0);
        const Shape query = shapeOf(q);
        const int64_t width = heads_ * headDim_;
        require(query.size() == 3 && query[2] == width && shapeOf(context.GetInput(1)) == query &&
                    shapeOf(context.GetInput(2)) == query,
            "EncodeAttend: query, key and value must have the shape [frames, rows, heads head_dim]");
        const IvcStrides strides{query[1] * width, headDim_, width};
        const bool windows = context.GetInputCount() > 3;
        require(windows == (block_ > 0), "EncodeAttend: window_of_place and block_size must be given together");
        require(!windows || (lengthOf(context.GetInput(3)) == query[1] && query[1] > 2 * block_),
            "EncodeAttend: window_of_place must have one entry for each row, and a block of padding at both ends");
        const IvcEncoder e{static_cast<int32_t>(query[0]), static_cast<int32_t>(heads_),
            static_cast<int32_t>(query[1]), static_cast<int32_t>(headDim_), scale_,
            ivcType(q.GetTensorTypeAndShapeInfo().GetElementType()), static_cast<int32_t>(block_), strides, strides,
            strides};
        const Shape given = windows ? Shape{query[0], query[1] - 2 * block_, width} : Shape{query[0] * query[1], width};
        auto y = outputOf(context, 0, given);
        check(ivcEncodeAttend(&e, q.GetTensorRawData(), context.GetInput(1).GetTensorRawData(),
                  context.GetInput(2).GetTensorRawData(),
                  windows ? context.GetInput(3).GetTensorData<int32_t>() : nullptr, y.GetTensorMutableRawData(),
                  static_cast<cudaStream_t>(context.GetGPUComputeStream())),
            "EncodeAttend");
    }

    float scale_;
    int64_t heads_, headDim_, block_;
};

struct SelectTokensOperator : Description<SelectTokensOperator, SelectTokens> {
    using Description::Description;

    const char* GetName() const { return "SelectTokens"; }
    size_t GetInputTypeCount() const { return 6; }
    size_t GetOutputTypeCount() const { return 3; }
    Type GetInputType(size_t i) const { return i == 0 ? values : i == 1 ? kFloat32 : kInt32; }
    Type GetOutputType(size_t i) const { return i == 1 ? kFloat32 : kInt32; }
    // keep_count: outputs depend on it, so the host must know it
    OrtMemType GetInputMemoryType(size_t i) const { return i == 5 ? OrtMemTypeCPUInput : OrtMemTypeDefault; }
};

struct CacheIndexOperator : Description<CacheIndexOperator, CacheIndex> {
    using Description::Description;

    const char* GetName() const { return "CacheIndex"; }
    size_t GetInputTypeCount() const { return 4; }
    size_t GetOutputTypeCount() const { return 1; }
    Type GetInputType(size_t i) const { return i == 3 ? values : kInt32; }
    Type GetOutputType(size_t) const { return kInt32; }
    OrtMemType GetInputMemoryType(size_t i) const { return i == 1 ? OrtMemTypeCPUInput : OrtMemTypeDefault; }
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

struct EncodeAttendOperator : Description<EncodeAttendOperator, EncodeAttend> {
    using Description::Description;

    const char* GetName() const { return "EncodeAttend"; }
    size_t GetInputTypeCount() const { return 4; }
    size_t GetOutputTypeCount() const { return 1; }
    Type GetInputType(size_t i) const { return i == 3 ? kInt32 : values; }
    Type GetOutputType(size_t) const { return values; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return i == 3 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
};

// One operator for each type of values.
template <class Operator>
void add(Ort::CustomOpDomain& domain) {
    static const Operator all[] = {Operator(kFloat32), Operator(kFloat16), Operator(kBFloat16)};
    for (const auto& one : all) domain.Add(&one);
}

OrtCustomOpDomain* domain() {
    static const Ort::CustomOpDomain made = [] {
        Ort::CustomOpDomain d("ivc");
        add<SelectTokensOperator>(d);
        add<CacheIndexOperator>(d);
        add<CompactGatherNOperator>(d);
        add<EncodeAttendOperator>(d);
        add<FusedLinearOperator<false>>(d);
        add<FusedLinearOperator<true>>(d);
        add<FusedLinearPackedOperator<4>>(d);
        add<FusedLinearPackedOperator<8>>(d);
        add<TurnHeadsOperator>(d);
        add<AttendJoinedOperator>(d);
        add<TakeStepOperator>(d);
        add<GiveAnswerOperator>(d);
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
                                  " or later, but this is " + base->GetVersionString();
        return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, built.c_str());
    }
    Ort::InitApi(api);
    return ivc::guarded([&] { Ort::UnownedSessionOptions(options).Add(ivc::domain()); });
}
