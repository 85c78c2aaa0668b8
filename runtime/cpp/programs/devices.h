// The devices that this build knows.
#pragma once

#include <memory>

#include "ivc/bundle.h"
#include "ivc/device.h"
#include "ivc/error.h"
#ifdef IVC_ONNXRUNTIME
#include "ivc/onnxruntime.h"
#endif

namespace ivc {

inline std::unique_ptr<Device> openDevice(const Bundle& bundle, int32_t threads) {
#ifdef IVC_ONNXRUNTIME
    OnnxRuntimeOptions options;
    options.threads = threads;
    return openOnnxRuntime(bundle, options);
#else
    (void)bundle, (void)threads;
    throw Error("this program was built without anything that runs graphs: build it where onnxruntime is found");
#endif
}

}  // namespace ivc
