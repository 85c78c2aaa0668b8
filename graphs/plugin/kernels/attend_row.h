// Attention of a decode step in one launch. It splits the heads of one row, normalises and rotates them, appends key
// and value to the caches, and attends to the caches. From SM 90 on, attend_together.h does the same, by parts of this.
//
// The cached keys are split over blocks. Every block rotates the queries of its key-value head itself. The block with
// the last keys also rotates and appends the row's own key. Each block writes its partial result, and the last block of
// a head adds them up.
#pragma once

#include "attend.h"
#include "turn.h"

namespace ivc {

constexpr int kMostRowQueries = 16;  // queries of one key-value head
constexpr int kMostRowSplits = 32;   // more splits take longer to combine than they save
constexpr int kWantedRowBlocks = 128;

template <int kDepth>
using OneRow = Shape<kDepth, 1, 1, 8, 128, 1>;

// One launch's arguments.
struct AttendRow {
    Attend a;
    Turn t;
    int32_t* counters;  // [kvHeads]
};

template <class Value, class S>
struct RowAttention {
    static_assert(sizeof(Value) == 2, "of 16 bits");
    using Tiles = Attention<Value, Sight::kCausal, S>;

    // In shared memory, after what Attention uses.
    struct Fresh {
        Value key[S::kDepth], value[S::kDepth];
        int32_t flag;
    };
    static constexpr int kSharedBytes = S::kSharedBytes + static_cast<int>((sizeof(Fresh) + 15) / 16 * 16);

    // Splits the row: queries into shared memory; in the block with the `last` keys, also key and value.
    IVC_WARP static void split(Block& block, char* shared, Fresh& fresh, const AttendRow& r, int32_t head, int32_t past,
        bool last) {
        const Turn& t = r.t;
        const int32_t group = r.a.group, lanes = t.lanes(), count = (group + (last ? 2 : 0)) * lanes;
        block.each([&](int warp) {
            for (int32_t first = warp * kWarp; first - warp * kWarp < count; first += S::kThreads) {
                Pairs<> pairs;
                const auto item = [&](int lane) { return (first + lane) / lanes; };
                const auto element = [&](int lane) { return 4 * ((first + lane) % lanes); };
                const auto real = [&](int lane) { return first + lane < count; };
                pairs.read<Value>(t, [&](int lane) -> const Value* {
                    if (!real(lane)) return nullptr;
                    const int32_t i = item(lane);
                    const int32_t number = i < group    ? head * group + i
                                           : i == group ? t.heads + head
                                                        : t.heads + t.kvHeads + head;
                    return static_cast<const Value*>(t.rows) + t.place(number) + element(lane);
                });
                if (t.queryNorm || t.keyNorm) {
                    pairs.norm<Value>(t, [&](int lane) -> const Value* {
                        const int32_t i = item(lane);
                        const void* weights = i < group ? t.queryNorm : i == group ? t.keyNorm : nullptr;
                        return weights && real(lane) ? static_cast<const Value*>(weights) + element(lane) : nullptr;
                    });
                }
                if (t.cos) {
                    const auto turned = [&](int lane) { return real(lane) && item(lane) <= group; };
                    Angles<> angles;
                    angles.read(t, [&](int lane) -> int64_t { return turned(lane) ? element(lane) : -1; });
                    pairs.turn(angles, turned);
                }
                eachLane([&](int lane) {
                    if (!real(lane)) return;
                    const int32_t i = item(lane), at = element(lane), other = at + t.half();
                    const Pairs<>::Both& x = pairs.x[lane];
                    if (i < group) {
                        const auto place = [&](int e) {
                            return shared + S::template at<S::kQueries>(i, e / 8) + e % 8 * sizeof(Value);
                        };
                        writeEach<Value>(place(at), x.low);
                        writeEach<Value>(place(other), x.high);
                        return;
                    }
                    Value* near = i == group ? fresh.key : fresh.value;
                    void* cache = i == group ? r.a.keyCache : r.a.valueCache;
                    Value* far = static_cast<Value*>(cache) +
                                 (static_cast<int64_t>(head) * r.a.capacity + past) * r.a.headDim;
                    for (Value* to : {near, far}) {
                        writeEach<Value>(to + at, x.low);
                        writeEach<Value>(to + other, x.high);
                    }
                });
            }
        });
    }

    // Makes zeros of the tile's queries after the last, so that no result depends on what shared memory held before.
    IVC_WARP static void clear(Block& block, char* shared, int32_t group) {
        block.each([&](int warp) {
            eachLane([&](int lane) {
                for (int i = group * S::kChunks + warp * kWarp + lane; i < S::kQueries * S::kChunks; i += S::kThreads) {
                    char* to = shared + S::template at<S::kQueries>(i / S::kChunks, i % S::kChunks);
                    *reinterpret_cast<Vector16*>(to) = Vector16{};
                }
            });
        });
    }

    // Puts the row's own key and value at their place in the last tile.
    IVC_WARP static void place(Block& block, const Tiles& tiles, const Fresh& fresh, int32_t row, int stage) {
        block.each([&](int warp) {
            eachLane([&](int lane) {
                const int thread = warp * kWarp + lane, chunk = thread % S::kChunks;
                if (thread >= 2 * S::kChunks) return;
                char* tile = thread < S::kChunks ? tiles.keys(stage) : tiles.values(stage);
                char* to = tile + S::template at<S::kKeys>(row, chunk);
                const Value* from = (thread < S::kChunks ? fresh.key : fresh.value) + 8 * chunk;
                *reinterpret_cast<Vector16*>(to) = *reinterpret_cast<const Vector16*>(from);
            });
        });
    }

