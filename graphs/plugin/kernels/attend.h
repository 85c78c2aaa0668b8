// Attention by tiles of keys. Scores, softmax and weighted values of a tile of queries stay in registers.
//
// One algorithm serves a decoder layer (a cache and, with a causal mask, fresh rows), the frames of an encoder and its
// windows. A block takes one tile of queries and loops over tiles of keys. For each query it keeps the largest score,
// the sum of weights and the sum of weighted values. When a larger score appears, it scales these sums down. A tile of
// queries holds all heads that share a key-value head, row by row, and head by head within a row. If there are few
// queries, the keys of a tile are split over warps, and all keys over blocks. Their partial results are then combined.
// Sources: Dao 2023, "FlashAttention-2" (arXiv 2307.08691), algorithm 1; Dao et al. 2023, "Flash-Decoding".
#pragma once

#include "ivc_types.h"
#include "rows.h"
#include "warp.h"

namespace ivc {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMostAboveBase = 8;  // weights are at most 2 to this power, and keep the precision of their type

// One launch's arguments. Strides are in elements.
struct Attend {
    const void *q, *k, *v;
    void *keyCache, *valueCache;  // [kvHeads, capacity, headDim]
    void* y;                      // [frames, rows, heads * headDim]
    const int32_t* pastLength;
    const int32_t* windowOfPlace;
    float* partial;  // [splits, kvHeads, queries, headDim], then the largest scores and the sums of weights
    IvcStrides qStride, kStride, vStride;
    int32_t frames, heads, kvHeads, headDim;
    int32_t group;     // heads / kvHeads
    int32_t rows;      // rows of queries, in y
    int32_t keys;      // rows of k and v
    int32_t firstRow;  // row of q that belongs to y's first row
    int32_t capacity, blockSize, splits;
    int32_t append;
    float scale;  // of the products, times log2(e), since weights are powers of 2

    // Queries of one key-value head.
    IVC_HD int32_t queries() const { return rows * group; }
    IVC_HD int32_t past() const {
        if (capacity == 0) return 0;
#ifdef __CUDA_ARCH__
        const int32_t length = __ldcg(pastLength);  // kernels that start early may find older values in the L1 cache
#else
        const int32_t length = *pastLength;
#endif
        return larger(0, smaller(length, append ? capacity - rows : capacity));
    }
    IVC_HD int64_t stats() const { return static_cast<int64_t>(splits) * kvHeads * queries(); }
    IVC_HD float* largest() const { return partial + stats() * headDim; }
    IVC_HD float* sums() const { return largest() + stats(); }
};

// The keys that a query may attend to.
enum class Sight { kCausal, kFrame, kWindow };

// Keys that follow each other in one tensor.
template <class Value>
struct Tile {
    const Value *k, *v;  // the first key
    int64_t kRow, vRow;  // strides from row to row
    int32_t first, end;  // number of the first key, and one past the last
    bool cached;
};

// The tiles of keys that a tile of queries visits. `frame` and `head` are those of the block's keys.
template <class Value, Sight kSight, int kKeysOfTile>
struct Visit {
    const Attend& a;
    const Value *k, *v, *keyCache, *valueCache;  // rows of the head
    int32_t past = 0;        // valid rows of the cache
    int32_t cacheTiles = 0;  // tiles of the cache, which come first
    int32_t first = 0, end;  // range of the other keys
    int32_t from, to;        // range of this split's tiles

    // The queries are firstQuery to endQuery - 1.
    IVC_HD Visit(const Attend& attend, int32_t frame, int32_t head, int32_t firstQuery, int32_t endQuery, int32_t split)
        : a(attend) {
        k = static_cast<const Value*>(a.k) + frame * a.kStride.frame + head * a.kStride.head;
        v = static_cast<const Value*>(a.v) + frame * a.vStride.frame + head * a.vStride.head;
        const int64_t inCache = static_cast<int64_t>(head) * a.capacity * a.headDim;
        keyCache = static_cast<const Value*>(a.keyCache) + inCache;
        valueCache = static_cast<const Value*>(a.valueCache) + inCache;
        const int32_t low = firstQuery / a.group, high = (endQuery - 1) / a.group;  // rows of these queries
        if (kSight == Sight::kCausal) {
            past = a.past();
            cacheTiles = ceilDiv(past, kKeysOfTile);
            end = high + 1;
        } else if (kSight == Sight::kWindow) {  // its own block and its two neighbours
            first = low / a.blockSize * a.blockSize;
            end = smaller(a.keys, (high / a.blockSize + 3) * a.blockSize);
        } else {
            end = a.keys;
        }
        const int64_t tiles = cacheTiles + ceilDiv(end - first, kKeysOfTile);
        from = static_cast<int32_t>(tiles * split / a.splits);
        to = static_cast<int32_t>(tiles * (split + 1) / a.splits);
    }

