// manifest.json: what a runtime needs to know about a bundle, checked before anything is computed of it.
//
// Names as in ivc_export/contract/manifest.py, which says what each field means.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ivc/json.h"

namespace ivc {

enum class Blanks { kNone, kNewlines, kBlanks };

struct Segment {
    std::string before, behind;
};

struct Spoken : Segment {
    Blanks left = Blanks::kNone, right = Blanks::kNone;
};

struct ChatSegments {
    std::optional<Spoken> begin;
    std::string beginWithoutSystem, assistantOpen;
    Segment firstUser, user;
    Spoken text, past;
    std::optional<std::string> thinkingEnd;
    Blanks thinkingLeft = Blanks::kNone;
    std::string picture, pictureLine;
    bool picturesFirst = false;
};

struct Decoder {
    int32_t layers = 0, hiddenSize = 0, heads = 0, kvHeads = 0, headDim = 0, valueDim = 0, vocabSize = 0;
    int32_t maxPositions = 0, deepstack = 0;
};

struct SelectionRule {
    std::string method = "ivc-prune";
    double ivcFraction = 0;
    double rowFraction = 0;  // where there are views
    int32_t queryOffset = 0;
    bool tiles = false, views = false;
    std::vector<int32_t> wholeLayers;
};

struct Preprocessing {
    enum class Kind { kPatches, kTiles, kViews };
    Kind kind = Kind::kPatches;
    float rescaleFactor = 0;
    std::array<float, 3> mean{}, std{};
    std::string resample;
    int32_t patchSize = 0, mergeSize = 0, temporalPatchSize = 0, minPixels = 0, maxPixels = 0;  // of patches
    int32_t tilePixels = 0, tileSide = 0;                  // of tiles, and of views
    int32_t minTiles = 0, maxTiles = 0;                    // of tiles
    bool crop = false;                                     // of one tile
    int32_t tokenSide = 0;                                 // of views, as the next two
    std::vector<std::pair<int32_t, int32_t>> shapes;       // columns and rows of tiles
    float filling = 0;                                     // the level of what is filled up, times rescaleFactor

    bool cut() const { return kind == Kind::kTiles && !crop; }  // into tiles, with a thumbnail behind several
    bool twice() const { return kind == Kind::kViews; }         // shown in two views
};

struct SpecialTokens {
    int32_t image = 0;
    std::optional<int32_t> visionStart, visionEnd, video;
    bool templateMarks = false;
    std::vector<int32_t> stop;

    bool isVisual(int32_t token) const { return token == image || token == video; }
};

// Of a tensor: how far it reaches along one axis, or the axis's name where a run decides, such as "S".
struct Extent {
    int64_t size = 0;
    std::string axis;
};

struct Tensor {
    std::string name, dtype;
    std::vector<Extent> shape;
};

struct Graph {
    std::string file, sha256;
    std::vector<Tensor> inputs, outputs;
};

struct WeightFile {
    std::string file, headerSha256;
    std::optional<std::string> sha256;  // of the whole file, where somebody has read it
    uint64_t size = 0;
};

// Floats, [vocabulary, hidden]; or where `block` is not 0 bytes, [vocabulary, blocks, block], each less 128 and times its
// block's scale: floats, [vocabulary, blocks].
struct EmbeddingTable {
    std::string file, dtype;  // of the floats
    uint64_t offset = 0, scales = 0;
    int32_t block = 0;
};

struct Manifest {
    std::string family, dtype, lowering;
    int32_t selectionLayer = 0, maxVisual = 0;
    double defaultRatio = 0, theta = 0, residualScale = 1;
    std::vector<int32_t> sections;
    Decoder decoder;
    SelectionRule selection;
    Preprocessing preprocessing;
    SpecialTokens tokens;
    std::map<std::string, Graph> graphs;
    EmbeddingTable embedding;
    std::vector<WeightFile> weights;
    std::optional<ChatSegments> chat;

    size_t axes() const { return sections.size(); }
    int32_t turned() const;  // values of a head that rotary embedding turns
};

// Of the text of a manifest.json; `what` names it in errors.
Manifest parseManifest(const std::string& text, const std::string& what);

// Of the bundle in `folder`, with the sizes and headers of the files that it names.
Manifest readManifest(const std::string& folder);

// SHA-256 over the fields that decide answers, as ivc_export.contract.manifest.constants_sha256 computes it.
std::string constantsSha256(const Json& manifest);

}  // namespace ivc
