// SelectTokens from votes and choices: the arguments of each launch, and the layout of scratch memory.
#pragma once

#include "choose.h"
#include "ivc_types.h"
#include "votes.h"

namespace ivc {

constexpr int kNearRows = kBins * kCopies * sizeof(uint32_t);  // so many rows are marked in shared memory
constexpr float kSeedPriority = 1e30f;  // of the last seed; each seed before it has this much more

// max(1, round(visual / divisor)), half to even, in integers.
inline int32_t seedCount(int32_t visual, int32_t divisor) {
    const int32_t odd = visual / divisor % 2;
    return larger(1, (visual + divisor / 2 - 1 + odd) / divisor);
}

inline bool possible(const IvcSelection& s) {
    return s.kvHeads > 0 && s.rows > 0 && s.headDim > 0 && s.visual > 0 && s.text >= 0 && s.queries > 0 &&
           s.keepCount > 0 && s.seedDivisor > 0 && s.seedDivisor % 2 == 0 &&
           (s.type == IVC_FLOAT32 || s.type == IVC_FLOAT16 || s.type == IVC_BFLOAT16) &&
           (s.softmax == IVC_SOFTMAX_VISUAL || s.softmax == IVC_SOFTMAX_ALL);
}

// From column sums to seeds, and then to scores.
struct Scoring {
    const float* textColumns;  // [textParts, visual]
    const float* seedColumns;  // [seedParts, visual]
    float* textSums;           // [visual]
    float* tokenScore;
    int32_t* seedIndex;
    uint32_t* keys;
    int32_t* found;
    int32_t visual, textParts, seedParts, seeds;
    float voters;  // heads * (queries + seeds)
};

IVC_BLOCK void scoreSeeds(const Team& team, Choice& choice, const Scoring& s) {
    team.each([&](int thread) {
        for (int32_t i = thread; i < s.visual; i += team.threads()) {
            float sum = 0.0f;
#pragma unroll 8
            for (int32_t part = 0; part < s.textParts; ++part) {
                sum += s.textColumns[static_cast<int64_t>(part) * s.visual + i];
            }
            s.textSums[i] = sum;
        }
    });
    chooseSeeds(team, choice, s.textSums, s.visual, s.seeds, s.keys, s.found, s.seedIndex);
}

// The work of one of several blocks.
IVC_BLOCK void scoreTokens(const Team& team, const Scoring& s, int block, int blocks) {
    team.each([&](int thread) {
        for (int32_t i = block * team.threads() + thread; i < s.visual; i += blocks * team.threads()) {
            float sum = s.textSums[i];
#pragma unroll 8
            for (int32_t part = 0; part < s.seedParts; ++part) {
                sum += s.seedColumns[static_cast<int64_t>(part) * s.visual + i];
            }
            s.tokenScore[i] = sum / s.voters;
        }
    });
}

// From scores and priorities to kept rows.
struct Keeping {
    const float* tokenScore;
    const int32_t* seedIndex;
    const float* priority;
    const int32_t* visualIndex;
    const int32_t* textIndex;
    int32_t* keepIndex;
    uint32_t* keys;
    uint8_t* kept;
    int32_t rows, visual, text, seeds, keepCount;
};

// keepIndex: all text rows and the keepCount best visual ones, ascending.
IVC_BLOCK void keepRows(const Team& team, Choice& c, const Keeping& k) {
    const int32_t rows = k.rows;
    uint32_t* const keys = keysNear(c, k.keys, k.visual);
    auto* const kept = rows <= kNearRows ? reinterpret_cast<uint8_t*>(c.bins) : k.kept;
    team.each([&](int thread) {
        for (int32_t i = thread; i < k.visual; i += team.threads()) {
            const float score = k.tokenScore[i], priority = k.priority[i];
            keys[i] = ordered(score < priority ? priority : score);
        }
    });
    team.each([&](int thread) {
        for (int32_t i = thread; i < k.seeds; i += team.threads()) {
            keys[clamped(k.seedIndex[i], k.visual)] = ordered(kSeedPriority * static_cast<float>(k.seeds - i));
        }
    });
    findThreshold(team, c, keys, k.visual, k.keepCount);
    team.each([&](int thread) {
        for (int32_t i = thread; i < k.text; i += team.threads()) kept[clamped(k.textIndex[i], rows)] = 1;
    });
    takeChosen(
        team, c, keys, k.visual, [&](int32_t i, int32_t) { kept[clamped(k.visualIndex[i], rows)] = 1; },
        [&](int32_t i) { kept[clamped(k.visualIndex[i], rows)] = 0; });
    const int32_t share = ceilDiv(rows, team.threads()), total = k.text + k.keepCount;
    const auto begin = [&](int thread) { return smaller(thread * share, rows); };
    Team::Local<uint64_t> before(team);
    team.each([&](int thread) {
        uint64_t sum = 0;
        for (int32_t row = begin(thread); row < begin(thread + 1); ++row) sum += kept[row] == 1;
        before[thread] = sum;
    });
    team.sumsBefore(before, c.warps);
    team.each([&](int thread) {
        auto slot = static_cast<int32_t>(before[thread]);
        for (int32_t row = begin(thread); row < begin(thread + 1); ++row) {
            if (kept[row] == 1 && slot < total) k.keepIndex[slot++] = row;
        }
    });
}

// scoreTokens and keepRows in one block.
struct Ending {
    Scoring scoring;
    Keeping keeping;
};

// The scratch memory of one call. Its layout follows from the extents.
struct Scratch {
    const IvcSelection& s;
    int32_t seeds;
    int32_t textSplits, seedSplits;
    char* base;
    size_t bytes = 0;
    float *rowMax, *rowSum, *textColumns, *seedColumns, *textSums;
    uint32_t* keys;
    int32_t* found;
    uint8_t* kept;

