// y = f(n(x) W^T + b) + r with weights in 4 or 8 bits, for one row of x, which stays in registers.
#pragma once

#include "packed.h"

namespace ivc {

// Computes one row of x, which stays in registers as the right matrices of its products. Each block takes 16 columns of
// y in turn, and reads the next columns' weights while it multiplies. kParts warps share a sum, and each has at most
// kSlices slices of the row. kEachBlocks: blocks that a multiprocessor runs at a time.
template <class Value, int kBits, bool kGated, int kParts, int kSlices, int kEachBlocks>
struct OneRowPacked {
    using Few = FewPacked<Value, kBits, 32, kGated, 1, kParts, kSlices, kEachBlocks>;
    using Fetched = typename Few::Fetched;
    static constexpr int kTiles = Few::kTiles, kWarps = Few::kWarps, kThreads = Few::kThreads;
    static constexpr int kWords = Few::kWords, kSlice = Few::kSlice, kColumns = Few::kColumns;
    static constexpr int kBlocksEach = kEachBlocks, kMostFeatures = kParts * kSlices * kSlice;

    struct Shared {
        float sums[2][kWarps][1][kColumns];
        float squares[kWarps];
    };

    struct Octets {
        Octet<Value> x[kSlices][kWords];
    };

    struct Rights {
        Fragment x[kSlices][kWords];
    };

    static IVC_HD int32_t steps(const PackedProduct& a) { return ceilDiv(a.linear.out, kColumns); }
    static IVC_HD int32_t columnBlocks(const PackedProduct& a) { return smaller(steps(a), a.linear.blocks); }
    static int32_t rowBlocks(const PackedProduct&) { return 1; }

    static IVC_WARP void run(Block& block, Shared& shared, const PackedProduct& a, int32_t number, int32_t) {
        const int32_t end = steps(a), blocks = columnBlocks(a);
        PerWarp<Lane<Fetched>, kWarps> fetched[kSlices];
        PerWarp<Lane<Octets>, kWarps> octets, norms;
        PerWarp<Lane<Rights>, kWarps> rights;
        block.each([&](int warp) {
#pragma unroll
            for (int i = 0; i < kSlices; ++i) {
                eachLane([&](int lane) { fetched[i][warp][lane] = fetchedOf(a, number, i, warp, lane); });
            }
            if (a.linear.norm) fetchOctets(norms[warp], a, a.linear.norm, warp);
        });
        awaitKernelBefore();
        block.each([&](int warp) {
            fetchOctets(octets[warp], a, a.linear.x, warp);
            if (a.linear.norm) shareSum(shared.squares[warp], [&](int lane) { return squaresOf(octets[warp][lane]); });
        });
        if (a.linear.norm) block.barrier();
        block.each([&](int warp) { prepare(rights[warp], octets[warp], norms[warp], shared.squares, a.linear); });
        int32_t turn = 0;
        for (int32_t step = number; step < end; step += blocks, turn ^= 1) {
            PerWarp<Lane<typename Few::Added>, kWarps> added;
            block.each([&](int warp) {
                Lane<typename Few::Sums> sums;
                eachLane([&](int lane) {
                    sums[lane] = typename Few::Sums{};
                    Few::fetchBias(added[warp][lane], a.linear, step * kColumns, warp * kWarp + lane);
                    Few::fetchResidual(added[warp][lane], a.linear, 0, step * kColumns, warp * kWarp + lane);
                });
#pragma unroll
                for (int i = 0; i < kSlices; ++i) {
                    Few::addWith(sums, fetched[i][warp], rightOf(rights[warp], i));
                    if (step + blocks < end) {
                        eachLane([&](int lane) {
                            fetched[i][warp][lane] = fetchedOf(a, step + blocks, i, warp, lane);
                        });
                    }
                }
                Few::share(shared.sums[turn][warp], sums);
            });
            block.barrier();  // all have read the turn before the last: they passed this barrier since
            block.each([&](int warp) {
                eachLane([&](int lane) {
                    Few::finish(shared.sums[turn], a.linear, added[warp][lane], 0, step * kColumns, warp * kWarp + lane);
                });
            });
        }
    }

    static IVC_WARP Fetched fetchedOf(const PackedProduct& a, int32_t step, int i, int warp, int lane) {
        return Few::fetchedOf(a, step * kColumns, warp % kParts + i * kParts, warp, lane);
    }

    // Makes a warp's right matrices of its part of x, normalised and rounded to Value as a separate kernel would.
    template <int kCount>
    static IVC_WARP void prepare(Lane<Rights>& to, const Lane<Octets>& octets, const Lane<Octets>& norms,
        const float (&squares)[kCount], const Linear& a) {
        float sum = 0;
        if (a.norm) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) sum += squares[part];
        }
        const float factor = a.norm ? normFactor(a, sum) : 1;
        eachLane([&](int lane) {
#pragma unroll
            for (int i = 0; i < kSlices; ++i) {
#pragma unroll
                for (int word = 0; word < kWords; ++word) {
                    Octet<Value> octet = octets[lane].x[i][word];
                    if (a.norm) {
#pragma unroll
                        for (int j = 0; j < 8; ++j) {
                            octet.x[j] = static_cast<Value>(static_cast<float>(octet.x[j]) * factor *
                                                            static_cast<float>(norms[lane].x[i][word].x[j]));
                        }
                    }
                    interleave<Value, kBits>(to[lane].x[i][word], octet);
                }
            }
        });
    }

    // Gives the right matrices of slice i to FewPacked::addWith.
    static IVC_WARP auto rightOf(const Lane<Rights>& rights, int i) {
        return [&rights, i](int, int word, Lane<Fragment>& right) {
            eachLane([&](int lane) { right[lane] = rights[lane].x[i][word]; });
        };
    }

    // The values that a lane puts into right matrices, zeros elsewhere.
    static IVC_WARP void fetchOctets(Lane<Octets>& to, const PackedProduct& a, const void* row, int warp) {
        eachLane([&](int lane) {
#pragma unroll
            for (int i = 0; i < kSlices; ++i) {
#pragma unroll
                for (int word = 0; word < kWords; ++word) {
                    const int32_t at = (warp % kParts + i * kParts) * kSlice + lane % 4 * 32 + 8 * word;
                    const bool there = lane / 4 == lane % 4 && at < a.linear.features;
                    const Value* from = static_cast<const Value*>(row);
                    to[lane].x[i][word] = !there      ? Octet<Value>{}
                                          : a.whole ? octetOf<true>(from, at, a.linear.features)
                                                    : octetOf<false>(from, at, a.linear.features);
                }
            }
        });
    }

    static IVC_WARP float squaresOf(const Octets& octets) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < kSlices; ++i) {
#pragma unroll
            for (int word = 0; word < kWords; ++word) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float value = static_cast<float>(octets.x[i][word].x[j]);
                    squares += value * value;
                }
            }
        }
        return squares;
    }
};

}  // namespace ivc
