// Attention of a decode step as in attend_row.h, for SM 90 and later: the blocks of a key-value head form a cluster, and
// add up their results in each other's shared memory.
//
// Each block has an equal share of the keys, and each of its warps has 16 keys of every tile. A warp copies its own keys
// and values, and waits for these alone. Copies of the first tiles start before the previous kernel has ended.
#pragma once

#include "attend_row.h"

namespace ivc {

// Sizes of a block: each of its warps has kEach keys of a tile, and there are at most 8 kOctets queries.
template <int kDepth_, int kOctets_>
struct OwnKeys {
    static constexpr int kDepth = kDepth_, kWarps = 8, kThreads = kWarps * kWarp;
    static constexpr int kEach = 16, kKeys = kWarps * kEach, kOctets = kOctets_;
    static constexpr int kMostTiles = 2;  // that shared memory holds at a time
    // So few registers that blocks of the previous kernel leave enough for this one. With 3 they no longer suffice.
    static constexpr int kLeastBlocks = 2;
    using Tiles = Shape<kDepth, 1, 1, kWarps, kKeys, kMostTiles>;
    static_assert((kOctets == 1 || kOctets == 2) && kMostTiles == 2, "sizes of products, and awaited copies");
};

// One launch's arguments.
struct AttendTogether : AttendRow {
    int32_t blocks;  // of a cluster, which has all keys of a key-value head
    int32_t tiles;   // that a block's shared memory holds
};

template <class Value, class S>
struct Together {
    using Row = RowAttention<Value, typename S::Tiles>;
    using Fresh = typename Row::Fresh;
    static constexpr int kFours = S::kDepth / 4;  // of a query's elements
    static constexpr int kChunks = S::kDepth / 8, kTileBytes = S::Tiles::kTileBytes;
    static constexpr int kPitch = S::kDepth + 4;  // so that the queries of a result lie in different banks
    static constexpr int kStatBytes = 2 * sizeof(float);

    // What a warp has found. A lane has the base and the sum of query lane / 4 of each octet, and of the sums of
    // weighted values elements lane / 4 and lane / 4 + 8 of each sixteen, for queries 2 (lane % 4) and the next.
    struct Found {
        Lane<Product> value[S::kOctets][S::kDepth / 16];
        Lane<float> largest[S::kOctets], sum[S::kOctets];
    };

    // Fours of all queries that each block of a cluster adds up.
    static IVC_HD int32_t share(const AttendTogether& r) { return ceilDiv(r.a.group * kFours, r.blocks); }

    // Shared memory: what the blocks hand to this one, the row's own key and value, and then queries and tiles, whose
    // place the results of warps take.
    static IVC_HD int partBytes(const AttendTogether& r) { return r.blocks * share(r) * (16 + kStatBytes); }
    static IVC_HD int inputAt(const AttendTogether& r) {
        return (partBytes(r) + static_cast<int>(sizeof(Fresh)) + 127) / 128 * 128;
    }
    static IVC_HD int sharedBytes(const AttendTogether& r) {
        const int input = S::Tiles::kQueryBytes + 2 * r.tiles * kTileBytes;
        const int merge = S::kWarps * r.a.group * (kPitch + 2) * static_cast<int>(sizeof(float));
        return inputAt(r) + larger(input, merge);
    }

    Block& block;
    char* shared;
    const AttendTogether& r;
    int32_t head, rank, past, keys, from, to;

    IVC_WARP Together(Block& block, char* shared, const AttendTogether& r, int32_t head, int32_t rank)
        : block(block), shared(shared), r(r), head(head), rank(rank), past(r.a.past()), keys(past + 1) {
        const int32_t each = ceilDiv(keys, r.blocks);
        from = smaller(rank * each, keys);
        to = smaller(from + each, keys);
    }

    IVC_WARP Fresh& fresh() const { return *reinterpret_cast<Fresh*>(shared + partBytes(r)); }
    IVC_WARP char* input() const { return shared + inputAt(r); }
    IVC_WARP char* keyTile(int stage) const { return input() + S::Tiles::kQueryBytes + 2 * stage * kTileBytes; }
    IVC_WARP char* valueTile(int stage) const { return keyTile(stage) + kTileBytes; }
    static IVC_HD int at(int row, int chunk) { return S::Tiles::template at<S::kKeys>(row, chunk); }

