#include "ivc/resize.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <thread>

#include "ivc/error.h"

namespace ivc {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr int32_t kBits = 22;  // of fractions: what 8-bit values leave of 32 bits, with one for the sign and one spare

double sinc(double x) { return x == 0 ? 1 : std::sin(x * kPi) / (x * kPi); }

double reach(Resample filter) {
    switch (filter) {
        case Resample::kBilinear:
        case Resample::kHamming: return 1;
        case Resample::kBicubic: return 2;
        case Resample::kLanczos: return 3;
        default: return 0.5;
    }
}

double weight(Resample filter, double x) {
    const double distance = std::fabs(x);
    switch (filter) {
        case Resample::kBilinear: return distance < 1 ? 1 - distance : 0;
        case Resample::kHamming:
            if (distance == 0) return 1;
            return distance < 1 ? sinc(distance) * (0.54 + 0.46 * std::cos(distance * kPi)) : 0;
        case Resample::kBicubic: {
            const double a = -0.5;
            if (distance < 1) return ((a + 2) * distance - (a + 3)) * distance * distance + 1;
            return distance < 2 ? (((distance - 5) * distance + 8) * distance - 4) * a : 0;
        }
        case Resample::kLanczos: return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0;
        default: return x > -0.5 && x <= 0.5 ? 1 : 0;
    }
}

// For each place of a line from `first` on, which pixels of the line it was make it, and how much each counts.
struct Weights {
    std::vector<int32_t> starts, counts, values;
    size_t most = 0;

