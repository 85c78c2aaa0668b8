// A bundle's TensorRT engines, which ivc-build made for this TensorRT and GPU. In the library ivc::tensorrt, for TensorRT
// 8.6 to 11.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "ivc/bundle.h"
#include "ivc/device.h"
#include "ivc/image.h"

namespace ivc {

// Which engines to run, and how.
struct TensorrtOptions {
    std::string engines;  // their folder; empty is the bundle's own for this TensorRT and GPU
    std::string plugin;   // the library that they were built with, or empty; no other is ever loaded
    bool graph = true;    // whether a decode step is replayed as one CUDA graph
};

// Opens a bundle's engines on the current CUDA device, which must be current in every thread that runs them. Keep the
// bundle as long as the device. Throws if there are no engines for this TensorRT and GPU, or if they are older than the
// bundle, damaged, of another bundle, or built with another plugin.
std::unique_ptr<Device> openTensorrt(const Bundle& bundle, const TensorrtOptions& options = {});

// Copies a frame from device memory. stride: bytes from the beginning of a row to that of the next. bgr: whether pixels
// are BGR, not RGB. Synchronise the stream that writes the frame before the call.
Image copyDeviceImage(const void* pixels, int32_t width, int32_t height, size_t stride, bool bgr);

}  // namespace ivc
