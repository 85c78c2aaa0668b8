// What all custom operators for onnxruntime share.
#pragma once

#define ORT_API_MANUAL_INIT  // no onnxruntime is linked: the one that loads this library hands itself over
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>

#include "../kernels/ivc_kernels.h"

#if ORT_API_VERSION < 18
#error "onnxruntime 1.18 or later is needed"
#endif

#ifndef IVC_PROVIDER  // tests put kernels that are emulated on the host into the CPU provider
#define IVC_PROVIDER "CUDAExecutionProvider"
#endif

namespace ivc {

using Type = ONNXTensorElementDataType;
constexpr Type kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
constexpr Type kFloat32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr Type kFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr Type kBFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;

inline void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

inline void check(cudaError_t status, const char* what) {
    if (status) throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(status));
}

// Calls `body`, and turns what it throws into a status: no exception leaves the library.
template <class Body>
OrtStatus* guarded(Body body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
}

// Extents of a tensor. They need no memory of their own: a graph has hundreds of nodes, and the host runs ahead of a GPU
// by little.
class Shape {
   public:
    explicit Shape(size_t axes) : axes_(axes) { require(axes <= kMost, "ivc: a tensor has at most 8 axes"); }
    Shape(std::initializer_list<int64_t> extents) : Shape(extents.size()) {
        std::copy(extents.begin(), extents.end(), extents_);
    }

    size_t size() const { return axes_; }
    int64_t* data() { return extents_; }
    const int64_t* data() const { return extents_; }
    int64_t& operator[](size_t axis) { return extents_[axis]; }
    int64_t operator[](size_t axis) const { return extents_[axis]; }
    int64_t& back() { return extents_[axes_ - 1]; }
    int64_t back() const { return extents_[axes_ - 1]; }
    int64_t elements() const { return product(axes_); }
    int64_t rows() const { return product(axes_ - 1); }  // along the last axis
    bool operator==(const Shape& other) const {
        return axes_ == other.axes_ && std::equal(extents_, extents_ + axes_, other.extents_);
    }

   private:
    static constexpr size_t kMost = 8;

    int64_t product(size_t axes) const {
        return std::accumulate(extents_, extents_ + axes, int64_t{1}, std::multiplies<int64_t>());
    }

    int64_t extents_[kMost]{};
    size_t axes_;
};

inline Shape shapeOf(const Ort::ConstValue& tensor) {
    const auto info = tensor.GetTensorTypeAndShapeInfo();
    Shape shape(info.GetDimensionsCount());
    Ort::ThrowOnError(Ort::GetApi().GetDimensions(info, shape.data(), shape.size()));
    return shape;
}

// The shape of input `i` of a node. That of a constant is read once.
class InputShape {
   public:
    InputShape(const Ort::ConstKernelInfo& node, size_t i) {
        int constant = 0;
        if (i >= node.GetInputCount()) return;
        const auto value = node.GetTensorConstantInput(i, &constant);
        if (constant) known_ = shapeOf(value);
    }

    Shape of(const Ort::ConstValue& tensor) const { return known_ ? *known_ : shapeOf(tensor); }

   private:
    std::optional<Shape> known_;
};

inline Ort::UnownedValue outputOf(const Ort::KernelContext& context, size_t i, const Shape& shape) {
    return context.GetOutput(i, shape.data(), shape.size());
}

// Elements of a tensor that has one axis.
inline int32_t lengthOf(const Ort::ConstValue& tensor) {
    const Shape shape = shapeOf(tensor);
    require(shape.size() == 1, "ivc: indices, priorities and counts must have one axis");
    return static_cast<int32_t>(shape[0]);
}

// Scratch memory from the session's arena. It is given back as soon as the kernels are launched: the arena gives it to
// no other stream before they are done.
class Scratch {
   public:
    Scratch(OrtKernelContext* context, const Ort::ConstValue& tensor, size_t bytes, bool onStream) {
        const auto memory = tensor.GetTensorMemoryInfo();
        const OrtApi& api = Ort::GetApi();
        Ort::ThrowOnError(api.KernelContext_GetAllocator(context, memory, &allocator_));
        if (onStream) {  // on a host there is no stream, and this call would still look for one
            const Ort::Status status(api.KernelContext_GetScratchBuffer(context, memory, bytes, &data_));
            if (status.IsOK()) return;
            api.ReleaseAllocator(allocator_);
            throw std::runtime_error(status.GetErrorMessage());
        }
        data_ = allocator_->Alloc(allocator_, bytes);
    }
    ~Scratch() {
        allocator_->Free(allocator_, data_);
        Ort::GetApi().ReleaseAllocator(allocator_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* data() const { return data_; }

   private:
    OrtAllocator* allocator_ = nullptr;
    void* data_ = nullptr;
};

inline IvcType ivcType(Type type) {
    return type == kFloat32 ? IVC_FLOAT32 : type == kFloat16 ? IVC_FLOAT16 : IVC_BFLOAT16;
}

inline int64_t bytesOf(Type type) { return type == kFloat32 ? 4 : 2; }

// What onnxruntime asks an operator about itself, for one type of values. It joins operators of one name.
template <class Operator, class Kernel>
struct Description : Ort::CustomOpBase<Operator, Kernel, true> {
    explicit Description(Type values) : values(values) {}

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* node, void** kernel) const {
        return guarded([&] { *kernel = new Kernel(Ort::ConstKernelInfo(node)); });
    }
    const char* GetExecutionProviderType() const { return IVC_PROVIDER; }

    Type values;
};

}  // namespace ivc
