// PNG, by libpng, as Pillow makes RGB of it: 16 bits lose their lower half, grey ones what is above 255, alpha is
// dropped, and a transparent colour stays that colour.
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <vector>

#include <png.h>

#include "ivc/error.h"
#include "ivc/image.h"

namespace ivc {
namespace {

constexpr png_alloc_size_t kMostChunk = 8u << 20;

// libpng's state, and where it jumps to when it fails. It never owns what C++ destroys.
struct Decoder {
    png_structp state = nullptr;
    png_infop info = nullptr, end = nullptr;
    const std::string* bytes = nullptr;
    size_t at = 0;
    bool animated = false;
    char message[160] = "it is damaged";

    ~Decoder() { png_destroy_read_struct(&state, &info, &end); }
};

void fail(png_structp state, png_const_charp message) {
    auto* decoder = static_cast<Decoder*>(png_get_error_ptr(state));
    std::snprintf(decoder->message, sizeof decoder->message, "%s", message);
    png_longjmp(state, 1);
}

void ignore(png_structp, png_const_charp) {}

void give(png_structp state, png_bytep target, size_t size) {
    auto* decoder = static_cast<Decoder*>(png_get_io_ptr(state));
    if (size > decoder->bytes->size() - decoder->at) png_error(state, "the file is truncated");
    std::memcpy(target, decoder->bytes->data() + decoder->at, size);
    decoder->at += size;
}

int unknown(png_structp state, png_unknown_chunkp chunk) {
    auto* decoder = static_cast<Decoder*>(png_get_user_chunk_ptr(state));
    const png_byte* d = chunk->data;
    if (std::memcmp(chunk->name, "acTL", 4) == 0 && chunk->size >= 8) {
        decoder->animated = (d[0] | d[1] | d[2]) != 0 || d[3] > 1;
    }
    return 1;
}

// Calls what may fail within libpng, which jumps out of it: nothing in there may need a destructor.
template <class Step>
bool succeeds(Decoder& d, const Step& step) {
    if (setjmp(png_jmpbuf(d.state)) != 0) return false;
    step();
    return true;
}

// What an eXIf chunk says, or else XMP, of all that was read.
int32_t orientation(Decoder& d) {
    int32_t found = 0;
    for (png_infop info : {d.info, d.end}) {
        png_uint_32 size = 0;
        png_bytep exif = nullptr;
        if (found == 0 && png_get_eXIf_1(d.state, info, &size, &exif) != 0) found = exifOrientation(exif, size);
    }
    for (png_infop info : {d.info, d.end}) {
        png_textp texts = nullptr;
        int count = 0;
        png_get_text(d.state, info, &texts, &count);
        for (int i = 0; i < count && found == 0; ++i) {
            if (std::strcmp(texts[i].key, "XML:com.adobe.xmp") == 0) found = xmpOrientation(texts[i].text);
        }
    }
    return found;
}

// Samples of every pixel, `depth` bits each, as bytes of RGB.
class Converter {
   public:
    Converter(Decoder& d, int depth, int colour) : depth_(depth), colour_(colour) {
        for (int i = 0; i < 256; ++i) std::memset(palette_[i], i, 3);
        png_colorp colours = nullptr;
        int count = 0;
        if (colour == PNG_COLOR_TYPE_PALETTE) png_get_PLTE(d.state, d.info, &colours, &count);
        for (int i = 0; i < count; ++i) {
            palette_[i][0] = colours[i].red;
            palette_[i][1] = colours[i].green;
            palette_[i][2] = colours[i].blue;
        }
    }