    IVC_HD Tile<Value> operator[](int32_t tile) const {
        if (kSight == Sight::kCausal && tile < cacheTiles) {
            const int32_t at = tile * kKeysOfTile;
            const int64_t start = static_cast<int64_t>(at) * a.headDim;
            return {keyCache + start, valueCache + start, a.headDim, a.headDim, at, past, true};
        }
        const int32_t at = first + (tile - cacheTiles) * kKeysOfTile;
        return {k + at * a.kStride.row, v + at * a.vStride.row, a.kStride.row, a.vStride.row, at, end, false};
    }

    // Whether the tile has a key that some query from row `lowest` on must not attend to.
    IVC_HD bool masked(const Tile<Value>& t, int32_t lowest) const {
        const int32_t last = t.first + kKeysOfTile;
        return kSight == Sight::kWindow || last > t.end || (kSight == Sight::kCausal && !t.cached && last > lowest + 1);
    }
};

// Combines a value over the lanes of a warp. Every lane gets the result.
template <class Operation>
IVC_WARP void overWarp(Lane<float>& x, Operation operation) {
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) {
        Lane<float> other;
        exchange(other, x, mask);
        eachLane([&](int lane) { x[lane] = operation(x[lane], other[lane]); });
    }
}

// Appends a head's fresh keys and values to the cache: this block's share, in vectors of type Vector.
template <class Vector, class Value>
IVC_WARP void appendRows(const Attend& a, int32_t head, int32_t share, int32_t shares, int threads, int thread) {
    constexpr int kEach = sizeof(Vector) / sizeof(Value);
    const int32_t width = a.headDim / kEach;
    const int64_t past = a.past(), count = static_cast<int64_t>(a.rows) * width;
    for (int64_t i = static_cast<int64_t>(share) * threads + thread; i < count;
         i += static_cast<int64_t>(shares) * threads) {
        const int64_t row = i / width, at = i % width * kEach;
        const int64_t target = (static_cast<int64_t>(head) * a.capacity + past + row) * a.headDim + at;
        const int64_t key = head * a.kStride.head + row * a.kStride.row + at;
        const int64_t value = head * a.vStride.head + row * a.vStride.row + at;
        *reinterpret_cast<Vector*>(static_cast<Value*>(a.keyCache) + target) =
            *reinterpret_cast<const Vector*>(static_cast<const Value*>(a.k) + key);
        *reinterpret_cast<Vector*>(static_cast<Value*>(a.valueCache) + target) =
            *reinterpret_cast<const Vector*>(static_cast<const Value*>(a.v) + value);
    }
}

