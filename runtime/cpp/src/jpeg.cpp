// JPEG, by libjpeg's own defaults, as Pillow decodes it.
#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include <jerror.h>
#include <jpeglib.h>

#include "ivc/error.h"
#include "ivc/image.h"

namespace ivc {
namespace {

constexpr long kMostScans = 200;  // progressive files may hold thousands, each of which costs a pass over the picture

// libjpeg's state, and where it jumps to when it fails. It never owns what C++ destroys.
struct Decoder {
    jpeg_decompress_struct state;
    jpeg_error_mgr errors;
    jpeg_progress_mgr progress;
    std::jmp_buf failed;
    char message[JMSG_LENGTH_MAX];
};

Decoder* of(j_common_ptr state) { return static_cast<Decoder*>(state->client_data); }

void fail(j_common_ptr state) {
    state->err->format_message(state, of(state)->message);
    std::longjmp(of(state)->failed, 1);
}

void report(j_common_ptr state, int level) {
    if (level >= 0 || state->err->msg_code != JWRN_JPEG_EOF) return;
    std::strcpy(of(state)->message, "the file is truncated");
    std::longjmp(of(state)->failed, 1);
}

void watch(j_common_ptr state) {
    if (reinterpret_cast<j_decompress_ptr>(state)->input_scan_number <= kMostScans) return;
    std::strcpy(of(state)->message, "it has too many scans");
    std::longjmp(of(state)->failed, 1);
}

void open(Decoder& d, const std::string& bytes) {
    d.state.err = jpeg_std_error(&d.errors);
    d.errors.error_exit = fail;
    d.errors.emit_message = report;
    d.state.client_data = &d;
    jpeg_create_decompress(&d.state);
    d.progress.progress_monitor = watch;
    d.state.progress = &d.progress;
    jpeg_mem_src(&d.state, reinterpret_cast<const unsigned char*>(bytes.data()), static_cast<unsigned long>(bytes.size()));
    jpeg_save_markers(&d.state, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(&d.state, TRUE);
}

// Reads rows into `target`, of `components` bytes a pixel.
void decode(Decoder& d, J_COLOR_SPACE space, uint8_t* target) {
    d.state.out_color_space = space;
    jpeg_start_decompress(&d.state);
    const size_t row = static_cast<size_t>(d.state.output_width) * static_cast<size_t>(d.state.output_components);
    while (d.state.output_scanline < d.state.output_height) {
        JSAMPROW to = target + d.state.output_scanline * row;
        jpeg_read_scanlines(&d.state, &to, 1);
    }
    jpeg_finish_decompress(&d.state);
}

// What EXIF says, or else XMP.
int32_t orientation(const jpeg_decompress_struct& state) {
    int32_t exif = 0, xmp = 0;
    bool exifSeen = false;
    const char space[] = "http://ns.adobe.com/xap/1.0/";
    for (auto marker = state.marker_list; marker != nullptr; marker = marker->next) {
        const size_t size = marker->data_length;
        if (!exifSeen && size > 6 && std::memcmp(marker->data, "Exif\0\0", 6) == 0) {
            exif = exifOrientation(marker->data + 6, size - 6);
            exifSeen = true;
        } else if (size > sizeof space && std::memcmp(marker->data, space, sizeof space) == 0) {
            xmp = xmpOrientation(std::string(reinterpret_cast<char*>(marker->data) + sizeof space, size - sizeof space));
        }
    }
    return exif != 0 ? exif : xmp;
}

// Calls what may fail within libjpeg, which jumps out of it: nothing in there may need a destructor.
template <class Step>
bool succeeds(Decoder& d, const Step& step) {
    if (setjmp(d.failed) != 0) return false;
    step();
    return true;
}

// Adobe's inverted CMYK to RGB, without a colour profile, as Pillow does.
void fromCmyk(const std::vector<uint8_t>& cmyk, bool inverted, Image& image) {
    for (size_t i = 0; i < cmyk.size() / 4; ++i) {
        const auto ink = [&](size_t channel) { return inverted ? 255 - cmyk[4 * i + channel] : cmyk[4 * i + channel]; };
        const int32_t white = 255 - ink(3);
        for (size_t channel = 0; channel < 3; ++channel) {
            const int32_t product = ink(channel) * white + 128;
            const int32_t value = white - (((product >> 8) + product) >> 8);
            image.pixels[3 * i + channel] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
        }
    }
}

}  // namespace

Image decodeJpeg(const std::string& bytes, const std::string& name, int64_t most) {
    Decoder d{};
    struct Closing {
        Decoder& decoder;
        ~Closing() { jpeg_destroy_decompress(&decoder.state); }
    } closing{d};
    const auto step = [&](const auto& call) {
        if (succeeds(d, call)) return;
        throw Error(name + " cannot be read as a picture (" + d.message + "): give a PNG or JPEG file");
    };
    step([&] { open(d, bytes); });
    const auto width = static_cast<int64_t>(d.state.image_width), height = static_cast<int64_t>(d.state.image_height);
    const int32_t channels = d.state.num_components, turned = orientation(d.state);
    checkImage(width, height, name, most);
    if (channels != 1 && channels != 3 && channels != 4) {
        throw Error(name + " has " + std::to_string(channels) + " colour channels: convert it to RGB");
    }
    Image image(static_cast<int32_t>(width), static_cast<int32_t>(height));
    std::vector<uint8_t> other;  // of one or four bytes a pixel
    if (channels != 3) other.resize(static_cast<size_t>(width * height * channels));
    uint8_t* target = channels == 3 ? image.pixels.data() : other.data();
    const J_COLOR_SPACE space = channels == 1 ? JCS_GRAYSCALE : channels == 3 ? JCS_RGB : JCS_CMYK;
    step([&] { decode(d, space, target); });
    const bool adobe = d.state.saw_Adobe_marker != 0;
    if (channels == 1) {
        for (size_t i = 0; i < other.size(); ++i) std::memset(&image.pixels[3 * i], other[i], 3);
    } else if (channels == 4) {
        fromCmyk(other, adobe, image);
    }
    return upright(std::move(image), turned);
}

}  // namespace ivc
