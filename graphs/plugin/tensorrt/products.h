// The ivc operator of products over weights in 4 bits, as TensorRT sees it.
//
// Inputs are those of the `plugin` lowering (ivc_export/lowering/tensorrt/int4_products.py). Packed bytes come as int32,
// four at a time: TensorRT 8.6 has no constants of bytes.
#pragma once

#include "../kernels/ivc_linear.h"
#include "operators.h"

namespace ivc {

// MatMulInt4(x [rows, K], packed int32 [N, blocks, block_size / 8], scales [N, blocks]) -> y [rows, N], or with
// `zero_points` MatMulInt4(x, packed, scales, zero_points int32 [ceil(N ceil(blocks / 2) / 4)]).
class MatMulInt4 {
   public:
    static constexpr const char* kName = "MatMulInt4";
    static constexpr Attribute kAttributes[] = {{"block_size"}, {"zero_points"}};

    explicit MatMulInt4(const Attributes& attributes) : attributes_(attributes) {}

    static bool valid(const Attributes& a) { return a[0].size() == 1 && a[1].size() == 1 && a[0][0] > 0; }

    const Attributes& attributes() const { return attributes_; }

    int32_t outputs() const { return 1; }
    int32_t aliased(int32_t) const { return -1; }

    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        const auto& t = tensors[position];
        if (t.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position == 0) return isFloat(t.type) && t.type != DataType::kFLOAT;
        if (position == 1 || (position == kPoints && points())) return t.type == DataType::kINT32;
        return t.type == tensors[0].type;
    }

    DataType outputType(int32_t, const DataType* inputs) const { return inputs[0]; }

    DimsExprs outputShape(int32_t, const DimsExprs* inputs, IExprBuilder&) const {
        DimsExprs shape = inputs[0];
        shape.d[shape.nbDims - 1] = inputs[1].d[0];
        return shape;
    }

    size_t workspace(const PluginTensorDesc* in) const {
        const IvcLinear product = productOf(in);
        return ivcLinearInt4Workspace(&product, 0);
    }

    cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) const {
        const IvcLinear product = productOf(in);
        const IvcPacked weight{inputs[1], inputs[2], points() ? inputs[kPoints] : nullptr, attributes_[0][0]};
        return ivcLinearInt4(
            &product, &weight, inputs[0], nullptr, nullptr, nullptr, outputs[0], workspace, stream);
    }

   private:
    static constexpr int32_t kPoints = 3;

    static IvcLinear productOf(const PluginTensorDesc* in) {
        const int32_t last = in[0].dims.nbDims - 1;
        IvcLinear product{1, extent(in[0], last), extent(in[1], 0), ivcType(in[0].type), IVC_NO_ACTIVATION, 0, 1, 1, 0};
        for (int32_t a = 0; a < last; ++a) product.rows *= extent(in[0], a);
        return product;
    }

    bool points() const { return attributes_[1][0] != 0; }

    Attributes attributes_;
};

}  // namespace ivc
