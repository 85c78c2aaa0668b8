// A bundle's portable graphs on onnxruntime's CPU provider: ivc::onnxruntime.
#pragma once

#include <cstdint>
#include <memory>

#include "ivc/bundle.h"
#include "ivc/device.h"

namespace ivc {

// How onnxruntime runs.
struct OnnxRuntimeOptions {
    int32_t threads = 0;  // within an operator; 0 takes onnxruntime's default, one a core
};

// The bundle outlives the device. Throws where a graph does not open, or the bundle is not in float32.
std::unique_ptr<Device> openOnnxRuntime(const Bundle& bundle, const OnnxRuntimeOptions& options = {});

}  // namespace ivc
