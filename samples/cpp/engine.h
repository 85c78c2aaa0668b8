// TensorRT engines over device memory that grows as needed. For TensorRT 8.6 to 11.
#pragma once

#include <NvInfer.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "mapped_file.h"
#include "sizes.h"

inline void check(cudaError_t status) {
    if (status == cudaErrorMemoryAllocation) {
        throw std::runtime_error("the GPU has no memory left: close programs, or build engines with smaller maxima");
    }
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

struct Logger : nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << "TensorRT: " << message << "\n";
    }
};

constexpr char kOtherEngines[] = ": they are not this bundle's, build them with ivc-build";

// Of one value; of none but the types that graphs have.
inline size_t bytes(nvinfer1::DataType type) {
    if (type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kINT32) return 4;
    if (type == nvinfer1::DataType::kHALF) return 2;
#if NV_TENSORRT_MAJOR >= 9
    if (type == nvinfer1::DataType::kBF16) return 2;
#endif
    throw std::runtime_error(std::string("the engines have tensors of another type") + kOtherEngines);
}

// Named device buffers, zeroed when they are made: what attention masks must be finite.
class Memory {
   public:
    ~Memory() {
        for (const auto& buffer : buffers_) cudaFree(buffer.second.first);
    }

    void* get(const std::string& name, size_t size) {
        auto& [pointer, held] = buffers_[name];
        if (pointer == nullptr || held < size) {
            check(cudaDeviceSynchronize());
            check(cudaFree(pointer));
            held = size > 0 ? size : 1;  // TensorRT wants an address for empty tensors, too
            check(cudaMalloc(&pointer, held));
            check(cudaMemset(pointer, 0, held));
            check(cudaDeviceSynchronize());  // clearing is on another stream than what comes next
            ++generation_;
        }
        return pointer;
    }

    void* at(const std::string& name) const {
        const auto found = buffers_.find(name);
        if (found == buffers_.end()) throw std::runtime_error("the engines have no " + name + kOtherEngines);
        return found->second.first;
    }

    // Changes whenever a buffer is made or moved.
    int64_t generation() const { return generation_; }

   private:
    std::unordered_map<std::string, std::pair<void*, size_t>> buffers_;
    int64_t generation_ = 0;
};

// Floats in an engine's type.
inline std::vector<char> converted(const std::vector<float>& values, nvinfer1::DataType type) {
    std::vector<char> out(values.size() * bytes(type));
    for (size_t i = 0; i < values.size(); ++i) {
        if (type == nvinfer1::DataType::kFLOAT) {
            std::memcpy(&out[4 * i], &values[i], 4);
        } else if (type == nvinfer1::DataType::kHALF) {
            const __half half = __float2half(values[i]);
            std::memcpy(&out[2 * i], &half, 2);
        } else {
            const __nv_bfloat16 half = __float2bfloat16(values[i]);
            std::memcpy(&out[2 * i], &half, 2);
        }
    }
    return out;
}

#define IVC_TENSORRT_10_1 (NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 1))

// An execution context that works in memory of the caller's.
inline nvinfer1::IExecutionContext* makeContext(nvinfer1::ICudaEngine& engine) {
#if IVC_TENSORRT_10_1
    return engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
#else
    return engine.createExecutionContextWithoutDeviceMemory();
#endif
}

// Bytes that any context of an engine works in.
inline size_t scratchBytes(const nvinfer1::ICudaEngine& engine) {
#if IVC_TENSORRT_10_1
    return static_cast<size_t>(engine.getDeviceMemorySizeV2());
#else
    return engine.getDeviceMemorySize();
#endif
}

