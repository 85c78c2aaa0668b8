// A JPEG or PNG file, made ready in every way.
#include <cstddef>
#include <cstdint>

#include "ivc/error.h"
#include "ivc/image.h"
#include "ivc/visual.h"

namespace {

constexpr int64_t kMost = 1 << 18;

ivc::Manifest settings(ivc::Preprocessing::Kind kind) {
    ivc::Manifest m;
    m.maxVisual = 64;
    ivc::Preprocessing& p = m.preprocessing;
    p.kind = kind;
    p.rescaleFactor = 1 / 255.0f;
    p.std = {1, 1, 1};
    p.resample = "bicubic";
    p.patchSize = 4;
    p.mergeSize = p.temporalPatchSize = 2;
    p.minPixels = 64;
    p.maxPixels = 4096;
    p.tilePixels = 16;
    p.tileSide = 2;
    p.minTiles = 1;
    p.maxTiles = 6;
    p.tokenSide = 8;
    p.shapes = {{1, 1}, {2, 1}, {1, 3}};
    p.filling = 127;
    return m;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try {
        const ivc::Image image =
            ivc::decodeImage(std::string(reinterpret_cast<const char*>(data), size), "the picture", kMost);
        using Kind = ivc::Preprocessing::Kind;
        for (const auto kind : {Kind::kPatches, Kind::kTiles, Kind::kViews}) {
            try {
                ivc::prepare(image, settings(kind));
            } catch (const ivc::Error&) {
            }
        }
    } catch (const ivc::Error&) {
    }
    return 0;
}
