// Attention of one query in one block, without tensor cores: for float32, and for GPUs before SM 80.
#pragma once

#include "attend.h"

namespace ivc {

// Lanes share keys for the scores, and elements for the values. Warps take tiles of keys in turn.
template <class Value, Sight kSight>
struct PlainAttention {
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
    static constexpr int kMostDepth = 128, kPieces = kMostDepth / kWarp;

    struct Shared {
        float query[kMostDepth];
        float value[kWarps][kMostDepth];
        float largest[kWarps];
        float sum[kWarps];
    };

    struct Found {
        Lane<float> value[kPieces];  // element kWarp * piece + lane
        Lane<float> largest;
        Lane<float> sum;
    };

    // Computes the weight of each lane's key in the tile. Scales the sums so far down if a larger score has appeared.
    IVC_WARP static void weights(const Shared& shared, const Attend& a, const Tile<Value>& t, int32_t limit, Found& f,
        Lane<float>& weight) {
        Lane<float> most;
        eachLane([&](int lane) {
            const int32_t key = t.first + lane;
            bool seen = key < t.end;
            if (kSight == Sight::kWindow) seen = seen && a.windowOfPlace[key] >= 0 && a.windowOfPlace[key] == limit;
            if (kSight == Sight::kCausal) seen = seen && (t.cached || key <= limit);
            float score = 0;
            for (int i = 0; seen && i < a.headDim; ++i) {
                score += shared.query[i] * static_cast<float>(t.k[lane * t.kRow + i]);
            }
            weight[lane] = seen ? score * a.scale : -INFINITY;
            most[lane] = fmaxf(f.largest[lane], weight[lane]);
        });
        overWarp(most, [](float x, float y) { return fmaxf(x, y); });
        eachLane([&](int lane) {
            const float base = most[lane] == -INFINITY ? 0.0f : most[lane];
            const float kept = power2(f.largest[lane] - base);
            f.largest[lane] = most[lane];
            weight[lane] = power2(weight[lane] - base);
            f.sum[lane] = f.sum[lane] * kept + weight[lane];
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) f.value[piece][lane] *= kept;
        });
    }

    IVC_WARP static void run(
        Block& block, Shared& shared, const Attend& a, int32_t query, int32_t head, int32_t frame) {
        const int32_t row = query / a.group, of = head * a.group + query % a.group;
        const Visit<Value, kSight, kWarp> visit(a, frame, head, query, query + 1, 0);
        const int32_t limit = kSight == Sight::kWindow ? a.windowOfPlace[a.firstRow + row] : row;
        const Value* q = static_cast<const Value*>(a.q) + frame * a.qStride.frame + of * a.qStride.head +
                         (a.firstRow + row) * a.qStride.row;
        block.each([&](int warp) {
            eachLane([&](int lane) {
                const int thread = warp * kWarp + lane;
                if (thread < a.headDim) shared.query[thread] = static_cast<float>(q[thread]);
                if (a.append) appendRows<Value, Value>(a, head, query, a.queries(), kThreads, thread);
            });
        });
        block.barrier();
        block.each([&](int warp) {
            Found f;
            eachLane([&](int lane) {
                f.largest[lane] = -INFINITY;
                f.sum[lane] = 0;
#pragma unroll
                for (int piece = 0; piece < kPieces; ++piece) f.value[piece][lane] = 0;
            });
            for (int32_t i = warp; i < visit.to; i += kWarps) {
                const Tile<Value> t = visit[i];
                Lane<float> weight, factor;
                weights(shared, a, t, limit, f, weight);
                for (int key = 0; key < kWarp; ++key) {
                    spread(factor, weight, key);
                    eachLane([&](int lane) {
                        if (factor[lane] == 0) return;  // a key that is not attended to: its memory may hold anything
                        const Value* v = t.v + key * t.vRow;
#pragma unroll
                        for (int piece = 0; piece < kPieces; ++piece) {
                            const int element = kWarp * piece + lane;
                            if (element >= a.headDim) continue;
                            f.value[piece][lane] += factor[lane] * static_cast<float>(v[element]);
                        }
                    });
                }
            }
            overWarp(f.sum, [](float x, float y) { return x + y; });
            eachLane([&](int lane) {
#pragma unroll
                for (int piece = 0; piece < kPieces; ++piece) {
                    shared.value[warp][kWarp * piece + lane] = f.value[piece][lane];
                }
                if (lane == 0) {
                    shared.largest[warp] = f.largest[lane];
                    shared.sum[warp] = f.sum[lane];
                }
            });
        });
        block.barrier();
        block.each([&](int warp) {
            eachLane([&](int lane) {
                const int element = warp * kWarp + lane;
                if (element >= a.headDim) return;
                float most = -INFINITY, sum = 0, x = 0;
                for (int part = 0; part < kWarps; ++part) most = fmaxf(most, shared.largest[part]);
                for (int part = 0; part < kWarps; ++part) {
                    if (shared.sum[part] == 0) continue;
                    const float factor = power2(shared.largest[part] - most);
                    sum += factor * shared.sum[part];
                    x += factor * shared.value[part][element];
                }
                const int64_t line = (static_cast<int64_t>(frame) * a.rows + row) * a.heads + of;
                static_cast<Value*>(a.y)[line * a.headDim + element] = static_cast<Value>(sum == 0 ? 0.0f : x / sum);
            });
        });
    }
};

}  // namespace ivc
