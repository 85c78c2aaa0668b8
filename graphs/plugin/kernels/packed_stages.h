// y = f(n(x) G^T) * (n(x) U^T) for one row of x, with weights in 4 bits that wait in shared memory. So a block needs few
// registers, and all of its first weights are on their way before the previous kernel has ended.
#pragma once

#include "packed_row.h"

namespace ivc {

// Computes one row of x, which stays in registers as the right matrices of its products. Each block takes 16 columns of
// y in turn, and each of its kParts warps a slice of the row. The weights of kStages turns are copied into shared memory
// at once: words of a lane to where this lane alone reads them, scales and zero points as they lie in memory.
// kEachBlocks: blocks that a multiprocessor runs at a time.
template <class Value, int kParts, int kStages, int kEachBlocks>
struct StagedPacked {
    static constexpr int kBits = 4;
    using Few = FewPacked<Value, kBits, 32, true, 1, kParts, 1, kEachBlocks>;
    using Row = OneRowPacked<Value, kBits, true, kParts, 1, kEachBlocks>;
    using Fetched = typename Few::Fetched;
    static constexpr int kTiles = 2, kWarps = kParts, kThreads = kWarps * kWarp;
    static constexpr int kSlice = Few::kSlice, kColumns = Few::kColumns;
    static constexpr int kBlocksEach = kEachBlocks, kMostFeatures = kParts * kSlice;
    static_assert(sizeof(typename Few::Words) == 16, "one copy takes a lane's words of a column");

    struct alignas(16) Shared {
        float sums[2][kTiles * kWarps][1][kColumns];
        float squares[kWarps];
    };

    // The words of a turn. The scales of 16 columns follow, those of 16 columns of the other half of W, and then the zero
    // points of both.
    struct Stage {
        typename Few::Words words[kTiles][kWarps][2][kWarp];
    };

    static IVC_HD int32_t scaleBytes(const Packed& w) { return kColumns * 2 * w.blocks; }
    static IVC_HD int32_t pointBytes(const Packed& w) { return w.points ? kColumns * ceilDiv(w.blocks * kBits, 8) : 0; }
    static IVC_HD int32_t stageBytes(const Packed& w) {
        return static_cast<int32_t>(sizeof(Stage)) + kTiles * (scaleBytes(w) + pointBytes(w));
    }

    static IVC_HD int32_t steps(const PackedProduct& a) { return a.linear.out / kColumns; }
    static IVC_HD int32_t columnBlocks(const PackedProduct& a) { return smaller(steps(a), a.linear.blocks); }
    static IVC_HD int32_t sharedBytes(const PackedProduct& a) {
        const int32_t turns = ceilDiv(steps(a), columnBlocks(a));
        return static_cast<int32_t>(sizeof(Shared)) + smaller(kStages, turns) * stageBytes(a.packed);
    }

    // Whether copies of 16 bytes hold whole columns.
    static bool fits(const PackedProduct& a) {
        const Packed& w = a.packed;
        const uintptr_t all = reinterpret_cast<uintptr_t>(w.scales) | reinterpret_cast<uintptr_t>(w.points);
        return a.linear.out % kColumns == 0 && all % 16 == 0 && w.blockSize >= 32 && w.features <= kMostFeatures;
    }

