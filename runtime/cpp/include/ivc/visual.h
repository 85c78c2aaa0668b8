// Prepares a picture for the vision graph, by the manifest's preprocessing. It does what ivc_export.families does in
// Python.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ivc/image.h"
#include "ivc/manifest.h"

namespace ivc {

// A rectangle of pixels or tokens. right and bottom are exclusive.
struct Box {
    int32_t left = 0, top = 0, right = 0, bottom = 0;
};

// How a picture's visual tokens are ordered. There are three kinds:
//
// - tile is 0: rows by columns tokens, row-major.
// - tile is above 0: the tokens come tile by tile, tile x tile tokens each. After several tiles comes a thumbnail of the
//   whole picture, one tile more.
// - content is set: two views. The first is a thumbnail of tile x tile tokens, of which those within `content` show the
//   picture. The second is rows by columns tokens. Both are row-major, with a separator after each row and one between
//   the views.
struct Grid {
    int32_t rows = 0, columns = 0, tile = 0;
    std::optional<Box> content = std::nullopt;

    // The sizes of the blocks of visual tokens within which IVC tokens are selected. Without tiles there is one block.
    // With tiles each tile is one, the thumbnail too. With two views they are the thumbnail, the separator, and each row.
    std::vector<int32_t> blocks() const;
    int32_t visual() const;              // the number of visual tokens
    std::vector<int32_t> cells() const;  // for each of rows by columns places, row-major, the visual token that shows it
};

// Vision's output for a picture, which a device keeps in its own memory.
struct Seen {
    virtual ~Seen() = default;
};

// A picture as the vision graph takes it. Names are those of the graph's inputs.
struct Visual {
    Grid grid;
    std::vector<int64_t> shape;          // the shape of `pixels`: [1, patches, values] or [tiles, 3, side, side]
    std::vector<float> pixels;           // pixel_values
    std::vector<int32_t> patchPosition;  // [patches, 2]; empty for tiles and views
    std::vector<int32_t> tokenSource;    // [visual]; for views only
    int32_t width = 0, height = 0;       // those of the original picture
    Box covered;                         // the part of the picture that the tokens show
    Box spread;                          // what rows by columns tokens lie over: `covered`, and for views the padding, too

    // Where a device keeps vision's output. A later run then needs neither vision nor pixels.
    mutable std::shared_ptr<const Seen> seen;
};

// Resizes a picture and turns it into the vision graph's inputs. Throws if the picture is too elongated, or gives more
// visual tokens than the bundle takes.
Visual prepare(const Image& image, const Manifest& manifest);

int32_t tokenSide(const Preprocessing& preprocessing);  // pixels along one side of a visual token

}  // namespace ivc
