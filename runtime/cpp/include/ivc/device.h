// The interface of everything that runs a bundle's graphs.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "ivc/bundle.h"
#include "ivc/plan.h"
#include "ivc/visual.h"

namespace ivc {

// Runs the graphs, and holds the caches of one conversation at a time. Derive from it to add a runtime of your own.
class Device {
   public:
    virtual ~Device() = default;

    // Empties the caches for a new conversation. rows: how many rows caches that cannot grow must hold.
    virtual void begin(int32_t rows) = 0;
    // Runs vision, prefix and decoder over the caches, and appends the kept rows to them. Returns the logits of the last
    // row, float32 [vocabulary], valid until the next call. A device may keep vision's output in the picture's `seen`
    // and use it the next time. Throws TooLongError if the run exceeds the device's maxima.
    virtual const std::vector<float>& run(const Run& run, const std::vector<const Visual*>& pictures) = 0;
    // The rows of the last run that were kept, ascending.
    virtual const std::vector<int32_t>& keepIndex() const = 0;
    virtual int32_t length() const = 0;  // rows in each cache, except in whole layers
    virtual int32_t room() const = 0;    // rows that still fit into every cache; INT32_MAX if caches grow
    virtual int64_t cacheBytes() const = 0;  // bytes of the valid rows of all caches
    virtual std::string name() const = 0;  // for example "onnxruntime-cpu"
    virtual std::string dtype() const = 0;  // the dtype in which the graphs compute

    // Seconds of a stage, summed over its runs, and the number of runs. Stages are "vision", "prefill.prefix",
    // "decode.decoder" and so on.
    struct Time {
        double seconds = 0;
        int64_t runs = 0;
    };
    std::map<std::string, Time> times;
};

}  // namespace ivc
