// How similar each visual token is to the queries: softmax(V_q V^T / sqrt(D)), summed over heads and queries.
//
// Two launches work on tiles of 16 queries by 64 keys, so a matrix of queries x keys is never stored. The first finds
// the maximum and the sum of each row, the second sums the columns. Every sum has a fixed order, the same for every
// column, so that equal value vectors get equal scores. Source: arXiv 2602.03060, section 3.3.
#pragma once

#include <math.h>

#include "team.h"

namespace ivc {

constexpr int kVoteThreads = 256;
constexpr int kQueries = 16;  // of a tile
constexpr int kKeys = 64;     // of a tile
constexpr int kDepth = 32;    // elements of a head that are loaded at a time
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

    IVC_HD int32_t softmaxKeys() const { return softmaxOverAll ? rows : visual; }
    IVC_HD int32_t softmaxTiles() const { return ceilDiv(softmaxKeys(), kKeys); }
    IVC_HD int32_t visualRow(int32_t token) const { return clamped(visualIndex[clamped(token, visual)], rows); }
    IVC_HD int32_t queryRow(int32_t query) const {
        return seedIndex ? visualRow(seedIndex[query]) : clamped(queryIndex[query], rows);
    }
};

struct VoteTile {
    float query[kQueries][kDepth + 1];
    float key[kKeys][kDepth + 1];
    float score[kQueries][kKeys + 1];
    float lane[kQueries][kLanes];
    float rowMax[kQueries];
    float rowSum[kQueries];
    int32_t queryRow[kQueries];
    int32_t keyRow[kKeys];
};

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
        team.each([&](int thread) {
            for (int i = thread; i < (kQueries + kKeys) * kDepth; i += kVoteThreads) {
                const int line = i / kDepth, column = i % kDepth;
                const int32_t row = line < kQueries ? tile.queryRow[line] : tile.keyRow[line - kQueries];
                const bool inside = start + column < v.depth;
                const float x = inside ? static_cast<float>(values[static_cast<int64_t>(row) * v.depth + start + column]) : 0.0f;
                (line < kQueries ? tile.query[line] : tile.key[line - kQueries])[column] = x;
            }
        });
        team.each([&](int thread) {
            const int key = thread % kKeys, group = thread / kKeys;
            for (int d = 0; d < kDepth; ++d) {
                const float x = tile.key[key][d];
                for (int i = 0; i < kEach; ++i) sums[thread].each[i] += tile.query[group * kEach + i][d] * x;
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
        joinRows(team, tile, v, head, firstQuery);
        scoreTile(team, tile, v, head, firstQuery, firstKey, false);
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
