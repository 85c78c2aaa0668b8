// A bundle's TensorRT engines, as ivc-build made them for this TensorRT and GPU: ivc::tensorrt, TensorRT 8.6 to 11.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "ivc/bundle.h"
#include "ivc/device.h"
#include "ivc/image.h"

namespace ivc {

// Which engines run, and how.
struct TensorrtOptions {
    std::string engines;  // their folder; empty takes the bundle's own for this TensorRT and GPU
    std::string plugin;   // our plugin's library, where engines call it; nothing else is ever loaded
    bool graph = true;    // whether a decode step is replayed as one CUDA graph
};

// On the current CUDA device, which has to be current in every thread that runs it. The bundle outlives the device. Throws
// where there are no engines for this TensorRT and GPU, or they are stale, damaged, another bundle's, or call another plugin.
std::unique_ptr<Device> openTensorrt(const Bundle& bundle, const TensorrtOptions& options = {});

// A frame in device memory, rows of RGB pixels, or of BGR ones, `stride` bytes apart. It is copied when its stream
// is done with it: synchronise before the call.
Image copyDeviceImage(const void* pixels, int32_t width, int32_t height, size_t stride, bool bgr);

}  // namespace ivc
