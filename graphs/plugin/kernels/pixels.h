// Makes pixels, as a vision graph takes them, of the levels of a picture.
#pragma once

#include "ivc_types.h"
#include "team.h"

namespace ivc {

constexpr int kPixelThreads = 256;

struct Pixels {
    IvcPixels extents;
    const uint8_t* levels;
    float* pixels;
};

inline bool possible(const IvcPixels& p) {
    return p.outer > 0 && p.given > 0 && p.frames > 0 && p.frames % p.given == 0 && p.inner > 0;
}

// One block makes the pixels of kPixelThreads levels.
inline int64_t pixelBlocks(const IvcPixels& p) {
    return (int64_t{3} * p.outer * p.given * p.inner + kPixelThreads - 1) / kPixelThreads;
}

// Rounded after each step, as the host does it: a fused step would give another last bit.
IVC_HD inline float scaledLevel(float level, float factor, float mean, float std) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(__fsub_rn(__fmul_rn(level, factor), mean), std);
#else
    return (level * factor - mean) / std;
#endif
}

IVC_BLOCK void scalePixels(const Team& team, const Pixels& p, int64_t block) {
    const IvcPixels& e = p.extents;
    team.each([&](int thread) {
        const int64_t level = block * kPixelThreads + thread;
        const int64_t frame = level / e.inner, plane = frame / e.given;
        if (plane >= int64_t{3} * e.outer) return;
        const int channel = static_cast<int>(plane % 3);
        const float made = scaledLevel(static_cast<float>(p.levels[level]), e.factor, e.mean[channel], e.std[channel]);
        float* to = p.pixels + plane * e.frames * e.inner + level % e.inner;
        for (int64_t f = frame % e.given; f < e.frames; f += e.given) to[f * e.inner] = made;
    });
}

}  // namespace ivc
