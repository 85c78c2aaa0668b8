// y = f(n(x) W^T + b) + r for one row of x in 16 bits, with weights that wait in shared memory. So a block needs few
// registers, and all of its first weights are on their way before the previous kernel has ended.
#pragma once

#include "linear.h"

namespace ivc {

// Computes as OneRowLinear does, with the same result bit by bit. The weights of kStages turns are copied into shared
// memory at once, those of a lane to where this lane alone reads them.
template <class Value_, int kOut, bool kGated, int kOctets, int kStages, int kEach>
struct StagedLinear {
    using Value = Value_;
    using Held = OneRowLinear<Value, kOut, kGated, kOctets, kEach>;
    static constexpr int kWarps = Held::kWarps, kThreads = Held::kThreads, kColumns = Held::kColumns;
    static constexpr int kBlocksEach = kEach;

    struct alignas(16) Shared {
        typename Held::Shared sums;
    };

    struct Stage {
        Octet<Value> x[kWarps][kColumns][kOctets][kWarp];
    };

    static IVC_HD int32_t steps(const Linear& a) { return Held::steps(a); }
    static IVC_HD int32_t columnBlocks(const Linear& a) { return Held::columnBlocks(a); }
    static IVC_HD int32_t sharedBytes(const Linear& a) {
        const int32_t turns = ceilDiv(steps(a), columnBlocks(a));
        return static_cast<int32_t>(sizeof(Shared) + smaller(kStages, turns) * sizeof(Stage));
    }

    static IVC_WARP void run(Block& block, char* memory, const Linear& a, int32_t number) {
        typename Held::Shared& shared = reinterpret_cast<Shared*>(memory)->sums;
        Stage* stages = reinterpret_cast<Stage*>(memory + sizeof(Shared));
        const int32_t teams = kWarps / a.parts, end = steps(a), blocks = columnBlocks(a);
        PerWarp<Lane<typename Held::Row>, kWarps> rows;
        PerWarp<Lane<typename Held::Added>, kWarps> added;
#pragma unroll
        for (int i = 0; i < kStages; ++i) copy(block, stages[i], a, number + i * blocks);
        awaitKernelBefore();
        block.each([&](int warp) {
            eachLane([&](int lane) { rows[warp][lane] = Held::rowOf(a, warp, lane); });
            if (a.norm) shareSum(shared.squares[warp], [&](int lane) { return rows[warp][lane].squares; });
        });
        int32_t turn = 0, place = 0;
        for (int32_t step = number; step < end; step += blocks, turn ^= 1) {
            block.template awaitCopiesBut<kStages - 1>();
            block.each([&](int warp) {
                Lane<typename Held::Sums> sums;
                eachLane([&](int lane) {
                    added[warp][lane] = Held::addedOf(a, step * teams + warp, warp < teams ? lane : kOut);
                    sums[lane] = product(stages[place], rows[warp][lane], warp, lane);
                });
#pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                    shareSum(shared.sums[turn][warp][i], [&](int lane) { return sums[lane].x[i]; });
                }
            });
            copy(block, stages[place], a, step + kStages * blocks);
            place = place + 1 == kStages ? 0 : place + 1;
            block.barrier();  // all have read the turn before the last: they passed this barrier since
            block.each([&](int warp) {
                eachLane([&](int lane) {
                    const int32_t column = (step * teams + warp) * kOut + lane;
                    if (warp >= teams || lane >= kOut || column >= a.out) return;
                    Held::finish(shared, a, turn, warp * a.parts, lane, column, added[warp][lane]);
                });
            });
        }
    }

    // Starts to copy the weights of a turn. After the last turn, the group of copies is empty.
    static IVC_WARP void copy(Block& block, Stage& to, const Linear& a, int32_t step) {
        if (step < steps(a)) {
            block.each([&](int warp) {
                eachLane([&](int lane) {
#pragma unroll
                    for (int i = 0; i < kColumns; ++i) {
                        const Value* row = Held::weightRow(a, step, warp, i);
#pragma unroll
                        for (int octet = 0; octet < kOctets; ++octet) {
                            const int32_t at = Held::placeOf(a, warp, lane, octet);
                            const bool there = at < a.features;
                            block.copy16(&to.x[warp][i][octet][lane], there ? row + at : row, there);
                        }
                    }
                });
            });
        }
        block.endCopies();
    }

    static IVC_WARP typename Held::Sums product(const Stage& stage, const typename Held::Row& row, int warp, int lane) {
        typename Held::Sums sums{};
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
#pragma unroll
            for (int octet = 0; octet < kOctets; ++octet) {
                const Octet<Value> weights = stage.x[warp][i][octet][lane];
#pragma unroll
                for (int j = 0; j < 8; ++j) sums.x[i] += static_cast<float>(weights.x[j]) * row.x[octet][j];
            }
        }
        return sums;
    }
};

}  // namespace ivc
