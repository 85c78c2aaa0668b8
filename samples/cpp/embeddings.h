// The embedding table, mapped from the weight file that the manifest names.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.h"
#include "manifest.h"
#include "mapped_file.h"

// IEEE 754 binary16.
inline float fromHalf(uint16_t bits) {
    const int32_t exponent = (bits >> 10) & 31;
    const float fraction = static_cast<float>(bits & 1023), sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, -24);
    return sign * std::ldexp(1024.0f + fraction, exponent - 25);
}

class Embeddings {
   public:
    Embeddings(const std::string& bundle, const Json& manifest)
        : hidden_(static_cast<size_t>(manifest["decoder"]["hidden_size"].integer())),
          rows_(static_cast<size_t>(manifest["decoder"]["vocab_size"].integer())),
          type_(manifest["embedding"]["dtype"].text()),
          file_(confined(bundle, manifest["embedding"]["file"].text())) {
        const std::vector<int32_t> shape = manifest["embedding"]["shape"].integers();
        const bool fits = shape.size() == 2 && static_cast<size_t>(shape[0]) == rows_ &&
                          static_cast<size_t>(shape[1]) == hidden_;
        if (!fits || (type_ != "float32" && type_ != "float16" && type_ != "bfloat16")) {
            throw std::runtime_error("the manifest's embedding does not fit its decoder: export the model again");
        }
        const double offset = manifest["embedding"]["offset"].number();  // whole up to 2^53
        if (!(offset >= 0 && offset <= 9007199254740992.0 && offset == std::floor(offset))) {
            throw std::runtime_error("the manifest's embedding.offset is no place in a file: export the model again");
        }
        const size_t size = rows_ * hidden_ * (type_ == "float32" ? 4 : 2), from = static_cast<size_t>(offset);
        if (from > file_.size() || size > file_.size() - from) {
            throw std::runtime_error(manifest["embedding"]["file"].text() + " ends early: copy the bundle again");
        }
        table_ = file_.data() + from;
    }

    // Values of these tokens' rows, one row behind the other.
    std::vector<float> rows(const std::vector<int32_t>& tokens) const {
        std::vector<float> found;
        found.reserve(tokens.size() * hidden_);
        for (const int32_t token : tokens) {
            if (token < 0 || static_cast<size_t>(token) >= rows_) {
                throw std::runtime_error("token id " + std::to_string(token) + " has no embedding: export the model again");
            }
            for (size_t i = 0; i < hidden_; ++i) found.push_back(value(static_cast<size_t>(token) * hidden_ + i));
        }
        return found;
    }

   private:
    float value(size_t index) const {
        float x;
        if (type_ == "float32") {
            std::memcpy(&x, table_ + 4 * index, 4);
            return x;
        }
        uint16_t bits;
        std::memcpy(&bits, table_ + 2 * index, 2);
        if (type_ == "float16") return fromHalf(bits);
        const uint32_t widened = static_cast<uint32_t>(bits) << 16;
        std::memcpy(&x, &widened, 4);
        return x;
    }

    size_t hidden_, rows_;
    std::string type_;
    MappedFile file_;
    const char* table_;
};
