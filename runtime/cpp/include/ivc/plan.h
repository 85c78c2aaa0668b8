// One run of prefix and decoder, planned on the host: who is visual, who votes, where rows stand, what is kept.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ivc/manifest.h"
#include "ivc/visual.h"

namespace ivc {

// How visual tokens are chosen: "ivc-prune", "foreground", or "random" with a seed from 0 on and below 2^31; "fastv" on
// bundles that were exported with it. No name is the bundle's own.
struct Method {
    std::string name;
    int64_t seed = 0;
};

// The prefix graph's inputs that come from the prompt alone; names as in the contract.
struct Run {
    std::vector<int32_t> tokens;
    std::vector<Grid> grids;
    std::vector<int32_t> positionIds;  // [axes, rows]
    std::vector<int32_t> visualIndex, textIndex, queryIndex;
    std::vector<float> ivcPriority;
    std::vector<int32_t> thumbnailIndex, tileMap, candidateIndex;  // where the graph takes them
    int32_t keepCount = 1, nextPosition = 0;

    // S, the rows of this run.
    int32_t rows() const { return static_cast<int32_t>(tokens.size()); }
    int32_t kept() const { return static_cast<int32_t>(textIndex.size()) + keepCount; }  // rows that go on
};

// Throws where a ratio is not above 0 and up to 1.
void checkRatio(double ratio);
// Throws where there is no such method, its seed is out of range, or the bundle's graphs choose otherwise.
void checkMethod(const Manifest& manifest, const Method& method);

// A run of `tokens` from position `start` on, each picture's image tokens being grids[i].visual() of them. Without a
// picture the first row stands in for a visual token that is kept. question: the first row that may vote; of those from
// there on, rows from query_offset behind the last picture on do. Throws where there is nothing to run, an id is beyond
// the vocabulary, image tokens and pictures do not match, or the model does not know a position.
Run planRun(const Manifest& manifest, const std::vector<int32_t>& tokens, const std::vector<Grid>& grids,
    int32_t start, double ratio, const Method& method, int32_t question = 0);

}  // namespace ivc
