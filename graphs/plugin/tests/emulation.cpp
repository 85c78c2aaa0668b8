// The kernels' algorithms on the host, block after block and thread after thread: their logic is tested without
// a GPU. The calls have the kernels' signatures but for the stream, which is their order instead: 0, or 1 for backwards.
#include <stddef.h>

#include "../kernels/rows.h"
#include "../kernels/selection.h"
#include "../kernels/votes.h"

using namespace ivc;

namespace {

struct BFloat16 {
    uint16_t bits;

    explicit operator float() const {
        const uint32_t widened = static_cast<uint32_t>(bits) << 16;
        float value;
        memcpy(&value, &widened, sizeof value);
        return value;
    }
};

// A launch of blocks x by y by z.
template <class Block>
void launch(int x, int y, int z, bool backwards, Block block) {
    const int total = x * y * z;
    for (int i = 0; i < total; ++i) {
        const int at = backwards ? total - 1 - i : i;
        block(at % x, at / x % y, at / x / y);
    }
}

template <class Value>
void votes(const Votes<Value>& v, bool backwards) {
    const Team team{kVoteThreads, backwards};
    VoteTile tile;
    launch(v.softmaxTiles(), ceilDiv(v.queries, kQueries), v.heads, backwards,
        [&](int keys, int queries, int head) { voteRows(team, tile, v, head, queries, keys); });
    launch(ceilDiv(v.visual, kKeys), v.splits, v.heads, backwards,
        [&](int keys, int split, int head) { voteColumns(team, tile, v, head, split, keys); });
}

template <class Value>
void scores(const IvcSelection& s, const void* values, const int32_t* visualIndex, const int32_t* queryIndex,
    float* tokenScore, int32_t* seedIndex, void* workspace, bool backwards) {
    const Team team{kChooseThreads, backwards};
    const Scratch scratch(s, workspace);
    const Scoring scoring = scratch.scoring(tokenScore, seedIndex);
    Choice choice;
    votes(scratch.textVotes(static_cast<const Value*>(values), visualIndex, queryIndex), backwards);
    scoreSeeds(team, choice, scoring);
    votes(scratch.seedVotes(static_cast<const Value*>(values), visualIndex, seedIndex), backwards);
    launch(ceilDiv(s.visual, kChooseThreads), 1, 1, backwards,
        [&](int block, int, int) { scoreTokens(team, scoring, block); });
}

int copy(RowCopies& c, const IvcRows* tensors, int32_t count, int32_t copied, bool backwards) {
    const Team team{kRowThreads, backwards};
    for (int32_t first = 0; first < count && copied > 0; first += IVC_ROWS_PER_LAUNCH) {
        const int32_t blocks = planRows(c, tensors + first, smaller(count - first, IVC_ROWS_PER_LAUNCH), copied);
        if (blocks < 0) return 1;
        launch(blocks, 1, 1, backwards, [&](int block, int, int) { copyRows(team, c, block); });
    }
    return 0;
}

}  // namespace

extern "C" {

int32_t ivcSeedCount(int32_t visual, int32_t seedDivisor) { return seedCount(visual, seedDivisor); }

size_t ivcSelectionWorkspace(const IvcSelection* selection) { return Scratch(*selection, nullptr).bytes; }

int ivcTokenScores(const IvcSelection* s, const void* values, const int32_t* visualIndex, const int32_t* queryIndex,
    float* tokenScore, int32_t* seedIndex, void* workspace, size_t backwards) {
    if (!possible(*s) || s->type == IVC_FLOAT16) return 1;
    const auto call = s->type == IVC_FLOAT32 ? scores<float> : scores<BFloat16>;
    call(*s, values, visualIndex, queryIndex, tokenScore, seedIndex, workspace, backwards != 0);
    return 0;
}

int ivcKeptRows(const IvcSelection* s, const float* tokenScore, const int32_t* seedIndex, const float* priority,
    const int32_t* visualIndex, const int32_t* textIndex, int32_t* keepIndex, void* workspace, size_t backwards) {
    if (!possible(*s)) return 1;
    Choice choice;
    keepRows(Team{kChooseThreads, backwards != 0}, choice,
        Scratch(*s, workspace).keeping(tokenScore, seedIndex, priority, visualIndex, textIndex, keepIndex));
    return 0;
}

int ivcSelectTokens(const IvcSelection* s, const void* values, const float* priority, const int32_t* visualIndex,
    const int32_t* textIndex, const int32_t* queryIndex, int32_t* keepIndex, float* tokenScore, int32_t* seedIndex,
    void* workspace, size_t backwards) {
    return ivcTokenScores(s, values, visualIndex, queryIndex, tokenScore, seedIndex, workspace, backwards) ||
           ivcKeptRows(s, tokenScore, seedIndex, priority, visualIndex, textIndex, keepIndex, workspace, backwards);
}

int ivcCompactGather(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* keepIndex, int32_t kept,
    size_t backwards) {
    RowCopies c{};
    c.sourceRows = rows;
    c.targetRows = kept;
    c.gather = keepIndex;
    return copy(c, tensors, count, kept, backwards != 0);
}

int ivcCompactGatherInto(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* keepIndex, int32_t kept,
    const int32_t* pastLength, int32_t capacity, size_t backwards) {
    RowCopies c{};
    c.sourceRows = rows;
    c.targetRows = capacity;
    c.gather = keepIndex;
    c.offset = pastLength;
    return copy(c, tensors, count, kept, backwards != 0);
}

int ivcAppendRows(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* pastLength, int32_t capacity,
    size_t backwards) {
    RowCopies c{};
    c.sourceRows = rows;
    c.targetRows = capacity;
    c.offset = pastLength;
    return copy(c, tensors, count, rows, backwards != 0);
}
}
