// IPluginV2DynamicExt over an operator, for TensorRT 8.6.
#pragma once

#include <memory>
#include <string>

#include "fields.h"

#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // 8.6 deprecates IPluginV2, which its creators return

namespace ivc {

template <class Operator>
class Plugin final : public nvinfer1::IPluginV2DynamicExt {
   public:
    explicit Plugin(const Attributes& attributes) : operator_(attributes) {}

    nvinfer1::DimsExprs getOutputDimensions(
        int32_t output, const DimsExprs* inputs, int32_t, IExprBuilder& builder) noexcept override {
        return operator_.outputShape(output, inputs, builder);
    }
    bool supportsFormatCombination(
        int32_t position, const PluginTensorDesc* tensors, int32_t, int32_t) noexcept override {
        return operator_.supports(position, tensors);
    }
    void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
        int32_t) noexcept override {}
    size_t getWorkspaceSize(
        const PluginTensorDesc* inputs, int32_t, const PluginTensorDesc*, int32_t) const noexcept override {
        return operator_.workspace(inputs);
    }
    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return operator_.enqueue(in, inputs, outputs, workspace, stream);
    }
    DataType getOutputDataType(int32_t output, const DataType* inputs, int32_t) const noexcept override {
        return operator_.outputType(output, inputs);
    }

    const char* getPluginType() const noexcept override { return Operator::kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    int32_t getNbOutputs() const noexcept override { return operator_.outputs(); }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(const char* name) noexcept override { namespace_ = name; }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
        auto* copy = new Plugin(operator_.attributes());
        copy->namespace_ = namespace_;
        return copy;
    }

    // Each attribute's length, then its values, all int32.
    size_t getSerializationSize() const noexcept override {
        size_t size = 0;
        for (const auto& attribute : operator_.attributes()) size += (1 + attribute.size()) * sizeof(int32_t);
        return size;
    }
    void serialize(void* buffer) const noexcept override {
        auto* to = static_cast<char*>(buffer);
        for (const auto& attribute : operator_.attributes()) {
            const auto length = static_cast<int32_t>(attribute.size());
            std::memcpy(to, &length, sizeof length);
            if (length) std::memcpy(to + sizeof length, attribute.data(), length * sizeof(int32_t));
            to += (1 + attribute.size()) * sizeof(int32_t);
        }
    }
    static bool deserialize(const void* data, size_t size, Attributes& attributes) {
        const auto* from = static_cast<const char*>(data);
        for (auto& attribute : attributes) {
            int32_t length = 0;
            if (size < sizeof length) return false;
            std::memcpy(&length, from, sizeof length);
            from += sizeof length;
            size -= sizeof length;
            if (length < 0 || size / sizeof(int32_t) < static_cast<size_t>(length)) return false;
            attribute.resize(length);
            if (length) std::memcpy(attribute.data(), from, length * sizeof(int32_t));
            from += length * sizeof(int32_t);
            size -= length * sizeof(int32_t);
        }
        return size == 0;
    }

   private:
    Operator operator_;
    std::string namespace_ = kNamespace;
};

template <class Operator>
class Creator final : public nvinfer1::IPluginCreator {
   public:
    const char* getPluginName() const noexcept override { return Operator::kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    nvinfer1::IPluginV2* createPlugin(
        const char*, const nvinfer1::PluginFieldCollection* fields) noexcept override {
        return make(readFields<Operator>(fields));
    }
    nvinfer1::IPluginV2* deserializePlugin(const char*, const void* data, size_t size) noexcept override {
        Attributes attributes(attributeCount<Operator>());
        return Plugin<Operator>::deserialize(data, size, attributes) ? make(attributes) : nullptr;
    }
    void setPluginNamespace(const char* name) noexcept override { namespace_ = name; }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

   private:
    static nvinfer1::IPluginV2* make(const Attributes& attributes) {
        return Operator::valid(attributes) ? new Plugin<Operator>(attributes) : nullptr;
    }

    std::vector<nvinfer1::PluginField> fields_ = makeFields<Operator>(nullptr);
    nvinfer1::PluginFieldCollection collection_ = collection(fields_);
    std::string namespace_ = kNamespace;
};

}  // namespace ivc