    void row(const uint8_t* from, uint8_t* to, int32_t width) const {
        const int32_t channels = colour_ == PNG_COLOR_TYPE_GRAY_ALPHA ? 2
                                 : colour_ == PNG_COLOR_TYPE_RGB      ? 3
                                 : colour_ == PNG_COLOR_TYPE_RGBA     ? 4
                                                                      : 1;
        const int32_t size = depth_ == 16 ? 2 : 1;
        for (int32_t x = 0; x < width; ++x, to += 3, from += channels * size) {
            if (colour_ == PNG_COLOR_TYPE_PALETTE) {
                std::memcpy(to, palette_[from[0]], 3);
            } else if (channels >= 3) {
                for (int32_t i = 0; i < 3; ++i) to[i] = from[i * size];
            } else {
                std::memset(to, grey(from, channels), 3);
            }
        }
    }

   private:
    int grey(const uint8_t* from, int32_t channels) const {
        if (depth_ == 16) return channels == 2 ? from[0] : from[0] != 0 ? 255 : from[1];
        return depth_ == 8 ? from[0] : from[0] * 255 / ((1 << depth_) - 1);
    }

    int depth_, colour_;
    uint8_t palette_[256][3];
};

}  // namespace

Image decodePng(const std::string& bytes, const std::string& name, int64_t most) {
    Decoder d;
    d.bytes = &bytes;
    d.state = png_create_read_struct(PNG_LIBPNG_VER_STRING, &d, fail, ignore);
    if (d.state != nullptr) d.info = png_create_info_struct(d.state);
    if (d.info != nullptr) d.end = png_create_info_struct(d.state);
    if (d.end == nullptr) throw Error("there is no memory for " + name + ": close other programs");
    const auto step = [&](const auto& call) {
        if (succeeds(d, call)) return;
        throw Error(name + " cannot be read as a picture (" + d.message + "): give a PNG or JPEG file");
    };
    step([&] {
        png_set_read_fn(d.state, &d, give);
        png_set_read_user_chunk_fn(d.state, &d, unknown);
        png_set_chunk_malloc_max(d.state, kMostChunk);
        png_read_info(d.state, d.info);
    });
    png_uint_32 width = 0, height = 0;
    int depth = 0, colour = 0, interlace = 0;
    png_get_IHDR(d.state, d.info, &width, &height, &depth, &colour, &interlace, nullptr, nullptr);
    checkImage(width, height, name, most);
    if (d.animated) throw Error(name + " has several frames: give one frame as a picture");
    size_t size = 0;
    step([&] {
        png_set_packing(d.state);
        png_set_interlace_handling(d.state);
        png_read_update_info(d.state, d.info);
        size = png_get_rowbytes(d.state, d.info);
    });
    const Converter converter(d, depth, colour);
    Image image(static_cast<int32_t>(width), static_cast<int32_t>(height));
    std::vector<uint8_t> samples(interlace == PNG_INTERLACE_NONE ? size : size * height);
    for (uint32_t y = 0; y < height && interlace == PNG_INTERLACE_NONE; ++y) {
        step([&] { png_read_row(d.state, samples.data(), nullptr); });
        converter.row(samples.data(), image.row(static_cast<int32_t>(y)), image.width);
    }
    if (interlace != PNG_INTERLACE_NONE) {
        std::vector<png_bytep> rows(height);
        for (uint32_t y = 0; y < height; ++y) rows[y] = samples.data() + y * size;
        step([&] { png_read_image(d.state, rows.data()); });
        for (uint32_t y = 0; y < height; ++y) {
            converter.row(rows[y], image.row(static_cast<int32_t>(y)), image.width);
        }
    }
    step([&] { png_read_end(d.state, d.end); });
    return upright(std::move(image), orientation(d));
}

void writePng(const Image& image, const std::string& path) {
    png_image header{};
    header.version = PNG_IMAGE_VERSION;
    header.width = static_cast<png_uint_32>(image.width);
    header.height = static_cast<png_uint_32>(image.height);
    header.format = PNG_FORMAT_RGB;
    if (png_image_write_to_file(&header, path.c_str(), 0, image.pixels.data(), 0, nullptr) == 0) {
        throw Error(path + " cannot be written (" + header.message + "): check the folder");
    }
}

}  // namespace ivc
