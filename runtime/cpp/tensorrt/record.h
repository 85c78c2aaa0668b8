// The folder of engines that ivc-build made: what its build.json says, checked, and whether the bundle is theirs.
//
// Names as in ivc_export/tensorrt/store.py, which says what each field means.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ivc/bundle.h"

namespace ivc {

struct BuiltEngine {
    std::string file;
    uint64_t bytes = 0;
};

struct EngineRecord {
    std::string version, tensorrt, computeCapability, dtype, graphs;
    int32_t capacity = 0, maxVisual = 0, maxText = 0;
    std::string inputsSha256;
    std::map<std::string, std::optional<std::string>> weightsSha256;  // by file
    std::optional<std::string> pluginSha256;
    std::map<std::string, BuiltEngine> engines;
};

// Of the text of a build.json; `what` names it in errors.
EngineRecord parseRecord(const std::string& text, const std::string& what);

// TensorRT's version by getInferLibVersion's number, such as "8.6.1".
std::string versionOf(int32_t number);

// Engines for one TensorRT and GPU.
struct EngineFolder {
    std::string folder;
    EngineRecord record;

    std::string path(const std::string& name) const;  // of an engine's file
    // Refuses a library that is not the one that the engines call, which nothing but the caller may name.
    void checkPlugin(const std::string& plugin) const;
};

// The bundle's engines, in `folder`, or where that is empty in the bundle's own folder for this TensorRT and GPU
// (compute capability such as "8.7"). Throws where there are none, or they are others' or older than the bundle.
EngineFolder findEngines(const Bundle& bundle, const std::string& folder, const std::string& tensorrt,
    const std::string& capability);

}  // namespace ivc
