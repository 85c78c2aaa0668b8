// Encoder attention whose products groups of four warps make together (warp_group.h), while another thread copies keys
// and values (pipeline.h): SM 90 alone.
//
// The algorithm is that of attend.h. A warp has 16 queries of each of two bands. While scores of one band become
// weights, the products of the other are made. Step i computes the scores of tile i beside the weighted values of tile
// i - 1. Source: Shah et al. 2024, "FlashAttention-3" (arXiv 2407.08608).
#pragma once

#include "attend_plan.h"
#include "pipeline.h"

namespace ivc {

// Sizes of a block's tiles. Attention sees the bands of a warp as if they were those of two warps.
template <int kDepth_, int kGroups_, int kKeys_, int kStages_>
struct GroupedShape {
    static constexpr int kDepth = kDepth_, kGroups = kGroups_, kKeys = kKeys_, kStages = kStages_;
    using Line = Pipeline<kGroups, kStages>;
    static constexpr int kBands = 1, kRowWarps = 2 * Line::kWarps, kKeyWarps = 1;
    static constexpr int kThreads = Line::kThreads;
    static constexpr int kQueries = 16 * kRowWarps;
    static constexpr int kColumns = kKeys;
    static constexpr int kPieces = 2 * kDepth / kPieceBytes;
    static constexpr int kTileBytes = kPieces * kPieceBytes * kKeys;
    static constexpr int kQueryBytes = kPieces * kPieceBytes * kQueries;
    static constexpr int kInputBytes = kQueryBytes + 2 * kStages * kTileBytes;
    static constexpr int kSharedBytes = kInputBytes + Line::kBytes;
    static_assert(kDepth % 16 == 0 && kKeys % 16 == 0 && kQueries <= 256, "no map has such tiles");
    static_assert(kTileBytes % kTileAlignment == 0 && kQueryBytes % kTileAlignment == 0, "a tile is misplaced");
};

// Where a call's queries, keys and values lie.
struct AttendMaps {
    RowMap q, k, v;
};

template <class Value, class S>
struct GroupedAttention {
    using Rows = Attention<Value, Sight::kFrame, S>;

    // What a warp holds of one band of its queries.
    struct Band {
        Found<S> found;
        Lane<Fragment> weight[S::kColumns / 16];
    };
    struct Bands {
        Band band[2];
    };

    Rows rows;
    const AttendMaps& maps;

    IVC_WARP char* keys(int stage) const { return rows.shared + S::kQueryBytes + 2 * stage * S::kTileBytes; }
    IVC_WARP char* values(int stage) const { return keys(stage) + S::kTileBytes; }

    // The warp of Attention that has these queries: a group has its first band of 64 queries, then its second.
    IVC_WARP static int rowWarp(int warp, int band) { return (warp / 4 * 2 + band) * 4 + warp % 4; }

    // Starts the copies of a step: the keys of its tile, and the values of the tile before.
    IVC_WARP void copy(const typename S::Line& line, int32_t step, int stage, int32_t tiles) const {
        const int32_t head = rows.head, frame = rows.frame, row = step * S::kKeys;
        const int32_t tilesOfStep = (step < tiles) + (step > 0);
        line.expect(step, (step == 0 ? S::kQueryBytes : 0) + tilesOfStep * S::kTileBytes);
        if (step == 0) {
            line.template copyRows<S::kQueries, S::kPieces>(step, rows.shared, maps.q, rows.firstQuery, head, frame);
        }
        if (step < tiles) {
            line.template copyRows<S::kKeys, S::kPieces>(step, keys(stage), maps.k, row, head, frame);
        }
        if (step > 0) {
            line.template copyRows<S::kKeys, S::kPieces>(step, values(stage), maps.v, row - S::kKeys, head, frame);
        }
    }

    // Begins to multiply a band's queries and the keys of a stage.
    IVC_WARP void multiplyScores(Bands& bands, int band, int warp, int stage) const {
#pragma unroll
        for (int piece = 0; piece < S::kPieces; ++piece) {
            const char* queries = rows.shared + placeInTile(S::kQueries, 16 * rowWarp(warp / 4 * 4, band), 2 * piece);
            const char* tile = keys(stage) + placeInTile(S::kKeys, 0, 2 * piece);
            multiplyShared<Value>(bands.band[band].found.score[0], queries, warp % 4, tile, piece > 0);
        }
    }

    // Begins to add the values of a stage, multiplied by a band's weights.
    IVC_WARP void multiplyWeighted(Bands& bands, int band, int stage) const {
#pragma unroll
        for (int k = 0; k < S::kColumns / 16; ++k) {
            const char* tile = values(stage) + placeInTile(S::kKeys, 16 * k, 0);
            multiplyAcross<Value>(bands.band[band].found.value[0], bands.band[band].weight[k], tile, S::kKeys);
        }
    }

