// The ivc operators over rows in which one product has put query, key and value side by side, as TensorRT sees them.
//
// Inputs are those of the `plugin` lowering (ivc_export/lowering/tensorrt/joined.py and attention.py).
#pragma once

#include <memory>

#include "attention.h"

namespace ivc {

// What both have: {heads, kv_heads, head_dim, grouped, normed, epsilon}, and inputs (rows [R, (heads + 2 kv_heads)
// head_dim], cos, sin float32 [A, head_dim / 2]), with `normed` behind them query_norm, key_norm [head_dim].
class JoinedRows {
   public:
    static constexpr size_t kCount = 6;

    explicit JoinedRows(const Attributes& attributes) : a_(attributes) {}

    static bool valid(const Attributes& a) {
        for (size_t i = 0; i < kCount; ++i) {
            if (a[i].size() != 1) return false;
        }
        return a[0][0] > 0 && a[1][0] > 0 && a[0][0] % a[1][0] == 0 && a[2][0] > 0;
    }

    int32_t heads() const { return a_[0][0]; }
    int32_t kvHeads() const { return a_[1][0]; }
    int32_t headDim() const { return a_[2][0]; }
    int32_t inputs() const { return normed() ? 5 : 3; }

    // Of the inputs above: rows and norms are of one type.
    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        const auto type = tensors[position].type;
        if (position == 1 || position == 2) return type == DataType::kFLOAT;
        return position ? type == tensors[0].type : takesFloats(type, a_);
    }

    bool fits(const PluginTensorDesc* in) const {
        const auto angles = [&](const PluginTensorDesc& t) {
            return t.dims.nbDims == 2 && extent(t, 0) == extent(in[1], 0) && extent(t, 1) == headDim() / 2;
        };
        const bool norms = !normed() || (count(in[3]) == headDim() && count(in[4]) == headDim());
        return in[0].dims.nbDims == 2 && extent(in[0], 1) == (heads() + 2 * kvHeads()) * headDim() &&
               angles(in[1]) && angles(in[2]) && extent(in[1], 0) > 0 && extent(in[0], 0) % extent(in[1], 0) == 0 &&
               norms;
    }

    IvcJoined joined(const PluginTensorDesc* in, int32_t capacity, float scale, bool byHead) const {
        return {extent(in[0], 0), extent(in[1], 0), heads(), kvHeads(), headDim(),
            a_[3][0] ? IVC_HEADS_GROUPED : IVC_HEADS_APART, ivcType(in[0].type), real(a_[5]), capacity, scale, byHead};
    }

    IvcJoinedRows rows(const void* const* inputs) const {
        return {inputs[0], static_cast<const float*>(inputs[1]), static_cast<const float*>(inputs[2]),
            normed() ? inputs[3] : nullptr, normed() ? inputs[4] : nullptr};
    }

   private:
    bool normed() const { return a_[4][0] != 0; }

    const Attributes& a_;
};

// TurnHeads(the inputs above) -> query [R / A, heads, A, head_dim], key and, if `values`, value [R / A, kv_heads, A,
// head_dim]
class TurnHeads {
   public:
    static constexpr const char* kName = "TurnHeads";
    static constexpr Attribute kAttributes[] = {
        {"heads"}, {"kv_heads"}, {"head_dim"}, {"grouped"}, {"normed"}, {"epsilon", true}, {"values"}, {"float_type"}};

    explicit TurnHeads(const Attributes& attributes) : attributes_(attributes) {}

    static bool valid(const Attributes& a) { return JoinedRows::valid(a) && a[JoinedRows::kCount].size() == 1; }

    const Attributes& attributes() const { return attributes_; }

    int32_t outputs() const { return attributes_[JoinedRows::kCount][0] ? 3 : 2; }
    int32_t aliased(int32_t) const { return -1; }

    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        if (tensors[position].format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position >= given().inputs()) return tensors[position].type == tensors[0].type;
        return given().supports(position, tensors);
    }

    DataType outputType(int32_t, const DataType* inputs) const { return inputs[0]; }

    DimsExprs outputShape(int32_t output, const DimsExprs* inputs, IExprBuilder& builder) const {
        DimsExprs shape{};
        shape.nbDims = 4;
        shape.d[0] = builder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *inputs[0].d[0], *inputs[1].d[0]);
        shape.d[1] = builder.constant(output ? given().kvHeads() : given().heads());
        shape.d[2] = inputs[1].d[0];
        shape.d[3] = builder.constant(given().headDim());
        return shape;
    }

    size_t workspace(const PluginTensorDesc*) const { return 0; }

    cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs, void*,
        cudaStream_t stream) const {
        if (!given().fits(in)) return cudaErrorInvalidValue;
        const IvcJoined joined = given().joined(in, 0, 1, true);
        const IvcJoinedRows rows = given().rows(inputs);
        void* value = this->outputs() > 2 ? outputs[2] : nullptr;
        return ivcTurnHeads(&joined, &rows, outputs[0], outputs[1], value, stream);
    }

   private:
    JoinedRows given() const { return JoinedRows(attributes_); }

    Attributes attributes_;
};

