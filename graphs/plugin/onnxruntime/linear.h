// FusedLinear, FusedLinearWide, FusedLinearInt4 and FusedLinearInt8: products with the norm before them and the bias, the activation and the sum behind.
#pragma once

#include <optional>

#include "../kernels/ivc_linear.h"
#include "operator.h"

namespace ivc {

// What these operators say of a product. Attributes: activation ("none", "swish", "gelu" or "gelu_tanh"), gated, slope,
// scale, epsilon.
class LinearAttributes {
   public:
    // first: number of the input norm, which bias and residual follow.
    LinearAttributes(const Ort::ConstKernelInfo& node, size_t first)
        : first_(first),
          norm_(node, first),
          bias_(node, first + 1),
          activation_(activationOf(node.GetAttribute<std::string>("activation"))),
          gated_(node.GetAttribute<int64_t>("gated") != 0),
          slope_(node.GetAttribute<float>("slope")),
          scale_(node.GetAttribute<float>("scale")),
          epsilon_(node.GetAttribute<float>("epsilon")) {}

   protected:
    // What surrounds a product: norm? [K] of an RMS norm, or
    // [2 K] of a layer norm, the weight and then the bias; bias? [N], residual? [.., N], which has y's shape.
    struct Around {
        IvcLinear product;
        const void *norm, *bias, *residual;
        void* y;
    };

    // shape: of x. columns: rows of the weight.
    Around around(const Ort::KernelContext& context, Shape shape, int64_t columns) const {
        const auto x = context.GetInput(0);
        const auto norm = input(context, first_), bias = input(context, first_ + 1);
        const auto residual = input(context, first_ + 2);
        const int64_t each = gated_ ? 2 : 1, out = columns / each;
        const int64_t features = shape.back();
        const int64_t rows = shape.rows();
        shape.back() = out;
        require(columns % each == 0, "FusedLinear: the weight of a gated product must have an even number of rows");
        const Shape weights = norm ? norm_.of(norm) : Shape{features};
        const bool layerNorm = norm && weights == Shape{2 * features};
        require(layerNorm || weights == Shape{features},
            "FusedLinear: norm must have one weight for each feature, or a weight and a bias");
        require(!bias || bias_.of(bias) == Shape{columns}, "FusedLinear: bias must have one value for each row of weight");
        if (residual) {
            shape = shapeOf(residual);
            require(shape.size() > 1 && shape.back() == out && shape.rows() == rows,
                "FusedLinear: residual must have the shape of y, or its rows along other axes");
        }
        return {{static_cast<int32_t>(rows), static_cast<int32_t>(features), static_cast<int32_t>(out),
                    ivcType(x.GetTensorTypeAndShapeInfo().GetElementType()), activation_, gated_, slope_, scale_,
                    epsilon_, layerNorm, 0},
            data(norm), data(bias), data(residual), outputOf(context, 0, shape).GetTensorMutableRawData()};
    }

    static Ort::ConstValue input(const Ort::KernelContext& context, size_t i) {
        return i < context.GetInputCount() ? context.GetInput(i) : Ort::ConstValue{nullptr};
    }

    static const void* data(const Ort::ConstValue& tensor) { return tensor ? tensor.GetTensorRawData() : nullptr; }

    // Calls `launch` with scratch memory and the stream, if there are rows.
    template <class Launch>
    static void run(OrtKernelContext* raw, const Ort::KernelContext& context, const Around& a, size_t bytes,
        Launch launch) {
        if (a.product.rows == 0) return;
        void* const stream = context.GetGPUComputeStream();
        std::optional<Scratch> scratch;
        if (bytes) scratch.emplace(raw, context.GetInput(0), bytes, stream != nullptr);
        check(launch(scratch ? scratch->data() : nullptr, static_cast<cudaStream_t>(stream)), "FusedLinear");
    }

   private:
    static IvcActivation activationOf(const std::string& name) {
        static const char* const kNames[] = {"none", "swish", "gelu", "gelu_tanh"};
        for (int i = 0; i < 4; ++i) {
            if (name == kNames[i]) return static_cast<IvcActivation>(i);
        }
        throw std::invalid_argument("FusedLinear: there is no activation " + name);
    }