// Sizes of a block's tiles: kBands times kRowWarps bands of 16 queries, and kKeys keys, which kKeyWarps warps share.
template <int kDepth_, int kBands_, int kRowWarps_, int kKeyWarps_, int kKeys_, int kStages_>
struct Shape {
    static constexpr int kDepth = kDepth_;  // head size, rounded up to a multiple of 16
    static constexpr int kBands = kBands_;  // bands of 16 queries of one warp
    static constexpr int kRowWarps = kRowWarps_, kKeyWarps = kKeyWarps_;
    static constexpr int kKeys = kKeys_;
    // 1: the next keys are copied while values are used; 2: the next tile is copied while this one is used.
    static constexpr int kStages = kStages_;
    static constexpr int kWarps = kRowWarps * kKeyWarps, kThreads = kWarps * kWarp;
    static constexpr int kQueries = 16 * kBands * kRowWarps;
    static constexpr int kColumns = kKeys / kKeyWarps;  // keys of one warp
    static constexpr int kChunks = kDepth / 8;          // 16-byte chunks of a row
    // Rows are placed so that the same chunk of eight rows lies in different banks of shared memory. To this end chunks
    // are permuted by row (swizzled), or the number of chunks from row to row is odd.
    static constexpr bool kSwizzled = kChunks % 8 == 0;
    static constexpr int kRowBytes = 16 * (kSwizzled ? kChunks : kChunks | 1);
    static constexpr int kTileBytes = kKeys * kRowBytes;
    static constexpr int kQueryBytes = kQueries * kRowBytes;
    static constexpr int kMergeBytes = kKeyWarps == 1 ? 0 : 4 * kKeyWarps * kQueries * (kDepth + 2);
    static constexpr int kInputBytes = kQueryBytes + 2 * kStages * kTileBytes;
    static constexpr int kSharedBytes = kInputBytes < kMergeBytes ? kMergeBytes : kInputBytes;

    // Where a chunk of a row lies in a tile of kRows rows.
    template <int kRows>
    IVC_HD static int at(int row, int chunk) {
        return row * kRowBytes + 16 * (kSwizzled ? chunk ^ (row & 7) : chunk);
    }
};

// The partial results of a warp's queries. A lane has two rows of each band.
template <class S>
struct Found {
    Lane<Product> score[S::kBands][S::kColumns / 8];
    Lane<Product> value[S::kBands][S::kDepth / 8];  // sums of weighted values
    Lane<float> largest[S::kBands][2];  // the score to which weights are relative, before scaling: about the largest
    Lane<float> sum[S::kBands][2];                  // of this lane's weights
    Lane<int32_t> limit[S::kBands][2];  // causal: number of the row; windows: number of the window
};

template <class Value, Sight kSight, class S>
struct Attention {
    Block& block;
    char* shared;
    const Attend& a;
    int32_t frame, head, split;
    int32_t firstQuery, endQuery;

    IVC_WARP char* keys(int stage) const { return shared + S::kQueryBytes + 2 * stage * S::kTileBytes; }
    IVC_WARP char* values(int stage) const { return keys(stage) + S::kTileBytes; }

    // Starts to copy rows of 16-byte chunks into `target`. `source(row, chunk)` gives a chunk's address in a thread's
    // first row, and `next` its address in a row further down. Rows that are not `valid` become zeros, and so do chunks
    // after the head's last element. Eight lanes copy the chunks of a row, eight at a time. Fewer lanes copy the
    // remaining chunks.
    template <int kRows, int kLanes, int kFirstChunk, class Source, class Next, class Valid>
    IVC_WARP void load(char* target, Source source, Next next, Valid valid) const {
        constexpr int kStep = S::kThreads / kLanes;  // rows between those of a thread
        constexpr int kPieces = kLanes == 8 ? S::kChunks / 8 : 1;
        block.each([&](int warp) {
            eachLane([&](int lane) {
                const int thread = warp * kWarp + lane, top = thread / kLanes, chunk = kFirstChunk + thread % kLanes;
                const Value* start = source(top, chunk);
                const bool real = kLanes == 8 || 8 * chunk < a.headDim;
#pragma unroll
                for (int i = 0; i < ceilDiv(kRows, kStep); ++i) {
                    const int row = top + i * kStep;
                    if (kRows % kStep == 0 || row < kRows) {
                        const Value* from = next(start, top, i * kStep);
#pragma unroll
                        for (int piece = 0; piece < kPieces; ++piece) {
                            char* to = target + S::template at<kRows>(row, chunk + 8 * piece);
                            block.copy16(to, from + 64 * piece, real && valid(row));
                        }
                    }
                }
            });
        });
    }

    template <int kRows, class Source, class Next, class Valid>
    IVC_WARP void load(char* target, Source source, Next next, Valid valid) const {
        constexpr int kEights = S::kChunks / 8 * 8, kRest = S::kChunks - kEights;
        load<kRows, 8, 0>(target, source, next, valid);
        if constexpr (kRest > 0) load<kRows, kRest, kEights>(target, source, next, valid);
    }

