// Splits the heads of query, key and value out of the rows of one product, normalises and rotates them, in float32.
//
// A lane has a few elements of a head's first half, and as many of its second half, with which they are rotated. Source of the rotation: Su et al. 2021, section 3.4.2; of the norm: Zhang and Sennrich 2019, eq. 4.
#pragma once

#include <type_traits>

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
    IVC_HD int32_t lanes() const { return headDim / 8; }  // of one head, with four elements of each half
    IVC_HD bool wide() const { return half() % 8 == 0; }  // a lane of turnHeads has eight elements of each half, else four
    IVC_HD int32_t group() const { return heads / kvHeads; }

    // Where head `head` of a row's `of` heads is written.
    IVC_HD int64_t target(int32_t row, int32_t head, int32_t of) const {
        if (!byHead) return (static_cast<int64_t>(row) * of + head) * headDim;
        const int32_t frame = row / angleRows;  // in 32 bits: 64-bit divisions would take longer than the memory
        return (static_cast<int64_t>(frame * of + head) * angleRows + (row - frame * angleRows)) * headDim;
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

// kEach neighbouring elements, which are read and written 16 bytes at a time if possible, else 8.
template <class Value, int kEach>
struct Neighbours {
    static constexpr size_t kBytes = kEach * sizeof(Value);
    using Vector = std::conditional_t<kBytes % 16 == 0, Vector16, Vector8>;
    static constexpr int kVectors = static_cast<int>(kBytes / sizeof(Vector));
};

template <int kEach, class Value>
IVC_WARP void readEach(float* to, const Value* from) {
    using N = Neighbours<Value, kEach>;
    typename N::Vector bits[N::kVectors];
#pragma unroll
    for (int i = 0; i < N::kVectors; ++i) bits[i] = reinterpret_cast<const typename N::Vector*>(from)[i];
    Value values[kEach];
    memcpy(static_cast<void*>(values), bits, sizeof values);
#pragma unroll
    for (int i = 0; i < kEach; ++i) to[i] = static_cast<float>(values[i]);
}

template <class Value, int kEach = 4>
IVC_WARP void writeEach(void* to, const float* from) {
    using N = Neighbours<Value, kEach>;
    Value values[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[i] = static_cast<Value>(from[i]);
    typename N::Vector bits[N::kVectors];
    memcpy(bits, static_cast<const void*>(values), sizeof bits);
#pragma unroll
    for (int i = 0; i < N::kVectors; ++i) static_cast<typename N::Vector*>(to)[i] = bits[i];
}

// The angles by which a lane's elements are rotated.
template <int kEach = 4>
struct Angles {
    struct Both {
        float cos[kEach], sin[kEach];
    };
    Lane<Both> x;

    // `from(lane)`: the index of a lane's first cosine, or below 0 if it needs none.
    template <class From>
    IVC_WARP void read(const Turn& t, From from) {
        eachLane([&](int lane) {
            const int64_t at = from(lane);
            if (at < 0) return;
            readEach<kEach>(x[lane].cos, t.cos + at);
            readEach<kEach>(x[lane].sin, t.sin + at);
        });
    }
};

// The elements that the lanes of a warp have. half() / kEach neighbouring lanes share one head.
template <int kEach = 4>
struct Pairs {
    struct Both {
        float low[kEach], high[kEach];
    };
    Lane<Both> x;

    // `from(lane)`: the address of a lane's first element, or null if it has none.
    template <class Value, class From>
    IVC_WARP void read(const Turn& t, From from) {
        eachLane([&](int lane) {
            const Value* source = from(lane);
            x[lane] = Both{};
            if (!source) return;
            readEach<kEach>(x[lane].low, source);
            readEach<kEach>(x[lane].high, source + t.half());
        });
    }

    // `weight(lane)`: the weight of a lane's first element, or null if its head is not normalised. All lanes take part.
    template <class Value, class Weight>
    IVC_WARP void norm(const Turn& t, Weight weight) {
        Lane<float> sum;
        eachLane([&](int lane) {
            sum[lane] = 0;
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                sum[lane] += x[lane].low[i] * x[lane].low[i] + x[lane].high[i] * x[lane].high[i];
            }
        });
        for (int mask = 1; mask < t.half() / kEach; mask *= 2) {
            Lane<float> other;
            exchange(other, sum, mask);
            eachLane([&](int lane) { sum[lane] += other[lane]; });
        }
        eachLane([&](int lane) {
            const Value* of = weight(lane);
            if (!of) return;
            const float factor = 1 / sqrtf(sum[lane] / static_cast<float>(t.headDim) + t.epsilon);
#pragma unroll
            for (int i = 0; i < kEach; ++i) {  // one by one: weights may lie at any address
                x[lane].low[i] *= factor * static_cast<float>(of[i]);
                x[lane].high[i] *= factor * static_cast<float>(of[t.half() + i]);
            }
        });
    }

    // Rotates the elements of each lane for which `turned(lane)` is true.
    template <class Turned>
    IVC_WARP void turn(const Angles<kEach>& angles, Turned turned) {
        eachLane([&](int lane) {
            if (!turned(lane)) return;
            const typename Angles<kEach>::Both& a = angles.x[lane];
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
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
template <class Value, int kEach>
IVC_WARP void turnSome(Block& block, const Turn& t, int32_t number) {
    const int32_t lanes = t.half() / kEach, turned = t.heads + t.kvHeads, all = t.parts();
    const int32_t count = t.rowCount * all * lanes;
    struct Place {
        int32_t row, head, element;
    };
    block.each([&](int warp) {
        const int32_t first = number * kTurnThreads + warp * kWarp;
        const auto real = [&](int lane) { return first + lane < count; };
        Lane<Place> places;
        eachLane([&](int lane) {
            const int32_t head = (first + lane) / lanes, row = head / all;
            places[lane] = {row, head - row * all, kEach * (first + lane - head * lanes)};
        });
        Pairs<kEach> pairs;
        pairs.template read<Value>(t, [&](int lane) -> const Value* {
            if (!real(lane)) return nullptr;
            const Place& p = places[lane];
            return static_cast<const Value*>(t.rows) + static_cast<int64_t>(p.row) * t.width() + t.place(p.head) +
                   p.element;
        });
        if (t.queryNorm || t.keyNorm) {
            pairs.template norm<Value>(t, [&](int lane) -> const Value* {
                const Place& p = places[lane];
                const void* weights = p.head < t.heads ? t.queryNorm : p.head < turned ? t.keyNorm : nullptr;
                return weights && real(lane) ? static_cast<const Value*>(weights) + p.element : nullptr;
            });
        }
        if (t.cos) {
            const auto turns = [&](int lane) { return real(lane) && places[lane].head < turned; };
            Angles<kEach> angles;
            angles.read(t, [&](int lane) -> int64_t {
                if (!turns(lane)) return -1;
                return static_cast<int64_t>(places[lane].row % t.angleRows) * t.half() + places[lane].element;
            });
            pairs.turn(angles, turns);
        }
        eachLane([&](int lane) {
            if (!real(lane)) return;
            const Place& p = places[lane];
            Value* to = p.head < t.heads  ? static_cast<Value*>(t.q) + t.target(p.row, p.head, t.heads)
                        : p.head < turned ? static_cast<Value*>(t.k) + t.target(p.row, p.head - t.heads, t.kvHeads)
                                          : static_cast<Value*>(t.v) + t.target(p.row, p.head - turned, t.kvHeads);
            writeEach<Value, kEach>(to + p.element, pairs.x[lane].low);
            writeEach<Value, kEach>(to + p.element + t.half(), pairs.x[lane].high);
        });
    });
}

template <class Value>
IVC_WARP void turnHeads(Block& block, const Turn& t, int32_t number) {
    if (t.wide()) {
        turnSome<Value, 8>(block, t, number);
    } else {
        turnSome<Value, 4>(block, t, number);
    }
}

}  // namespace ivc