    IVC_WARP void beginScores(Bands& bands, int band, int warp, int stage) const {
        forgotten(bands.band[band].found.score[0]);
        beginProducts();
        multiplyScores(bands, band, warp, stage);
        endProducts();
    }

    IVC_WARP void beginWeighted(Bands& bands, int band, int stage) const {
        settled(bands.band[band].weight);
        settled(bands.band[band].found.value[0]);
        beginProducts();
        multiplyWeighted(bands, band, stage);
        endProducts();
    }

    // Both as one series.
    IVC_WARP void beginBoth(Bands& bands, int band, int warp, int stage) const {
        settled(bands.band[band].weight);
        settled(bands.band[band].found.value[0]);
        forgotten(bands.band[band].found.score[0]);
        beginProducts();
        multiplyScores(bands, band, warp, stage);
        multiplyWeighted(bands, band, stage);
        endProducts();
    }

    // Turns a band's scores into weights, once the products of its series are done.
    IVC_WARP void weigh(Bands& bands, int band, const Tile<Value>& tile, bool masked, int warp) const {
        Found<S>& f = bands.band[band].found;
        settled(f.score[0]);
        settled(f.value[0]);
        if (masked) rows.mask(f, tile, rowWarp(warp, band));
        rows.weights(f);
#pragma unroll
        for (int k = 0; k < S::kColumns / 16; ++k) bands.band[band].weight[k] = rows.weightsOf(f, 0, k);
        computed(f.sum[0][0], f.sum[0][1]);
    }

    IVC_WARP void run() const {
        const Visit<Value, Sight::kFrame, S::kKeys> visit(
            rows.a, rows.frame, rows.head, rows.firstQuery, rows.endQuery, 0);
        PerWarp<Bands, S::Line::kWarps> held;
        const typename S::Line line(rows.block, rows.shared + S::kInputBytes);
        const auto weighBoth = [&](Bands& bands, int32_t step, int warp) {
            const Tile<Value> tile = visit[step];
            const bool masked = visit.masked(tile, rows.firstQuery);
            awaitProducts<1>();
            weigh(bands, 0, tile, masked, warp);
            awaitProducts<0>();
            line.free(step);
            weigh(bands, 1, tile, masked, warp);
        };
        line.run(
            visit.to, [&](int32_t step, int stage) { copy(line, step, stage, visit.to); },
            [&](int stage, int warp) {
                Bands& bands = held[warp];
#pragma unroll
                for (int band = 0; band < 2; ++band) rows.begin(bands.band[band].found, rowWarp(warp, band));
                beginScores(bands, 0, warp, stage);
                beginScores(bands, 1, warp, stage);
                weighBoth(bands, 0, warp);
            },
            [&](int32_t step, int stage, int warp) {
                Bands& bands = held[warp];
                beginBoth(bands, 0, warp, stage);
                beginBoth(bands, 1, warp, stage);
                weighBoth(bands, step, warp);
            },
            [&](int stage, int warp) {
                Bands& bands = held[warp];
                beginWeighted(bands, 0, stage);
                beginWeighted(bands, 1, stage);
                awaitProducts<0>();
#pragma unroll
                for (int band = 0; band < 2; ++band) {
                    Found<S>& f = bands.band[band].found;
                    settled(f.value[0]);
                    rows.total(f);
                    rows.finish(f, rowWarp(warp, band));
                }
            });
    }
};

// The work of one block, like attend().
template <class Value, class S>
IVC_WARP void attendGrouped(
    Block& block, char* shared, const Attend& a, const AttendMaps& maps, int32_t tile, int32_t head, int32_t frame) {
    const int32_t firstQuery = tile * S::kQueries, endQuery = smaller(firstQuery + S::kQueries, a.queries());
    const Attention<Value, Sight::kFrame, S> rows{block, shared, a, frame, head, 0, firstQuery, endQuery};
    GroupedAttention<Value, S>{rows, maps}.run();
}

// Tiles for heads of 72 and 80. On an H200, microseconds for 16 heads of 80 at 1,024, 4,096 and 16,384 patches:
//     Patches                                   35    292   4,324
//     these, of 256 queries                     39    212   2,840
//     all threads copy, and wait at a barrier   45    263   3,644
//     PyTorch's, which is cuDNN's               19    201   3,393
// Slower, too: 64 keys; pieces of 128 bytes.
using GroupedPatches = GroupedShape<80, 2, 80, 4>;
static_assert(GroupedPatches::kQueries == kGroupedQueries, "the plan counts other blocks");

// The same as launchEncoder where groups of warps can multiply together.
template <class Half, class Brain, class Launch>
auto launchGroups(const IvcEncoder& c, const Attend& a, Launch launch) {
    return c.type == IVC_FLOAT16 ? launch.template grouped<Half, GroupedPatches>(a)
                                 : launch.template grouped<Brain, GroupedPatches>(a);
}

}  // namespace ivc