    Scratch(const IvcSelection& selection, void* workspace)
        : s(selection), seeds(seedCount(s.visual, s.seedDivisor)), textSplits(splits(s.queries)),
          seedSplits(splits(seeds)), base(static_cast<char*>(workspace)) {
        const int32_t most = larger(s.queries, seeds);
        const size_t tiles = ceilDiv(larger(s.visual, s.softmax == IVC_SOFTMAX_ALL ? s.rows : 0), kKeys);
        place(rowMax, tiles * s.kvHeads * most);
        place(rowSum, tiles * s.kvHeads * most);
        place(textColumns, static_cast<size_t>(s.kvHeads) * textSplits * s.visual);
        place(seedColumns, static_cast<size_t>(s.kvHeads) * seedSplits * s.visual);
        place(textSums, s.visual);
        place(keys, s.visual);
        place(found, seeds);
        place(kept, s.rows);
    }

    template <class Value>
    Votes<Value> textVotes(const Value* values, const int32_t* visualIndex, const int32_t* queryIndex) const {
        return {values, visualIndex, queryIndex, nullptr, rowMax, rowSum, textColumns, s.kvHeads, s.rows, s.headDim,
            s.visual, s.queries, textSplits, s.softmax == IVC_SOFTMAX_ALL, aligned(values)};
    }

    template <class Value>
    Votes<Value> seedVotes(const Value* values, const int32_t* visualIndex, const int32_t* seedIndex) const {
        return {values, visualIndex, nullptr, seedIndex, rowMax, rowSum, seedColumns, s.kvHeads, s.rows, s.headDim,
            s.visual, seeds, seedSplits, s.softmax == IVC_SOFTMAX_ALL, aligned(values)};
    }

    Scoring scoring(float* tokenScore, int32_t* seedIndex) const {
        return {textColumns, seedColumns, textSums, tokenScore, seedIndex, keys, found, s.visual,
            s.kvHeads * textSplits, s.kvHeads * seedSplits, seeds,
            static_cast<float>(s.kvHeads) * static_cast<float>(s.queries + seeds)};
    }

    Keeping keeping(const float* tokenScore, const int32_t* seedIndex, const float* priority,
        const int32_t* visualIndex, const int32_t* textIndex, int32_t* keepIndex) const {
        return {tokenScore, seedIndex, priority, visualIndex, textIndex, keepIndex, keys, kept, s.rows, s.visual,
            s.text, seeds, smaller(s.keepCount, s.visual)};
    }

   private:
    template <class Value>
    bool aligned(const Value* values) const {
        return (reinterpret_cast<uintptr_t>(values) | s.headDim * sizeof(Value)) % sizeof(Vector16) == 0;
    }

    static int32_t splits(int32_t queries) { return smaller(ceilDiv(queries, kQueries), kMostSplits); }

    template <class T>
    void place(T*& pointer, size_t count) {
        pointer = reinterpret_cast<T*>(base + bytes);
        bytes += (count * sizeof(T) + 255) / 256 * 256;
    }
};

}  // namespace ivc
