// FusedLinear: a product with the norm before it and the bias, the activation and the sum behind it.
#pragma once

#include <optional>

#include "../kernels/ivc_linear.h"
#include "operator.h"

namespace ivc {

// FusedLinear(x [.., K], weight [N, K], norm? [K], bias? [N], residual? [.., N]) -> y [.., N], as ivcFusedLinear
// computes it; with 2 N rows of weight and bias where gated. Attributes: activation ("none", "swish", "gelu" or
// "gelu_tanh"), gated, slope, scale, epsilon.
class FusedLinear {
   public:
    explicit FusedLinear(const Ort::ConstKernelInfo& node)
        : activation_(activationOf(node.GetAttribute<std::string>("activation"))),
          gated_(node.GetAttribute<int64_t>("gated") != 0),
          slope_(node.GetAttribute<float>("slope")),
          scale_(node.GetAttribute<float>("scale")),
          epsilon_(node.GetAttribute<float>("epsilon")) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
        return guarded([&] { compute(context, Ort::KernelContext(context)); });
    }

   private:
    static IvcActivation activationOf(const std::string& name) {
        static const char* const kNames[] = {"none", "swish", "gelu", "gelu_tanh"};
        for (int i = 0; i < 4; ++i) {
            if (name == kNames[i]) return static_cast<IvcActivation>(i);
        }
        throw std::invalid_argument("FusedLinear: there is no activation " + name);
    }

    void compute(OrtKernelContext* raw, const Ort::KernelContext& context) const {
        const auto input = [&](size_t i) {
            return i < context.GetInputCount() ? context.GetInput(i) : Ort::ConstValue{nullptr};
        };
        const auto x = input(0), bias = input(3), residual = input(4);
        Shape shape = shapeOf(x);
        const Shape weight = shapeOf(input(1));
        require(shape.size() > 1 && weight.size() == 2 && shape.back() == weight[1],
            "FusedLinear: rows of x and of weight differ in length");
        const int64_t each = gated_ ? 2 : 1, features = shape.back(), out = weight[0] / each;
        int64_t rows = 1;
        for (size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
        shape.back() = out;
        require(weight[0] % each == 0, "FusedLinear: gates and what they gate differ in number");
        require(!input(2) || shapeOf(input(2)) == Shape{features}, "FusedLinear: norm is not one a feature");
        require(!bias || shapeOf(bias) == Shape{weight[0]}, "FusedLinear: bias is not one a row of weight");
        require(!residual || shapeOf(residual) == shape, "FusedLinear: residual is not of y's shape");

        void* const y = context.GetOutput(0, shape).GetTensorMutableRawData();
        if (rows == 0) return;
        const IvcLinear c{static_cast<int32_t>(rows), static_cast<int32_t>(features), static_cast<int32_t>(out),
            ivcType(x.GetTensorTypeAndShapeInfo().GetElementType()), activation_, gated_, slope_, scale_, epsilon_};
        void* const stream = context.GetGPUComputeStream();
        const size_t bytes = ivcLinearWorkspace(&c, input(2) != nullptr);
        std::optional<Scratch> scratch;
        if (bytes) scratch.emplace(raw, x, bytes, stream != nullptr);
        check(ivcLinear(&c, data(x), data(input(2)), data(input(1)), data(bias), data(residual), y,
                  scratch ? scratch->data() : nullptr, static_cast<cudaStream_t>(stream)),
            "FusedLinear");
    }

    static const void* data(const Ort::ConstValue& tensor) { return tensor ? tensor.GetTensorRawData() : nullptr; }

    IvcActivation activation_;
    bool gated_;
    float slope_, scale_, epsilon_;
};

struct FusedLinearOperator : Description<FusedLinearOperator, FusedLinear> {
    using Description::Description;

    const char* GetName() const { return "FusedLinear"; }
    size_t GetInputTypeCount() const { return 5; }
    size_t GetOutputTypeCount() const { return 1; }
    Type GetInputType(size_t) const { return values; }
    Type GetOutputType(size_t) const { return values; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return i < 2 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }
};

}  // namespace ivc