// Zeros on the device, which kernels leave as such, of one operator: they are not copied with it.
class Counters {
   public:
    explicit Counters(int32_t count) : count_(count) {
        void* found = nullptr;
        const size_t size = sizeof(int32_t) * static_cast<size_t>(count);
        if (cudaMalloc(&found, size) == cudaSuccess) {
            device_.reset(static_cast<int32_t*>(found));
            // runs are on other streams, which do not wait for this one
            if (cudaMemset(found, 0, size) || cudaStreamSynchronize(nullptr)) device_.reset();
        } else {
            cudaGetLastError();  // a later call is not to find it
        }
    }
    Counters(const Counters& other) : Counters(other.count_) {}
    Counters& operator=(const Counters&) = delete;

    int32_t* get() const { return device_.get(); }

   private:
    struct Free {
        void operator()(int32_t* memory) const { cudaFree(memory); }
    };

    int32_t count_;
    std::unique_ptr<int32_t, Free> device_;
};

// AttendJoined(the inputs above, past_key [1, kv_heads, P, head_dim], past_value, past_length [1]) -> y [R, heads
// head_dim], present_key and present_value, as the past; {scale} beside the attributes above
class AttendJoined {
   public:
    static constexpr const char* kName = "AttendJoined";
    static constexpr Attribute kAttributes[] = {{"heads"}, {"kv_heads"}, {"head_dim"}, {"grouped"}, {"normed"},
        {"epsilon", true}, {"scale", true}, {"float_type"}};

    explicit AttendJoined(const Attributes& attributes) : attributes_(attributes), counters_(given().kvHeads()) {}

    static bool valid(const Attributes& a) { return JoinedRows::valid(a) && a[JoinedRows::kCount].size() == 1; }

    const Attributes& attributes() const { return attributes_; }

    int32_t outputs() const { return 3; }
    int32_t aliased(int32_t output) const { return output ? past() + output - 1 : -1; }

    bool supports(int32_t position, const PluginTensorDesc* tensors) const {
        const auto& t = tensors[position];
        if (t.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position < past()) return given().supports(position, tensors);
        return t.type == (position == past() + 2 ? DataType::kINT32 : tensors[0].type);
    }

    DataType outputType(int32_t, const DataType* inputs) const { return inputs[0]; }

    DimsExprs outputShape(int32_t output, const DimsExprs* inputs, IExprBuilder& builder) const {
        if (output) return inputs[past() + output - 1];
        DimsExprs shape{};
        shape.nbDims = 2;
        shape.d[0] = inputs[0].d[0];
        shape.d[1] = builder.constant(given().heads() * given().headDim());
        return shape;
    }

    size_t workspace(const PluginTensorDesc* in) const {
        IvcJoined j = joined(in);
        return mostWorkspace(j.rows, [&](int32_t rows) {
            j.rows = j.angleRows = rows;
            return ivcAttendJoinedWorkspace(&j);
        });
    }

    cudaError_t enqueue(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) const {
        if (!counters_.get()) return cudaErrorMemoryAllocation;
        const int32_t capacity = extent(in[past()], 2);
        const bool caches = isCache(in[past()], capacity) && isCache(in[past() + 1], capacity);
        if (!given().fits(in) || !caches || count(in[past() + 2]) != 1) return cudaErrorInvalidValue;
        for (int32_t i = 0; i < 2; ++i) {
            const auto status = bringPast(in[past() + i], inputs[past() + i], outputs[1 + i], stream);
            if (status != cudaSuccess) return status;
        }
        const IvcJoined j = joined(in);
        const IvcJoinedRows rows = given().rows(inputs);
        return ivcAttendJoined(&j, &rows, outputs[1], outputs[2], static_cast<const int32_t*>(inputs[past() + 2]),
            outputs[0], workspace, counters_.get(), stream);
    }

   private:
    JoinedRows given() const { return JoinedRows(attributes_); }
    int32_t past() const { return given().inputs(); }

    bool isCache(const PluginTensorDesc& t, int32_t capacity) const {
        return t.dims.nbDims == 4 && extent(t, 0) == 1 && extent(t, 1) == given().kvHeads() &&
               extent(t, 2) == capacity && extent(t, 3) == given().headDim();
    }

    IvcJoined joined(const PluginTensorDesc* in) const {
        return given().joined(in, extent(in[past()], 2), real(attributes_[JoinedRows::kCount]), false);
    }

    Attributes attributes_;
    Counters counters_;
};

}  // namespace ivc