    // What block `from` hands over: `share` fours, and their largest scores and sums.
    IVC_WARP static float* fours(char* parts, const AttendTogether& r, int32_t from) {
        return reinterpret_cast<float*>(parts) + 4 * from * share(r);
    }
    IVC_WARP static float* stats(char* parts, const AttendTogether& r, int32_t from) {
        return reinterpret_cast<float*>(parts) + 4 * r.blocks * share(r) + 2 * from * share(r);
    }

    // Starts to copy each warp's keys and values of a tile.
    IVC_WARP void load(int32_t number) const {
        const int32_t first = from + number * S::kKeys, end = smaller(to, past);
        if (first >= to) return;
        const int64_t start = (static_cast<int64_t>(head) * r.a.capacity + first) * r.a.headDim;
        const int stage = number % r.tiles;
        block.each([&](int warp) {
            if (first + S::kEach * warp >= to) return;
            eachLane([&](int lane) {
                constexpr int kRows = kWarp / kChunks;  // that the lanes copy at a time
                const int chunk = lane % kChunks, top = S::kEach * warp + lane / kChunks;
                for (const bool values : {false, true}) {
                    const Value* rows = static_cast<const Value*>(values ? r.a.valueCache : r.a.keyCache) + start;
                    char* tile = values ? valueTile(stage) : keyTile(stage);
#pragma unroll
                    for (int i = 0; i < S::kEach; i += kRows) {
                        const int row = top + i;
                        block.copy16(
                            tile + at(row, chunk), rows + row * S::kDepth + 8 * chunk, first + row < end);
                    }
                }
            });
        });
    }

    // Puts the row's own key and value among the keys of the warp whose they are.
    IVC_WARP void place(int row, int stage) const {
        eachLane([&](int lane) {
            if (lane >= 2 * kChunks) return;
            const int chunk = lane % kChunks;
            char* tile = lane < kChunks ? keyTile(stage) : valueTile(stage);
            const Value* own = (lane < kChunks ? fresh().key : fresh().value) + 8 * chunk;
            *reinterpret_cast<Vector16*>(tile + at(row, chunk)) = *reinterpret_cast<const Vector16*>(own);
        });
    }

    // Adds a warp's keys from row `row` of a tile on, 16 of them, of which `count` are valid.
    IVC_WARP void take(Found& f, int row, int stage, int32_t count) const {
        Lane<Product> score[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) eachLane([&](int lane) { score[i / 2][i % 2][lane] = Product{}; });
        const char* tile = keyTile(stage);
#pragma unroll
        for (int k = 0; k < S::kDepth / 16; ++k) {
            Lane<Fragment> query, key;
            loadMatrices<false>(query, [&](int lane) { return input() + at(lane % 16, 2 * k + lane / 16); });
            loadMatrices<false>(
                key, [&](int lane) { return tile + at(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2); });
            multiply<Value, 0>(score[k % 2][0], query, key);
            multiply<Value, 1>(score[k % 2][1], query, key);
        }
        Lane<Fragment> weight;
#pragma unroll
        for (int octet = 0; octet < S::kOctets; ++octet) {
            Lane<float> most, kept;
            Lane<float> x[4];
            eachLane([&](int lane) {
                most[lane] = f.largest[octet][lane];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int part = i / 2, key = 8 * part + 2 * (lane % 4) + i % 2, at = 2 * octet + i % 2;
                    const float sum = score[0][part][lane].x[at] + score[1][part][lane].x[at];
                    x[i][lane] = key < count ? sum * r.a.scale : -INFINITY;
                    most[lane] = fmaxf(most[lane], x[i][lane]);
                }
            });
            Row::Tiles::ofQuad(most, [](float a, float b) { return fmaxf(a, b); });
            eachLane([&](int lane) {
                const float base = most[lane] == -INFINITY ? 0.0f : most[lane];
                kept[lane] = power2(f.largest[octet][lane] - base);
                f.largest[octet][lane] = most[lane];
                float sum = f.sum[octet][lane] * kept[lane];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    x[i][lane] = power2(x[i][lane] - base);
                    sum += x[i][lane];
                }
                f.sum[octet][lane] = sum;
                weight[lane].x[2 * octet] = packed<Value>(x[0][lane], x[1][lane]);
                weight[lane].x[2 * octet + 1] = packed<Value>(x[2][lane], x[3][lane]);
            });
            Lane<float> factor[2];  // of the lane's two queries
            for (int i = 0; i < 2; ++i) gather(factor[i], kept, [&](int lane) { return 8 * (lane % 4) + 4 * i; });
            eachLane([&](int lane) {
#pragma unroll
                for (int n = 0; n < S::kDepth / 16; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) f.value[octet][n][lane].x[i] *= factor[i % 2][lane];
                }
            });
        }
        const char* values = valueTile(stage);
