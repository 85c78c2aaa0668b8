// The ivc operators of products, as TensorRT sees them.
//
// Inputs are those of the `plugin` lowering (ivc_export/lowering/tensorrt/linears.py). Packed bytes come as int32, four
// at a time: TensorRT 8.6 has no constants of bytes.
#pragma once

#include "../kernels/ivc_linear.h"
#include "operators.h"

namespace ivc {

// What both have: {activation, gated, normed, biased, summed, slope, scale, epsilon}, `activation` being one of
// IvcActivation, and behind the weights the inputs norm, bias [N] and residual [.., N], those left out whose `normed`,
// `biased` or `summed` is 0. `norm` is [K] of an RMS norm, or [2 K] of a layer norm, the weight and then the bias.
class Surroundings {
   public:
    static constexpr size_t kCount = 8;

    explicit Surroundings(const Attributes& attributes) : a_(attributes) {}

    static bool valid(const Attributes& a) {
        for (size_t i = 0; i + 1 < a.size(); ++i) {
            if (a[i].size() != 1) return false;
        }
        return a[0][0] >= IVC_NO_ACTIVATION && a[0][0] <= IVC_GELU_TANH;
    }

    bool normed() const { return flag(kNormed); }

    DimsExprs outputShape(const DimsExprs* inputs, IExprBuilder& builder) const {
        DimsExprs shape = inputs[0];
        const auto*& columns = shape.d[shape.nbDims - 1];
        columns = inputs[1].d[0];
        if (flag(kGated)) {
            columns = builder.operation(
                nvinfer1::DimensionOperation::kFLOOR_DIV, *inputs[1].d[0], *builder.constant(2));
        }
        return shape;
    }

    // first: the number of the first input behind the weights.
    IvcLinear linear(const PluginTensorDesc* in, int32_t first) const {
        const int32_t last = in[0].dims.nbDims - 1;
        const bool layerNorm = flag(kNormed) && count(in[first]) == 2 * static_cast<int64_t>(extent(in[0], last));
        IvcLinear c{1, extent(in[0], last), extent(in[1], 0) / (flag(kGated) ? 2 : 1), ivcType(in[0].type),
            static_cast<IvcActivation>(a_[0][0]), flag(kGated), real(a_[5]), real(a_[6]), real(a_[7]), layerNorm, 0};
        for (int32_t a = 0; a < last; ++a) c.rows *= extent(in[0], a);
        return c;
    }

    // Whether what surrounds the product is of its extents, and an N of gates is even. first: as in `linear`.
    bool fits(const PluginTensorDesc* in, int32_t first) const {
        const IvcLinear c = linear(in, first);
        const int32_t columns = extent(in[1], 0);
        bool fit = columns == c.out * (flag(kGated) ? 2 : 1);
        if (flag(kNormed)) fit = fit && count(in[first++]) == (c.layerNorm ? 2 : 1) * static_cast<int64_t>(c.features);
        if (flag(kNormed + 1)) fit = fit && count(in[first++]) == columns;
        if (!flag(kNormed + 2)) return fit;
        const PluginTensorDesc& residual = in[first];
        return fit && sameRows(residual, in[0]) && extent(residual, residual.dims.nbDims - 1) == c.out;
    }

    struct Operands {
        const void *norm = nullptr, *bias = nullptr, *residual = nullptr;
    };

    // The number of all inputs. first: as in `linear`.
    int32_t operandCount(int32_t first) const {
        return first + flag(kNormed) + flag(kNormed + 1) + flag(kNormed + 2);
    }

    // first: as in `linear`.
    Operands operands(const void* const* inputs, int32_t first) const {
        Operands found;
        if (flag(kNormed)) found.norm = inputs[first++];
        if (flag(kNormed + 1)) found.bias = inputs[first++];
        if (flag(kNormed + 2)) found.residual = inputs[first];
        return found;
    }

   private:
    static constexpr int32_t kGated = 1, kNormed = 2;

    bool flag(int32_t attribute) const { return a_[attribute][0] != 0; }

    const Attributes& a_;
};

// A product and its surroundings, whatever its weights are.
class Product {
   public:
    explicit Product(const Attributes& attributes) : attributes_(attributes) {}

    const Attributes& attributes() const { return attributes_; }

    int32_t outputs() const { return 1; }
    int32_t aliased(int32_t) const { return -1; }

    DataType outputType(int32_t, const DataType* inputs) const { return inputs[0]; }

    DimsExprs outputShape(int32_t, const DimsExprs* inputs, IExprBuilder& builder) const {
        return around().outputShape(inputs, builder);
    }