    size_t first_;
    InputShape norm_, bias_;
    IvcActivation activation_;
    bool gated_;
    float slope_, scale_, epsilon_;
};

// FusedLinear(x [.., K], weight [N, K], norm?, bias?, residual?) -> y [.., N], as ivcLinear computes it; 2 N rows of
// weight and bias where gated. y has the shape of residual if there is one: other axes than x for the same rows. y of
// FusedLinearWide is float32.
template <bool kWide>
class FusedLinear : LinearAttributes {
   public:
    explicit FusedLinear(const Ort::ConstKernelInfo& node) : LinearAttributes(node, 2), weight_(node, 1) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* raw) const {
        return guarded([&] {
            const Ort::KernelContext context(raw);
            const Shape x = shapeOf(context.GetInput(0)), weight = weight_.of(context.GetInput(1));
            require(x.size() > 1 && weight.size() == 2 && x.back() == weight[1],
                "FusedLinear: rows of x and of weight must have the same length");
            Around a = around(context, x, weight[0]);
            a.product.wide = kWide;
            run(raw, context, a, ivcLinearWorkspace(&a.product, a.norm != nullptr),
                [&](void* workspace, cudaStream_t stream) {
                    return ivcLinear(&a.product, data(context.GetInput(0)), a.norm, data(context.GetInput(1)), a.bias,
                        a.residual, a.y, workspace, stream);
                });
        });
    }

   private:
    InputShape weight_;
};

// FusedLinearInt4(x [.., K], packed uint8 [N, blocks, block_size / 2], scales [N, blocks], zero_points? uint8
// [N, ceil(blocks / 2)], norm?, bias?, residual?) -> y [.., N] in the same way, as ivcLinearPacked computes it. Attribute
// beside the others: block_size. FusedLinearInt8 has a byte for each value and for each zero point.
template <int kBits>
class FusedLinearPacked : LinearAttributes {
   public:
    explicit FusedLinearPacked(const Ort::ConstKernelInfo& node)
        : LinearAttributes(node, 4),
          packed_(node, 1),
          scales_(node, 2),
          points_(node, 3),
          block_(node.GetAttribute<int64_t>("block_size")) {}

    OrtStatusPtr ComputeV2(OrtKernelContext* raw) const {
        return guarded([&] {
            const Ort::KernelContext context(raw);
            const Shape x = shapeOf(context.GetInput(0)), packed = packed_.of(context.GetInput(1));
            require(block_ > 0 && x.size() > 1 && packed.size() == 3 && packed[2] == block_ * kBits / 8 &&
                        packed[1] == (x.back() + block_ - 1) / block_,
                "FusedLinear: packed must have the shape [N, ceil(K / block_size), block_size bits / 8]");
            const auto points = input(context, 3);
            require(scales_.of(context.GetInput(2)).elements() == packed[0] * packed[1],
                "FusedLinear: scales must have one value for each block");
            require(!points || points_.of(points).elements() == packed[0] * ((packed[1] * kBits + 7) / 8),
                "FusedLinear: zero_points must have the bits of an entry for each block of a row");
            const Around a = around(context, x, packed[0]);
            const IvcPacked weight{data(context.GetInput(1)), data(context.GetInput(2)), data(points),
                static_cast<int32_t>(block_), kBits};
            run(raw, context, a, ivcLinearPackedWorkspace(&a.product, a.norm != nullptr),
                [&](void* workspace, cudaStream_t stream) {
                    return ivcLinearPacked(&a.product, &weight, data(context.GetInput(0)), a.norm, a.bias, a.residual,
                        a.y, workspace, stream);
                });
        });
    }

   private:
    InputShape packed_, scales_, points_;
    int64_t block_;
};

template <bool kWide>
struct FusedLinearOperator : Description<FusedLinearOperator<kWide>, FusedLinear<kWide>> {
    using Base = Description<FusedLinearOperator<kWide>, FusedLinear<kWide>>;
    using Base::Base;
    using Base::values;

    const char* GetName() const { return kWide ? "FusedLinearWide" : "FusedLinear"; }
    size_t GetInputTypeCount() const { return 5; }
    size_t GetOutputTypeCount() const { return 1; }
    Type GetInputType(size_t) const { return values; }
    Type GetOutputType(size_t) const { return kWide ? kFloat32 : values; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return i < 2 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }
};

template <int kBits>
struct FusedLinearPackedOperator : Description<FusedLinearPackedOperator<kBits>, FusedLinearPacked<kBits>> {
    using Base = Description<FusedLinearPackedOperator<kBits>, FusedLinearPacked<kBits>>;
    using Base::Base;
    using Base::values;

    const char* GetName() const { return kBits == 4 ? "FusedLinearInt4" : "FusedLinearInt8"; }
    size_t GetInputTypeCount() const { return 7; }
    size_t GetOutputTypeCount() const { return 1; }
    Type GetInputType(size_t i) const { return i == 1 || i == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : values; }
    Type GetOutputType(size_t) const { return values; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return i < 3 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }
};

}  // namespace ivc
