// A picture made ready for the vision graph, as ivc_export.families does by the manifest's preprocessing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ivc/image.h"
#include "ivc/manifest.h"

namespace ivc {

// Visual tokens: rows by columns, row-major. Where `tile` is not 0 they come tile by tile, of tile x tile tokens each;
// behind several tiles comes a thumbnail of the whole picture, of one tile.
struct Grid {
    int32_t rows = 0, columns = 0, tile = 0;

    std::vector<int32_t> blocks() const;  // visual tokens of each tile, thumbnail included; without tiles one number
    int32_t visual() const;
};

struct Box {
    int32_t left = 0, top = 0, right = 0, bottom = 0;
};

struct Visual {
    Grid grid;
    std::vector<int64_t> shape;          // of pixels: [1, patches, values] or [tiles, 3, side, side]
    std::vector<float> pixels;           // pixel_values
    std::vector<int32_t> patchPosition;  // [patches, 2]; empty of tiles
    int32_t width = 0, height = 0;       // of the picture that it was
    Box covered;                         // the part of it that is shown
};

// Throws where the picture is too elongated, or gives more visual tokens than the bundle takes.
Visual prepare(const Image& image, const Manifest& manifest);

int32_t tokenSide(const Preprocessing& preprocessing);  // pixels along one side of a visual token

}  // namespace ivc
