// Prepares a picture for the vision graph, by the manifest's preprocessing. It does what ivc_export.families does in
// Python.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
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

// The values of pixel_values by channel and 8-bit level.
template <class T>
using LevelTable = std::array<std::array<T, 256>, 3>;

// pixel_values, as the 8-bit levels that pixels have, and what each level is after normalisation.
struct Pixels {
    std::vector<uint8_t> levels;    // [patches or tiles, 3, inner]
    size_t inner = 0;               // pixels of one channel of a patch or tile
    size_t frames = 1;              // how often these are repeated: pixel_values are [patches or tiles, 3, frames, inner]
    LevelTable<float> values{};

    size_t size() const { return levels.size() * frames; }  // the number of values
    std::vector<float> normalised() const;                  // all of them

    // Writes `count` values, from the value `first` on. table: what to write for each level.
    template <class T>
    void write(const LevelTable<T>& table, size_t first, size_t count, T* to) const {
        while (count > 0) {
            const size_t block = first / inner, place = first % inner, some = std::min(count, inner - place);
            const uint8_t* from = levels.data() + block / frames * inner + place;
            const T* known = table[block / frames % 3].data();
            for (size_t i = 0; i < some; ++i) to[i] = known[from[i]];
            first += some;
            count -= some;
            to += some;
        }
    }
};

// Vision's output for a picture, which a device keeps in its own memory.
struct Seen {
    virtual ~Seen() = default;
};

// A picture as the vision graph takes it. Names are those of the graph's inputs.
struct Visual {
    Grid grid;
    std::vector<int64_t> shape;          // the shape of pixel_values: [1, patches, values] or [tiles, 3, side, side]
    Pixels pixels;                       // pixel_values
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