    Weights(int32_t from, int32_t to, int32_t first, int32_t places, Resample filter) {
        const double scale = static_cast<double>(from) / to, wide = std::max(scale, 1.0);
        const double support = reach(filter) * wide;
        most = static_cast<size_t>(std::ceil(support)) * 2 + 1;
        values.assign(static_cast<size_t>(places) * most, 0);
        std::vector<double> exact(most);
        for (int32_t place = 0; place < places; ++place) {
            const double centre = (first + place + 0.5) * scale;
            const int32_t start = std::max(0, static_cast<int32_t>(centre - support + 0.5));
            const int32_t count = std::min(from, static_cast<int32_t>(centre + support + 0.5)) - start;
            double sum = 0;
            for (int32_t i = 0; i < count; ++i) {
                exact[static_cast<size_t>(i)] = weight(filter, (i + start - centre + 0.5) * (1 / wide));
                sum += exact[static_cast<size_t>(i)];
            }
            for (int32_t i = 0; i < count; ++i) {
                double value = exact[static_cast<size_t>(i)];
                if (sum != 0) value /= sum;
                value *= 1 << kBits;
                values[static_cast<size_t>(place) * most + static_cast<size_t>(i)] =
                    static_cast<int32_t>(value < 0 ? value - 0.5 : value + 0.5);
            }
            starts.push_back(start);
            counts.push_back(count);
        }
    }
};

uint8_t rounded(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

constexpr size_t kMostThreads = 4;

// Calls work(part, first, end) for parts of `rows` rows, side by side if there is enough to compute. It must not throw.
// values: those of a row.
template <class Work>
void inParts(int32_t rows, int32_t values, const Work& work) {
    constexpr int64_t kEnough = 1 << 19;  // values for which a thread is worth starting
    const auto wanted = static_cast<size_t>(int64_t{rows} * values / kEnough);
    const size_t parts = std::min({kMostThreads, static_cast<size_t>(std::thread::hardware_concurrency()), wanted});
    std::vector<std::thread> threads;
    threads.reserve(kMostThreads);
    int32_t first = 0;
    for (size_t part = 1; part < parts; ++part) {
        const auto end = static_cast<int32_t>(int64_t{rows} * static_cast<int64_t>(part) / static_cast<int64_t>(parts));
        try {
            threads.emplace_back(work, part, first, end);
        } catch (const std::exception&) {  // the system has no more threads or memory
            break;
        }
        first = end;
    }
    work(0, first, rows);
    for (std::thread& thread : threads) thread.join();
}

// Each row of `image` resized to `width`; kept are those from `first` on, as many as `target` is wide.
void resizeRows(const Image& image, int32_t width, int32_t first, Resample filter, Image& target) {
    if (width == image.width) {
        for (int32_t y = 0; y < target.height; ++y) {
            const uint8_t* from = image.row(y) + static_cast<size_t>(first) * 3;
            std::copy(from, from + static_cast<size_t>(target.width) * 3, target.row(y));
        }
        return;
    }
    const Weights weights(image.width, width, first, target.width, filter);
    inParts(target.height, 3 * target.width, [&](size_t, int32_t begin, int32_t end) {
        for (int32_t y = begin; y < end; ++y) {
            const uint8_t* from = image.row(y);
            uint8_t* to = target.row(y);
            for (size_t x = 0; x < static_cast<size_t>(target.width); ++x, to += 3) {
                const int32_t* values = &weights.values[x * weights.most];
                const uint8_t* pixel = from + static_cast<size_t>(weights.starts[x]) * 3;
                int32_t red = 1 << (kBits - 1), green = red, blue = red;
                for (int32_t i = 0; i < weights.counts[x]; ++i, pixel += 3) {
                    red += pixel[0] * values[i];
                    green += pixel[1] * values[i];
                    blue += pixel[2] * values[i];
                }
                to[0] = rounded(red);
                to[1] = rounded(green);
                to[2] = rounded(blue);
            }
        }
    });
}

// The same of columns, a row at a time.
void resizeColumns(const Image& image, int32_t height, int32_t first, Resample filter, Image& target) {
    const size_t row = static_cast<size_t>(image.width) * 3;
    if (height == image.height) {
        for (int32_t y = 0; y < target.height; ++y) std::copy(image.row(first + y), image.row(first + y) + row, target.row(y));
        return;
    }
    const Weights weights(image.height, height, first, target.height, filter);
    std::vector<int32_t> all(kMostThreads * row);
    inParts(target.height, 3 * target.width, [&](size_t part, int32_t begin, int32_t end) {
        int32_t* sums = &all[part * row];
        for (int32_t y = begin; y < end; ++y) {
            const auto place = static_cast<size_t>(y);
            std::fill(sums, sums + row, 1 << (kBits - 1));
            for (int32_t i = 0; i < weights.counts[place]; ++i) {
                const int32_t value = weights.values[place * weights.most + static_cast<size_t>(i)];
                const uint8_t* from = image.row(weights.starts[place] + i);
                for (size_t x = 0; x < row; ++x) sums[x] += from[x] * value;
            }
            uint8_t* to = target.row(y);
            for (size_t x = 0; x < row; ++x) to[x] = rounded(sums[x]);
        }
    });
}

// Pixels that the places of a resized line are taken from, one each.
std::vector<int32_t> nearest(int32_t from, int32_t to) {
    std::vector<int32_t> found(static_cast<size_t>(to));
    const double scale = static_cast<double>(from) / to;
    double at = scale * 0.5;  // summed up, as Pillow does
    for (int32_t& place : found) {
        place = std::min(from - 1, static_cast<int32_t>(at));
        at += scale;
    }
    return found;
}

}  // namespace

Resample resampleOf(const std::string& name) {
    const std::pair<const char*, Resample> names[] = {{"nearest", Resample::kNearest}, {"box", Resample::kBox},
        {"bilinear", Resample::kBilinear}, {"hamming", Resample::kHamming}, {"bicubic", Resample::kBicubic},
        {"lanczos", Resample::kLanczos}};
    for (const auto& [known, filter] : names) {
        if (name == known) return filter;
    }
    throw Error("pictures are resampled by " + name + ", which this version does not know: upgrade this library");
}

void resize(const Image& image, int32_t width, int32_t height, Resample filter, int32_t left, int32_t top, Image& part) {
    if (left < 0 || top < 0 || left > width - part.width || top > height - part.height) {
        throw Error("a part of a picture lies outside it: please report this as a bug of the library");
    }
    if (filter == Resample::kNearest) {
        const std::vector<int32_t> columns = nearest(image.width, width), rows = nearest(image.height, height);
        for (int32_t y = 0; y < part.height; ++y) {
            const uint8_t* from = image.row(rows[static_cast<size_t>(top + y)]);
            uint8_t* to = part.row(y);
            for (int32_t x = 0; x < part.width; ++x, to += 3) {
                const uint8_t* pixel = from + static_cast<size_t>(columns[static_cast<size_t>(left + x)]) * 3;
                std::copy(pixel, pixel + 3, to);
            }
        }
        return;
    }
    if (width == image.width && part.width == width) {
        resizeColumns(image, height, top, filter, part);
        return;
    }
    Image across(part.width, image.height);
    resizeRows(image, width, left, filter, across);
    resizeColumns(across, height, top, filter, part);
}

}  // namespace ivc
