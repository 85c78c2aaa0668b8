// The first and the last kernel of a decode step. The first turns a few numbers in host memory into a row of embeddings
// and its angles. The last writes the best of the logits to host memory. So a step needs no copies, and the host waits
// once.
#pragma once

#include "ivc_types.h"
#include "linear_plan.h"
#include "warp.h"

namespace ivc {

constexpr int kStepThreads = 256;
constexpr int kAnswerBlocks = 128;

// Whether a step can start with such extents, and whether it can end with them. A thread reads one number of the step.
// Ids are compared as floats, which limits vocab.
inline bool canBegin(const IvcStep& c) {
    return c.axes > 0 && c.axes <= kStepThreads - 4 && c.pairs > 0 && c.hidden > 0 && c.vocab > 0;
}
inline bool canEnd(const IvcStep& c) { return c.vocab > 0 && c.vocab <= 1 << 24; }

// One launch's arguments; see ivcTakeStep.
struct TakeStep {
    const int32_t *step, *before;  // before: may be null
    const void* row;  // the table, or the caller's row
    bool ofTable;
    const float* frequencies;
    void* embeds;
    float *cos, *sin;
    int32_t* lengths[2];
    int32_t axes, pairs, hidden, vocab, lengthCount;
    float scale;
    bool whole;  // rows can be read and written in octets
};

inline TakeStep planned(const IvcStep& c, const int32_t* step, const void* table, const void* row,
    const int32_t* before, const float* frequencies, void* embeds, float* cos, float* sin, int32_t* length,
    int32_t* wholeLength) {
    const void* rows = table ? table : row;
    return {step, before, rows, table != nullptr, frequencies, embeds, cos, sin, {length, wholeLength}, c.axes, c.pairs,
        c.hidden, c.vocab, wholeLength ? 2 : 1, c.scale, inOctets(c.hidden, {rows, embeds})};
}

struct StepShared {
    int32_t step[kStepThreads];
};

// Scales a row of embeddings.
template <class Value>
IVC_WARP void takeRow(const TakeStep& t, int64_t number, int thread) {
    const Value* from = static_cast<const Value*>(t.row) + number * t.hidden;
    for (int32_t at = 8 * thread; at < t.hidden; at += 8 * kStepThreads) {
        Octet<Value> octet = t.whole ? octetOf<true>(from, at, t.hidden) : octetOf<false>(from, at, t.hidden);
#pragma unroll
        for (int i = 0; i < 8; ++i) octet.x[i] = static_cast<Value>(static_cast<float>(octet.x[i]) * t.scale);
        Value* to = static_cast<Value*>(t.embeds);
        if (t.whole) {
            put<true>(to, at, t.hidden, octet);
        } else {
            put<false>(to, at, t.hidden, octet);
        }
    }
}

// The sum of positions times frequencies.
IVC_WARP float angleOf(const TakeStep& t, const StepShared& shared, int32_t pair) {
    constexpr int kAtOnce = 4;
    float angle = 0;
    for (int32_t first = 0; first < t.axes; first += kAtOnce) {
        float frequencies[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            frequencies[i] = first + i < t.axes ? t.frequencies[(first + i) * t.pairs + pair] : 0;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (first + i < t.axes) angle += static_cast<float>(shared.step[1 + first + i]) * frequencies[i];
        }
    }
    return angle;
}

// Host memory is far: each thread reads all that it needs of it at once. The second kernel of a step starts when this
// one has ended, and lets others start that read the lengths before they wait.
template <class Value>
IVC_WARP void takeStep(Block& block, StepShared& shared, const TakeStep& t) {
    block.each([&](int warp) {
        eachLane([&](int lane) {
            const int thread = warp * kWarp + lane;
            const int32_t count = 1 + t.axes + t.lengthCount;
            const int32_t* from = thread < count ? t.step + thread : thread == count ? t.before : nullptr;
            const int32_t number = from ? *from : 0;
            if (!t.ofTable) takeRow<Value>(t, 0, thread);
            shared.step[thread] = number;
        });
    });
    block.barrier();
    block.each([&](int warp) {
        eachLane([&](int lane) {
            const int thread = warp * kWarp + lane;
            const int32_t token = shared.step[0] < 0 ? shared.step[1 + t.axes + t.lengthCount] : shared.step[0];
            if (t.ofTable) takeRow<Value>(t, clamped(token, t.vocab), thread);
            for (int32_t i = thread; i < t.pairs; i += kStepThreads) {
                const float angle = angleOf(t, shared, i);
                t.cos[i] = cosf(angle);
                t.sin[i] = sinf(angle);
            }
            if (thread < t.lengthCount) {
                *t.lengths[thread] = shared.step[1 + t.axes + thread];
                showWrites();
            }
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
    bool whole;  // x and logits can be read and written in octets
};

inline GiveAnswer planned(const IvcStep& c, const void* x, const int32_t* wanted, float* logits, int32_t* best,
    float* told, int32_t* scratch) {
    return {x, wanted, logits, told, best, reinterpret_cast<float*>(scratch + 1), scratch, c.vocab,
        inOctets(c.vocab, {x, logits})};
}

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
    int32_t flag, wanted;
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
        eachLane([&](int lane) {  // one of the block's threads asks the host, which is far; no kernel writes it
            if (warp == 0 && lane == 0) shared.wanted = *g.wanted;
        });
    });
    block.barrier();
    awaitKernelBefore();
    const bool wanted = shared.wanted != 0;
    block.each([&](int warp) {
        Lane<Best> best;
        eachLane([&](int lane) {
            best[lane] = nothing;
            const int32_t first = 8 * (number * kStepThreads + warp * kWarp + lane);
            for (int32_t at = first; at < g.vocab; at += 8 * kAnswerBlocks * kStepThreads) {
                const Value* from = static_cast<const Value*>(g.x);
                const Octet<Value> octet =
                    g.whole ? octetOf<true>(from, at, g.vocab) : octetOf<false>(from, at, g.vocab);
                Octet<float> wide;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float x = wide.x[i] = static_cast<float>(octet.x[i]);
                    const Best one{x, static_cast<float>(at + i), x == x ? 0.0f : 1.0f};
                    if (at + i < g.vocab) best[lane] = better(best[lane], one);
                }
                if (g.whole) {
                    put<true>(g.logits, at, g.vocab, wide);
                } else {
                    put<false>(g.logits, at, g.vocab, wide);
                }
                if (wanted) put<false>(g.told, at, g.vocab, wide);
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