    static IVC_WARP void run(Block& block, char* memory, const PackedProduct& a, int32_t number) {
        Shared& shared = *reinterpret_cast<Shared*>(memory);
        const int32_t end = steps(a), blocks = columnBlocks(a), bytes = stageBytes(a.packed);
        char* const stages = memory + sizeof(Shared);
        PerWarp<Lane<typename Row::Octets>, kWarps> octets, norms;
        PerWarp<Lane<typename Row::Rights>, kWarps> rights;
#pragma unroll 1
        for (int i = 0; i < kStages; ++i) copy(block, stages + i * bytes, a, number + i * blocks);
        block.each([&](int warp) {
            if (a.linear.norm) Row::fetchOctets(norms[warp], a, a.linear.norm, warp);
        });
        awaitKernelBefore();
        block.each([&](int warp) {
            Row::fetchOctets(octets[warp], a, a.linear.x, warp);
            if (a.linear.norm) {
                shareSum(shared.squares[warp], [&](int lane) { return Row::squaresOf(octets[warp][lane]); });
            }
        });
        block.template awaitCopiesBut<kStages - 1>();
        block.barrier();
        block.each([&](int warp) { Row::prepare(rights[warp], octets[warp], norms[warp], shared.squares, a.linear); });
        int32_t turn = 0, place = 0;
        for (int32_t step = number; step < end; step += blocks, turn ^= 1) {
            PerWarp<Lane<typename Few::Added>, kWarps> added;
            char* const stage = stages + place * bytes;
            block.each([&](int warp) {
                eachLane([&](int lane) {
                    Few::fetchBias(added[warp][lane], a.linear, step * kColumns, warp * kWarp + lane);
                    Few::fetchResidual(added[warp][lane], a.linear, 0, step * kColumns, warp * kWarp + lane);
                });
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    Lane<typename Few::Sums> sums;
                    Lane<Fetched> fetched;
                    eachLane([&](int lane) {
                        sums[lane] = typename Few::Sums{};
                        fetched[lane] = fetchedOf(stage, a.packed, tile, warp, lane);
                    });
                    Few::addWith(sums, fetched, Row::rightOf(rights[warp], 0));
                    Few::share(shared.sums[turn][tile * kWarps + warp], sums);
                }
            });
            block.template awaitCopiesBut<kStages - 2>();
            block.barrier();  // all have read the turn before the last, and this stage, and have copied the next one
            copy(block, stage, a, step + kStages * blocks);
            place = place + 1 == kStages ? 0 : place + 1;
            block.each([&](int warp) {
                eachLane([&](int lane) {
                    Few::finish(shared.sums[turn], a.linear, added[warp][lane], 0, step * kColumns, warp * kWarp + lane);
                });
            });
        }
    }

    // Starts to copy the weights of a turn. After the last turn, the group of copies is empty.
    static IVC_WARP void copy(Block& block, char* stage, const PackedProduct& a, int32_t step) {
        const Packed& w = a.packed;
        if (step < steps(a)) {
            Stage& to = *reinterpret_cast<Stage*>(stage);
            block.each([&](int warp) {
                eachLane([&](int lane) {
                    const int32_t at = warp * kSlice + lane % 4 * 32;
                    const bool there = at < w.blocks << w.blockBits;
#pragma unroll
                    for (int i = 0; i < 2 * kTiles; ++i) {
                        const int32_t column = step * kColumns + lane / 4 + 8 * (i % 2) + (i < 2 ? 0 : a.linear.out);
                        block.copy16(&to.words[i / 2][warp][i % 2][lane], w.place<kBits>(column, there ? at : 0), there);
                    }
                });
            });
            copyTiles(block, stage + sizeof(Stage), w.scales, scaleBytes(w), a, step);
            copyTiles(block, stage + sizeof(Stage) + kTiles * scaleBytes(w), w.points, pointBytes(w), a, step);
        }
        block.endCopies();
    }

    // Starts to copy `bytes` of a tensor for 16 columns of each half of W.
    static IVC_WARP void copyTiles(
        Block& block, char* to, const void* tensor, int32_t bytes, const PackedProduct& a, int32_t step) {
        const char* from = static_cast<const char*>(tensor) + static_cast<int64_t>(step) * bytes;
        const int64_t half = static_cast<int64_t>(steps(a) - 1) * bytes;
        block.each([&](int warp) {
            eachLane([&](int lane) {
                for (int32_t at = 16 * (warp * kWarp + lane); at < kTiles * bytes; at += 16 * kThreads) {
                    block.copy16(to + at, from + at + (at < bytes ? 0 : half), true);
                }
            });
        });
    }

    // A lane's part of a slice, of what was copied.
    static IVC_WARP Fetched fetchedOf(const char* stage, const Packed& w, int tile, int warp, int lane) {
        const auto& words = reinterpret_cast<const Stage*>(stage)->words[tile][warp];
        const char* const scales = stage + sizeof(Stage) + tile * scaleBytes(w);
        const char* const points = stage + sizeof(Stage) + kTiles * scaleBytes(w) + tile * pointBytes(w);
        Packed near = w;
        near.scales = scales;
        near.points = w.points ? reinterpret_cast<const uint8_t*>(points) : nullptr;
        const auto blockOf = [&](int chunk) {
            return smaller((warp * kSlice + chunk * 32) >> w.blockBits, w.blocks - 1);
        };
        Fetched found;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int32_t column = lane / 4 + 8 * half;
            found.words[half] = words[half][lane];
            found.zeros[half] = near.template zero<kBits>(column, blockOf(lane % 4));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                found.scales[half][i] = near.template scale<Value>(column, blockOf(2 * (lane % 2) + i));
            }
        }
        return found;
    }
};

}  // namespace ivc
