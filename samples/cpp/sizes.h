// Shapes of tensors, and how many values they hold.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

using Shape = std::vector<int64_t>;

constexpr int64_t kMostValues = int64_t{1} << 48;  // more than any memory holds, and their bytes fit 64 bits

inline size_t count(const Shape& shape) {
    int64_t product = 1;
    for (const int64_t extent : shape) {
        if (extent < 0 || (extent > 0 && product > kMostValues / extent)) {
            throw std::runtime_error("a tensor's shape fits no memory: build the engines again with ivc-build");
        }
        product *= extent;
    }
    return static_cast<size_t>(product);
}
