#include "ivc/tensorrt.h"

#include <NvInfer.h>
#include <dlfcn.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <utility>

#include "cuda.h"
#include "engines.h"
#include "ivc/error.h"

#define IVC_TENSORRT_10_1 (NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 1))

namespace ivc {
namespace {

// Keeps the last error, and prints nothing.
class Logger : public nvinfer1::ILogger {
   public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            last_ = message;
            last_ = last_.substr(0, last_.find('\n'));
        } catch (...) {  // no memory for what it says
        }
    }
    std::string last() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return last_.empty() ? "" : " (" + last_ + ")";
    }

   private:
    std::mutex mutex_;
    std::string last_;
};

// TensorRT keeps the first logger that it is given for as long as the program runs.
Logger& logger() {
    static auto* const kLogger = new Logger;
    return *kLogger;
}

std::optional<Type> typeOf(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return Type::kFloat32;
        case nvinfer1::DataType::kHALF: return Type::kFloat16;
        case nvinfer1::DataType::kINT32: return Type::kInt32;
#if NV_TENSORRT_MAJOR >= 9
        case nvinfer1::DataType::kBF16: return Type::kBfloat16;
#endif
        default: return std::nullopt;
    }
}

Shape shapeOf(const nvinfer1::Dims& dims) {
    if (dims.nbDims < 0) return {-1};  // of no known rank
    return Shape(dims.d, dims.d + dims.nbDims);
}

class TensorrtEngine : public Engine {
   public:
    TensorrtEngine(std::shared_ptr<nvinfer1::IRuntime> runtime, const std::string& path, size_t profiles,
        cudaStream_t stream)
        : runtime_(std::move(runtime)), stream_(stream) {
        const MappedFile plan(path, "build the engines again with ivc-build");
        engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (!engine_) {
            throw Error(path + " does not load in TensorRT " + versionOf(getInferLibVersion()) + logger().last() +
                        ": build it here with ivc-build");
        }
        for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* name = engine_->getIOTensorName(i);
            const std::optional<Type> type = typeOf(engine_->getTensorDataType(name));
            if (!type) throw Error(path + " has " + name + " in a type that no graph of ivc-export has: build it with ivc-build");
            const bool input = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
            const bool host = engine_->getTensorLocation(name) == nvinfer1::TensorLocation::kHOST;
            tensors_[name] = {input, *type, shapeOf(engine_->getTensorShape(name)), host};
        }
        for (size_t i = 0; i < profiles; ++i) {
#if IVC_TENSORRT_10_1
            contexts_.emplace_back(
                engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
#else
            contexts_.emplace_back(engine_->createExecutionContextWithoutDeviceMemory());
#endif
            const auto profile = static_cast<int32_t>(i);
            const bool known = profile < engine_->getNbOptimizationProfiles() && contexts_.back();
            if (!known || !contexts_.back()->setOptimizationProfileAsync(profile, stream_)) {
                throw Error("TensorRT cannot prepare " + path + logger().last() + ": check that the GPU has memory left");
            }
            checkCuda(cudaStreamSynchronize(stream_));  // who destroys the context need not wait for that
        }
    }

    const std::map<std::string, EngineTensor>& tensors() const override { return tensors_; }

    size_t scratch() const override {
#if IVC_TENSORRT_10_1
        return static_cast<size_t>(engine_->getDeviceMemorySizeV2());
#else
        return engine_->getDeviceMemorySize();
#endif
    }

    void useScratch(void* address) override {
        for (const auto& context : contexts_) {
#if IVC_TENSORRT_10_1
            context->setDeviceMemoryV2(address, static_cast<int64_t>(scratch()));
#else
            context->setDeviceMemory(address);
#endif
        }
    }

    bool setInput(size_t profile, const std::string& name, const Shape& shape, void* address) override {
        nvinfer1::Dims dims{};
        if (shape.size() > nvinfer1::Dims::MAX_DIMS) return false;
        dims.nbDims = static_cast<int32_t>(shape.size());
        for (size_t i = 0; i < shape.size(); ++i) {
            dims.d[i] = static_cast<std::decay_t<decltype(dims.d[0])>>(shape[i]);
            if (dims.d[i] != shape[i]) return false;
        }
        nvinfer1::IExecutionContext& context = *contexts_.at(profile);
        return context.setInputShape(name.c_str(), dims) && context.setTensorAddress(name.c_str(), address);
    }

    bool setOutput(size_t profile, const std::string& name, void* address) override {
        return contexts_.at(profile)->setTensorAddress(name.c_str(), address);
    }

    Shape shape(size_t profile, const std::string& name) const override {
        return shapeOf(contexts_.at(profile)->getTensorShape(name.c_str()));
    }

    bool start(size_t profile) override { return contexts_.at(profile)->enqueueV3(stream_); }

   private:
    std::shared_ptr<nvinfer1::IRuntime> runtime_;  // outlives its engines, and they their contexts
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;
    std::map<std::string, EngineTensor> tensors_;
    cudaStream_t stream_;
};

void loadPlugin(const std::string& path) {
    const std::string whole = path.find('/') == std::string::npos ? "./" + path : path;  // not from the system's folders
    if (dlopen(whole.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr) return;
    const char* reason = dlerror();
    throw Error(std::string("the plugin does not load (") + (reason == nullptr ? "for an unknown reason" : reason) +
                "): build it with cmake from graphs/plugin");
}

}  // namespace

std::unique_ptr<Device> openTensorrt(const Bundle& bundle, const TensorrtOptions& options) {
    const std::string capability = computeCapability();
    const EngineFolder found = findEngines(bundle, options.engines, versionOf(getInferLibVersion()), capability);
    found.checkPlugin(options.plugin);
    if (!options.plugin.empty()) loadPlugin(options.plugin);
    auto gpu = std::make_unique<CudaGpu>();
    const std::shared_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger()));
    if (!runtime) throw Error("TensorRT does not start" + logger().last() + ": build this program with the TensorRT of this machine");
    Engines engines;
    for (const char* name : {"vision", "prefix", "decoder"}) {
        const size_t profiles = std::string(name) == "vision" ? 1 : 2;
        engines[name] = std::make_unique<TensorrtEngine>(runtime, found.path(name), profiles, gpu->stream());
    }
    return makeEnginesDevice(bundle, found.record, std::move(gpu), std::move(engines), options.graph);
}

Image copyDeviceImage(const void* pixels, int32_t width, int32_t height, size_t stride, bool bgr) {
    checkImage(width, height, "the picture");
    const size_t row = static_cast<size_t>(width) * 3;
    if (pixels == nullptr || stride < row) throw Error("the address of the picture is null, or its rows overlap: check its address and stride");
    std::vector<uint8_t> copied(row * static_cast<size_t>(height));
    checkCuda(cudaMemcpy2D(copied.data(), row, pixels, stride, row, static_cast<size_t>(height), cudaMemcpyDefault));
    return copyImage(copied.data(), width, height, row, bgr);
}

}  // namespace ivc
