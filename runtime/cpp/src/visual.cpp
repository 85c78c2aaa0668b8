#include "ivc/visual.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "ivc/error.h"
#include "ivc/resize.h"

namespace ivc {
namespace {

constexpr int64_t kPatchesAspect = 200, kTilesAspect = 3000;
constexpr int64_t kMostPrepared = 400'000'000;  // pixels that a picture is scaled to

void checkShape(const Image& image, int64_t limit) {
    const int64_t longer = std::max(image.width, image.height), shorter = std::min(image.width, image.height);
    if (longer <= limit * shorter) return;
    throw Error("a picture of " + std::to_string(image.width) + " x " + std::to_string(image.height) +
                " is too elongated: crop it to an aspect ratio below " + std::to_string(limit));
}

// The part of a picture scaled to width x height that lies at (left, top) and is as large as `part`.
void scale(const Image& image, int64_t width, int64_t height, const Preprocessing& p, int32_t left, int32_t top,
    Image& part) {
    const int64_t most = std::max(width, int64_t{part.width}) * std::max(height, int64_t{image.height});
    if (width > INT32_MAX || height > INT32_MAX || most > 8 * kMostPrepared) {
        throw Error("the scaled picture would not fit into memory: crop it to a less elongated shape");
    }
    resize(image, static_cast<int32_t>(width), static_cast<int32_t>(height), resampleOf(p.resample), left, top, part);
}

// Pixels of `count` patches or tiles of `inner` pixels, still without levels.
Pixels pixelsOf(int64_t count, int64_t inner, const Preprocessing& p) {
    Pixels found;
    found.inner = static_cast<size_t>(inner);
    found.levels.resize(static_cast<size_t>(count * 3 * inner));
    for (size_t channel = 0; channel < 3; ++channel) {
        for (size_t level = 0; level < 256; ++level) {
            const float value = static_cast<float>(level) * p.rescaleFactor;
            found.values[channel][level] = (value - p.mean[channel]) / p.std[channel];
        }
    }
    return found;
}

// Takes `count` pixels of a row apart: their channels lie `inner` levels behind each other.
void split(const uint8_t* from, int64_t count, size_t inner, uint8_t* to) {
    for (int64_t i = 0; i < count; ++i, from += 3) {
        to[i] = from[0];
        to[i + static_cast<int64_t>(inner)] = from[1];
        to[i + 2 * static_cast<int64_t>(inner)] = from[2];
    }
}

// The size that a picture is scaled to, in visual tokens: within min_pixels and max_pixels.
std::pair<int64_t, int64_t> tokensOf(const Image& image, const Preprocessing& p) {
    const double unit = tokenSide(p), height = image.height, width = image.width, area = unit * unit;
    double rows = std::nearbyint(height / unit), columns = std::nearbyint(width / unit);
    if (rows * columns * area > p.maxPixels) {
        const double by = std::sqrt(height * width / p.maxPixels);
        rows = std::max(1.0, std::floor(height / by / unit));
        columns = std::max(1.0, std::floor(width / by / unit));
    } else if (rows * columns * area < p.minPixels) {
        const double by = std::sqrt(p.minPixels / (height * width));
        rows = std::ceil(height * by / unit);
        columns = std::ceil(width * by / unit);
    }
    return {static_cast<int64_t>(rows), static_cast<int64_t>(columns)};
}

void checkTokens(int64_t visual, const Manifest& manifest) {
    if (visual <= manifest.maxVisual) return;
    throw Error("the picture gives " + std::to_string(visual) + " visual tokens, but this bundle takes " +
                std::to_string(manifest.maxVisual) + " at most: crop it to a less elongated shape");
}

Visual patches(const Image& image, const Manifest& manifest) {
    const Preprocessing& p = manifest.preprocessing;
    checkShape(image, kPatchesAspect);
    const auto [rows, columns] = tokensOf(image, p);
    checkTokens(rows * columns, manifest);
    const int64_t side = tokenSide(p), merge = p.mergeSize, patch = p.patchSize;
    if (rows * columns * side * side * p.temporalPatchSize > 8 * kMostPrepared) throw Error("the scaled picture would not fit into memory: crop it");
    Image own;
    const bool fits = image.width == columns * side && image.height == rows * side;
    if (!fits) {
        own = Image(static_cast<int32_t>(columns * side), static_cast<int32_t>(rows * side));
        scale(image, own.width, own.height, p, 0, 0, own);
    }
    const Image& scaled = fits ? image : own;
    Visual found;
    found.grid = {static_cast<int32_t>(rows), static_cast<int32_t>(columns), 0};
    const int64_t count = rows * columns * merge * merge;
    found.shape = {1, count, 3 * p.temporalPatchSize * patch * patch};
    found.pixels = pixelsOf(count, patch * patch, p);
    found.pixels.frames = static_cast<size_t>(p.temporalPatchSize);  // a still picture repeats
    found.patchPosition.reserve(static_cast<size_t>(count) * 2);
    uint8_t* to = found.pixels.levels.data();
    for (int64_t i = 0; i < count; ++i) {  // tokens row-major, and the patches within each
        const int64_t token = i / (merge * merge), within = i % (merge * merge);
        const int64_t y = token / columns * merge + within / merge, x = token % columns * merge + within % merge;
        found.patchPosition.push_back(static_cast<int32_t>(y));
        found.patchPosition.push_back(static_cast<int32_t>(x));
        for (int64_t row = 0; row < patch; ++row, to += patch) {
            split(scaled.row(static_cast<int32_t>(y * patch + row)) + x * patch * 3, patch, found.pixels.inner, to);
        }
        to += 2 * found.pixels.inner;
    }
    return found;
}

// The pixels of a tile of a picture, as the tile `number`.
void putTile(const Image& image, int64_t left, int64_t top, int64_t side, int64_t number, Pixels& pixels) {
    uint8_t* to = pixels.levels.data() + static_cast<size_t>(number) * 3 * pixels.inner;
    for (int64_t y = 0; y < side; ++y, to += side) {
        split(image.row(static_cast<int32_t>(top + y)) + left * 3, side, pixels.inner, to);
    }
}

// Columns and rows of tiles: the closest aspect ratio; of equals the most tiles that are not twice the picture.
std::pair<int32_t, int32_t> tiling(const Image& image, const Preprocessing& p) {
    std::vector<std::pair<int32_t, int32_t>> shapes;
    for (int32_t columns = 1; columns <= p.maxTiles; ++columns) {
        for (int32_t rows = 1; rows <= p.maxTiles && columns * rows <= p.maxTiles; ++rows) {
            if (columns * rows >= p.minTiles) shapes.emplace_back(columns, rows);
        }
    }
    std::stable_sort(shapes.begin(), shapes.end(), [](const auto& a, const auto& b) {
        return a.first * a.second < b.first * b.second;
    });
    const double width = image.width, height = image.height;
    std::pair<int32_t, int32_t> best{1, 1};
    double least = HUGE_VAL;
    for (const auto& shape : shapes) {
        const double difference = std::fabs(width / height - static_cast<double>(shape.first) / shape.second);
        const double tiles = 0.5 * (static_cast<double>(p.tilePixels) * p.tilePixels) * shape.first * shape.second;
        if (difference < least || (difference == least && width * height > tiles)) {
            best = shape;
            least = difference;
        }
    }
    return best;
}

Visual middle(const Image& image, const Manifest& manifest) {
    const Preprocessing& p = manifest.preprocessing;
    const int64_t side = p.tilePixels, shorter = std::min(image.width, image.height);
    const int64_t width = side * image.width / shorter, height = side * image.height / shorter;
    Image scaled(p.tilePixels, p.tilePixels);
    scale(image, width, height, p, static_cast<int32_t>((width - side) / 2), static_cast<int32_t>((height - side) / 2),
        scaled);
    Visual found;
    found.grid = {p.tileSide, p.tileSide, 0};
    found.shape = {1, 3, side, side};
    found.pixels = pixelsOf(1, side * side, p);
    putTile(scaled, 0, 0, side, 0, found.pixels);
    const auto square = static_cast<int32_t>(shorter);
    found.covered.left = (image.width - square) / 2;
    found.covered.top = (image.height - square) / 2;
    found.covered.right = found.covered.left + square;
    found.covered.bottom = found.covered.top + square;
    return found;
}

Visual tiles(const Image& image, const Manifest& manifest) {
    const Preprocessing& p = manifest.preprocessing;
    const auto [columns, rows] = tiling(image, p);
    const int64_t side = p.tilePixels, count = int64_t{columns} * rows, all = count + (count > 1 ? 1 : 0);
    checkTokens(all * p.tileSide * p.tileSide, manifest);
    if (count * side * side > kMostPrepared) throw Error("the scaled picture would not fit into memory: crop it");
    Image canvas(static_cast<int32_t>(columns * side), static_cast<int32_t>(rows * side));
    scale(image, canvas.width, canvas.height, p, 0, 0, canvas);
    Visual found;
    found.grid = {rows * p.tileSide, columns * p.tileSide, p.tileSide};
    found.shape = {all, 3, side, side};
    found.pixels = pixelsOf(all, side * side, p);
    for (int64_t tile = 0; tile < count; ++tile) {
        putTile(canvas, tile % columns * side, tile / columns * side, side, tile, found.pixels);
    }
    if (count > 1) {
        Image thumbnail(p.tilePixels, p.tilePixels);
        scale(image, side, side, p, 0, 0, thumbnail);
        putTile(thumbnail, 0, 0, side, count, found.pixels);
    }
    return found;
}

// Of a picture, and of the size that it has in a view.
struct Size {
    int32_t width, height;
};

// A picture of size `s`, scaled into width x height.
Size within(Size s, int32_t width, int32_t height) {
    const int64_t across = int64_t{s.width} * height, down = int64_t{s.height} * width;
    const auto part = [](int32_t side, int32_t other, int32_t whole) {
        const double scaled = static_cast<double>(side) / other * whole;
        return std::max(1, static_cast<int32_t>(std::nearbyint(scaled)));
    };
    if (across > down) return {width, part(s.height, s.width, width)};
    if (across < down) return {part(s.width, s.height, height), height};
    return {width, height};
}

// Columns and rows of the second view's tiles: in which the picture has most pixels, at most its own; of equals the
// least filling, and the first of these.
std::pair<int32_t, int32_t> viewTiling(Size s, const Preprocessing& p) {
    std::pair<int32_t, int32_t> best = p.shapes.front();
    std::pair<int64_t, int64_t> most{-1, 0};
    for (const auto& shape : p.shapes) {
        const double across = int64_t{shape.first} * p.tilePixels, down = int64_t{shape.second} * p.tilePixels;
        const double by = std::min(across / s.width, down / s.height);
        const int64_t scaled = static_cast<int64_t>(s.width * by) * static_cast<int64_t>(s.height * by);
        const int64_t shown = std::min(scaled, int64_t{s.width} * s.height);
        const std::pair<int64_t, int64_t> goodness{shown, shown - static_cast<int64_t>(across * down)};
        if (goodness <= most) continue;
        best = shape;
        most = goodness;
    }
    return best;
}

// The first view's tokens that show a picture.
Box contentOf(Size s, const Preprocessing& p) {
    const double pixels = p.tilePixels, by = std::min(pixels / s.width, pixels / s.height);
    const auto ends = [&](int32_t extent, int32_t& first, int32_t& end) {
        const int32_t scaled = static_cast<int32_t>(extent * by), before = (p.tilePixels - scaled) / 2;
        first = std::min(p.tileSide, before / p.tokenSide);
        end = std::min(p.tileSide, (before + scaled + p.tokenSide - 1) / p.tokenSide);
    };
    Box box;
    ends(s.width, box.left, box.right);
    ends(s.height, box.top, box.bottom);
    return box;
}

// Puts a view of columns x rows tiles behind the first `before` tiles: the picture in the middle, and filling around it.
// Returns the part of the view that shows the picture.
Box putView(const Image& image, int32_t columns, int32_t rows, int32_t before, const Preprocessing& p, Pixels& pixels) {
    const int32_t side = p.tilePixels, width = columns * side, height = rows * side;
    const Size size = within({image.width, image.height}, width, height);
    Image scaled(size.width, size.height);
    scale(image, size.width, size.height, p, 0, 0, scaled);
    const auto middle = [](int32_t whole, int32_t part) { return static_cast<int32_t>(std::nearbyint((whole - part) / 2.0)); };
    const int32_t left = middle(width, size.width), top = middle(height, size.height);
    Image view(width, height);
    std::fill(view.pixels.begin(), view.pixels.end(), p.filling);
    for (int32_t y = 0; y < size.height; ++y) {
        std::copy_n(scaled.row(y), size_t{3} * static_cast<size_t>(size.width), view.row(top + y) + size_t{3} * static_cast<size_t>(left));
    }
    for (int32_t tile = 0; tile < columns * rows; ++tile) {
        putTile(view, tile % columns * side, tile / columns * side, side, before + tile, pixels);
    }
    return {left, top, left + size.width, top + size.height};
}

// What each visual token of so many tiles is: 0 a row's separator, 1 that between the views, from 2 on the tiles' tokens.
std::vector<int32_t> tokenSource(int32_t columns, int32_t rows, int32_t side) {
    std::vector<int32_t> found;
    const auto add = [&](int32_t first, int32_t across, int32_t down) {
        for (int32_t row = 0; row < down * side; ++row) {
            for (int32_t column = 0; column < across * side; ++column) {
                const int32_t tile = first + row / side * across + column / side;
                found.push_back(2 + (tile * side + row % side) * side + column % side);
            }
            found.push_back(0);
        }
    };
    add(0, 1, 1);
    found.push_back(1);
    add(1, columns, rows);
    return found;
}

Visual views(const Image& image, const Manifest& manifest) {
    const Preprocessing& p = manifest.preprocessing;
    checkShape(image, p.tilePixels);
    const Size size{image.width, image.height};
    const auto [columns, rows] = viewTiling(size, p);
    const int64_t pixels = p.tilePixels, all = 1 + int64_t{columns} * rows, side = p.tileSide;
    checkTokens(side * (side + 1) + 1 + side * rows * (side * columns + 1), manifest);
    if (all * pixels * pixels > kMostPrepared) throw Error("the scaled picture would not fit into memory: crop it");
    Visual found;
    found.grid = {rows * p.tileSide, columns * p.tileSide, p.tileSide, contentOf(size, p)};
    found.shape = {all, 3, pixels, pixels};
    found.pixels = pixelsOf(all, pixels * pixels, p);
    found.tokenSource = tokenSource(columns, rows, p.tileSide);
    putView(image, 1, 1, 0, p, found.pixels);
    const Box shown = putView(image, columns, rows, 1, p, found.pixels);
    const auto scaled = [](int64_t part, int32_t whole, int32_t by) { return static_cast<int32_t>(part * whole / by); };
    const int32_t across = shown.right - shown.left, down = shown.bottom - shown.top;
    found.spread = {-scaled(shown.left, image.width, across), -scaled(shown.top, image.height, down),
        scaled(columns * pixels - shown.left, image.width, across), scaled(rows * pixels - shown.top, image.height, down)};
    return found;
}

}  // namespace

std::vector<float> Pixels::normalised() const {
    std::vector<float> found(size());
    write(values, 0, found.size(), found.data());
    return found;
}

std::vector<int32_t> Grid::blocks() const {
    if (content) {
        std::vector<int32_t> found{tile * (tile + 1), 1};
        found.insert(found.end(), static_cast<size_t>(rows), columns + 1);
        return found;
    }
    if (tile == 0) return {rows * columns};
    const int32_t count = rows * columns / (tile * tile);
    return std::vector<int32_t>(static_cast<size_t>(count + (count > 1 ? 1 : 0)), tile * tile);
}

int32_t Grid::visual() const {
    int32_t sum = 0;
    for (const int32_t block : blocks()) sum += block;
    return sum;
}

std::vector<int32_t> Grid::cells() const {
    std::vector<int32_t> found;
    for (int32_t row = 0; row < rows; ++row) {
        for (int32_t column = 0; column < columns; ++column) {
            if (content) {
                found.push_back(tile * (tile + 1) + 1 + row * (columns + 1) + column);
            } else if (tile == 0) {
                found.push_back(row * columns + column);
            } else {
                const int32_t before = row / tile * (columns / tile) + column / tile;
                found.push_back((before * tile + row % tile) * tile + column % tile);
            }
        }
    }
    return found;
}

int32_t tokenSide(const Preprocessing& p) {
    if (p.twice()) return p.tokenSide;
    return p.kind == Preprocessing::Kind::kPatches ? p.patchSize * p.mergeSize : p.tilePixels / p.tileSide;
}

Visual prepare(const Image& image, const Manifest& manifest) {
    checkImage(image.width, image.height, "the picture");
    const Preprocessing& p = manifest.preprocessing;
    Visual found;
    if (p.kind == Preprocessing::Kind::kPatches) {
        found = patches(image, manifest);
    } else if (p.twice()) {
        found = views(image, manifest);
    } else {
        checkShape(image, kTilesAspect);
        found = p.crop ? middle(image, manifest) : tiles(image, manifest);
    }
    checkTokens(found.grid.visual(), manifest);
    found.width = image.width;
    found.height = image.height;
    if (found.covered.right == 0) found.covered = {0, 0, image.width, image.height};
    if (found.spread.right == 0) found.spread = found.covered;
    return found;
}

}  // namespace ivc
