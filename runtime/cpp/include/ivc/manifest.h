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

// What is stripped from an end of a text: nothing, newlines, or all that Python's str.strip strips.
enum class Blanks { kNone, kNewlines, kBlanks };

// What the chat template writes before and behind something.
struct Segment {
    std::string before, behind;
};

// A text in a conversation: what is stripped from its ends, and what is then written around it.
struct Spoken : Segment {
    Blanks left = Blanks::kNone, right = Blanks::kNone;
};

// A chat template without Jinja; `render` puts a conversation together of it.
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

// Sizes of the language decoder.
struct Decoder {
    int32_t layers = 0, hiddenSize = 0, heads = 0, kvHeads = 0, headDim = 0, valueDim = 0, vocabSize = 0;
    int32_t maxPositions = 0, deepstack = 0;
};

// How visual tokens are chosen, as far as the host is concerned.
struct SelectionRule {
    std::string method = "ivc-prune";
    double ivcFraction = 0;
    double rowFraction = 0;  // where there are views
    int32_t queryOffset = 0;
    bool tiles = false, views = false;
    std::vector<int32_t> wholeLayers;
};

// How a picture becomes what the vision graph takes.
struct Preprocessing {
    // Patches at its own size, tiles of a fixed one, or two views of tiles.
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

// Token ids that a runtime must know.
struct SpecialTokens {
    int32_t image = 0;
    std::optional<int32_t> visionStart, visionEnd, video;
    bool templateMarks = false;
    std::vector<int32_t> stop;

    // Whether it stands for a visual token, of a picture or of a video.
    bool isVisual(int32_t token) const { return token == image || token == video; }
};

// Of a tensor: how far it reaches along one axis, or the axis's name where a run decides, such as "S".
struct Extent {
    int64_t size = 0;
    std::string axis;
};

// An input or output of a graph.
struct Tensor {
    std::string name, dtype;
    std::vector<Extent> shape;
};

// One graph of the bundle; `sha256` is of its file, which holds no weights.
struct Graph {
    std::string file, sha256;
    std::vector<Tensor> inputs, outputs;
};

// A safetensors file of the bundle, its size in bytes.
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

// All that a runtime needs of it.
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

    // Rotary positions of a row: 1, or 3 where pictures spread over rows and columns.
    size_t axes() const { return sections.size(); }
    int32_t turned() const;  // values of a head that rotary embedding turns
};

// Of the text of a manifest.json; `what` names it in errors. Throws where it is damaged, edited, or of another version.
Manifest parseManifest(const std::string& text, const std::string& what);

// Of the bundle in `folder`. Throws as parseManifest, and where files that it names are missing, outside the bundle, or of
// other sizes or headers.
Manifest readManifest(const std::string& folder);

// SHA-256 over the fields that decide answers, as ivc_export.contract.manifest.constants_sha256 computes it.
std::string constantsSha256(const Json& manifest);

}  // namespace ivc
