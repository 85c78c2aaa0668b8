// Splits the heads of query, key and value out of the rows of one product, normalises and rotates them, in float32.
//
// A lane has four elements of a head's first half, and the four elements of its second half with which they are
// rotated. Source of the rotation: Su et al. 2021, section 3.4.2; of the norm: Zhang and Sennrich 2019, eq. 4.
#pragma once

#include "ivc_types.h"
#include "rows.h"
#include "warp.h"

namespace ivc {

constexpr int kTurnThreads = 256;

// One launch's arguments.
struct Turn {
    const void* rows;
    const float *cos, *sin;
    const void *queryNorm, *keyNorm;
    void *q, *k, *v;
    int32_t rowCount, angleRows, heads, kvHeads, headDim, grouped, byHead;
    float epsilon;

    IVC_HD int32_t half() const { return headDim / 2; }
    IVC_HD int32_t lanes() const { return headDim / 8; }  // of one head
    IVC_HD int32_t group() const { return heads / kvHeads; }

    // Where head `head` of a row's `of` heads is written.
    IVC_HD int64_t target(int64_t row, int32_t head, int32_t of) const {
        if (!byHead) return (row * of + head) * headDim;
        return ((row / angleRows * of + head) * angleRows + row % angleRows) * headDim;
    }

    IVC_HD int32_t width() const { return (heads + 2 * kvHeads) * headDim; }

    // The number of heads that are split from a row.
    IVC_HD int32_t parts() const { return heads + kvHeads + (v ? kvHeads : 0); }

    // Where a head starts in a row. Heads are numbered: all queries, then all keys, then all values.
    IVC_HD int32_t place(int32_t head) const {
        if (!grouped) return head * headDim;
        if (head < heads) return (head / group() * (group() + 2) + head % group()) * headDim;
        const int32_t other = head - heads, value = other >= kvHeads;
        return ((other - value * kvHeads) * (group() + 2) + group() + value) * headDim;
    }
};

template <class Value, bool kWide = sizeof(Value) == 4>
struct FourOf {
    using Vector = Vector8;
};
template <class Value>
struct FourOf<Value, true> {
    using Vector = Vector16;
};

template <class Value>
IVC_WARP void readFour(float* to, const Value* from) {
    const auto bits = *reinterpret_cast<const typename FourOf<Value>::Vector*>(from);
    Value values[4];
    memcpy(static_cast<void*>(values), &bits, sizeof values);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = static_cast<float>(values[i]);
}

template <class Value>
IVC_WARP void writeFour(void* to, const float* from) {
    Value values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = static_cast<Value>(from[i]);
    typename FourOf<Value>::Vector bits;
    memcpy(&bits, static_cast<const void*>(values), sizeof bits);
    *static_cast<typename FourOf<Value>::Vector*>(to) = bits;
}

// The angles by which a lane's elements are rotated.
struct Angles {
    struct Both {
        float cos[4], sin[4];
    };
    Lane<Both> x;

    // `from(lane)`: the index of a lane's first cosine, or below 0 if it needs none.
    template <class From>
    IVC_WARP void read(const Turn& t, From from) {
        eachLane([&](int lane) {
            const int64_t at = from(lane);
            if (at < 0) return;
            readFour(x[lane].cos, t.cos + at);
            readFour(x[lane].sin, t.sin + at);
        });
    }
};

// The elements that the lanes of a warp have. lanes() neighbouring lanes share one head.
struct Pairs {
    struct Both {
        float low[4], high[4];
    };
    Lane<Both> x;

    // `from(lane)`: the address of a lane's first element, or null if it has none.
    template <class Value, class From>
    IVC_WARP void read(const Turn& t, From from) {
        eachLane([&](int lane) {
            const Value* source = from(lane);
            x[lane] = Both{};
            if (!source) return;
            readFour(x[lane].low, source);
            readFour(x[lane].high, source + t.half());
        });
    }