    // The work of one block: `head` of keys, and a split.
    IVC_WARP static void run(Block& block, char* shared, const AttendRow& r, int32_t head, int32_t split) {
        Attend a = r.a;
        const int32_t past = a.past(), tileCount = ceilDiv(past + 1, S::kKeys);
        a.splits = smaller(a.splits, tileCount);
        if (split >= a.splits) return;
        const int32_t from = static_cast<int32_t>(static_cast<int64_t>(tileCount) * split / a.splits);
        const int32_t to = static_cast<int32_t>(static_cast<int64_t>(tileCount) * (split + 1) / a.splits);
        Fresh& fresh = *reinterpret_cast<Fresh*>(shared + S::kSharedBytes);
        const Tiles tiles{block, shared, a, 0, head, split, 0, a.group};
        const int64_t inCache = static_cast<int64_t>(head) * a.capacity * a.headDim;
        const auto tile = [&](int32_t number, int32_t end) {
            const int64_t start = inCache + static_cast<int64_t>(number) * S::kKeys * a.headDim;
            return Tile<Value>{static_cast<const Value*>(a.keyCache) + start,
                static_cast<const Value*>(a.valueCache) + start, a.headDim, a.headDim, number * S::kKeys, end, true};
        };
        tiles.loadKeys(tile(from, past), 0);
        tiles.loadValues(tile(from, past), 0);
        clear(block, shared, a.group);
        awaitKernelBefore();  // for the row; caches and their length are from before the step, or of its first kernel
        RowAttention::split(block, shared, fresh, r, head, past, to == tileCount);
        PerWarp<Found<S>, S::kWarps> found;
        block.each([&](int warp) { tiles.begin(found[warp], warp); });
        for (int32_t i = from; i < to; ++i) {
            const int stage = (i - from) % S::kStages;
            const Tile<Value> of = tile(i, past + 1);
            block.awaitCopies();
            block.barrier();
            if (i == tileCount - 1) {
                place(block, tiles, fresh, past - of.first, stage);
                block.barrier();
            }
            if (S::kStages == 2 && i + 1 < to) {
                tiles.loadKeys(tile(i + 1, past), 1 - stage);
                tiles.loadValues(tile(i + 1, past), 1 - stage);
            }
            const bool masked = of.first + S::kKeys > of.end;
            block.each([&](int warp) {
                tiles.scores(found[warp], warp, stage);
                if (masked) tiles.mask(found[warp], of, warp);
                tiles.weights(found[warp]);
                tiles.weighted(found[warp], warp, stage);
            });
            if (S::kStages == 1 && i + 1 < to) {
                block.barrier();
                tiles.loadKeys(tile(i + 1, past), 0);
                tiles.loadValues(tile(i + 1, past), 0);
            }
        }
        block.each([&](int warp) {
            for (int half = 0; half < 2; ++half) {
                Tiles::ofQuad(found[warp].sum[0][half], [](float x, float y) { return x + y; });
            }
        });
        using Merged = typename Tiles::Merged;
        static_assert(S::kBands == 1 && S::kRowWarps == 1 && S::kKeyWarps > 1, "warps share the queries");
        Merged& merged = *reinterpret_cast<Merged*>(shared);
        block.barrier();
        block.each([&](int warp) { tiles.hand(merged, found[warp], warp); });
        block.barrier();
        block.each([&](int warp) { tiles.finishMerged(merged, warp); });
        if (a.splits > 1 && block.last(r.counters + head, a.splits, &fresh.flag)) combine(block, a, head);
    }

    // Adds up the results of a head's blocks. A lane has four elements of a query, and reads several splits at once.
    IVC_WARP static void combine(Block& block, const Attend& a, int32_t head) {
        constexpr int kAtOnce = 8;
        const int32_t lines = a.kvHeads * a.group, line = head * a.group, fours = a.headDim / 4;
        block.each([&](int warp) {
            eachLane([&](int lane) {
                for (int32_t i = warp * kWarp + lane; i < a.group * fours; i += S::kThreads) {
                    const int32_t query = line + i / fours;
                    const int64_t at = static_cast<int64_t>(query) * a.headDim + 4 * (i % fours);
                    float most = -INFINITY, sum = 0, x[4] = {};
                    for (int32_t first = 0; first < a.splits; first += kAtOnce) {
                        float largest[kAtOnce], sums[kAtOnce], parts[kAtOnce][4];
#pragma unroll
                        for (int j = 0; j < kAtOnce; ++j) {
                            const int32_t s = smaller(first + j, a.splits - 1);
                            largest[j] = fromOthers(a.largest() + s * lines + query);
                            sums[j] = fromOthers(a.sums() + s * lines + query);
                            fourFromOthers(parts[j], a.partial + static_cast<int64_t>(s) * lines * a.headDim + at);
                        }
                        float found = most;
#pragma unroll
                        for (int j = 0; j < kAtOnce; ++j) found = fmaxf(found, largest[j]);
                        const float kept = power2(most - found);
                        most = found;
                        sum *= kept;
#pragma unroll
                        for (int k = 0; k < 4; ++k) x[k] *= kept;
#pragma unroll
                        for (int j = 0; j < kAtOnce; ++j) {
                            const float factor = first + j < a.splits ? power2(largest[j] - most) : 0.0f;
                            sum += factor * sums[j];
#pragma unroll
                            for (int k = 0; k < 4; ++k) x[k] += factor * parts[j][k];
                        }
                    }
#pragma unroll
                    for (int k = 0; k < 4; ++k) x[k] /= sum;
                    writeEach<Value>(static_cast<Value*>(a.y) + at, x);
                }
            });
        });
    }
};

}  // namespace ivc