    IVC_WARP void loadQueries() const {
        const Value* q = static_cast<const Value*>(a.q) + frame * a.qStride.frame + a.firstRow * a.qStride.row;
        load<S::kQueries>(
            shared, [&](int, int chunk) { return q + 8 * chunk; },
            [&](const Value* start, int top, int below) {
                const int32_t query = smaller(firstQuery + top + below, endQuery - 1);
                const int32_t row = query / a.group, of = head * a.group + query % a.group;
                return start + of * a.qStride.head + row * a.qStride.row;
            },
            [&](int at) { return firstQuery + at < endQuery; });
    }

    // Copies rows from `start` on. `row` is the stride between them.
    template <class Valid>
    IVC_WARP void loadRows(char* target, const Value* start, int64_t row, Valid valid) const {
        load<S::kKeys>(
            target, [&](int top, int chunk) { return start + top * row + 8 * chunk; },
            [&](const Value* from, int, int below) { return from + below * row; }, valid);
    }

    IVC_WARP void loadKeys(const Tile<Value>& t, int stage) const {
        if (t.first + S::kKeys <= t.end) {
            loadRows(keys(stage), t.k, t.kRow, [](int) { return true; });
        } else {
            loadRows(keys(stage), t.k, t.kRow, [&](int at) { return t.first + at < t.end; });
        }
    }

    IVC_WARP void loadValues(const Tile<Value>& t, int stage) const {
        if constexpr (kSight == Sight::kWindow) {  // empty places become zeros
            loadRows(values(stage), t.v, t.vRow,
                [&](int at) { return t.first + at < t.end && a.windowOfPlace[t.first + at] >= 0; });
        } else if (t.first + S::kKeys <= t.end) {
            loadRows(values(stage), t.v, t.vRow, [](int) { return true; });
        } else {
            loadRows(values(stage), t.v, t.vRow, [&](int at) { return t.first + at < t.end; });
        }
    }

