// Chooses the kernel of an attention call, and its blocks, from extents alone.
#pragma once

#include <initializer_list>

#include "attend.h"
#include "attend_plain.h"

namespace ivc {

// Tiles of a decoder, by the number of queries of a key-value head. Few queries: the keys of a tile are split over
// warps, and all keys over blocks. Some queries: all tiles run at the same time and the longest decides, so two warps
// share the queries of a tile.
template <int kDepth>
using FewQueries = Shape<kDepth, 1, 1, 4, 64, 2>;
template <int kDepth>
using SomeQueries = Shape<kDepth, 1, 4, 2, 128, 1>;
template <int kDepth>
using ManyQueries = Shape<kDepth, kDepth == 128 ? 1 : 2, 4, 1, 64, 1>;
// Tiles of an encoder.
template <int kDepth>
using Patches = Shape<kDepth, kDepth == 128 ? 1 : 2, 4, 1, 64, 1>;
constexpr int kGroupedQueries = 256;      // of a block of attend_grouped.h
constexpr int kLeastGroupedBlocks = 128;  // with fewer, multiprocessors have nothing to do

constexpr int kMostFewQueries = 64;
constexpr int kMostSomeBlocks = 256;
constexpr int kWantedBlocks = 128;  // blocks to which a decoder's keys are split
constexpr int kMostKeySplits = 16;  // more splits take longer to combine than they save

struct Blocks {
    int32_t x, y, z;
};

enum class Queries { kFew, kSome, kMany };

inline int64_t queriesOf(const IvcAttention& c) { return static_cast<int64_t>(c.rows) * (c.heads / c.kvHeads); }

template <class S>
inline int64_t tilesOf(const IvcAttention& c) {
    return (queriesOf(c) + S::kQueries - 1) / S::kQueries * c.kvHeads;
}

inline Queries tilingOf(const IvcAttention& c) {
    if (queriesOf(c) <= kMostFewQueries) return Queries::kFew;
    return tilesOf<SomeQueries<128>>(c) <= kMostSomeBlocks ? Queries::kSome : Queries::kMany;
}

inline bool wellPlaced(IvcType type, const IvcStrides& s) {
    return type == IVC_FLOAT32 || (s.frame | s.head | s.row) % 8 == 0;
}

// Whether addresses allow copies of 16 bytes.
inline bool wellPlaced(const Attend& a, IvcType type) {
    uintptr_t bits = 0;
    for (const void* address : {a.q, a.k, a.v, static_cast<const void*>(a.keyCache),
             static_cast<const void*>(a.valueCache), static_cast<const void*>(a.y)}) {
        bits |= reinterpret_cast<uintptr_t>(address);
    }
    return bits % (type == IVC_FLOAT32 ? 4 : 16) == 0;
}

inline bool possible(const IvcAttention& c) {
    return c.rows > 0 && c.capacity >= 0 && c.kvHeads > 0 && c.heads > 0 && c.heads % c.kvHeads == 0 &&
           (c.headDim == 64 || c.headDim == 128) && c.scale > 0 && c.type >= IVC_FLOAT32 && c.type <= IVC_BFLOAT16 &&
           (c.fresh == IVC_FRESH_APART || c.capacity >= c.rows) && wellPlaced(c.type, c.q) &&
           wellPlaced(c.type, c.k) && wellPlaced(c.type, c.v) && c.kvHeads <= 65535 &&
           queriesOf(c) < INT32_MAX - 1024;
}

inline bool possible(const IvcEncoder& c) {
    return c.frames > 0 && c.frames <= 65535 && c.heads > 0 && c.heads <= 65535 && c.rows > 0 &&
           (c.headDim == 64 || c.headDim == 72 || c.headDim == 80 || c.headDim == 128) && c.scale > 0 &&
           c.type >= IVC_FLOAT32 && c.type <= IVC_BFLOAT16 && wellPlaced(c.type, c.q) && wellPlaced(c.type, c.k) &&
           wellPlaced(c.type, c.v) && c.rows < INT32_MAX - 1024 &&
           (c.blockSize == 0 || (c.blockSize > 0 && c.rows % c.blockSize == 0 && c.rows / c.blockSize > 2));
}

// The number of parts into which keys are split, so that there are enough blocks.
template <class S>
inline int32_t splitsFor(const IvcAttention& c) {
    const int64_t tiles = ceilDiv(c.capacity, S::kKeys) + ceilDiv(c.rows, S::kKeys);
    const int64_t wanted = larger<int64_t>(1, kWantedBlocks / tilesOf<S>(c));
    return static_cast<int32_t>(smaller(smaller(tiles, wanted), static_cast<int64_t>(kMostKeySplits)));
}

inline int32_t splitsOf(const IvcAttention& c) {
    const Queries tiling = tilingOf(c);
    if (c.type == IVC_FLOAT32 || tiling == Queries::kMany) return 1;
    return tiling == Queries::kFew ? splitsFor<FewQueries<128>>(c) : splitsFor<SomeQueries<128>>(c);
}

inline size_t workspaceOf(const IvcAttention& c) {
    const int32_t splits = splitsOf(c);
    if (splits == 1) return 0;
    return sizeof(float) * static_cast<size_t>(splits) * static_cast<size_t>(c.heads) * static_cast<size_t>(c.rows) *
           static_cast<size_t>(c.headDim + 2);
}

inline Attend planned(const IvcAttention& c) {
    Attend a{};
    a.qStride = c.q;
    a.kStride = c.k;
    a.vStride = c.v;
    a.frames = 1;
    a.heads = c.heads;
    a.kvHeads = c.kvHeads;
    a.headDim = c.headDim;
    a.group = c.heads / c.kvHeads;
    a.rows = a.keys = c.rows;
    a.capacity = c.capacity;
    a.append = c.fresh == IVC_FRESH_APPENDED;
    a.splits = splitsOf(c);
    a.scale = c.scale * kLog2E;
    return a;
}

inline Attend planned(const IvcEncoder& c) {
    Attend a{};
    a.qStride = c.q;
    a.kStride = c.k;
    a.vStride = c.v;
    a.frames = c.frames;
    a.heads = a.kvHeads = c.heads;
    a.headDim = c.headDim;
    a.group = 1;
    a.rows = c.rows - 2 * c.blockSize;
    a.keys = c.rows;
    a.firstRow = a.blockSize = c.blockSize;
    a.splits = 1;
    a.scale = c.scale * kLog2E;
    return a;
}

// Calls `launch` with the kernel of a planned call: launch.tiles<Value, Sight, Shape>(attend), or launch.plain<Value,
// Sight>(attend). `Half` and `Brain` are float16 and bfloat16.
template <class Value, int kDepth, class Launch>
auto launchDecoderTiles(const IvcAttention& c, const Attend& a, Launch launch) {
    switch (tilingOf(c)) {
        case Queries::kFew: return launch.template tiles<Value, Sight::kCausal, FewQueries<kDepth>>(a);
        case Queries::kSome: return launch.template tiles<Value, Sight::kCausal, SomeQueries<kDepth>>(a);
        default: return launch.template tiles<Value, Sight::kCausal, ManyQueries<kDepth>>(a);
    }
}

template <class Value, class Launch>
auto launchDecoderTiles(const IvcAttention& c, const Attend& a, Launch launch) {
    return c.headDim == 64 ? launchDecoderTiles<Value, 64>(c, a, launch) : launchDecoderTiles<Value, 128>(c, a, launch);
}

template <class Half, class Brain, class Launch>
auto launchDecoder(const IvcAttention& c, const Attend& a, bool tensorCores, Launch launch) {
    if (c.type == IVC_FLOAT32) return launch.template plain<float, Sight::kCausal>(a);
    if (!tensorCores) {
        return c.type == IVC_FLOAT16 ? launch.template plain<Half, Sight::kCausal>(a)
                                     : launch.template plain<Brain, Sight::kCausal>(a);
    }
    return c.type == IVC_FLOAT16 ? launchDecoderTiles<Half>(c, a, launch) : launchDecoderTiles<Brain>(c, a, launch);
}

template <class Value, Sight kSight, class Launch>
auto launchEncoderTiles(const Attend& a, Launch launch) {
    if (a.headDim == 64) return launch.template tiles<Value, kSight, Patches<64>>(a);
    if (a.headDim <= 80) return launch.template tiles<Value, kSight, Patches<80>>(a);
    return launch.template tiles<Value, kSight, Patches<128>>(a);
}

template <class Half, class Brain, Sight kSight, class Launch>
auto launchEncoder(const IvcEncoder& c, const Attend& a, bool tensorCores, Launch launch) {
    if (c.type == IVC_FLOAT32) return launch.template plain<float, kSight>(a);
    if (!tensorCores) {
        return c.type == IVC_FLOAT16 ? launch.template plain<Half, kSight>(a) : launch.template plain<Brain, kSight>(a);
    }
    return c.type == IVC_FLOAT16 ? launchEncoderTiles<Half, kSight>(a, launch)
                                 : launchEncoderTiles<Brain, kSight>(a, launch);
}

template <class Half, class Brain, class Launch>
auto launchEncoder(const IvcEncoder& c, const Attend& a, bool tensorCores, Launch launch) {
    return c.blockSize > 0 ? launchEncoder<Half, Brain, Sight::kWindow>(c, a, tensorCores, launch)
                           : launchEncoder<Half, Brain, Sight::kFrame>(c, a, tensorCores, launch);
}

// Whether launchGroups (attend_grouped.h) takes a call, and whether it is then the faster way.
inline bool takesGroups(const IvcEncoder& c) {
    return c.type != IVC_FLOAT32 && c.blockSize == 0 && (c.headDim == 72 || c.headDim == 80);
}
inline bool fasterInGroups(const IvcEncoder& c) {
    return static_cast<int64_t>(ceilDiv(c.rows, kGroupedQueries)) * c.heads * c.frames >= kLeastGroupedBlocks;
}

// The grid of a kernel that works by tiles.
template <Sight kSight, class S>
inline Blocks blocksOf(const Attend& a) {
    return {ceilDiv(a.queries(), S::kQueries), a.kvHeads, kSight == Sight::kCausal ? a.splits : a.frames};
}

}  // namespace ivc
