#include "ivc/image.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "ivc/error.h"
#include "ivc/files.h"

namespace ivc {
namespace {

constexpr uint64_t kMostFileBytes = 512u << 20;

bool beginsWith(const std::string& bytes, const char* signature, size_t size) {
    return bytes.size() >= size && std::memcmp(bytes.data(), signature, size) == 0;
}

}  // namespace

void checkImage(int64_t width, int64_t height, const std::string& name, int64_t most) {
    if (width < 1 || height < 1) throw Error(name + " has no pixels: give another picture");
    if (std::max(width, height) < 2) {
        throw Error(name + " is a single pixel, which shows nothing: give a larger picture");
    }
    if (width > most || height > most || width * height > most) {
        throw Error(name + " has more than " + std::to_string(most / 1'000'000) + " megapixels: scale it down");
    }
}

Image decodeImage(const std::string& bytes, const std::string& name, int64_t most) {
    if (beginsWith(bytes, "\xff\xd8\xff", 3)) return decodeJpeg(bytes, name, most);
    if (beginsWith(bytes, "\x89PNG\r\n\x1a\n", 8)) return decodePng(bytes, name, most);
    throw Error(name + " is neither JPEG nor PNG: convert it");
}

Image readImage(const std::string& path) {
    return decodeImage(readFile(path, "check the picture's path", kMostFileBytes), path);
}

Image copyImage(const uint8_t* data, int32_t width, int32_t height, size_t stride, bool bgr) {
    checkImage(width, height, "the picture");
    Image image(width, height);
    const size_t row = static_cast<size_t>(width) * 3;
    if (stride < row) throw Error("the picture's rows overlap: give a stride of at least three bytes a pixel");
    for (int32_t y = 0; y < height; ++y) {
        const uint8_t* from = data + static_cast<size_t>(y) * stride;
        uint8_t* to = image.row(y);
        std::memcpy(to, from, row);
        if (!bgr) continue;
        for (size_t x = 0; x < row; x += 3) std::swap(to[x], to[x + 2]);
    }
    return image;
}

int32_t exifOrientation(const uint8_t* data, size_t size) {
    if (size < 8) return 0;
    const bool little = data[0] == 'I' && data[1] == 'I';
    if (!little && !(data[0] == 'M' && data[1] == 'M')) return 0;
    const auto number = [&](size_t at, size_t bytes) {
        uint32_t value = 0;
        for (size_t i = 0; i < bytes; ++i) value = value << 8 | data[at + (little ? bytes - 1 - i : i)];
        return value;
    };
    const size_t directory = number(4, 4);
    if (directory > size - 2) return 0;
    const size_t entries = number(directory, 2);
    for (size_t i = 0; i < entries && directory + 2 + 12 * (i + 1) <= size; ++i) {
        const size_t entry = directory + 2 + 12 * i;
        if (number(entry, 2) != 0x0112) continue;
        const uint32_t type = number(entry + 2, 2);
        const uint32_t value = type == 3 ? number(entry + 8, 2) : type == 4 ? number(entry + 8, 4) : 0;
        return value <= 8 ? static_cast<int32_t>(value) : 1;
    }
    return 0;
}

int32_t xmpOrientation(const std::string& xmp) {
    const std::string key = "tiff:Orientation";
    for (size_t at = xmp.find(key); at != std::string::npos; at = xmp.find(key, at + 1)) {
        const std::string rest = xmp.substr(at + key.size(), 3);
        const size_t digit = rest.compare(0, 2, "=\"") == 0 ? 2 : rest.compare(0, 1, ">") == 0 ? 1 : 3;
        if (digit < rest.size() && rest[digit] >= '0' && rest[digit] <= '9') return rest[digit] - '0';
    }
    return 0;
}

Image upright(Image image, int32_t orientation) {
    if (orientation < 2 || orientation > 8) return image;
    const bool turned = orientation >= 5;
    const int32_t width = image.width, height = image.height;
    Image found(turned ? height : width, turned ? width : height);
    for (int32_t y = 0; y < found.height; ++y) {
        uint8_t* to = found.row(y);
        for (int32_t x = 0; x < found.width; ++x, to += 3) {
            int32_t fromX = turned ? y : x, fromY = turned ? x : y;
            if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) fromX = width - 1 - fromX;
            if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) fromY = height - 1 - fromY;
            std::memcpy(to, image.row(fromY) + static_cast<size_t>(fromX) * 3, 3);
        }
    }
    return found;
}

}  // namespace ivc