    // `weight(lane)`: the weight of a lane's first element, or null if its head is not normalised. All lanes take part.
    template <class Value, class Weight>
    IVC_WARP void norm(const Turn& t, Weight weight) {
        Lane<float> sum;
        eachLane([&](int lane) {
            sum[lane] = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum[lane] += x[lane].low[i] * x[lane].low[i] + x[lane].high[i] * x[lane].high[i];
            }
        });
        for (int mask = 1; mask < t.lanes(); mask *= 2) {
            Lane<float> other;
            exchange(other, sum, mask);
            eachLane([&](int lane) { sum[lane] += other[lane]; });
        }
        eachLane([&](int lane) {
            const Value* of = weight(lane);
            if (!of) return;
            const float factor = 1 / sqrtf(sum[lane] / static_cast<float>(t.headDim) + t.epsilon);
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // one by one: weights may lie at any address
                x[lane].low[i] *= factor * static_cast<float>(of[i]);
                x[lane].high[i] *= factor * static_cast<float>(of[t.half() + i]);
            }
        });
    }

    // Rotates the elements of each lane for which `turned(lane)` is true.
    template <class Turned>
    IVC_WARP void turn(const Angles& angles, Turned turned) {
        eachLane([&](int lane) {
            if (!turned(lane)) return;
            const Angles::Both& a = angles.x[lane];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float low = x[lane].low[i], high = x[lane].high[i];
                x[lane].low[i] = low * a.cos[i] - high * a.sin[i];
                x[lane].high[i] = high * a.cos[i] + low * a.sin[i];
            }
        });
    }
};

// The work of one block: kTurnThreads lanes of the heads of rows. A row's queries come first, then its keys, then its
// values, if they are wanted. With more heads per lane, angles would be read once, but an H200 is slower: it then reads
// and writes rows in shorter pieces.
template <class Value>
IVC_WARP void turnHeads(Block& block, const Turn& t, int32_t number) {
    const int32_t lanes = t.lanes(), turned = t.heads + t.kvHeads, all = t.parts(), count = t.rowCount * all * lanes;
    block.each([&](int warp) {
        const int32_t first = number * kTurnThreads + warp * kWarp;
        const auto headOf = [&](int lane) { return (first + lane) / lanes % all; };
        const auto rowOf = [&](int lane) { return (first + lane) / lanes / all; };
        const auto element = [&](int lane) { return 4 * ((first + lane) % lanes); };
        const auto real = [&](int lane) { return first + lane < count; };
        Pairs pairs;
        pairs.read<Value>(t, [&](int lane) -> const Value* {
            if (!real(lane)) return nullptr;
            const int64_t row = static_cast<int64_t>(rowOf(lane)) * t.width();
            return static_cast<const Value*>(t.rows) + row + t.place(headOf(lane)) + element(lane);
        });
        if (t.queryNorm || t.keyNorm) {
            pairs.norm<Value>(t, [&](int lane) -> const Value* {
                const int32_t head = headOf(lane);
                const void* weights = head < t.heads ? t.queryNorm : head < turned ? t.keyNorm : nullptr;
                return weights && real(lane) ? static_cast<const Value*>(weights) + element(lane) : nullptr;
            });
        }
        if (t.cos) {
            const auto turns = [&](int lane) { return real(lane) && headOf(lane) < turned; };
            Angles angles;
            angles.read(t, [&](int lane) -> int64_t {
                if (!turns(lane)) return -1;
                return static_cast<int64_t>(rowOf(lane) % t.angleRows) * t.half() + element(lane);
            });
            pairs.turn(angles, turns);
        }
        eachLane([&](int lane) {
            if (!real(lane)) return;
            const int32_t head = headOf(lane);
            const int64_t row = rowOf(lane);
            Value* to = head < t.heads  ? static_cast<Value*>(t.q) + t.target(row, head, t.heads)
                        : head < turned ? static_cast<Value*>(t.k) + t.target(row, head - t.heads, t.kvHeads)
                                        : static_cast<Value*>(t.v) + t.target(row, head - turned, t.kvHeads);
            writeFour<Value>(to + element(lane), pairs.x[lane].low);
            writeFour<Value>(to + element(lane) + t.half(), pairs.x[lane].high);
        });
    });
}

}  // namespace ivc
