// The devices that this build knows, and the options that choose one.
#pragma once

#include <memory>
#include <string>

#include "ivc/bundle.h"
#include "ivc/device.h"
#include "ivc/error.h"
#ifdef IVC_ONNXRUNTIME
#include "ivc/onnxruntime.h"
#endif
#ifdef IVC_TENSORRT
#include "ivc/tensorrt.h"
#endif
#include "options.h"

namespace ivc {

const char kDeviceUsage[] =
    "  --backend NAME     runtime: onnxruntime-cpu or tensorrt (default: the first that this program was built with)\n"
    "  --engines DIR      folder of the engines (default: those in the bundle for this TensorRT and GPU)\n"
    "  --plugin LIB       libivc_plugin.so, if the engines were built with it\n"
    "  --threads N        threads of an operator, on onnxruntime\n";

struct DeviceChoice {
    std::string backend, engines, plugin;
    int32_t threads = 0;
    bool threadsGiven = false;
};

inline void addDeviceOptions(Options& options, DeviceChoice& choice) {
    const auto text = [&](const char* name, std::string& to) {
        options.valued[name] = [&to](const std::string& option, const std::string& value) {
            if (value.empty()) throw Error("the value of " + option + " is empty: give a file or a folder");
            to = value;
        };
    };
    options.valued["--backend"] = [&](const std::string& option, const std::string& value) {
        if (value != "onnxruntime-cpu" && value != "tensorrt") {
            throw Error(option + " takes onnxruntime-cpu or tensorrt, not " + value);
        }
        choice.backend = value;
    };
    text("--engines", choice.engines);
    text("--plugin", choice.plugin);
    options.valued["--threads"] = [&](const std::string& option, const std::string& value) {
        choice.threads = static_cast<int32_t>(wholeOf(option, value, 0, 1024));
        choice.threadsGiven = true;
    };
}

inline std::unique_ptr<Device> openDevice(const Bundle& bundle, const DeviceChoice& choice) {
    std::string backend = choice.backend;
#ifdef IVC_ONNXRUNTIME
    if (backend.empty()) backend = "onnxruntime-cpu";
#endif
#ifdef IVC_TENSORRT
    if (backend.empty()) backend = "tensorrt";
#endif
    if (backend.empty()) {
        throw Error("this program was built without onnxruntime and without TensorRT: build it where one of them is "
                    "installed");
    }
    if (backend != "tensorrt" && !(choice.engines + choice.plugin).empty()) {
        throw Error("--engines and --plugin are for tensorrt: use them with --backend tensorrt, or leave them out");
    }
    if (backend != "onnxruntime-cpu" && choice.threadsGiven) {
        throw Error("--threads is for onnxruntime-cpu: use it with --backend onnxruntime-cpu, or leave it out");
    }
#ifdef IVC_ONNXRUNTIME
    if (backend == "onnxruntime-cpu") {
        OnnxRuntimeOptions options;
        options.threads = choice.threads;
        return openOnnxRuntime(bundle, options);
    }
#endif
#ifdef IVC_TENSORRT
    if (backend == "tensorrt") {
        TensorrtOptions options;
        options.engines = choice.engines;
        options.plugin = choice.plugin;
        return openTensorrt(bundle, options);
    }
#endif
    (void)bundle;
    throw Error("this program was built without " + backend + ": build it where that is installed");
}

}  // namespace ivc
