// The first and the last operator of a decode step. They use host memory that the caller keeps; see ivcTakeStep.
#pragma once

#include "joined.h"

namespace ivc {

// TakeStep(step int32 [1 + axes + 1 or 2], frequencies float32 [axes, 1, pairs], table? [vocab, hidden], row? [1, 1,
//     hidden], before? int32 [2]) -> embeds [1, 1, hidden], times the attribute `scale`; cos, sin float32 [1, pairs],
//     length int32 [1], whole_length? int32 [1]: see ivcTakeStep. Either table or row is given. step, row and before are
//     in host memory, which is pinned if the device is a GPU.
class TakeStep {
   public:
    explicit TakeStep(const Ort::ConstKernelInfo& node) : scale_(node.GetAttribute<float>("scale")) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
        return guarded([&] { compute(Ort::KernelContext(context)); });
    }

   private:
    void compute(const Ort::KernelContext& context) const {
        const Shape frequencies = shapeOf(context.GetInput(1));
        const void *table = given(context, 2), *row = given(context, 3);
        require(frequencies.size() == 3 && frequencies[1] == 1, "TakeStep: frequencies must have the shape [axes, 1, pairs]");
        require((table == nullptr) != (row == nullptr), "TakeStep: either a table or a row must be given");
        const void* before = given(context, 4);
        require(before == nullptr || lengthOf(context.GetInput(4)) == 2, "TakeStep: before must have two elements");
        const auto rows = context.GetInput(table ? 2 : 3);
        const Shape shape = shapeOf(rows);
        IvcStep c{};
        c.axes = static_cast<int32_t>(frequencies[0]);
        c.pairs = static_cast<int32_t>(frequencies[2]);
        c.hidden = static_cast<int32_t>(shape.back());
        c.vocab = static_cast<int32_t>(shape[0]);
        c.type = ivcType(rows.GetTensorTypeAndShapeInfo().GetElementType());
        c.scale = scale_;
        const int32_t lengths = lengthOf(context.GetInput(0)) - 1 - c.axes;
        require(lengths == 1 || lengths == 2, "TakeStep: step must hold a token, its positions, and one or two lengths");
        auto embeds = outputOf(context, 0, Shape{1, 1, c.hidden});
        auto cos = outputOf(context, 1, Shape{1, c.pairs}), sin = outputOf(context, 2, Shape{1, c.pairs});
        auto length = outputOf(context, 3, Shape{1});
        int32_t* whole = lengths == 2 ? outputOf(context, 4, Shape{1}).GetTensorMutableData<int32_t>() : nullptr;
        check(ivcTakeStep(&c, context.GetInput(0).GetTensorData<int32_t>(), table, row,
                  static_cast<const int32_t*>(before), context.GetInput(1).GetTensorData<float>(),
                  embeds.GetTensorMutableRawData(), cos.GetTensorMutableData<float>(),
                  sin.GetTensorMutableData<float>(),
                  length.GetTensorMutableData<int32_t>(), whole,
                  static_cast<cudaStream_t>(context.GetGPUComputeStream())),
            "TakeStep");
    }

    float scale_;
};

// GiveAnswer(x [1, vocab], wanted int32 [1], best int32 [2], told float32 [vocab]) -> logits float32 [1, 1, vocab]: see
// ivcGiveAnswer. All but x and logits are in host memory, as for TakeStep. best and told are inputs, although they are
// written: an output of a custom operator cannot be in host memory.
class GiveAnswer {
   public:
    explicit GiveAnswer(const Ort::ConstKernelInfo& node) : scratch_(node, IVC_ANSWER_SCRATCH) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
        return guarded([&] { compute(Ort::KernelContext(context)); });
    }

   private:
    void compute(const Ort::KernelContext& context) const {
        const auto x = context.GetInput(0);
        const Shape shape = shapeOf(x);
        require(shape.size() == 2 && shape[0] == 1, "GiveAnswer: logits must have the shape [1, vocab]");
        require(lengthOf(context.GetInput(1)) == 1 && lengthOf(context.GetInput(2)) == 2 &&
                    lengthOf(context.GetInput(3)) == shape[1],
            "GiveAnswer: wanted must have one element, best two, and told as many as logits");
        IvcStep c{};
        c.vocab = static_cast<int32_t>(shape[1]);
        c.type = ivcType(x.GetTensorTypeAndShapeInfo().GetElementType());
        const auto host = [&](size_t i) { return const_cast<void*>(context.GetInput(i).GetTensorRawData()); };
        auto logits = outputOf(context, 0, Shape{1, 1, shape[1]});
        check(ivcGiveAnswer(&c, x.GetTensorRawData(), static_cast<const int32_t*>(host(1)),
                  logits.GetTensorMutableData<float>(), static_cast<int32_t*>(host(2)), static_cast<float*>(host(3)),
                  scratch_.data(), static_cast<cudaStream_t>(context.GetGPUComputeStream())),
            "GiveAnswer");
    }

    Counters scratch_;
};

struct TakeStepOperator : Description<TakeStepOperator, TakeStep> {
    using Description::Description;

    const char* GetName() const { return "TakeStep"; }
    size_t GetInputTypeCount() const { return 5; }
    size_t GetOutputTypeCount() const { return 5; }
    Type GetInputType(size_t i) const { return i % 4 == 0 ? kInt32 : i == 1 ? kFloat32 : values; }
    Type GetOutputType(size_t i) const { return i == 0 ? values : i < 3 ? kFloat32 : kInt32; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return i > 1 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t i) const {
        return i > 3 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
    OrtMemType GetInputMemoryType(size_t i) const {
        return i == 1 || i == 2 ? OrtMemTypeDefault : OrtMemTypeCPUInput;
    }
};

struct GiveAnswerOperator : Description<GiveAnswerOperator, GiveAnswer> {
    using Description::Description;

    const char* GetName() const { return "GiveAnswer"; }
    size_t GetInputTypeCount() const { return 4; }
    size_t GetOutputTypeCount() const { return 1; }
    Type GetInputType(size_t i) const { return i == 0 ? values : i == 3 ? kFloat32 : kInt32; }
    Type GetOutputType(size_t) const { return kFloat32; }
    OrtMemType GetInputMemoryType(size_t i) const { return i > 0 ? OrtMemTypeCPUInput : OrtMemTypeDefault; }
};

}  // namespace ivc
