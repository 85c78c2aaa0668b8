// Resizes pictures with the same values as Pillow: 8 bits a channel, rows first and then columns.
#pragma once

#include <cstdint>
#include <string>

#include "ivc/image.h"

namespace ivc {

// Pillow's filters.
enum class Resample { kNearest, kBox, kBilinear, kHamming, kBicubic, kLanczos };

// A filter by its name, for example "bicubic". Throws if there is no such filter.
Resample resampleOf(const std::string& name);

// Fills `part` with a part of the picture as resized to width x height: the one of its size that begins at (left, top).
void resize(const Image& image, int32_t width, int32_t height, Resample filter, int32_t left, int32_t top, Image& part);

}  // namespace ivc