    IVC_WARP void begin(Found<S>& f, int warp) const {
#pragma unroll
        for (int band = 0; band < S::kBands; ++band) {
            eachLane([&](int lane) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    f.largest[band][half][lane] = -INFINITY;
                    f.sum[band][half][lane] = 0;
                    const int32_t query = firstQuery + queryAt(warp, band, half, lane);
                    const int32_t row = smaller(query, endQuery - 1) / a.group;
                    f.limit[band][half][lane] = kSight == Sight::kWindow ? a.windowOfPlace[a.firstRow + row] : row;
                }
#pragma unroll
                for (int n = 0; n < S::kDepth / 8; ++n) f.value[band][n][lane] = Product{};
            });
        }
    }

    // The query, counted from the block's first, to which a lane's half of a band belongs.
    IVC_WARP static int queryAt(int warp, int band, int half, int lane) {
        return (warp / S::kKeyWarps * S::kBands + band) * 16 + 8 * half + lane / 4;
    }

    // Multiplies the warp's queries and keys.
    IVC_WARP void scores(Found<S>& f, int warp, int stage) const {
        const int firstBand = warp / S::kKeyWarps * S::kBands;
        const int firstColumn = warp % S::kKeyWarps * S::kColumns;
        const char* tile = keys(stage);
#pragma unroll
        for (int band = 0; band < S::kBands; ++band) {
#pragma unroll
            for (int n = 0; n < S::kColumns / 8; ++n) {
                eachLane([&](int lane) { f.score[band][n][lane] = Product{}; });
            }
        }
#pragma unroll
        for (int k = 0; k < S::kDepth / 16; ++k) {
            Lane<Fragment> q[S::kBands];
#pragma unroll
            for (int band = 0; band < S::kBands; ++band) {
                loadMatrices<false>(q[band], [&](int lane) {
                    return shared + S::template at<S::kQueries>((firstBand + band) * 16 + lane % 16, 2 * k + lane / 16);
                });
            }
#pragma unroll
            for (int n = 0; n < S::kColumns / 16; ++n) {
                Lane<Fragment> rows;
                loadMatrices<false>(rows, [&](int lane) {
                    return tile +
                           S::template at<S::kKeys>(
                               firstColumn + 16 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
                });
#pragma unroll
                for (int band = 0; band < S::kBands; ++band) {
                    multiply<Value, 0>(f.score[band][2 * n], q[band], rows);
                    multiply<Value, 1>(f.score[band][2 * n + 1], q[band], rows);
                }
            }
        }
    }

    // Sets the scores of keys that a query must not attend to to minus infinity.
    IVC_WARP void mask(Found<S>& f, const Tile<Value>& t, int warp) const {
        const int32_t firstKey = t.first + warp % S::kKeyWarps * S::kColumns;
        eachLane([&](int lane) {
#pragma unroll
            for (int n = 0; n < S::kColumns / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int32_t key = firstKey + 8 * n + 2 * (lane % 4) + i;
                    const int32_t window = kSight == Sight::kWindow && key < t.end ? a.windowOfPlace[key] : -1;
#pragma unroll
                    for (int band = 0; band < S::kBands; ++band) {
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const int32_t limit = f.limit[band][half][lane];
                            const bool seen = kSight == Sight::kWindow ? window >= 0 && window == limit
                                                                       : key < t.end &&
                                    (kSight == Sight::kFrame || t.cached || key <= limit);
                            if (!seen) f.score[band][n][lane].x[2 * half + i] = -INFINITY;
                        }
                    }
                }
            }
        });
    }

    // Turns scores into weights, which are relative to a base. Only where a score exceeds the base by so much that
    // weights could get too large for 16 bits, the base becomes the largest score, and the sums are scaled down.
    IVC_WARP void weights(Found<S>& f) const {
        Lane<float> most[S::kBands][2];
        Lane<bool> rises;
        eachLane([&](int lane) { rises[lane] = false; });
#pragma unroll
        for (int band = 0; band < S::kBands; ++band) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                eachLane([&](int lane) {
                    float x = f.largest[band][half][lane];
#pragma unroll
                    for (int n = 0; n < S::kColumns / 8; ++n) {
                        const float* s = f.score[band][n][lane].x + 2 * half;
                        x = fmaxf(x, fmaxf(s[0], s[1]));
                    }
                    most[band][half][lane] = x;
                });
                ofQuad(most[band][half], [](float x, float y) { return fmaxf(x, y); });
                eachLane([&](int lane) {
                    const float base = f.largest[band][half][lane];
                    rises[lane] = rises[lane] | (most[band][half][lane] * a.scale > base * a.scale + kMostAboveBase);
                });
            }
        }
        if (anyLane(rises)) rebase(f, most);
