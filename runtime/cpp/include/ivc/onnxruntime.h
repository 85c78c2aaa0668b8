// A bundle's portable graphs on onnxruntime's CPU provider: ivc::onnxruntime.
#pragma once

#include <cstdint>
#include <memory>

#include "ivc/bundle.h"
#include "ivc/device.h"

namespace ivc {

struct OnnxRuntimeOptions {
    int32_t threads = 0;  // within an operator; 0 takes onnxruntime's default, one a core
};

// The bundle outlives the device. Throws where a graph does not open.
std::unique_ptr<Device> openOnnxRuntime(const Bundle& bundle, const OnnxRuntimeOptions& options = {});

}  // namespace ivc
