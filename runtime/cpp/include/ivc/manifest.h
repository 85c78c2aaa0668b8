// manifest.json: what a runtime must know about a bundle. It is checked before anything uses it.
//
// Names are those of ivc_export/contract/manifest.py, which describes each field.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ivc/json.h"

namespace ivc {

// What is stripped from an end of a text: nothing, newlines, or all characters that Python's str.strip removes.
enum class Blanks { kNone, kNewlines, kBlanks };

// What the chat template writes before and after something.
struct Segment {
    std::string before, behind;
};

// A text in a conversation: what is stripped from its ends, and what is written around it afterwards.
struct Spoken : Segment {
    Blanks left = Blanks::kNone, right = Blanks::kNone;
};

// The parts of a chat template, from which `render` writes a conversation without Jinja.
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

// How visual tokens are selected: the part that the host computes.
struct SelectionRule {
    std::string method = "ivc-prune";
    double ivcFraction = 0;
    double rowFraction = 0;  // if there are views
    int32_t queryOffset = 0;
    bool tiles = false, views = false;
    std::vector<int32_t> wholeLayers;
};

// How a picture is prepared for the vision graph.
struct Preprocessing {
    // Patches at the picture's own size, tiles of a fixed size, or two views of tiles.
    enum class Kind { kPatches, kTiles, kViews };
    Kind kind = Kind::kPatches;
    float rescaleFactor = 0;
    std::array<float, 3> mean{}, std{};
    std::string resample;
    int32_t patchSize = 0, mergeSize = 0, temporalPatchSize = 0, minPixels = 0, maxPixels = 0;  // for patches
    int32_t tilePixels = 0, tileSide = 0;                  // for tiles and for views
    int32_t minTiles = 0, maxTiles = 0;                    // for tiles
    bool crop = false;                                     // for one tile
    int32_t tokenSide = 0;                                 // for views, as are the next two
    std::vector<std::pair<int32_t, int32_t>> shapes;       // columns and rows of tiles
    uint8_t filling = 0;                                   // the level of the padding

    bool cut() const { return kind == Kind::kTiles && !crop; }  // into tiles, with a thumbnail after several
    bool twice() const { return kind == Kind::kViews; }         // whether there are two views
};

// Token ids that a runtime must know.
struct SpecialTokens {
    int32_t image = 0;
    std::optional<int32_t> visionStart, visionEnd, video;
    bool templateMarks = false;
    std::vector<int32_t> stop;

    // Whether a token stands for a visual token of a picture or a video.
    bool isVisual(int32_t token) const { return token == image || token == video; }
};

// The size of a tensor along one axis; or, if it differs from run to run, the axis's name, for example "S".
struct Extent {
    int64_t size = 0;
    std::string axis;
};

// An input or output of a graph.
struct Tensor {
    std::string name, dtype;
    std::vector<Extent> shape;
};

// One graph of the bundle. sha256 is that of its file, which holds no weights.
struct Graph {
    std::string file, sha256;
    std::vector<Tensor> inputs, outputs;
};

// A safetensors file of the bundle. size is in bytes.
struct WeightFile {
    std::string file, headerSha256;
    std::optional<std::string> sha256;  // that of the whole file, if ivc-check --weights has read it
    uint64_t size = 0;
};

// The table of token embeddings. If block is 0, floats, [vocabulary, hidden]. Otherwise bytes, [vocabulary, blocks, block]:
// a value is its byte minus 128, times its block's scale. Scales are floats, [vocabulary, blocks].
struct EmbeddingTable {
    std::string file, dtype;  // the dtype of the floats
    uint64_t offset = 0, scales = 0;
    int32_t block = 0;
};

// The manifest's fields that a runtime needs.
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

    // Rotary positions of a row: 1, or 3 if pictures have positions by row and column.
    size_t axes() const { return sections.size(); }
    int32_t turned() const;  // values of a head that rotary embedding rotates
};

// Reads the text of a manifest.json. what: names it in errors. Throws if it is damaged, was edited, or is of another
// version.
Manifest parseManifest(const std::string& text, const std::string& what);

// Reads the manifest of the bundle in `folder`. Throws as parseManifest does, and if a file that it names is missing, lies
// outside the bundle, or has another size or header.
Manifest readManifest(const std::string& folder);

// SHA-256 over the fields that answers depend on, the same as ivc_export.contract.manifest.constants_sha256.
std::string constantsSha256(const Json& manifest);

}  // namespace ivc
