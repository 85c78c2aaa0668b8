#include "../src/c_objects.h"
#include "ivc/onnxruntime.h"

extern "C" ivc_error* ivc_onnxruntime_open(const ivc_bundle* bundle, int32_t threads, ivc_device** device) {
    return ivc::made(device, [&] {
        ivc::OnnxRuntimeOptions options;
        options.threads = threads;
        return ivc::openOnnxRuntime(ivc::given(bundle, "bundle")->bundle, options);
    });
}