#pragma unroll
        for (int band = 0; band < S::kBands; ++band) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                eachLane([&](int lane) {
                    const float base = scaledBase(f.largest[band][half][lane]);
                    float sum = f.sum[band][half][lane];
#pragma unroll
                    for (int n = 0; n < S::kColumns / 8; ++n) {
                        float* s = f.score[band][n][lane].x + 2 * half;
                        s[0] = power2(s[0] * a.scale - base);
                        s[1] = power2(s[1] * a.scale - base);
                        sum += s[0] + s[1];
                    }
                    f.sum[band][half][lane] = sum;
                });
            }
        }
    }

    IVC_WARP float scaledBase(float largest) const { return largest == -INFINITY ? 0.0f : largest * a.scale; }

    // Makes `most` the bases.
    IVC_WARP void rebase(Found<S>& f, const Lane<float> (&most)[S::kBands][2]) const {
#pragma unroll
        for (int band = 0; band < S::kBands; ++band) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                eachLane([&](int lane) {
                    const float x = most[band][half][lane];
                    const float kept = power2(f.largest[band][half][lane] * a.scale - scaledBase(x));
                    f.largest[band][half][lane] = x;
                    f.sum[band][half][lane] *= kept;
#pragma unroll
                    for (int n = 0; n < S::kDepth / 8; ++n) {
                        float* value = f.value[band][n][lane].x + 2 * half;
                        value[0] *= kept;
                        value[1] *= kept;
                    }
                });
            }
        }
    }

    // Combines a value over the four lanes that share a row.
    template <class Operation>
    IVC_WARP static void ofQuad(Lane<float>& x, Operation operation) {
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
            Lane<float> other;
            exchange(other, x, mask);
            eachLane([&](int lane) { x[lane] = operation(x[lane], other[lane]); });
        }
    }

    // The weights of 16 keys, rounded.
    IVC_WARP Lane<Fragment> weightsOf(Found<S>& f, int band, int k) const {
        Lane<Fragment> weight;
        eachLane([&](int lane) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* s = f.score[band][2 * k + i / 2][lane].x + i % 2 * 2;
                weight[lane].x[i] = packed<Value>(s[0], s[1]);
            }
        });
        return weight;
    }

    // Adds the values, multiplied by their weights.
    IVC_WARP void weighted(Found<S>& f, int warp, int stage) const {
        const int firstColumn = warp % S::kKeyWarps * S::kColumns;
        const char* tile = values(stage);
#pragma unroll
        for (int k = 0; k < S::kColumns / 16; ++k) {
            Lane<Fragment> weight[S::kBands];
#pragma unroll
            for (int band = 0; band < S::kBands; ++band) {
                weight[band] = weightsOf(f, band, k);
            }
#pragma unroll
            for (int n = 0; n < S::kDepth / 16; ++n) {
                Lane<Fragment> rows;
                loadMatrices<true>(rows, [&](int lane) {
                    return tile + S::template at<S::kKeys>(firstColumn + 16 * k + lane % 16, 2 * n + lane / 16);
                });
#pragma unroll
                for (int band = 0; band < S::kBands; ++band) {
                    multiply<Value, 0>(f.value[band][2 * n], weight[band], rows);
                    multiply<Value, 1>(f.value[band][2 * n + 1], weight[band], rows);
                }
            }
        }
    }

    // Processes one tile of keys. If keys and values are copied separately, its scores are computed already.
    template <bool kMasked>
    IVC_WARP void take(Found<S>& f, const Tile<Value>& t, int warp, int stage) const {
        if (S::kStages == 2) scores(f, warp, stage);
        if (kMasked) mask(f, t, warp);
        weights(f);
        weighted(f, warp, stage);
    }

    // Where the elements of a query's result go: the result itself, or one split's part of it.
    struct Line {
        Value* y;
        float* partial;
        float factor;

        IVC_WARP void write(int element, float x0, float x1) const {
            if (y) {
                const uint32_t bits = packed<Value>(x0 * factor, x1 * factor);
                memcpy(y + element, &bits, sizeof bits);
            } else {
                partial[element] = x0;
                partial[element + 1] = x1;
            }
        }
    };

    IVC_WARP Line line(int at, float sum) const {
        const int32_t query = firstQuery + at;
        if (a.splits > 1) return {nullptr, a.partial + statsAt(query) * a.headDim, 1.0f};
        const int32_t row = query / a.group, of = head * a.group + query % a.group;
        const int64_t number = (static_cast<int64_t>(frame) * a.rows + row) * a.heads + of;
        return {static_cast<Value*>(a.y) + number * a.headDim, nullptr, sum == 0 ? 0.0f : 1 / sum};
    }

    IVC_WARP void writeStats(int at, float largest, float sum) const {
        const int32_t query = firstQuery + at;
        if (a.splits == 1) return;
        a.largest()[statsAt(query)] = largest * a.scale;
        a.sums()[statsAt(query)] = sum;
    }

    IVC_WARP int64_t statsAt(int32_t query) const {
        return (static_cast<int64_t>(split) * a.kvHeads + head) * a.queries() + query;
    }

    // Writes the results of the warps, if each has queries of its own.
    IVC_WARP void finish(Found<S>& f, int warp) const {
#pragma unroll
        for (int band = 0; band < S::kBands; ++band) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                eachLane([&](int lane) {
                    const int at = queryAt(warp, band, half, lane);
                    const float sum = f.sum[band][half][lane];
                    if (firstQuery + at >= endQuery) return;
                    const Line to = line(at, sum);
#pragma unroll
                    for (int n = 0; n < S::kDepth / 8; ++n) {
                        const float* x = f.value[band][n][lane].x + 2 * half;
                        const int element = 8 * n + 2 * (lane % 4);
                        if (8 * n < a.headDim) to.write(element, x[0], x[1]);
                    }
                    if (lane % 4 == 0) writeStats(at, f.largest[band][half][lane], sum);
                });
            }
        }
    }

    // Warps that share queries combine their results in shared memory.
    struct Merged {
        float value[S::kKeyWarps][S::kQueries][S::kDepth];
        float largest[S::kKeyWarps][S::kQueries];
        float sum[S::kKeyWarps][S::kQueries];
    };

    IVC_WARP void hand(Merged& merged, Found<S>& f, int warp) const {
        const int part = warp % S::kKeyWarps;
#pragma unroll
        for (int band = 0; band < S::kBands; ++band) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                eachLane([&](int lane) {
                    const int at = queryAt(warp, band, half, lane);
#pragma unroll
                    for (int n = 0; n < S::kDepth / 8; ++n) {
                        float* to = merged.value[part][at] + 8 * n + 2 * (lane % 4);
                        to[0] = f.value[band][n][lane].x[2 * half];
                        to[1] = f.value[band][n][lane].x[2 * half + 1];
                    }
                    if (lane % 4 == 0) {
                        merged.largest[part][at] = f.largest[band][half][lane];
                        merged.sum[part][at] = f.sum[band][half][lane];
                    }
                });
            }
        }
    }

    IVC_WARP void finishMerged(const Merged& merged, int warp) const {
        constexpr int kPairs = S::kDepth / 2;
        eachLane([&](int lane) {
            for (int i = warp * kWarp + lane; i < (endQuery - firstQuery) * kPairs; i += S::kThreads) {
                const int at = i / kPairs, element = 2 * (i % kPairs);
                float most = -INFINITY, sum = 0, x0 = 0, x1 = 0;
#pragma unroll
                for (int part = 0; part < S::kKeyWarps; ++part) most = fmaxf(most, merged.largest[part][at]);
                const float base = most == -INFINITY ? 0.0f : most * a.scale;
#pragma unroll
                for (int part = 0; part < S::kKeyWarps; ++part) {
                    const float factor = power2(merged.largest[part][at] * a.scale - base);
                    sum += factor * merged.sum[part][at];
                    x0 += factor * merged.value[part][at][element];
                    x1 += factor * merged.value[part][at][element + 1];
                }
                if (element < a.headDim) line(at, sum).write(element, x0, x1);
                if (element == 0) writeStats(at, most, sum);
            }
        });
    }

    // Makes the sums of weights those of rows.
    IVC_WARP void total(Found<S>& f) const {
#pragma unroll
        for (int i = 0; i < 2 * S::kBands; ++i) {
            ofQuad(f.sum[i / 2][i % 2], [](float x, float y) { return x + y; });
        }
    }

    IVC_WARP void run() const {
        const Visit<Value, kSight, S::kKeys> visit(a, frame, head, firstQuery, endQuery, split);
        const int32_t lowest = firstQuery / a.group;
        PerWarp<Found<S>, S::kWarps> found;
        loadQueries();
        if (visit.from < visit.to) {
            loadKeys(visit[visit.from], 0);
            if (S::kStages == 2) loadValues(visit[visit.from], 0);
        }
        block.each([&](int warp) { begin(found[warp], warp); });
        for (int32_t i = visit.from; i < visit.to; ++i) {
            const Tile<Value> tile = visit[i];
            const int stage = S::kStages == 2 ? (i - visit.from) % 2 : 0;
            block.awaitCopies();
            block.barrier();
            if (S::kStages == 1) {
                loadValues(tile, 0);
            } else if (i + 1 < visit.to) {
                loadKeys(visit[i + 1], 1 - stage);
                loadValues(visit[i + 1], 1 - stage);
            }
            const bool masked = visit.masked(tile, lowest);
            if constexpr (S::kStages == 1) {
                block.each([&](int warp) { scores(found[warp], warp, stage); });
                block.awaitCopies();
                block.barrier();
                if (i + 1 < visit.to) loadKeys(visit[i + 1], 0);
            }
            block.each([&](int warp) {
                if (masked) {
                    take<true>(found[warp], tile, warp, stage);
                } else {
                    take<false>(found[warp], tile, warp, stage);
                }
            });
        }
        block.awaitCopies();
        block.each([&](int warp) { total(found[warp]); });
        if constexpr (S::kKeyWarps == 1) {
            block.each([&](int warp) { finish(found[warp], warp); });
        } else {
            Merged& merged = *reinterpret_cast<Merged*>(shared);
            static_assert(sizeof(Merged) <= S::kSharedBytes, "too little shared memory");
            block.barrier();
            block.each([&](int warp) { hand(merged, found[warp], warp); });
            block.barrier();
            block.each([&](int warp) { finishMerged(merged, warp); });
        }
    }
};

