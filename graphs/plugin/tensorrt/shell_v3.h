// IPluginV3 over an operator, for TensorRT 10.0 and later.
#pragma once

#include "fields.h"

namespace ivc {

#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
#define IVC_ALIASES 1  // outputs may be declared to lie in inputs' memory
using Build = nvinfer1::IPluginV3OneBuildV2;
#else
using Build = nvinfer1::IPluginV3OneBuild;
#endif

template <class Operator>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public Build,
                     public nvinfer1::IPluginV3OneRuntime {
   public:
    explicit Plugin(const Attributes& attributes) : operator_(attributes) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<Build*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    nvinfer1::IPluginV3* clone() noexcept override { return new Plugin(operator_.attributes()); }

    const char* getPluginName() const noexcept override { return Operator::kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return operator_.outputs(); }
#if IVC_ALIASES
    int32_t getAliasedInput(int32_t output) noexcept override { return operator_.aliased(output); }
#endif
    int32_t getOutputDataTypes(
        DataType* outputs, int32_t count, const DataType* inputs, int32_t) const noexcept override {
        for (int32_t i = 0; i < count; ++i) outputs[i] = operator_.outputType(i, inputs);
        return 0;
    }
    int32_t getOutputShapes(const DimsExprs* inputs, int32_t, const DimsExprs*, int32_t, DimsExprs* outputs,
        int32_t count, IExprBuilder& builder) noexcept override {
        for (int32_t i = 0; i < count; ++i) outputs[i] = operator_.outputShape(i, inputs, builder);
        return 0;
    }
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
        int32_t inputs, int32_t outputs) noexcept override {
        std::vector<PluginTensorDesc> plain;
        for (int32_t i = 0; i < inputs + outputs; ++i) plain.push_back(tensors[i].desc);
        return operator_.supports(position, plain.data());
    }
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t,
        const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {
        return 0;
    }
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
        const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override {
        std::vector<PluginTensorDesc> largest;
        for (int32_t i = 0; i < count; ++i) {
            largest.push_back(inputs[i].desc);
            largest.back().dims = inputs[i].max;
        }
        return operator_.workspace(largest.data());
    }

    int32_t onShapeChange(
        const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
        return 0;
    }
    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return operator_.enqueue(in, inputs, outputs, workspace, stream);
    }
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
        fields_ = makeFields<Operator>(&operator_.attributes());
        collection_ = collection(fields_);
        return &collection_;
    }

   private:
    Operator operator_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

template <class Operator>
class Creator final : public nvinfer1::IPluginCreatorV3One {
   public:
    const char* getPluginName() const noexcept override { return Operator::kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
        nvinfer1::TensorRTPhase) noexcept override {
        const Attributes attributes = readFields<Operator>(fields);
        return Operator::valid(attributes) ? new Plugin<Operator>(attributes) : nullptr;
    }

   private:
    std::vector<nvinfer1::PluginField> fields_ = makeFields<Operator>(nullptr);
    nvinfer1::PluginFieldCollection collection_ = collection(fields_);
};

}  // namespace ivc