// One engine with an execution context for one of its optimization profiles. Contexts that run one after the other
// share `scratch`, which is as large as the largest engine asks for.
class Context {
   public:
    Context(nvinfer1::ICudaEngine& engine, int32_t profile, void* scratch, cudaStream_t stream)
        : engine_(engine), context_(makeContext(engine)), stream_(stream) {
        if (!context_) throw std::runtime_error("TensorRT cannot make an execution context: is memory short?");
        if (!context_->setOptimizationProfileAsync(profile, stream)) {
            throw std::runtime_error("the engine has no profile " + std::to_string(profile) + ": build it with ivc-build");
        }
#if IVC_TENSORRT_10_1
        context_->setDeviceMemoryV2(scratch, static_cast<int64_t>(scratchBytes(engine)));
#else
        context_->setDeviceMemory(scratch);
#endif
    }

    nvinfer1::DataType type(const std::string& name) const { return engine_.getTensorDataType(name.c_str()); }

    // Inputs that the engine lacks are ignored: TensorRT drops what a graph does not read.
    bool has(const std::string& name) const {
        for (int32_t i = 0; i < engine_.getNbIOTensors(); ++i) {
            if (name == engine_.getIOTensorName(i)) return true;
        }
        return false;
    }

    void input(const std::string& name, void* address, const Shape& shape) {
        if (!has(name)) return;
        bytes(type(name));  // refuses types of other sizes
        nvinfer1::Dims dims{};
        dims.nbDims = static_cast<int32_t>(shape.size());
        for (size_t i = 0; i < shape.size(); ++i) dims.d[i] = static_cast<std::decay_t<decltype(dims.d[0])>>(shape[i]);
        if (!context_->setInputShape(name.c_str(), dims) || !context_->setTensorAddress(name.c_str(), address)) {
            throw std::runtime_error(name + " does not fit the engine's profile: build with larger maxima");
        }
    }

    // Lets an output lie at `address`, if the engine has it.
    void output(const std::string& name, void* address) {
        if (has(name) && !context_->setTensorAddress(name.c_str(), address)) {
            throw std::runtime_error("TensorRT does not take memory for " + name + kOtherEngines);
        }
    }

    // Gives every output memory for the inputs set, under `prefix` and its name, but for those that begin with `own`.
    void outputs(Memory& memory, const std::string& prefix, const std::string& own = "-") {
        for (int32_t i = 0; i < engine_.getNbIOTensors(); ++i) {
            const char* name = engine_.getIOTensorName(i);
            if (engine_.getTensorIOMode(name) != nvinfer1::TensorIOMode::kOUTPUT) continue;
            if (std::string(name).rfind(own, 0) == 0) continue;
            void* address = memory.get(prefix + name, count(shape(name)) * bytes(engine_.getTensorDataType(name)));
            if (!context_->setTensorAddress(name, address)) {
                throw std::runtime_error(std::string("TensorRT does not take memory for ") + name + kOtherEngines);
            }
        }
    }

    Shape shape(const std::string& name) const {
        const nvinfer1::Dims dims = context_->getTensorShape(name.c_str());
        const Shape shape(dims.d, dims.d + std::max<int32_t>(0, dims.nbDims));
        if (dims.nbDims < 0 || std::any_of(shape.begin(), shape.end(), [](int64_t extent) { return extent < 0; })) {
            throw std::runtime_error("the engines know no shape of " + name + kOtherEngines);
        }
        return shape;
    }

    // Refuses an output of other sizes than those that it is copied with.
    void expect(const std::string& name, size_t values, size_t size) const {
        if (count(shape(name)) == values && bytes(type(name)) == size) return;
        throw std::runtime_error("the engines give " + name + " in another size" + kOtherEngines);
    }

    void enqueue() {
        if (context_->enqueueV3(stream_)) return;
        throw std::runtime_error("TensorRT cannot run an engine: see that the GPU has memory left");
    }

   private:
    nvinfer1::ICudaEngine& engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    cudaStream_t stream_;
};

inline std::unique_ptr<nvinfer1::ICudaEngine> loadEngine(nvinfer1::IRuntime& runtime, const std::string& path) {
    const MappedFile plan(path);
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime.deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine) throw std::runtime_error(path + " does not load: build it here with ivc-build");
    return engine;
}