// The work of one block: `tile` of queries, `head` of keys, and a split (decoders) or a frame (encoders). Tiles with
// the most keys start first.
template <class Value, Sight kSight, class S>
IVC_WARP void attend(Block& block, char* shared, const Attend& a, int32_t tile, int32_t head, int32_t splitOrFrame) {
    constexpr bool kCausal = kSight == Sight::kCausal;
    const int32_t tiles = ceilDiv(a.queries(), S::kQueries);
    const int32_t firstQuery = (kCausal ? tiles - 1 - tile : tile) * S::kQueries;
    const int32_t split = kCausal ? splitOrFrame : 0;
    if (kCausal && a.append) {
        block.each([&](int warp) {
            eachLane([&](int lane) {
                appendRows<Vector16, Value>(
                    a, head, split * tiles + tile, a.splits * tiles, S::kThreads, warp * kWarp + lane);
            });
        });
    }
    const Attention<Value, kSight, S> attention{block, shared, a, kCausal ? 0 : splitOrFrame, head, split, firstQuery,
        smaller(firstQuery + S::kQueries, a.queries())};
    attention.run();
}

// Combines the results of the splits for one row of y, `line` of [kvHeads, queries], in one block. Warps take splits in
// turn. Each lane has four elements of the row.
template <class Value>
struct Combining {
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
    static constexpr int kMostDepth = 4 * kWarp;