   protected:
    Surroundings around() const { return Surroundings(attributes_); }
    int32_t attribute(size_t i) const { return attributes_[i][0]; }

   private:
    Attributes attributes_;
};

// FusedLinear(x [.., K], weight [N, K], the inputs above) -> y [.., N]; with 2 N rows of weight and bias where gated. y of
// FusedLinearWide is float32.
template <bool kWide>
class FusedLinearOf : public Product {
   public:
    static constexpr const char* kName = kWide ? "FusedLinearWide" : "FusedLinear";
    static constexpr Attribute kAttributes[] = {{"activation"}, {"gated"}, {"normed"}, {"biased"}, {"summed"},
        {"slope", true}, {"scale", true}, {"epsilon", true}, {"float_type"}};

    using Product::Product;

    static bool valid(const Attributes& a) { return Surroundings::valid(a); }

    DataType outputType(int32_t, const DataType* inputs) const { return kWide ? DataType::kFLOAT : inputs[0]; }

    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        const auto& t = tensors[position];
        if (t.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position == 0) return takesFloats(t.type, attributes());
        return t.type == (kWide && position == around().operandCount(2) ? DataType::kFLOAT : tensors[0].type);
    }

    size_t workspace(const PluginTensorDesc* in) const {
        const IvcLinear c = product(in);
        return ivcLinearWorkspace(&c, around().normed());
    }

    cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) const {
        const IvcLinear c = product(in);
        const bool weight = in[1].dims.nbDims == 2 && extent(in[1], 1) == c.features;
        if (!weight || !around().fits(in, 2)) return cudaErrorInvalidValue;
        const auto given = around().operands(inputs, 2);
        return ivcLinear(&c, inputs[0], given.norm, inputs[1], given.bias, given.residual, outputs[0], workspace, stream);
    }

   private:
    IvcLinear product(const PluginTensorDesc* in) const {
        IvcLinear c = around().linear(in, 2);
        c.wide = kWide;
        return c;
    }
};

using FusedLinear = FusedLinearOf<false>;
using FusedLinearWide = FusedLinearOf<true>;

// FusedLinearInt4(x [.., K], packed int32 [N, blocks, block_size / 8], scales [N, blocks], zero_points int32
// [ceil(N ceil(blocks / 2) / 4)], the inputs above) -> y [.., N], the zero points left out where `zero_points` is 0
class FusedLinearInt4 : public Product {
   public:
    static constexpr const char* kName = "FusedLinearInt4";
    static constexpr Attribute kAttributes[] = {{"activation"}, {"gated"}, {"normed"}, {"biased"}, {"summed"},
        {"slope", true}, {"scale", true}, {"epsilon", true}, {"block_size"}, {"zero_points"},
        {"float_type"}};

    using Product::Product;

    static bool valid(const Attributes& a) { return Surroundings::valid(a) && a[Surroundings::kCount][0] > 0; }

    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        const auto& t = tensors[position];
        if (t.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position == 0) return takesFloats(t.type, attributes()) && t.type != DataType::kFLOAT;
        if (position == 1 || (position == kPoints && points())) return t.type == DataType::kINT32;
        return t.type == tensors[0].type;
    }

    size_t workspace(const PluginTensorDesc* in) const {
        const IvcLinear c = around().linear(in, behind());
        return ivcLinearPackedWorkspace(&c, around().normed());
    }

    cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) const {
        const IvcLinear c = around().linear(in, behind());
        if (!weightFits(in, c) || !around().fits(in, behind())) return cudaErrorInvalidValue;
        const IvcPacked weight{
            inputs[1], inputs[2], points() ? inputs[kPoints] : nullptr, attribute(Surroundings::kCount), 4};
        const auto given = around().operands(inputs, behind());
        return ivcLinearPacked(
            &c, &weight, inputs[0], given.norm, given.bias, given.residual, outputs[0], workspace, stream);
    }

   private:
    static constexpr int32_t kPoints = 3;

    bool points() const { return attribute(Surroundings::kCount + 1) != 0; }
    int32_t behind() const { return points() ? kPoints + 1 : kPoints; }

    bool weightFits(const PluginTensorDesc* in, const IvcLinear& c) const {
        const int32_t block = attribute(Surroundings::kCount), blocks = ceilDivided(c.features, block);
        const int64_t rows = extent(in[1], 0);
        return in[1].dims.nbDims == 3 && extent(in[1], 1) == blocks && extent(in[1], 2) == block / 8 &&
               count(in[2]) == rows * blocks &&
               (!points() || count(in[kPoints]) == (rows * ceilDivided(blocks, 2) + 3) / 4);
    }
};

}  // namespace ivc
