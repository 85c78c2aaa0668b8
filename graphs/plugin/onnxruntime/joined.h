// Operators on joined rows, in which one product has put the heads of query, key and value side by side.
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "operator.h"

namespace ivc {

constexpr Type kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

// Optional input `i` of a call, or null.
const void* given(const Ort::KernelContext& context, size_t i) {
    if (i >= context.GetInputCount()) return nullptr;
    const auto value = context.GetInput(i);
    return value ? value.GetTensorRawData() : nullptr;
}

// Joined rows of a call. Attributes: heads, kv_heads, head_dim, grouped (whether heads are ordered by key-value head)
// and epsilon (of norms). Optional inputs, from a given number on: cos, sin [angle rows, D / 2], query_norm, key_norm
// [D].
class JoinedHeads {
   public:
    explicit JoinedHeads(const Ort::ConstKernelInfo& node)
        : heads_(node.GetAttribute<int64_t>("heads")),
          kvHeads_(node.GetAttribute<int64_t>("kv_heads")),
          headDim_(node.GetAttribute<int64_t>("head_dim")),
          grouped_(node.GetAttribute<int64_t>("grouped")),
          epsilon_(node.GetAttribute<float>("epsilon")) {
        require(heads_ > 0 && kvHeads_ > 0 && headDim_ > 0, "ivc: heads, kv_heads and head_dim must be above 0");
    }

    int64_t kvHeads() const { return kvHeads_; }
    int64_t headDim() const { return headDim_; }
    int64_t width() const { return heads_ * headDim_; }
    int64_t kvWidth() const { return kvHeads_ * headDim_; }

    std::pair<IvcJoined, IvcJoinedRows> of(const Ort::KernelContext& context, size_t firstOptional) const {
        const auto rows = context.GetInput(0);
        const Shape shape = shapeOf(rows);
        require(shape.size() == 2 && shape[1] == width() + 2 * kvWidth(),
            "ivc: joined rows must have the shape [rows, (heads + 2 kv_heads) head_dim]");
        const auto at = [&](size_t i) { return given(context, firstOptional + i); };
        const IvcJoinedRows r{rows.GetTensorRawData(), static_cast<const float*>(at(0)),
            static_cast<const float*>(at(1)), at(2), at(3)};
        IvcJoined c{};
        c.rows = static_cast<int32_t>(shape[0]);
        if (r.cos && r.sin) {
            const Shape angles = shapeOf(context.GetInput(firstOptional));
            require(angles.size() == 2 && angles[0] > 0 && shape[0] % angles[0] == 0 && angles[1] == headDim_ / 2 &&
                        angles == shapeOf(context.GetInput(firstOptional + 1)),
                "ivc: cosines and sines must have the shape [rows of a frame, head_dim / 2]");
            c.angleRows = static_cast<int32_t>(angles[0]);
        }
        for (size_t i : {2, 3}) {
            require(!at(i) || lengthOf(context.GetInput(firstOptional + i)) == headDim_,
                "ivc: a norm must have one weight for each element of a head");
        }
        c.heads = static_cast<int32_t>(heads_);
        c.kvHeads = static_cast<int32_t>(kvHeads_);
        c.headDim = static_cast<int32_t>(headDim_);
        c.order = grouped_ ? IVC_HEADS_GROUPED : IVC_HEADS_APART;
        c.type = ivcType(rows.GetTensorTypeAndShapeInfo().GetElementType());
        c.epsilon = epsilon_;
        return {c, r};
    }

   private:
    int64_t heads_, kvHeads_, headDim_, grouped_;
    float epsilon_;
};

// TurnHeads(rows [frames rows, width], frames int64 [1], cos?, sin?, query_norm?, key_norm?)
//     -> q [frames, rows, heads D], k, v [frames, rows, kv_heads D]. Attributes: as JoinedHeads.
class TurnHeads {
   public:
    explicit TurnHeads(const Ort::ConstKernelInfo& node) : joined_(node) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
        return guarded([&] { compute(Ort::KernelContext(context)); });
    }

   private:
    void compute(const Ort::KernelContext& context) const {
        const auto [c, rows] = joined_.of(context, 2);
        require(lengthOf(context.GetInput(1)) == 1, "TurnHeads: frames must have one element");
        const int64_t frames = *context.GetInput(1).GetTensorData<int64_t>();
        require(frames > 0 && c.rows % frames == 0, "TurnHeads: all frames must have the same number of rows");
        void* outputs[3];
        for (size_t i = 0; i < 3; ++i) {
            const int64_t width = i == 0 ? joined_.width() : joined_.kvWidth();
            outputs[i] = outputOf(context, i, Shape{frames, c.rows / frames, width}).GetTensorMutableRawData();
        }
        check(ivcTurnHeads(&c, &rows, outputs[0], outputs[1], outputs[2],
                  static_cast<cudaStream_t>(context.GetGPUComputeStream())),
            "TurnHeads");
    }

    JoinedHeads joined_;
};

