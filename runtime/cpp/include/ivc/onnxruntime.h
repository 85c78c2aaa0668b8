// A bundle's portable graphs on onnxruntime's CPU provider. In the library ivc::onnxruntime.
#pragma once

#include <cstdint>
#include <memory>

#include "ivc/bundle.h"
#include "ivc/device.h"

namespace ivc {

// How onnxruntime runs.
struct OnnxRuntimeOptions {
    int32_t threads = 0;  // within an operator; 0 is onnxruntime's default, one for each core
};

// Opens a bundle's graphs. Keep the bundle as long as the device. Throws if a graph does not open, or if the bundle is
// not in float32 (export it with --dtype float32).
std::unique_ptr<Device> openOnnxRuntime(const Bundle& bundle, const OnnxRuntimeOptions& options = {});

}  // namespace ivc
