#include "../src/c_objects.h"
#include "ivc/tensorrt.h"

using ivc::given;
using ivc::made;

extern "C" {

ivc_error* ivc_tensorrt_open(const ivc_bundle* bundle, const char* engines, const char* plugin, ivc_device** device) {
    return made(device, [&] {
        ivc::TensorrtOptions options;
        if (engines != nullptr) options.engines = engines;
        if (plugin != nullptr) options.plugin = plugin;
        return ivc::openTensorrt(given(bundle, "bundle")->bundle, options);
    });
}

ivc_error* ivc_picture_rgb_on_device(const void* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture) {
    return made(picture, [&] { return ivc::copyDeviceImage(pixels, width, height, stride, false); });
}

ivc_error* ivc_picture_bgr_on_device(const void* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture) {
    return made(picture, [&] { return ivc::copyDeviceImage(pixels, width, height, stride, true); });
}

}  // extern "C"
