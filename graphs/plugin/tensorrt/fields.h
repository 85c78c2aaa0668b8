// Attributes to and from TensorRT's plugin fields.
#pragma once

#include <cstring>
#include <iterator>
#include <vector>

#include "operators.h"

namespace ivc {

constexpr const char* kNamespace = "ivc";
constexpr const char* kVersion = "1";

inline nvinfer1::PluginFieldType fieldType(const Attribute& attribute) {
    return attribute.real ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32;
}

template <class Operator>
constexpr size_t attributeCount() {
    return std::size(Operator::kAttributes);
}

// Reads what a parser or an engine gives; fields of other names are ignored.
template <class Operator>
Attributes readFields(const nvinfer1::PluginFieldCollection* fields) {
    Attributes attributes(attributeCount<Operator>());
    for (int32_t i = 0; fields && i < fields->nbFields; ++i) {
        const auto& field = fields->fields[i];
        for (size_t a = 0; a < attributes.size(); ++a) {
            if (std::strcmp(field.name, Operator::kAttributes[a].name) == 0 && field.data &&
                field.type == fieldType(Operator::kAttributes[a])) {
                attributes[a].resize(field.length);
                if (field.length) std::memcpy(attributes[a].data(), field.data, field.length * sizeof(int32_t));
            }
        }
    }
    return attributes;
}

// Fields that point into `attributes`; without them, names alone, as a creator announces them.
template <class Operator>
std::vector<nvinfer1::PluginField> makeFields(const Attributes* attributes) {
    std::vector<nvinfer1::PluginField> fields;
    for (size_t a = 0; a < attributeCount<Operator>(); ++a) {
        const void* data = attributes ? (*attributes)[a].data() : nullptr;
        const int32_t length = attributes ? static_cast<int32_t>((*attributes)[a].size()) : 1;
        const Attribute& attribute = Operator::kAttributes[a];
        fields.emplace_back(attribute.name, data, fieldType(attribute), length);
    }
    return fields;
}

inline nvinfer1::PluginFieldCollection collection(const std::vector<nvinfer1::PluginField>& fields) {
    return {static_cast<int32_t>(fields.size()), fields.data()};
}

}  // namespace ivc
