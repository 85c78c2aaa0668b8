// How similar each visual token is to the queries: softmax(V_q V^T / sqrt(D)), summed over heads and queries.
//
// Two launches work on tiles of 16 queries by 64 keys, so a matrix of queries x keys is never stored. The first finds
// the maximum and the sum of each row, the second sums the columns. Every sum has a fixed order, the same for every
// column, so that equal value vectors get equal scores. Source: arXiv 2602.03060, section 3.3.
#pragma once

#include <math.h>
#include <string.h>

#include <type_traits>

#include "rows.h"
#include "team.h"
#include "warp.h"

namespace ivc {

constexpr int kVoteThreads = 256;
constexpr int kQueries = 16;  // of a tile
constexpr int kKeys = 64;     // of a tile
constexpr int kDepth = 128;   // elements of a head that are loaded at a time
constexpr int kLanes = kVoteThreads / kQueries;
constexpr int kEach = kQueries * kKeys / kVoteThreads;  // scores of one thread
constexpr int kGroups = kVoteThreads / kKeys;
constexpr int kMostSplits = 8;  // blocks that share the queries of one tile of keys

// One launch's arguments. Queries are the rows queryIndex[q]; if seedIndex is not null, the rows
// visualIndex[seedIndex[q]]. Keys are the visual tokens; if the softmax runs over all rows, the rows 0..rows-1.
template <class Value>
struct Votes {
    const Value* values;  // [heads, rows, depth]
    const int32_t* visualIndex;
    const int32_t* queryIndex;
    const int32_t* seedIndex;
    float* rowMax;      // [heads, queries, tiles of the softmax's keys]
    float* rowSum;      // the same
    float* columnSums;  // [heads * splits, visual]
    int32_t heads, rows, depth, visual, queries, splits;
    bool softmaxOverAll;
    bool aligned;  // whether each row of values begins at a multiple of 16 bytes