// Device memory of one node. It holds zeros at first.
class Counters {
   public:
    Counters(const Ort::ConstKernelInfo& node, int64_t count) {
        const OrtKernelInfo* const info = node;
        OrtAllocator* allocator = nullptr;
        Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator));
        allocator_.reset(allocator);
        const size_t bytes = sizeof(int32_t) * static_cast<size_t>(count);
        data_ = {static_cast<int32_t*>(allocator->Alloc(allocator, bytes)), Free{allocator}};
        check(cudaMemset(data_.get(), 0, bytes), "ivc");
        check(cudaStreamSynchronize(nullptr), "ivc");  // runs are on other streams
    }

    int32_t* data() const { return data_.get(); }

   private:
    struct Release {
        void operator()(OrtAllocator* allocator) const { Ort::GetApi().ReleaseAllocator(allocator); }
    };
    struct Free {
        OrtAllocator* allocator;
        void operator()(int32_t* memory) const { allocator->Free(allocator, memory); }
    };

    std::unique_ptr<OrtAllocator, Release> allocator_;
    std::unique_ptr<int32_t, Free> data_{nullptr, Free{}};
};

// The cache of output `output`: the memory of input `input` if the caller has bound both to it, else a copy.
void* presentOf(const Ort::KernelContext& context, size_t input, size_t output, const Shape& shape, size_t bytes,
    void* stream) {
    const void* const past = context.GetInput(input).GetTensorRawData();
    void* const present = outputOf(context, output, shape).GetTensorMutableRawData();
    if (present != past) {
        check(
            cudaMemcpyAsync(present, past, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)), "ivc");
    }
    return present;
}

// AttendJoined(rows [S, width], past_key, past_value [1, kv_heads, P, D], past_length int32 [1], cos?, sin?,
//     query_norm?, key_norm?) -> y [S, heads D], present_key, present_value as AttendInPlace gives them.
// Attributes: scale, and those of JoinedHeads. Runs of one session take turns, since only one run can use a node's
// counters.
class AttendJoined {
   public:
    explicit AttendJoined(const Ort::ConstKernelInfo& node)
        : joined_(node), scale_(node.GetAttribute<float>("scale")), counters_(node, joined_.kvHeads()) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
        return guarded([&] { compute(context, Ort::KernelContext(context)); });
    }

   private:
    static constexpr size_t kPast = 1, kPastLength = 3;

    void compute(OrtKernelContext* raw, const Ort::KernelContext& context) const {
        auto [c, rows] = joined_.of(context, kPastLength + 1);
        const Shape cache = shapeOf(context.GetInput(kPast));
        require(cache.size() == 4 && cache[0] == 1 && cache[1] == c.kvHeads && cache[3] == c.headDim &&
                    cache == shapeOf(context.GetInput(kPast + 1)),
            "AttendJoined: both caches must have the shape [1, kv_heads, P, head_dim]");
        require(lengthOf(context.GetInput(kPastLength)) == 1, "AttendJoined: past_length must have one element");
        require(c.rows <= cache[2], "AttendJoined: the caches have no room for this run's rows");
        c.capacity = static_cast<int32_t>(cache[2]);
        c.scale = scale_;
        auto y = outputOf(context, 0, Shape{c.rows, joined_.width()});
        void* const stream = context.GetGPUComputeStream();
        void* present[2];
        const auto bytes = static_cast<size_t>(joined_.kvWidth() * cache[2] * (c.type == IVC_FLOAT32 ? 4 : 2));
        for (size_t i = 0; i < 2; ++i) {
            present[i] = presentOf(context, kPast + i, 1 + i, cache, bytes, stream);
        }
        const size_t scratchBytes = ivcAttendJoinedWorkspace(&c);
        std::optional<Scratch> scratch;
        if (scratchBytes) scratch.emplace(raw, context.GetInput(0), scratchBytes, stream != nullptr);
        check(ivcAttendJoined(&c, &rows, present[0], present[1],
                  context.GetInput(kPastLength).GetTensorData<int32_t>(), y.GetTensorMutableRawData(),
                  scratch ? scratch->data() : nullptr, counters_.data(), static_cast<cudaStream_t>(stream)),
            "AttendJoined");
    }

    JoinedHeads joined_;
    float scale_;
    Counters counters_;
};

struct TurnHeadsOperator : Description<TurnHeadsOperator, TurnHeads> {
    using Description::Description;

    const char* GetName() const { return "TurnHeads"; }
    size_t GetInputTypeCount() const { return 6; }
    size_t GetOutputTypeCount() const { return 3; }
    Type GetInputType(size_t i) const { return i == 1 ? kInt64 : i == 2 || i == 3 ? kFloat32 : values; }
    Type GetOutputType(size_t) const { return values; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return i > 1 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
    // frames: outputs depend on it, so the host must know it
    OrtMemType GetInputMemoryType(size_t i) const { return i == 1 ? OrtMemTypeCPUInput : OrtMemTypeDefault; }
};

struct AttendJoinedOperator : Description<AttendJoinedOperator, AttendJoined> {
    using Description::Description;

    const char* GetName() const { return "AttendJoined"; }
    size_t GetInputTypeCount() const { return 8; }
    size_t GetOutputTypeCount() const { return 3; }
    Type GetInputType(size_t i) const { return i == 3 ? kInt32 : i == 4 || i == 5 ? kFloat32 : values; }
    Type GetOutputType(size_t) const { return values; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return i > 3 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
};

}  // namespace ivc
