// What runs a bundle's graphs. A device holds the caches of one conversation at a time.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "ivc/bundle.h"
#include "ivc/plan.h"
#include "ivc/visual.h"

namespace ivc {

// One conversation's runs. Another runtime is another class of this.
class Device {
   public:
    virtual ~Device() = default;

    // Forgets what was run, for another conversation. rows: that its caches should hold, if they cannot grow.
    virtual void begin(int32_t rows) = 0;
    // Runs vision, prefix and decoder over the caches and appends the kept rows. Logits of the last row, float32
    // [vocabulary], which are valid until the next call. A device that keeps what vision made of a picture leaves it in
    // the picture's `seen`, and takes it from there the next time. Throws TooLongError where its maxima are outgrown.
    virtual const std::vector<float>& run(const Run& run, const std::vector<const Visual*>& pictures) = 0;
    // The rows that went on in the last run, ascending.
    virtual const std::vector<int32_t>& keepIndex() const = 0;
    virtual int32_t length() const = 0;  // rows of every cache but those kept whole
    virtual int32_t room() const = 0;    // rows that every cache still takes; INT32_MAX where caches grow
    virtual int64_t cacheBytes() const = 0;  // of the valid rows of all caches
    virtual std::string name() const = 0;  // such as "onnxruntime-cpu"
    virtual std::string dtype() const = 0;  // of what the graphs compute in

    // Seconds by stage, summed over its runs, and how many these were: "vision", "prefill.prefix", "decode.decoder", ...
    struct Time {
        double seconds = 0;
        int64_t runs = 0;
    };
    std::map<std::string, Time> times;
};

}  // namespace ivc
