// Pictures resized as Pillow resizes them: 8 bits a channel, rows first and then columns.
#pragma once

#include <cstdint>
#include <string>

#include "ivc/image.h"

namespace ivc {

// Pillow's filters.
enum class Resample { kNearest, kBox, kBilinear, kHamming, kBicubic, kLanczos };

// A filter by its name, "bicubic" for one. Throws where there is none of it.
Resample resampleOf(const std::string& name);

// Of the picture resized to width x height, the part from (left, top) on that is as large as `part`, which it fills.
void resize(const Image& image, int32_t width, int32_t height, Resample filter, int32_t left, int32_t top, Image& part);

}  // namespace ivc
