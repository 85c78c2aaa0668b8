// A picture made ready for the vision graph, as ivc_export.families does by the manifest's preprocessing.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ivc/image.h"
#include "ivc/manifest.h"

namespace ivc {

// Right and bottom are the first behind it.
struct Box {
    int32_t left = 0, top = 0, right = 0, bottom = 0;
};

// Visual tokens: rows by columns, row-major. Where `tile` is not 0 they come tile by tile, of tile x tile tokens each;
// behind several tiles comes a thumbnail of the whole picture, of one tile.
//
// With `content` they are two views: first a thumbnail of tile x tile tokens, of which those within `content` show the
// picture, then rows by columns tokens; both row-major, with a separator behind each row, and one between them.
struct Grid {
    int32_t rows = 0, columns = 0, tile = 0;
    std::optional<Box> content = std::nullopt;

    // Numbers of visual tokens within which IVC tokens are chosen: each tile's, thumbnail included; without tiles one
    // number; of two views the thumbnail's, the separator's, and those of each row.
    std::vector<int32_t> blocks() const;
    int32_t visual() const;              // of all visual tokens
    std::vector<int32_t> cells() const;  // the visual token that shows each of rows by columns places, row-major
};

// What a device keeps of a picture that vision has run on, in memory of its own.
struct Seen {
    virtual ~Seen() = default;
};

// What the vision graph takes of a picture; names as in the contract.
struct Visual {
    Grid grid;
    std::vector<int64_t> shape;          // of pixels: [1, patches, values] or [tiles, 3, side, side]
    std::vector<float> pixels;           // pixel_values
    std::vector<int32_t> patchPosition;  // [patches, 2]; empty of tiles and views
    std::vector<int32_t> tokenSource;    // [visual]; of views alone
    int32_t width = 0, height = 0;       // of the picture that it was
    Box covered;                         // the part of it that is shown
    Box spread;                          // what rows by columns tokens lie over: `covered`, and of views the filling around it

    // Where a device keeps what vision made of it, so that a later run costs no vision, and needs no pixels.
    mutable std::shared_ptr<const Seen> seen;
};

// Throws where the picture is too elongated, or gives more visual tokens than the bundle takes.
Visual prepare(const Image& image, const Manifest& manifest);

int32_t tokenSide(const Preprocessing& preprocessing);  // pixels along one side of a visual token

}  // namespace ivc
