// Chooses the kernels of a call on joined rows, from extents alone.
#pragma once

#include <initializer_list>

#include "attend_plan.h"
#include "attend_row.h"
#include "attend_together.h"

namespace ivc {

// Whether addresses are multiples of 16 bytes.
inline bool inSixteens(std::initializer_list<const void*> tensors) {
    uintptr_t together = 0;
    for (const void* tensor : tensors) together |= reinterpret_cast<uintptr_t>(tensor);
    return together % 16 == 0;
}

inline bool possible(const IvcJoined& c, const IvcJoinedRows& r) {
    const bool normed = r.queryNorm || r.keyNorm;
    return c.rows > 0 && c.kvHeads > 0 && c.heads > 0 && c.heads % c.kvHeads == 0 && c.headDim > 0 &&
           c.headDim <= 128 && c.headDim % 8 == 0 && (!normed || (c.headDim & (c.headDim - 1)) == 0) &&
           c.type >= IVC_FLOAT32 && c.type <= IVC_BFLOAT16 && (r.cos == nullptr) == (r.sin == nullptr) &&
           inSixteens({r.cos, r.sin}) && (!(r.cos || c.byHead) || (c.angleRows > 0 && c.rows % c.angleRows == 0)) &&
           static_cast<int64_t>(c.rows) * (c.heads + 2 * c.kvHeads) * (c.headDim / 8) < INT32_MAX - kTurnThreads;
}

inline Turn planned(const IvcJoined& c, const IvcJoinedRows& r, void* q, void* k, void* v) {
    return {r.rows, r.cos, r.sin, r.queryNorm, r.keyNorm, q, k, v, c.rows, c.angleRows, c.heads, c.kvHeads, c.headDim,
        c.order == IVC_HEADS_GROUPED, c.byHead, c.epsilon};
}

inline int32_t turnBlocks(const Turn& t) {
    return ceilDiv(t.rowCount * t.parts() * (t.half() / (t.wide() ? 8 : 4)), kTurnThreads);
}

// The attention after ivcTurnHeads: query and key are in their own buffers, the value is still in the joined rows.
inline IvcAttention apart(const IvcJoined& c) {
    const int64_t size = c.headDim, width = (c.heads + 2 * static_cast<int64_t>(c.kvHeads)) * size;
    const bool grouped = c.order == IVC_HEADS_GROUPED;
    const IvcStrides value{0, grouped ? (c.heads / c.kvHeads + 2) * size : size, width};
    return {c.rows, c.capacity, c.heads, c.kvHeads, c.headDim, c.scale, c.type, IVC_FRESH_APPENDED,
        {0, size, c.heads * size}, {0, size, c.kvHeads * size}, value};
}

// Whether one launch does everything.
inline bool inOneLaunch(const IvcJoined& c, bool tensorCores) {
    return c.rows == 1 && c.type != IVC_FLOAT32 && tensorCores && c.heads / c.kvHeads <= kMostRowQueries;
}

// Splits of the keys where no blocks form clusters.
inline int32_t rowSplitsOf(const IvcJoined& c) {
    const int32_t tiles = ceilDiv(c.capacity, OneRow<128>::kKeys);
    return larger(1, smaller(smaller(tiles, kMostRowSplits), kWantedRowBlocks / c.kvHeads));
}

// Blocks of a cluster, which share the keys of a key-value head, or 0 where no clusters are better. On an H200 all kernels
// of a float16 decode step (28 layers, 2 key-value heads and 12 heads of 128) take so many microseconds at 320, 1,090,
// 2,112 and 4,160 cached rows:
//     rowSplitsOf, without clusters    1,148   1,244   1,274   1,326
//     8 blocks                         1,107   1,176   1,213   1,280
// And attention alone, a layer:
//     2 key-value heads, 12 heads, without clusters      6.5    7.3    8.3   10.4
//         8 blocks                                       4.9    5.7    6.7    9.1
//     8 key-value heads, 32 heads, without clusters      6.4    8.7   11.0   14.2
//         8 blocks                                       5.1    6.2    7.7   10.7
//     32 key-value heads, 32 heads, without clusters     8.4   13.2   18.2   27.8
//         4 blocks                                       5.6   15.7   21.0   31.8
// 8 blocks are the most that every device with clusters allows. 16 were faster by 0.2 us a layer at 4,160 rows alone, and
// slower by 1 us at 320. 4 warps a block instead of 8 were slower by 1 to 3 us from 2,112 rows on.
constexpr int kMostTogetherHeads = 8;
inline int32_t clusterOf(const IvcJoined& c) { return c.kvHeads <= kMostTogetherHeads ? 8 : 0; }

inline int64_t bytesOf(IvcType type) { return type == IVC_FLOAT32 ? 4 : 2; }

// Bytes of a rotated query or key, rounded up to a multiple of 16.
inline size_t turnedBytes(const IvcJoined& c, int32_t heads) {
    return static_cast<size_t>((bytesOf(c.type) * c.rows * heads * c.headDim + 15) / 16 * 16);
}

inline size_t workspaceOf(const IvcJoined& c, bool tensorCores) {
    if (!possible(c, IvcJoinedRows{})) return 0;
    if (inOneLaunch(c, tensorCores)) {
        const int32_t splits = rowSplitsOf(c);
        return sizeof(float) * static_cast<size_t>(splits) * static_cast<size_t>(c.heads) *
               static_cast<size_t>(c.headDim + 2);
    }
    const IvcAttention attention = apart(c);
    return turnedBytes(c, c.heads) + turnedBytes(c, c.kvHeads) + (possible(attention) ? workspaceOf(attention) : 0);
}

template <class Half, class Brain, class Launch>
auto launchTurn(const IvcJoined& c, const Turn& t, Launch launch) {
    return c.type == IVC_FLOAT32   ? launch.template turn<float>(t)
           : c.type == IVC_FLOAT16 ? launch.template turn<Half>(t)
                                   : launch.template turn<Brain>(t);
}

// One row's attention, in clusters if their blocks may have clusterBytes of shared memory and that is enough.
template <class Value, class S, class Launch>
auto launchRow(const IvcJoined& c, const AttendRow& row, int clusterBytes, Launch launch) {
    const int32_t blocks = clusterOf(c);
    if (blocks == 0) return launch.template row<Value, OneRow<S::kDepth>>(row);
    AttendTogether r{row, blocks, smaller(S::kMostTiles, ceilDiv(ceilDiv(c.capacity, blocks), S::kKeys))};
    while (r.tiles > 1 && Together<Value, S>::sharedBytes(r) > clusterBytes) --r.tiles;
    return Together<Value, S>::sharedBytes(r) > clusterBytes ? launch.template row<Value, OneRow<S::kDepth>>(row)
                                                             : launch.template together<Value, S>(r);
}

template <class Value, int kDepth, class Launch>
auto launchRow(const IvcJoined& c, const AttendRow& row, int clusterBytes, Launch launch) {
    return row.a.group <= 8 ? launchRow<Value, OwnKeys<kDepth, 1>>(c, row, clusterBytes, launch)
                            : launchRow<Value, OwnKeys<kDepth, 2>>(c, row, clusterBytes, launch);
}

// Runs the call through `launch`: launch.turn<Value>(turn), launch.row<Value, Shape>(row), launch.together<Value,
// Shape>(row), and what launchDecoder needs. clusterBytes: of shared memory of a block of a cluster; 0: no clusters.
// Returns the status of the first launch that fails, or `impossible`.
template <class Half, class Brain, class Status, class Launch>
Status attendJoined(const IvcJoined& c, const IvcJoinedRows& r, void* keyCache, void* valueCache,
    const int32_t* pastLength, void* y, void* workspace, int32_t* counters, bool tensorCores, int clusterBytes,
    Status impossible, Launch launch) {
    if (!possible(c, r)) return impossible;
    const IvcAttention attention = apart(c);
    if (!possible(attention)) return impossible;
    Attend a = planned(attention);
    a.keyCache = keyCache;
    a.valueCache = valueCache;
    a.pastLength = pastLength;
    a.y = y;
    a.q = a.k = a.v = r.rows;
    if (!wellPlaced(a, c.type)) return impossible;
    if (inOneLaunch(c, tensorCores)) {
        a.splits = rowSplitsOf(c);
        a.partial = static_cast<float*>(workspace);
        const AttendRow row{a, planned(c, r, nullptr, nullptr, nullptr), counters};
        if (c.headDim == 64) {
            return c.type == IVC_FLOAT16 ? launchRow<Half, 64>(c, row, clusterBytes, launch)
                                         : launchRow<Brain, 64>(c, row, clusterBytes, launch);
        }
        return c.type == IVC_FLOAT16 ? launchRow<Half, 128>(c, row, clusterBytes, launch)
                                     : launchRow<Brain, 128>(c, row, clusterBytes, launch);
    }
    char* q = static_cast<char*>(workspace);
    char* k = q + turnedBytes(c, c.heads);
    const Turn turn = planned(c, r, q, k, nullptr);
    const Status turned = launchTurn<Half, Brain>(c, turn, launch);
    if (turned != Status()) return turned;
    a.q = q;
    a.k = k;
    a.v = static_cast<const char*>(r.rows) + turn.place(c.heads + c.kvHeads) * bytesOf(c.type);
    a.partial = reinterpret_cast<float*>(k + turnedBytes(c, c.kvHeads));
    return launchDecoder<Half, Brain>(attention, a, tensorCores, launch);
}

}  // namespace ivc
