// The ivc operators of attention, and of caches that are written in place, as TensorRT sees them.
//
// Inputs are those of the `plugin` lowering (ivc_export/lowering/tensorrt/attention.py). A cache that is given back lies
// in the memory of the one that is taken: from TensorRT 10.3 on that is declared; before, addresses are compared, and
// the past is copied where they differ, as they do while a builder tunes.
#pragma once

#include <algorithm>

#include "operators.h"

namespace ivc {

// Copies a cache where its output is other memory than its input.
inline cudaError_t bringPast(const PluginTensorDesc& cache, const void* past, void* present, cudaStream_t stream) {
    if (past == present) return cudaSuccess;
    size_t size = bytes(cache.type);
    for (int32_t a = 0; a < cache.dims.nbDims; ++a) size *= static_cast<size_t>(extent(cache, a));
    return size ? cudaMemcpyAsync(present, past, size, cudaMemcpyDeviceToDevice, stream) : cudaSuccess;
}

// The most scratch memory that a call of up to `rows` rows needs: fewer rows are split over more blocks. of(rows): of
// so many.
template <class Of>
size_t mostWorkspace(int32_t rows, Of of) {
    size_t most = 0;
    for (int32_t count = 1; count <= rows; ++count) most = std::max(most, of(count));
    return most;
}

// Strides of heads [frames, heads, rows, D], or of rows [frames rows, heads D or more] from which they were not split.
inline IvcStrides strides(const PluginTensorDesc& tensor, int64_t heads, int64_t rows, int64_t headDim) {
    if (tensor.dims.nbDims != 2) return {heads * rows * headDim, rows * headDim, headDim};
    const int64_t width = extent(tensor, 1);
    return {rows * width, headDim, width};
}

// AttendInPlace(q [1, heads, S, D], k [1, kv_heads, S, D], v [1, kv_heads, S, D] or [S, kv_heads D],
//     past_key [1, kv_heads, P, D], past_value [1, kv_heads, P, D], past_length [1])
//     -> y [S, heads D], and with `append` present_key and present_value, as the past
class AttendInPlace {
   public:
    static constexpr const char* kName = "AttendInPlace";
    static constexpr Attribute kAttributes[] = {{"scale", true}, {"append"}, {"float_type"}};

    explicit AttendInPlace(const Attributes& attributes) : attributes_(attributes) {}

    static bool valid(const Attributes& a) { return a[0].size() == 1 && a[1].size() == 1; }

    const Attributes& attributes() const { return attributes_; }

    int32_t outputs() const { return append() ? 3 : 1; }
    int32_t aliased(int32_t output) const { return output ? kPast + output - 1 : -1; }

    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        const auto& t = tensors[position];
        if (t.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position == kPastLength) return t.type == DataType::kINT32;
        return position ? t.type == tensors[0].type : takesFloats(t.type, attributes_);
    }

    DataType outputType(int32_t, const DataType* inputs) const { return inputs[0]; }

    DimsExprs outputShape(int32_t output, const DimsExprs* inputs, IExprBuilder& builder) const {
        if (output) return inputs[kPast + output - 1];
        DimsExprs shape{};
        shape.nbDims = 2;
        shape.d[0] = inputs[0].d[2];
        shape.d[1] = builder.operation(nvinfer1::DimensionOperation::kPROD, *inputs[0].d[1], *inputs[0].d[3]);
        return shape;
    }

    size_t workspace(const PluginTensorDesc* in) const {
        IvcAttention a = attention(in);
        return mostWorkspace(a.rows, [&](int32_t rows) {
            a.rows = rows;
            return ivcAttendWorkspace(&a);
        });
    }

    cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) const {
        const IvcAttention a = attention(in);
        void *key = const_cast<void*>(inputs[kPast]), *value = const_cast<void*>(inputs[kPast + 1]);
        if (append()) {
            key = outputs[1];
            value = outputs[2];
            for (int32_t i = 0; i < 2; ++i) {
                const auto status = bringPast(in[kPast + i], inputs[kPast + i], outputs[1 + i], stream);
                if (status != cudaSuccess) return status;
            }
        }
        return ivcAttendInPlace(&a, inputs[0], inputs[1], inputs[2], key, value,
            static_cast<const int32_t*>(inputs[kPastLength]), outputs[0], workspace, stream);
    }

   private:
    static constexpr int32_t kPast = 3, kPastLength = 5;

    bool append() const { return attributes_[1][0] != 0; }

    IvcAttention attention(const PluginTensorDesc* in) const {
        const int32_t heads = extent(in[0], 1), kvHeads = extent(in[1], 1), rows = extent(in[0], 2);
        const int32_t headDim = extent(in[0], 3);
        return {rows, extent(in[kPast], 2), heads, kvHeads, headDim, real(attributes_[0]), ivcType(in[0].type),
            append() ? IVC_FRESH_APPENDED : IVC_FRESH_APART, strides(in[0], heads, rows, headDim),
            strides(in[1], kvHeads, rows, headDim), strides(in[2], kvHeads, rows, headDim)};
    }

    Attributes attributes_;
};

// EncodeAttend(q, k [frames, heads, rows, D], v the same or [frames rows, heads D or more]) -> y [frames rows, heads D],
// or with windows of `block_size` places at most EncodeAttend(q, k, v, window_of_place [rows]) -> y [frames, rows -
// 2 block_size, heads D]. Of wider rows, v is the last heads D columns.
class EncodeAttend {
   public:
    static constexpr const char* kName = "EncodeAttend";
    static constexpr Attribute kAttributes[] = {{"scale", true}, {"heads"}, {"block_size"}, {"float_type"}};

