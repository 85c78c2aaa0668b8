// Picture files to RGB pixels, as Pillow converts them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ivc {

constexpr int64_t kMostPixels = 80'000'000;  // of a picture file

// An RGB picture: three bytes a pixel, row by row.
struct Image {
    int32_t width = 0, height = 0;
    std::vector<uint8_t> pixels;

    Image() = default;
    // A black picture. Throws std::bad_alloc where there is no memory for it.
    Image(int32_t width_, int32_t height_)
        : width(width_), height(height_), pixels(static_cast<size_t>(width_) * static_cast<size_t>(height_) * 3) {}
    // The first byte of row y, which is of 0 to height - 1.
    uint8_t* row(int32_t y) { return pixels.data() + static_cast<size_t>(y) * static_cast<size_t>(width) * 3; }
    const uint8_t* row(int32_t y) const {
        return pixels.data() + static_cast<size_t>(y) * static_cast<size_t>(width) * 3;
    }
};

// A JPEG or PNG file's picture, turned as its EXIF orientation says. name: names it in errors. most: pixels that are
// decoded at most. Throws where it is neither, is damaged, has several frames, one pixel, or more than `most`.
Image decodeImage(const std::string& bytes, const std::string& name, int64_t most = kMostPixels);
// The same of a file, of at most 512 MiB.
Image readImage(const std::string& path);

// A copy of rows of RGB pixels, or of BGR ones as cameras give them, `stride` bytes apart. Throws where rows would overlap.
Image copyImage(const uint8_t* data, int32_t width, int32_t height, size_t stride, bool bgr);

// Refuses a picture of one pixel, or of too many.
void checkImage(int64_t width, int64_t height, const std::string& name, int64_t most = kMostPixels);

// Writes a PNG file. Throws where it cannot.
void writePng(const Image& image, const std::string& path);

// The value of EXIF's orientation, 1 to 8, within a TIFF structure; 0 where it says nothing.
int32_t exifOrientation(const uint8_t* data, size_t size);
// The same within XMP's text.
int32_t xmpOrientation(const std::string& xmp);

// A picture turned as an orientation says; other values than 2 to 8 leave it.
Image upright(Image image, int32_t orientation);

// What decodeImage does of a JPEG, and of a PNG file.
Image decodeJpeg(const std::string& bytes, const std::string& name, int64_t most);
Image decodePng(const std::string& bytes, const std::string& name, int64_t most);

}  // namespace ivc