#pragma unroll
        for (int n = 0; n < S::kDepth / 16; ++n) {
            Lane<Fragment> value;
            loadMatrices<true>(value,
                [&](int lane) { return values + at(row + lane % 8 + lane / 16 * 8, 2 * n + lane / 8 % 2); });
            multiply<Value, 0>(f.value[0][n], value, weight);
            if constexpr (S::kOctets == 2) multiply<Value, 1>(f.value[1][n], value, weight);
        }
    }

    // Attends to the block's keys. `partsOf(rank)` gives the shared memory of a block of the cluster.
    template <class PartsOf>
    IVC_WARP void attend(PartsOf partsOf) const {
        const int32_t count = ceilDiv(to - from, S::kKeys);
        const bool last = from < to && to == keys;
        block.arriveAtCluster();
        for (int32_t i = 0; i < r.tiles; ++i) {
            load(i);
            block.endCopies();
        }
        awaitKernelBefore();  // for the row, as in attend_row.h
        if (from < to) {
            Row::split(block, input(), fresh(), r, head, past, last);
            PerWarp<Found, S::kWarps> found;
            block.each([&](int warp) { begin(found[warp]); });
            block.barrier();
            for (int32_t i = 0; i < count; ++i) {
                const int stage = i % r.tiles;
                const int32_t start = from + i * S::kKeys;
                if (r.tiles == 1) {
                    block.awaitCopiesBut<0>();
                } else {
                    block.awaitCopiesBut<1>();
                }
                block.each([&](int warp) {
                    block.warpBarrier();
#pragma unroll
                    for (int row = S::kEach * warp; row < S::kEach * (warp + 1); row += 16) {
                        const int32_t first = start + row;
                        if (first >= to) continue;
                        if (last && first <= past && past < first + 16) {
                            place(past - start, stage);
                            block.warpBarrier();
                        }
                        take(found[warp], row, stage, to - first);
                    }
                    block.warpBarrier();
                });
                load(i + r.tiles);
                block.endCopies();
            }
            block.barrier();
            block.each([&](int warp) { hand(found[warp], warp); });
            block.barrier();
        }
        block.awaitCluster();  // all blocks have started, so their shared memory can be written
        if (from < to) block.each([&](int warp) { send(partsOf, warp); });
        block.arriveAtCluster();
        block.awaitCluster();
    }

    IVC_WARP void begin(Found& f) const {
        eachLane([&](int lane) {
#pragma unroll
            for (int octet = 0; octet < S::kOctets; ++octet) {
                f.largest[octet][lane] = -INFINITY;
                f.sum[octet][lane] = 0;
#pragma unroll
                for (int n = 0; n < S::kDepth / 16; ++n) f.value[octet][n][lane] = Product{};
            }
        });
    }

    // The results of warps, in shared memory.
    IVC_WARP float* resultOf(int warp, int query) const {
        return reinterpret_cast<float*>(input()) + (warp * r.a.group + query) * kPitch;
    }
    IVC_WARP float* statsOf(int warp, int query) const {
        return reinterpret_cast<float*>(input()) + S::kWarps * r.a.group * kPitch + 2 * (warp * r.a.group + query);
    }

    IVC_WARP void hand(Found& f, int warp) const {
#pragma unroll
        for (int octet = 0; octet < S::kOctets; ++octet) {
            Row::Tiles::ofQuad(f.sum[octet], [](float x, float y) { return x + y; });
            eachLane([&](int lane) {
                const int of = 8 * octet + lane / 4;
                if (lane % 4 == 0 && of < r.a.group) {
                    statsOf(warp, of)[0] = f.largest[octet][lane];
                    statsOf(warp, of)[1] = f.sum[octet][lane];
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int query = 8 * octet + 2 * (lane % 4) + i;
                    if (query >= r.a.group) continue;
                    float* to = resultOf(warp, query) + lane / 4;
#pragma unroll
                    for (int n = 0; n < S::kDepth / 16; ++n) {
                        to[16 * n] = f.value[octet][n][lane].x[i];
                        to[16 * n + 8] = f.value[octet][n][lane].x[2 + i];
                    }
                }
            });
        }
    }

    // The factor of a sum whose weights are relative to `base`, where `most` is the largest base.
    IVC_WARP static float factor(float base, float most) { return most == -INFINITY ? 0.0f : power2(base - most); }

    // Adds up the results of warps, and hands each four to the block that adds up those of blocks.
    template <class PartsOf>
    IVC_WARP void send(PartsOf partsOf, int warp) const {
        const int32_t each = share(r);
        eachLane([&](int lane) {
            for (int32_t i = warp * kWarp + lane; i < r.a.group * kFours; i += S::kThreads) {
                const int query = i / kFours, four = i % kFours;
                float largest[S::kWarps], most = -INFINITY, sum = 0, x[4] = {};
#pragma unroll
                for (int part = 0; part < S::kWarps; ++part) {
                    largest[part] = statsOf(part, query)[0];
                    most = fmaxf(most, largest[part]);
                }
#pragma unroll
                for (int part = 0; part < S::kWarps; ++part) {
                    const float scale = factor(largest[part], most);
                    const Vector16 bits = *reinterpret_cast<const Vector16*>(resultOf(part, query) + 4 * four);
                    float of[4];
                    memcpy(of, &bits, sizeof of);
                    sum += scale * statsOf(part, query)[1];
#pragma unroll
                    for (int j = 0; j < 4; ++j) x[j] += scale * of[j];
                }
                char* parts = partsOf(i / each);
                const int32_t at = i % each;
                Vector16 bits;
                memcpy(&bits, x, sizeof bits);
                *reinterpret_cast<Vector16*>(fours(parts, r, rank) + 4 * at) = bits;
                stats(parts, r, rank)[2 * at] = most;
                stats(parts, r, rank)[2 * at + 1] = sum;
            }
        });
    }

    // Adds up what the blocks have handed to this one.
    IVC_WARP void finish() const {
        const int32_t each = share(r), total = r.a.group * kFours;
        const int32_t parts = ceilDiv(keys, ceilDiv(keys, r.blocks));  // blocks that have keys
        block.each([&](int warp) {
            eachLane([&](int lane) {
                for (int32_t at = warp * kWarp + lane; at < each && rank * each + at < total; at += S::kThreads) {
                    float most = -INFINITY, sum = 0, x[4] = {};
#pragma unroll 8
                    for (int32_t part = 0; part < parts; ++part) most = fmaxf(most, stats(shared, r, part)[2 * at]);
#pragma unroll 8
                    for (int32_t part = 0; part < parts; ++part) {
                        const float* stat = stats(shared, r, part) + 2 * at;
                        const Vector16 bits = *reinterpret_cast<const Vector16*>(fours(shared, r, part) + 4 * at);
                        float of[4];
                        memcpy(of, &bits, sizeof of);
                        const float scale = factor(stat[0], most);
                        sum += scale * stat[1];
#pragma unroll
                        for (int j = 0; j < 4; ++j) x[j] += scale * of[j];
                    }
                    const int32_t query = (rank * each + at) / kFours, four = (rank * each + at) % kFours;
#pragma unroll
                    for (int j = 0; j < 4; ++j) x[j] /= sum;
                    writeEach<Value>(
                        static_cast<Value*>(r.a.y) + (head * r.a.group + query) * r.a.headDim + 4 * four, x);
                }
            });
        });
    }
};

}  // namespace ivc
