// Plans one run of prefix and decoder on the host: positions, the rows that are visual, the rows that vote, and how many
// visual tokens to keep.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ivc/manifest.h"
#include "ivc/visual.h"

namespace ivc {

// How visual tokens are selected: "ivc-prune", "foreground", or "random" with a seed of 0 to 2^31 - 1. Bundles that were
// exported with "fastv" take that. An empty name is the bundle's own method.
struct Method {
    std::string name;
    int64_t seed = 0;
};

// The prefix graph's inputs that depend on the prompt alone. Names are those of the graph's inputs.
struct Run {
    std::vector<int32_t> tokens;
    std::vector<Grid> grids;
    std::vector<int32_t> positionIds;  // [axes, rows]
    std::vector<int32_t> visualIndex, textIndex, queryIndex;
    std::vector<float> ivcPriority;
    std::vector<int32_t> thumbnailIndex, tileMap, candidateIndex;  // if the graph takes them
    int32_t keepCount = 1, nextPosition = 0;

    // The rows of this run (axis S).
    int32_t rows() const { return static_cast<int32_t>(tokens.size()); }
    int32_t kept() const { return static_cast<int32_t>(textIndex.size()) + keepCount; }  // the rows that are kept
};

// Throws if a ratio is not above 0 and at most 1.
void checkRatio(double ratio);
// Throws if there is no such method, if its seed is out of range, or if the bundle's graphs select by another method.
void checkMethod(const Manifest& manifest, const Method& method);

// Plans a run.
//
// tokens: the ids, with grids[i].visual() image tokens for picture i. Without pictures, the first row takes the place of
// a visual token that is kept. start: the position of the first token. question: the first row that may vote. Of the
// rows from there on, those vote that come after the last picture and the query_offset rows behind it.
//
// Throws if there are no tokens, if an id is beyond the vocabulary, if image tokens and pictures do not match, or if a
// position is beyond the model's.
Run planRun(const Manifest& manifest, const std::vector<int32_t>& tokens, const std::vector<Grid>& grids,
    int32_t start, double ratio, const Method& method, int32_t question = 0);

}  // namespace ivc
