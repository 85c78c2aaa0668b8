// The first and the last kernel of a decode step. The first turns a few numbers in host memory into a row of embeddings
// and its angles. The last writes the best of the logits to host memory. So a step needs no copies, and the host waits
// once.
#pragma once

#include "ivc_types.h"
#include "warp.h"

namespace ivc {

constexpr int kStepThreads = 256;
constexpr int kAnswerBlocks = 64;

// Whether a step can start with such extents, and whether it can end with them. Ids are compared as floats, which
// limits vocab.
inline bool canBegin(const IvcStep& c) { return c.axes > 0 && c.pairs > 0 && c.hidden > 0 && c.vocab > 0; }
inline bool canEnd(const IvcStep& c) { return c.vocab > 0 && c.vocab <= 1 << 24; }

// One launch's arguments; see ivcTakeStep.
struct TakeStep {
    const int32_t* step;
    const void* row;  // the table, or the caller's row
    bool ofTable;
    const float* frequencies;
    void* embeds;
    float *cos, *sin;
    int32_t* lengths[2];
    int32_t axes, pairs, rowHalves, vocab, lengthCount;
};

IVC_WARP void takeStep(Block& block, const TakeStep& t) {
    block.each([&](int warp) {
        eachLane([&](int lane) {
            const int thread = warp * kWarp + lane;
            const int64_t number = t.ofTable ? clamped(t.step[0], t.vocab) : 0;
            const auto* from = static_cast<const uint16_t*>(t.row) + number * t.rowHalves;
            for (int i = thread; i < t.rowHalves; i += kStepThreads) static_cast<uint16_t*>(t.embeds)[i] = from[i];
            for (int i = thread; i < t.pairs; i += kStepThreads) {
                float angle = 0;
                for (int axis = 0; axis < t.axes; ++axis) {
                    angle += static_cast<float>(t.step[1 + axis]) * t.frequencies[axis * t.pairs + i];
                }
                t.cos[i] = cosf(angle);
                t.sin[i] = sinf(angle);
            }
            if (thread < t.lengthCount) *t.lengths[thread] = t.step[1 + t.axes + thread];
        });
    });
}

// One launch's arguments; see ivcGiveAnswer.
struct GiveAnswer {
    const void* x;
    const int32_t* wanted;
    float *logits, *told;
    int32_t* best;
    float* found;      // [kAnswerBlocks, 3]
    int32_t* counter;  // 0 before and after
    int32_t vocab;
};

// The largest logit so far (the first of equal ones), and whether there was a NaN.
struct Best {
    float value, index, none;
};

IVC_HD inline Best better(const Best& a, const Best& b) {
    const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
    const Best& found = second ? b : a;
    return {found.value, found.index, a.none > b.none ? a.none : b.none};
}

struct AnswerShared {
    Best found[kStepThreads / kWarp];
    int32_t flag;
};

// Combines the lanes of a warp. Every lane gets the result.
IVC_WARP void bestOfWarp(Lane<Best>& best) {
    for (int mask = 1; mask < kWarp; mask *= 2) {
        Lane<float> from[3], to[3];
        eachLane([&](int lane) {
            from[0][lane] = best[lane].value;
            from[1][lane] = best[lane].index;
            from[2][lane] = best[lane].none;
        });
        for (int i = 0; i < 3; ++i) exchange(to[i], from[i], mask);
        eachLane([&](int lane) { best[lane] = better(best[lane], {to[0][lane], to[1][lane], to[2][lane]}); });
    }
}

template <class Value>
IVC_WARP void giveAnswer(Block& block, AnswerShared& shared, const GiveAnswer& g, int32_t number) {
    const Best nothing{-INFINITY, 1e9f, 0};
    block.each([&](int warp) {
        Lane<Best> best;
        eachLane([&](int lane) {
            best[lane] = nothing;
            const bool wanted = *g.wanted != 0;
            const int thread = warp * kWarp + lane;
            for (int32_t i = number * kStepThreads + thread; i < g.vocab; i += kAnswerBlocks * kStepThreads) {
                const float x = static_cast<float>(static_cast<const Value*>(g.x)[i]);
                g.logits[i] = x;
                if (wanted) g.told[i] = x;
                best[lane] = better(best[lane], {x, static_cast<float>(i), x == x ? 0.0f : 1.0f});
            }
        });
        bestOfWarp(best);
        eachLane([&](int lane) {
            if (lane == 0) shared.found[warp] = best[lane];
        });
    });
    block.barrier();
    block.each([&](int warp) {
        eachLane([&](int lane) {
            if (warp != 0 || lane != 0) return;
            Best best = nothing;
            for (const Best& one : shared.found) best = better(best, one);
            float* to = g.found + 3 * number;
            to[0] = best.value;
            to[1] = best.index;
            to[2] = best.none;
        });
    });
    if (!block.last(g.counter, kAnswerBlocks, &shared.flag)) return;
    block.each([&](int warp) {
        Lane<Best> best;
        eachLane([&](int lane) {
            best[lane] = nothing;
            for (int i = lane; i < kAnswerBlocks; i += kWarp) {
                const float* from = g.found + 3 * i;
                best[lane] = better(best[lane], {fromOthers(from), fromOthers(from + 1), fromOthers(from + 2)});
            }
        });
        bestOfWarp(best);
        eachLane([&](int lane) {
            if (warp != 0 || lane != 0) return;
            g.best[0] = static_cast<int32_t>(best[lane].index);
            g.best[1] = best[lane].none == 0 && best[lane].value < INFINITY && best[lane].value > -INFINITY;
        });
    });
}

}  // namespace ivc
