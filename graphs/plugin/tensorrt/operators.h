// The ivc operators as TensorRT sees them, apart from any plugin interface: formats, shapes, workspace and launches.
// Those of attention are in attention.h, products in products.h.
//
// Inputs are those of the `plugin` lowering (ivc_export/lowering/tensorrt/plugin.py).
#pragma once

#include <NvInfer.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels/ivc_kernels.h"

namespace ivc {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::IDimensionExpr;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginTensorDesc;

// An attribute's name, and whether its values are float32, which are kept as their bits.
struct Attribute {
    const char* name;
    bool real = false;
};

// Attributes' values, in the order of an operator's kAttributes; a missing one is empty.
using Attributes = std::vector<std::vector<int32_t>>;

inline float real(const std::vector<int32_t>& attribute) {
    float value = 0;
    std::memcpy(&value, attribute.data(), sizeof value);
    return value;
}

inline bool isFloat(DataType type) {
#if NV_TENSORRT_MAJOR >= 10
    if (type == DataType::kBF16) return true;
#endif
    return type == DataType::kFLOAT || type == DataType::kHALF;
}

// Whether an operator may have floating-point tensors of a type. Its last attribute, float_type, is the ONNX data type that
// they have in the graph, or 0. A builder that may choose times conversions of whole caches to float32 and back, and at
// sizes where they cost little takes them.
inline bool takesFloats(DataType type, const Attributes& attributes) {
    const auto& wanted = attributes.back();
    if (!isFloat(type)) return false;
    return wanted.empty() || wanted[0] == 0 ||
           wanted[0] == (type == DataType::kFLOAT ? 1 : type == DataType::kHALF ? 10 : 16);
}

inline IvcType ivcType(DataType type) {
    return type == DataType::kFLOAT ? IVC_FLOAT32 : type == DataType::kHALF ? IVC_FLOAT16 : IVC_BFLOAT16;
}

inline int32_t bytes(DataType type) { return type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 2; }

inline int32_t extent(const PluginTensorDesc& tensor, int32_t axis) {
    return static_cast<int32_t>(tensor.dims.d[axis]);
}

inline int64_t count(const PluginTensorDesc& tensor) {
    int64_t product = 1;
    for (int32_t a = 0; a < tensor.dims.nbDims; ++a) product *= extent(tensor, a);
    return product;
}

// Whether two tensors differ in no extent but the last.
inline bool sameRows(const PluginTensorDesc& a, const PluginTensorDesc& b) {
    bool same = a.dims.nbDims == b.dims.nbDims;
    for (int32_t axis = 0; same && axis + 1 < a.dims.nbDims; ++axis) same = extent(a, axis) == extent(b, axis);
    return same;
}

inline int32_t ceilDivided(int32_t a, int32_t b) { return a / b + (a % b != 0); }

// SelectTokens(values [1, kv_heads, S, D], ivc_priority [L], visual_index [L], text_index [T], query_index [Q],
//     keep_slots [keep_count]) -> keep_index [T + keep_count], token_score [L], seed_index [seeds]
// keep_slots says keep_count by its length, its values are not read: TensorRT 8.6 computes a plugin's output shapes
// from input shapes alone.
class SelectTokens {
   public:
    static constexpr const char* kName = "SelectTokens";
    static constexpr Attribute kAttributes[] = {{"seed_divisor"}, {"softmax_all"}, {"float_type"}};

    explicit SelectTokens(const Attributes& attributes) : attributes_(attributes) {}

    static bool valid(const Attributes& a) {
        return a[0].size() == 1 && a[0][0] > 0 && a[0][0] % 2 == 0 && a[1].size() <= 1;
    }

    const Attributes& attributes() const { return attributes_; }

    int32_t outputs() const { return 3; }
    int32_t aliased(int32_t) const { return -1; }

    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        const auto& t = tensors[position];
        if (t.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position == 0) return takesFloats(t.type, attributes_);
        return t.type == (position == 1 || position == 7 ? DataType::kFLOAT : DataType::kINT32);
    }

    DataType outputType(int32_t output, const DataType*) const {
        return output == 1 ? DataType::kFLOAT : DataType::kINT32;
    }

