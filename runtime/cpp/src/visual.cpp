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
        throw Error("a picture would be scaled beyond any memory: crop it to a less elongated shape");
    }
    resize(image, static_cast<int32_t>(width), static_cast<int32_t>(height), resampleOf(p.resample), left, top, part);
}

float level(uint8_t value, size_t channel, const Preprocessing& p) {
    return (static_cast<float>(value) * p.rescaleFactor - p.mean[channel]) / p.std[channel];
}

// Every level that a channel can have.
struct Levels {
    float values[3][256];

    explicit Levels(const Preprocessing& p) {
        for (size_t channel = 0; channel < 3; ++channel) {
            for (int value = 0; value < 256; ++value) {
                values[channel][value] = level(static_cast<uint8_t>(value), channel, p);
            }
        }
    }
};

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
    throw Error("the picture gives " + std::to_string(visual) + " visual tokens, and this bundle takes " +
                std::to_string(manifest.maxVisual) + ": crop it to a less elongated shape");
}

Visual patches(const Image& image, const Manifest& manifest) {
    const Preprocessing& p = manifest.preprocessing;
    checkShape(image, kPatchesAspect);
    const auto [rows, columns] = tokensOf(image, p);
    checkTokens(rows * columns, manifest);
    const int64_t side = tokenSide(p), merge = p.mergeSize, patch = p.patchSize;
    if (rows * columns * side * side > kMostPrepared) throw Error("the picture is scaled beyond any memory: crop it");
    Image scaled(static_cast<int32_t>(columns * side), static_cast<int32_t>(rows * side));
    scale(image, scaled.width, scaled.height, p, 0, 0, scaled);
    Visual found;
    found.grid = {static_cast<int32_t>(rows), static_cast<int32_t>(columns), 0};
    const int64_t count = rows * columns * merge * merge;
    found.shape = {1, count, 3 * p.temporalPatchSize * patch * patch};
    found.pixels.reserve(static_cast<size_t>(count * found.shape[2]));
    found.patchPosition.reserve(static_cast<size_t>(count) * 2);
    const Levels levels(p);
    for (int64_t i = 0; i < count; ++i) {  // tokens row-major, and the patches within each
        const int64_t token = i / (merge * merge), within = i % (merge * merge);
        const int64_t y = token / columns * merge + within / merge, x = token % columns * merge + within % merge;
        found.patchPosition.push_back(static_cast<int32_t>(y));
        found.patchPosition.push_back(static_cast<int32_t>(x));
        for (size_t channel = 0; channel < 3; ++channel) {
            for (int32_t frame = 0; frame < p.temporalPatchSize; ++frame) {  // a still picture repeats
                for (int64_t row = 0; row < patch; ++row) {
                    const uint8_t* from = scaled.row(static_cast<int32_t>(y * patch + row)) + x * patch * 3;
                    for (int64_t column = 0; column < patch; ++column) {
                        found.pixels.push_back(levels.values[channel][from[3 * column + static_cast<int64_t>(channel)]]);
                    }
                }
            }
        }
    }
    return found;
}

// The pixels of a tile of a picture, channel by channel.
void addTile(const Image& image, int64_t left, int64_t top, int64_t side, const Levels& levels, Visual& visual) {
    for (size_t channel = 0; channel < 3; ++channel) {
        for (int64_t y = 0; y < side; ++y) {
            const uint8_t* from = image.row(static_cast<int32_t>(top + y)) + left * 3;
            for (int64_t x = 0; x < side; ++x) {
                visual.pixels.push_back(levels.values[channel][from[3 * x + static_cast<int64_t>(channel)]]);
            }
        }
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
    addTile(scaled, 0, 0, side, Levels(p), found);
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
    if (count * side * side > kMostPrepared) throw Error("the picture is scaled beyond any memory: crop it");
    Image canvas(static_cast<int32_t>(columns * side), static_cast<int32_t>(rows * side));
    scale(image, canvas.width, canvas.height, p, 0, 0, canvas);
    Visual found;
    found.grid = {rows * p.tileSide, columns * p.tileSide, p.tileSide};
    found.shape = {all, 3, side, side};
    found.pixels.reserve(static_cast<size_t>(all * 3 * side * side));
    const Levels levels(p);
    for (int64_t tile = 0; tile < count; ++tile) {
        addTile(canvas, tile % columns * side, tile / columns * side, side, levels, found);
    }
    if (count > 1) {
        Image thumbnail(p.tilePixels, p.tilePixels);
        scale(image, side, side, p, 0, 0, thumbnail);
        addTile(thumbnail, 0, 0, side, levels, found);
    }
    return found;
}

}  // namespace

std::vector<int32_t> Grid::blocks() const {
    if (tile == 0) return {rows * columns};
    const int32_t count = rows * columns / (tile * tile);
    return std::vector<int32_t>(static_cast<size_t>(count + (count > 1 ? 1 : 0)), tile * tile);
}

int32_t Grid::visual() const {
    int32_t sum = 0;
    for (const int32_t block : blocks()) sum += block;
    return sum;
}

int32_t tokenSide(const Preprocessing& p) {
    return p.kind == Preprocessing::Kind::kPatches ? p.patchSize * p.mergeSize : p.tilePixels / p.tileSide;
}

Visual prepare(const Image& image, const Manifest& manifest) {
    checkImage(image.width, image.height, "the picture");
    const Preprocessing& p = manifest.preprocessing;
    Visual found;
    if (p.kind == Preprocessing::Kind::kPatches) {
        found = patches(image, manifest);
    } else {
        checkShape(image, kTilesAspect);
        found = p.crop ? middle(image, manifest) : tiles(image, manifest);
    }
    checkTokens(found.grid.visual(), manifest);
    found.width = image.width;
    found.height = image.height;
    if (found.covered.right == 0) found.covered = {0, 0, image.width, image.height};
    return found;
}

}  // namespace ivc
