// Reads picture files to RGB pixels, with the same values as Pillow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ivc {

constexpr int64_t kMostPixels = 80'000'000;  // the most pixels of a picture file

// An RGB picture: three bytes a pixel, row by row.
struct Image {
    int32_t width = 0, height = 0;
    std::vector<uint8_t> pixels;

    Image() = default;
    // A black picture. Throws std::bad_alloc if there is not enough memory.
    Image(int32_t width_, int32_t height_)
        : width(width_), height(height_), pixels(static_cast<size_t>(width_) * static_cast<size_t>(height_) * 3) {}
    // The first byte of row y, 0 to height - 1.
    uint8_t* row(int32_t y) { return pixels.data() + static_cast<size_t>(y) * static_cast<size_t>(width) * 3; }
    const uint8_t* row(int32_t y) const {
        return pixels.data() + static_cast<size_t>(y) * static_cast<size_t>(width) * 3;
    }
};

// Decodes the bytes of a JPEG or PNG file, and turns the picture as its EXIF orientation says. name: for errors. most: the
// most pixels to decode. Throws if the file is of another kind, is damaged, or has several frames, a single pixel, or more
// than `most` pixels.
Image decodeImage(const std::string& bytes, const std::string& name, int64_t most = kMostPixels);
// The same for a file of at most 512 MiB.
Image readImage(const std::string& path);

// Copies pixels of three bytes. stride: bytes from the beginning of a row to that of the next. bgr: whether pixels are BGR,
// which many cameras give, not RGB. Throws if rows would overlap.
Image copyImage(const uint8_t* data, int32_t width, int32_t height, size_t stride, bool bgr);

// Throws if a picture has a single pixel, or more than `most`.
void checkImage(int64_t width, int64_t height, const std::string& name, int64_t most = kMostPixels);

// Writes a PNG file. Throws if that fails.
void writePng(const Image& image, const std::string& path);

// The orientation in EXIF data (a TIFF structure), 1 to 8; 0 if there is none.
int32_t exifOrientation(const uint8_t* data, size_t size);
// The same for XMP text.
int32_t xmpOrientation(const std::string& xmp);

// The picture, turned as an orientation of 2 to 8 says. Other values change nothing.
Image upright(Image image, int32_t orientation);

// decodeImage for a JPEG, and for a PNG file.
Image decodeJpeg(const std::string& bytes, const std::string& name, int64_t most);
Image decodePng(const std::string& bytes, const std::string& name, int64_t most);

}  // namespace ivc
