// Copies rows of many tensors in one launch, in 16-byte vectors if addresses and row sizes allow it, else in smaller
// ones.
#pragma once

#include "ivc_types.h"
#include "team.h"

namespace ivc {

constexpr int kRowThreads = 256;
constexpr int kRowUnroll = 4;  // vectors that a thread copies at once
constexpr int kRowBlock = kRowThreads * kRowUnroll;

#ifdef __CUDACC__
using Vector16 = uint4;
using Vector8 = uint2;
#else
struct alignas(16) Vector16 {
    uint32_t x[4];
};
struct alignas(8) Vector8 {
    uint32_t x[2];
};
#endif

// One launch's arguments. They must fit into the 4 KiB of a kernel's parameters.
struct RowCopies {
    IvcRows tensors[IVC_ROWS_PER_LAUNCH];
    int32_t firstBlock[IVC_ROWS_PER_LAUNCH + 1];  // number of each tensor's first block
    int32_t count;
    int32_t sourceRows, targetRows, copied;
    const int32_t* gather;  // source row of each copied row; null: 0..copied-1
    const int32_t* offset;  // the first target row; null: 0
};

// The widest power of two, up to 16 bytes, that divides both addresses and the row size.
IVC_HD inline int32_t vectorBytes(const IvcRows& t) {
    const uint64_t bits = reinterpret_cast<uint64_t>(t.source) | reinterpret_cast<uint64_t>(t.target) |
                          static_cast<uint64_t>(t.rowBytes) | 16u;
    return static_cast<int32_t>(bits & (~bits + 1));
}

// The number of vectors that are copied of tensor `t`: outer * copied * (rowBytes / vectorBytes).
IVC_HD inline int64_t vectorCount(const IvcRows& t, int32_t copied) {
    return static_cast<int64_t>(t.outer) * copied * (t.rowBytes / vectorBytes(t));
}

template <class Vector>
IVC_BLOCK void copyVectors(const Team& team, const RowCopies& c, const IvcRows& t, int32_t first) {
    const auto* source = static_cast<const Vector*>(t.source);
    auto* target = static_cast<Vector*>(t.target);
    const int32_t width = t.rowBytes / static_cast<int32_t>(sizeof(Vector));
    const int32_t end = static_cast<int32_t>(vectorCount(t, c.copied));
    team.each([&](int thread) {
        const int32_t offset = c.offset ? *c.offset : 0;
        Vector values[kRowUnroll];
        int64_t to[kRowUnroll];
#pragma unroll
        for (int i = 0; i < kRowUnroll; ++i) {
            const int32_t at = first + i * kRowThreads + thread;
            to[i] = -1;
            if (at >= 0 && at < end) {
                const int32_t line = at / width, column = at % width;
                const int32_t outer = line / c.copied, m = line % c.copied;
                const int32_t from = c.gather ? clamped(c.gather[m], c.sourceRows) : m;
                if (offset >= 0 && m < c.targetRows - offset) {
                    values[i] = source[(static_cast<int64_t>(outer) * c.sourceRows + from) * width + column];
                    to[i] = (static_cast<int64_t>(outer) * c.targetRows + offset + m) * width + column;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kRowUnroll; ++i) {
            if (to[i] >= 0) target[to[i]] = values[i];
        }
    });
}

// The work of one block.
IVC_BLOCK void copyRows(const Team& team, const RowCopies& c, int32_t block) {
    int32_t low = 0, high = c.count - 1;  // finds the last tensor whose first block is not after this one
    while (low < high) {
        const int32_t middle = (low + high + 1) / 2;
        if (c.firstBlock[middle] <= block) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const IvcRows& t = c.tensors[low];
    const int32_t first = (block - c.firstBlock[low]) * kRowBlock;
    switch (vectorBytes(t)) {
        case 16: return copyVectors<Vector16>(team, c, t, first);
        case 8: return copyVectors<Vector8>(team, c, t, first);
        case 4: return copyVectors<uint32_t>(team, c, t, first);
        case 2: return copyVectors<uint16_t>(team, c, t, first);
        default: return copyVectors<uint8_t>(team, c, t, first);
    }
}

// One launch's arguments: see ivcCacheIndex.
struct CacheRows {
    const int32_t* keepIndex;
    int32_t* cacheIndex;
    int32_t kept, past, capacity;
};

IVC_BLOCK void indexCaches(const Team& team, const CacheRows& c, int32_t block) {
    team.each([&](int thread) {
        const int32_t row = block * team.threads() + thread;
        if (row >= c.capacity) return;
        const bool fresh = row >= c.past && row - c.past < c.kept;
        c.cacheIndex[row] = fresh ? c.past + c.keepIndex[row - c.past] : row;
    });
}

// Fills `c` with the tensors and returns the number of blocks, or -1 if a tensor is impossible.
inline int32_t planRows(RowCopies& c, const IvcRows* tensors, int32_t count, int32_t copied) {
    int64_t blocks = 0;
    c.count = count;
    c.copied = copied;
    for (int32_t i = 0; i < count; ++i) {
        const IvcRows& t = tensors[i];
        if (t.outer <= 0 || t.rowBytes <= 0) return -1;
        c.tensors[i] = t;
        c.firstBlock[i] = static_cast<int32_t>(blocks);
        const int64_t vectors = vectorCount(t, copied);
        blocks += (vectors + kRowBlock - 1) / kRowBlock;
        if (vectors > INT32_MAX - kRowBlock || blocks > INT32_MAX) return -1;
    }
    c.firstBlock[count] = static_cast<int32_t>(blocks);
    return static_cast<int32_t>(blocks);
}

}  // namespace ivc