    explicit EncodeAttend(const Attributes& attributes) : attributes_(attributes) {}

    static bool valid(const Attributes& a) {
        return a[0].size() == 1 && a[1].size() == 1 && a[2].size() == 1 && a[1][0] > 0 && a[2][0] >= 0;
    }

    const Attributes& attributes() const { return attributes_; }

    int32_t outputs() const { return 1; }
    int32_t aliased(int32_t) const { return -1; }

    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        const auto& t = tensors[position];
        if (t.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position == 3 && block()) return t.type == DataType::kINT32;
        return position ? t.type == tensors[0].type : takesFloats(t.type, attributes_);
    }

    DataType outputType(int32_t, const DataType* inputs) const { return inputs[0]; }

    DimsExprs outputShape(int32_t, const DimsExprs* inputs, IExprBuilder& builder) const {
        using Operation = nvinfer1::DimensionOperation;
        const auto& q = inputs[0];
        DimsExprs shape{};
        shape.nbDims = block() ? 3 : 2;
        shape.d[0] = block() ? q.d[0] : builder.operation(Operation::kPROD, *q.d[0], *q.d[2]);
        if (block()) shape.d[1] = builder.operation(Operation::kSUB, *q.d[2], *builder.constant(2 * block()));
        shape.d[shape.nbDims - 1] = builder.operation(Operation::kPROD, *q.d[1], *q.d[3]);
        return shape;
    }

    size_t workspace(const PluginTensorDesc*) const { return 0; }

    cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs, void*,
        cudaStream_t stream) const {
        const int32_t heads = attributes_[1][0], rows = extent(in[0], 2), headDim = extent(in[0], 3);
        const bool inRows = in[2].dims.nbDims == 2;
        const int32_t before = inRows ? extent(in[2], 1) - heads * headDim : 0;  // columns of other heads
        if (before < 0 || (inRows && extent(in[2], 0) != extent(in[0], 0) * rows)) return cudaErrorInvalidValue;
        const void* v = static_cast<const char*>(inputs[2]) + before * static_cast<int64_t>(bytes(in[2].type));
        const IvcEncoder e{extent(in[0], 0), heads, rows, headDim, real(attributes_[0]), ivcType(in[0].type), block(),
            strides(in[0], heads, rows, headDim), strides(in[1], heads, rows, headDim),
            strides(in[2], heads, rows, headDim)};
        const void* windows = block() ? inputs[3] : nullptr;
        return ivcEncodeAttend(
            &e, inputs[0], inputs[1], v, static_cast<const int32_t*>(windows), outputs[0], stream);
    }

   private:
    int32_t block() const { return attributes_[2][0]; }

    Attributes attributes_;
};

// CompactIntoCaches(keep_index [M], past_length [1], x_1 .. x_n [1, kv_heads, S, D], past_1 .. past_n
// [1, kv_heads, P, D]) -> present_1 .. present_n: the rows keep_index of each x in its cache, from row past_length on.
class CompactIntoCaches {
   public:
    static constexpr const char* kName = "CompactIntoCaches";
    static constexpr Attribute kAttributes[] = {{"caches"}, {"float_type"}};

    explicit CompactIntoCaches(const Attributes& attributes) : attributes_(attributes) {}

    static bool valid(const Attributes& a) { return a[0].size() == 1 && a[0][0] > 0; }

    const Attributes& attributes() const { return attributes_; }

    int32_t outputs() const { return attributes_[0][0]; }
    int32_t aliased(int32_t output) const { return kFirst + outputs() + output; }

    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        const auto& t = tensors[position];
        if (t.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position < kFirst) return t.type == DataType::kINT32;
        return position > kFirst ? t.type == tensors[kFirst].type : takesFloats(t.type, attributes_);
    }

    DataType outputType(int32_t, const DataType* inputs) const { return inputs[kFirst]; }

    DimsExprs outputShape(int32_t output, const DimsExprs* inputs, IExprBuilder&) const {
        return inputs[kFirst + outputs() + output];
    }

    size_t workspace(const PluginTensorDesc*) const { return 0; }

    cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs, void*,
        cudaStream_t stream) const {
        std::vector<IvcRows> tensors;
        const int32_t count = this->outputs(), rows = extent(in[kFirst], 2), past = kFirst + count;
        for (int32_t i = 0; i < count; ++i) {
            const auto& x = in[kFirst + i];
            if (extent(x, 2) != rows || extent(in[past + i], 2) != extent(in[past], 2)) return cudaErrorInvalidValue;
            const auto status = bringPast(in[past + i], inputs[past + i], outputs[i], stream);
            if (status != cudaSuccess) return status;
            tensors.push_back({inputs[kFirst + i], outputs[i], extent(x, 0) * extent(x, 1), extent(x, 3) * bytes(x.type)});
        }
        return ivcCompactGatherInto(tensors.data(), count, rows, static_cast<const int32_t*>(inputs[0]),
            extent(in[0], 0), static_cast<const int32_t*>(inputs[1]), extent(in[past], 2), stream);
    }

   private:
    static constexpr int32_t kFirst = 2;

    Attributes attributes_;
};

}  // namespace ivc