    IVC_HD int32_t softmaxKeys() const { return softmaxOverAll ? rows : visual; }
    IVC_HD int32_t softmaxTiles() const { return ceilDiv(softmaxKeys(), kKeys); }
    IVC_HD int32_t visualRow(int32_t token) const { return clamped(visualIndex[clamped(token, visual)], rows); }
    IVC_HD int32_t queryRow(int32_t query) const {
        return seedIndex ? visualRow(seedIndex[query]) : clamped(queryIndex[query], rows);
    }
};

#ifdef __CUDACC__
using Four = float4;
#else
struct alignas(16) Four {
    float x, y, z, w;
};
#endif

constexpr int kDepthFours = kDepth / 4;

// Rows are a multiple of 16 bytes, but not of the 128 bytes of all banks of shared memory.
struct VoteTile {
    Four query[kQueries][kDepthFours + 1];
    Four key[kKeys][kDepthFours + 1];
    float score[kQueries][kKeys + 1];
    float lane[kQueries][kLanes];
    float rowMax[kQueries];
    float rowSum[kQueries];
    int32_t queryRow[kQueries];
    int32_t keyRow[kKeys];
};

IVC_BLOCK Four* fours(VoteTile& tile, int line) {
    return line < kQueries ? tile.query[line] : tile.key[line - kQueries];
}

// One thread's part of the elements start..start+kDepth-1 of a tile's rows, in float32; zeros behind the last one.
template <class Row>
IVC_BLOCK void loadElements(VoteTile& tile, int thread, Row row, int start, int depth) {
    for (int i = thread; i < (kQueries + kKeys) * kDepth; i += kVoteThreads) {
        const int line = i / kDepth, column = i % kDepth;
        reinterpret_cast<float*>(fours(tile, line))[column] =
            start + column < depth ? static_cast<float>(row(line)[start + column]) : 0.0f;
    }
}

// The same by vectors of 16 bytes.
template <class Row>
IVC_BLOCK void loadVectors(VoteTile& tile, int thread, Row row, int start, int depth) {
    using Value = std::decay_t<decltype(*row(0))>;
    constexpr int kEach = sizeof(Vector16) / sizeof(Value), kAcross = kDepth / kEach;
#pragma unroll
    for (int i = 0; i < (kQueries + kKeys) * kAcross / kVoteThreads; ++i) {
        const int line = (i * kVoteThreads + thread) / kAcross, column = (i * kVoteThreads + thread) % kAcross * kEach;
        Value x[kEach] = {};
        if (start + column < depth) {
            const Vector16 vector = *reinterpret_cast<const Vector16*>(row(line) + start + column);
            memcpy(x, &vector, sizeof vector);
        }
        for (int j = 0; j < kEach; j += 4) {
            const auto at = [&](int k) { return static_cast<float>(x[j + k]); };
            fours(tile, line)[(column + j) / 4] = Four{at(0), at(1), at(2), at(3)};
        }
    }
}

// Fills tile.score with V_q V_k^T / sqrt(D) for the queries from firstQuery and the keys from firstKey on.
template <class Value>
IVC_BLOCK void scoreTile(
    const Team& team, VoteTile& tile, const Votes<Value>& v, int head, int firstQuery, int firstKey, bool allRows) {
    const Value* values = v.values + static_cast<int64_t>(head) * v.rows * v.depth;
    team.each([&](int thread) {
        if (thread < kQueries) tile.queryRow[thread] = v.queryRow(smaller(firstQuery + thread, v.queries - 1));
        if (thread < kKeys) {
            const int32_t key = firstKey + thread;
            tile.keyRow[thread] = allRows ? clamped(key, v.rows) : v.visualRow(key);
        }
    });
    struct Sums {
        float each[kEach];
    };
    Team::Local<Sums> sums(team);
    for (int start = 0; start < v.depth; start += kDepth) {
        const int fours = ceilDiv(smaller(kDepth, v.depth - start), 4);
        team.each([&](int thread) {
            const auto row = [&](int line) {
                const int32_t at = line < kQueries ? tile.queryRow[line] : tile.keyRow[line - kQueries];
                return values + static_cast<int64_t>(at) * v.depth;
            };
            if (v.aligned) {
                loadVectors(tile, thread, row, start, v.depth);
            } else {
                loadElements(tile, thread, row, start, v.depth);
            }
        });
        team.each([&](int thread) {
            const int key = thread % kKeys, group = thread / kKeys;
#pragma unroll 4
            for (int four = 0; four < fours; ++four) {
                const Four x = tile.key[key][four];
                for (int i = 0; i < kEach; ++i) {
                    const Four q = tile.query[group * kEach + i][four];
                    float& sum = sums[thread].each[i];  // in the order of the elements
                    sum += q.x * x.x;
                    sum += q.y * x.y;
                    sum += q.z * x.z;
                    sum += q.w * x.w;
                }
            }
        });
    }
    const float root = sqrtf(static_cast<float>(v.depth));
    team.each([&](int thread) {
        const int key = thread % kKeys, group = thread / kKeys;
        for (int i = 0; i < kEach; ++i) tile.score[group * kEach + i][key] = sums[thread].each[i] / root;
    });
}

// Writes the maximum and the sum of exponentials of a tile's rows to v.rowMax and v.rowSum.
template <class Value>
IVC_BLOCK void voteRows(
    const Team& team, VoteTile& tile, const Votes<Value>& v, int head, int queryTile, int keyTile) {
    const int firstQuery = queryTile * kQueries, firstKey = keyTile * kKeys;
    const int keys = smaller(kKeys, v.softmaxKeys() - firstKey);
    awaitKernelBeforeNext();  // voteColumns reads the same rows before it waits
    scoreTile(team, tile, v, head, firstQuery, firstKey, v.softmaxOverAll);
    team.each([&](int thread) {
        const int query = thread / kLanes, lane = thread % kLanes;
        float most = -INFINITY;
        for (int key = lane; key < keys; key += kLanes) most = fmaxf(most, tile.score[query][key]);
        tile.lane[query][lane] = most;
    });
    team.each([&](int thread) {
        if (thread >= kQueries) return;
        float most = -INFINITY;
        for (int lane = 0; lane < kLanes; ++lane) most = fmaxf(most, tile.lane[thread][lane]);
        tile.rowMax[thread] = most;
    });
    team.each([&](int thread) {
        const int query = thread / kLanes, lane = thread % kLanes;
        float sum = 0.0f;
        for (int key = lane; key < keys; key += kLanes) sum += expf(tile.score[query][key] - tile.rowMax[query]);
        tile.lane[query][lane] = sum;
    });
    team.each([&](int thread) {
        if (thread >= kQueries || firstQuery + thread >= v.queries) return;
        float sum = 0.0f;
        for (int lane = 0; lane < kLanes; ++lane) sum += tile.lane[thread][lane];
        const int64_t at =
            (static_cast<int64_t>(head) * v.queries + firstQuery + thread) * v.softmaxTiles() + keyTile;
        v.rowMax[at] = tile.rowMax[thread];
        v.rowSum[at] = sum;
    });
}

// Combines what voteRows wrote for each tile of keys: the maximum and the sum of a row, in tile.rowMax and tile.rowSum.
template <class Value>
IVC_BLOCK void joinRows(const Team& team, VoteTile& tile, const Votes<Value>& v, int head, int firstQuery) {
    const int tiles = v.softmaxTiles();
    const auto at = [&](int query) {
        return (static_cast<int64_t>(head) * v.queries + smaller(firstQuery + query, v.queries - 1)) * tiles;
    };
    team.each([&](int thread) {
        const int query = thread / kLanes, lane = thread % kLanes;
        float most = -INFINITY;
        for (int i = lane; i < tiles; i += kLanes) most = fmaxf(most, v.rowMax[at(query) + i]);
        tile.lane[query][lane] = most;
    });
    team.each([&](int thread) {
        if (thread >= kQueries) return;
        float most = -INFINITY;
        for (int lane = 0; lane < kLanes; ++lane) most = fmaxf(most, tile.lane[thread][lane]);
        tile.rowMax[thread] = most;
    });
    team.each([&](int thread) {
        const int query = thread / kLanes, lane = thread % kLanes;
        float sum = 0.0f;
        for (int i = lane; i < tiles; i += kLanes) {
            sum += v.rowSum[at(query) + i] * expf(v.rowMax[at(query) + i] - tile.rowMax[query]);
        }
        tile.lane[query][lane] = sum;
    });
    team.each([&](int thread) {
        if (thread >= kQueries) return;
        float sum = 0.0f;
        for (int lane = 0; lane < kLanes; ++lane) sum += tile.lane[thread][lane];
        tile.rowSum[thread] = sum;
    });
}

// For one tile of visual tokens, sums the weights of this split's queries of one head into v.columnSums.
template <class Value>
IVC_BLOCK void voteColumns(const Team& team, VoteTile& tile, const Votes<Value>& v, int head, int split, int keyTile) {
    const int firstKey = keyTile * kKeys;
    Team::Local<float> sums(team);
    for (int firstQuery = split * kQueries; firstQuery < v.queries; firstQuery += v.splits * kQueries) {
        scoreTile(team, tile, v, head, firstQuery, firstKey, false);
        if (firstQuery == split * kQueries) awaitKernelBefore();  // voteRows
        joinRows(team, tile, v, head, firstQuery);
        team.each([&](int thread) {
            const int key = thread % kKeys, group = thread / kKeys;
            for (int i = 0; i < kEach; ++i) {
                const int query = group * kEach + i;
                if (firstQuery + query < v.queries) {
                    sums[thread] += expf(tile.score[query][key] - tile.rowMax[query]) / tile.rowSum[query];
                }
            }
        });
    }
    team.each([&](int thread) { tile.score[thread / kKeys][thread % kKeys] = sums[thread]; });
    team.each([&](int thread) {
        if (thread >= kKeys || firstKey + thread >= v.visual) return;
        float sum = 0.0f;
        for (int group = 0; group < kGroups; ++group) sum += tile.score[group][thread];
        v.columnSums[static_cast<int64_t>(head * v.splits + split) * v.visual + firstKey + thread] = sum;
    });
}

}  // namespace ivc