    DimsExprs outputShape(int32_t output, const DimsExprs* inputs, IExprBuilder& builder) const {
        using Operation = nvinfer1::DimensionOperation;
        const auto combine = [&](Operation operation, const IDimensionExpr* a, const IDimensionExpr* b) {
            return builder.operation(operation, *a, *b);
        };
        const auto number = [&](int32_t value) { return builder.constant(value); };
        const IDimensionExpr *visual = inputs[2].d[0], *divisor = number(attributes_[0][0]);
        DimsExprs shape{};
        shape.nbDims = 1;
        if (output == 0) {
            shape.d[0] = combine(Operation::kSUM, inputs[3].d[0], inputs[5].d[0]);
        } else if (output == 1) {
            shape.d[0] = visual;
        } else {  // max(1, (L + divisor / 2 - 1 + odd) / divisor), odd being L / divisor's last bit
            const auto* quotient = combine(Operation::kFLOOR_DIV, visual, divisor);
            const auto* even = combine(
                Operation::kPROD, combine(Operation::kFLOOR_DIV, quotient, number(2)), number(2));
            const auto* odd = combine(Operation::kSUB, quotient, even);
            const auto* raised = combine(Operation::kSUM, visual, number(attributes_[0][0] / 2 - 1));
            const auto* rounded =
                combine(Operation::kFLOOR_DIV, combine(Operation::kSUM, raised, odd), divisor);
            shape.d[0] = combine(Operation::kMAX, rounded, number(1));
        }
        return shape;
    }

    size_t workspace(const PluginTensorDesc* inputs) const {
        const IvcSelection s = selection(inputs);
        return ivcSelectionWorkspace(&s);
    }

    cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) const {
        const IvcSelection s = selection(in);
        const auto ints = [&](int32_t i) { return static_cast<const int32_t*>(inputs[i]); };
        return ivcSelectTokens(&s, inputs[0], static_cast<const float*>(inputs[1]), ints(2), ints(3), ints(4),
            static_cast<int32_t*>(outputs[0]), static_cast<float*>(outputs[1]), static_cast<int32_t*>(outputs[2]),
            workspace, stream);
    }

   private:
    IvcSelection selection(const PluginTensorDesc* in) const {
        const bool all = !attributes_[1].empty() && attributes_[1][0] != 0;
        return {extent(in[0], 1), extent(in[0], 2), extent(in[0], 3), extent(in[2], 0), extent(in[3], 0),
            extent(in[4], 0), extent(in[5], 0), attributes_[0][0], ivcType(in[0].type),
            all ? IVC_SOFTMAX_ALL : IVC_SOFTMAX_VISUAL};
    }

    Attributes attributes_;
};

// CompactGatherN(keep_index [M], x_1 .. x_n) -> y_1 .. y_n: the rows keep_index of each x along its axis.
// Attributes: axes, one a tensor; kinds, 0 for a tensor of the graph's floating-point type, 1 for int32, 2 for float32.
class CompactGatherN {
   public:
    static constexpr const char* kName = "CompactGatherN";
    static constexpr Attribute kAttributes[] = {{"axes"}, {"kinds"}, {"float_type"}};

    explicit CompactGatherN(const Attributes& attributes) : attributes_(attributes) {}

    static bool valid(const Attributes& a) { return !a[0].empty() && a[0].size() == a[1].size(); }

    const Attributes& attributes() const { return attributes_; }

    int32_t outputs() const { return static_cast<int32_t>(attributes_[0].size()); }
    int32_t aliased(int32_t) const { return -1; }  // no output is an input's memory

    // All tensors of kind 0 are of one type: with a choice for each, a builder would try 2^n combinations.
    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        const auto& t = tensors[position];
        if (t.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position == 0) return t.type == DataType::kINT32;
        const int32_t index = (position - 1) % outputs();
        const int32_t kind = attributes_[1][index];
        if (kind != 0) return t.type == (kind == 1 ? DataType::kINT32 : DataType::kFLOAT);
        for (int32_t i = 0; i < outputs(); ++i) {
            if (!attributes_[1][i] && i + 1 < position) return t.type == tensors[i + 1].type;
        }
        return takesFloats(t.type, attributes_);
    }

    DataType outputType(int32_t output, const DataType* inputs) const { return inputs[output + 1]; }

    DimsExprs outputShape(int32_t output, const DimsExprs* inputs, IExprBuilder&) const {
        DimsExprs shape = inputs[output + 1];
        shape.d[attributes_[0][output]] = inputs[0].d[0];
        return shape;
    }

    size_t workspace(const PluginTensorDesc*) const { return 0; }

    cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs, void*,
        cudaStream_t stream) const {
        std::vector<IvcRows> tensors;
        const int32_t rows = extent(in[1], attributes_[0][0]);
        for (int32_t i = 0; i < this->outputs(); ++i) {
            const auto& t = in[i + 1];
            const int32_t axis = attributes_[0][i];
            IvcRows one{inputs[i + 1], outputs[i], 1, bytes(t.type)};
            for (int32_t a = 0; a < axis; ++a) one.outer *= extent(t, a);
            for (int32_t a = axis + 1; a < t.dims.nbDims; ++a) one.rowBytes *= extent(t, a);
            if (extent(t, axis) != rows) return cudaErrorInvalidValue;
            tensors.push_back(one);
        }
        return ivcCompactGather(tensors.data(), this->outputs(), rows, static_cast<const int32_t*>(inputs[0]),
            extent(in[0], 0), stream);
    }

   private:
    Attributes attributes_;
};

}  // namespace ivc