    struct Shared {
        float value[kWarps][kMostDepth];
        float sum[kWarps];
    };

    IVC_WARP static void run(Block& block, Shared& shared, const Attend& a, int32_t line) {
        const int64_t lines = static_cast<int64_t>(a.kvHeads) * a.queries();
        const float *largest = a.largest() + line, *sums = a.sums() + line;
        block.each([&](int warp) {
            Lane<float> most;
            eachLane([&](int lane) {
                most[lane] = -INFINITY;
                for (int32_t s = lane; s < a.splits; s += kWarp) most[lane] = fmaxf(most[lane], largest[s * lines]);
            });
            overWarp(most, [](float x, float y) { return fmaxf(x, y); });
            eachLane([&](int lane) {
                float x[4] = {}, sum = 0;
#pragma unroll 8
                for (int32_t s = warp; s < a.splits; s += kWarps) {
                    const float part = sums[s * lines];
                    const float factor = part == 0 ? 0.0f : power2(largest[s * lines] - most[lane]);
                    sum += factor * part;
                    if (4 * lane < a.headDim && part != 0) {  // a split without keys wrote no values
                        const float* from = a.partial + (s * lines + line) * a.headDim + 4 * lane;
                        for (int i = 0; i < 4; ++i) x[i] += factor * from[i];
                    }
                }
                for (int i = 0; i < 4; ++i) shared.value[warp][4 * lane + i] = x[i];
                if (lane == 0) shared.sum[warp] = sum;
            });
        });
        block.barrier();
        block.each([&](int warp) {
            eachLane([&](int lane) {
                const int element = warp * kWarp + lane;
                if (element >= a.headDim) return;
                float x = 0, sum = 0;
                for (int part = 0; part < kWarps; ++part) {
                    x += shared.value[part][element];
                    sum += shared.sum[part];
                }
                const int32_t head = line / a.queries(), query = line % a.queries();
                const int64_t to = static_cast<int64_t>(query / a.group) * a.heads + head * a.group + query % a.group;
                static_cast<Value*>(a.y)[to * a.headDim + element] = static_cast<Value>(sum == 0 ? 0.0f : x / sum);
            });
        });
    }
};

}  // namespace ivc
