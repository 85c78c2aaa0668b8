// y = f(n(x) W^T + b) + r with weights in 4 or 8 bits, for few rows of x. Reads each weight once, multiplies on tensor
// cores, and computes norm, bias, activation and residual in the same launch. For many rows, the weights are first
// unpacked to floats.
//
// W = (stored - zero point) scale.
#pragma once

#include <type_traits>

#include "linear.h"

namespace ivc {

// Weights [columns, features]; see IvcPacked.
struct Packed {
    const uint8_t* values;  // [columns, blocks, blockSize bits / 8], the low half of a byte first
    const void* scales;     // [columns, blocks]
    const uint8_t* points;  // [columns, ceil(blocks bits / 8)], or null
    int32_t columns, features, blocks, blockSize;
    int32_t blockBits;  // blockSize is 2 to the power of this

    // Where stored values of a row of W lie.
    template <int kBits>
    IVC_HD const uint8_t* place(int32_t column, int32_t at) const {
        const int64_t first = static_cast<int64_t>(column) * blocks << blockBits;
        return values + (first + at) * kBits / 8;
    }

    template <int kBits, class Words>
    IVC_HD Words stored(int32_t column, int32_t at) const {
        return *reinterpret_cast<const Words*>(place<kBits>(column, at));
    }

    template <class Value>
    IVC_HD Value scale(int32_t column, int32_t block) const {
        return static_cast<const Value*>(scales)[static_cast<int64_t>(column) * blocks + block];
    }

    template <int kBits>
    IVC_HD uint8_t zero(int32_t column, int32_t block) const {
        if (!points) return 1 << (kBits - 1);
        if (kBits == 8) return points[static_cast<int64_t>(column) * blocks + block];
        return points[static_cast<int64_t>(column) * ((blocks + 1) / 2) + block / 2] >> 4 * (block % 2) & 15;
    }
};

// One product of few rows. The `weight` of its `linear` is null.
struct PackedProduct {
    Linear linear;
    Packed packed;
    bool whole;  // groups of 8 values lie within a row, at multiples of 16 bytes: in x and in the norm's weight
};

// 8 stored values of kBits each, packed.
template <int kBits>
using Eighth = std::conditional_t<kBits == 4, uint32_t, uint64_t>;

template <int kBits>
IVC_HD int32_t valueAt(Eighth<kBits> stored, int i) {
    return static_cast<int32_t>(stored >> kBits * i & ((1 << kBits) - 1));
}

// 8 stored values minus the zero point of their block, exactly, in pairs. For i below 4, a pair is value i with value
// i + 4 of 4 bits, or values 2 i and 2 i + 1 of 8 bits.
template <class Value, int kBits>
IVC_WARP void integers(uint32_t (&found)[4], Eighth<kBits> stored, uint32_t zero) {
    constexpr int kStep = kBits == 4 ? 1 : 2, kOther = kBits == 4 ? 4 : 1;
#ifdef __CUDACC__
    // A number, put into the last bits of 1024 in float16 or of 128 in bfloat16, is added to it. bfloat16 has room for
    // 4 bits there.
    constexpr bool kHalf = std::is_same<Value, __half>::value;
    if constexpr (kHalf || kBits == 4) {
        constexpr uint32_t kOnes = 0x00010001, kBias = kOnes * (kHalf ? 0x6400 : 0x4300);
        using Pair = std::conditional_t<kHalf, __half2, __nv_bfloat162>;
        const uint32_t bias = kBias + kOnes * zero;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t biased;
            if constexpr (kBits == 4) {
                biased = (stored >> 4 * i & 15 * kOnes) | kBias;
            } else {
                biased = __byte_perm(static_cast<uint32_t>(stored >> 32 * (i / 2)), kBias, i % 2 ? 0x7372 : 0x7170);
            }
            Pair left, right;
            memcpy(&left, &biased, sizeof left);
            memcpy(&right, &bias, sizeof right);
            left = __hsub2(left, right);
            memcpy(&found[i], &left, sizeof left);
        }
    } else
#endif
    {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto value = [&](int at) {
                return static_cast<float>(valueAt<kBits>(stored, at) - static_cast<int32_t>(zero));
            };
            found[i] = packed<Value>(value(kStep * i), value(kStep * i + kOther));
        }
    }
}

// 8 values of x in the same order.
template <class Value, int kBits>
IVC_WARP void interleave(Fragment& to, const Octet<Value>& from) {
    uint32_t x[4];
    memcpy(x, &from, sizeof x);
    if constexpr (kBits == 8) {
        memcpy(to.x, x, sizeof x);
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            to.x[2 * i] = (x[i] & 0xffff) | x[i + 2] << 16;
            to.x[2 * i + 1] = x[i] >> 16 | (x[i + 2] & 0xffff0000);
        }
    }
}

// Computes kRows rows of x times 16 columns of y, or times 16 columns of each half of W if gated, on tensor cores. The
// warps of a column take slices of 4 kChunk features in turn, and load kAhead slices at once. Each of the four chunks
// of a slice lies in one block of W. The lanes that load it have columns 2 (lane % 4), that + 1, that + 8 and that + 9
// of a matrix. For each row of x, the right matrix has four columns, one for each chunk, with zeros outside the chunk.
// So each chunk has its own sum of exact products, which is then scaled in float32.
template <class Value, int kBits, int kChunk, bool kGated, int kRowsEach, int kParts, int kAheadEach, int kEachBlocks = 1>
struct FewPacked {
    static constexpr int kTiles = kGated ? 2 : 1, kWarps = kTiles * kParts, kThreads = kWarps * kWarp;
    static constexpr int kWords = kChunk / 8, kSlice = 4 * kChunk;
    static constexpr int kRows = kRowsEach, kPairs = (kRows + 1) / 2, kColumns = 16, kAhead = kAheadEach, kBlocksEach = kEachBlocks;
    static constexpr int kResults = (kRows * kColumns + kThreads - 1) / kThreads;
    static constexpr int kNormed = kRows == 1 ? (kAhead * kSlice / 8 + kWarp - 1) / kWarp : 0;

    // The rows of x of a warp's slices: those that are multiplied, and as many that follow.
    using Batch = Value[kAhead][kRows][kSlice];

    struct alignas(16) Shared {
        Batch x[kWarps][2];
        float sums[kWarps][kRows][kColumns];
        float squares[kWarps][kRows];
    };
    static_assert(sizeof(Shared) <= 48 * 1024, "more than static shared memory may be");

    struct alignas(kChunk * kBits / 8 < 16 ? kChunk * kBits / 8 : 16) Words {
        Eighth<kBits> x[kWords];
    };

    // What a lane loads of a slice: a chunk of two rows of W, and the scales of the sums that it will have.
    struct Fetched {
        Words words[2];
        uint8_t zeros[2];
        Value scales[2][2];
    };

    struct Sums {
        float x[kPairs][2];
    };

    // The weights of the norm of a lane's part of the first slices, for one row of x.
    struct Norms {
        Octet<Value> x[kNormed > 0 ? kNormed : 1];
    };

    // What is added to a thread's results.
    struct Added {
        float bias[kResults], upBias[kResults], residual[kResults];
    };

    static int32_t columnBlocks(const PackedProduct& a) { return ceilDiv(a.linear.out, kColumns); }
    static int32_t rowBlocks(const PackedProduct& a) { return ceilDiv(a.linear.rows, kRows); }

    static IVC_WARP void run(Block& block, Shared& shared, const PackedProduct& a, int32_t columnBlock, int32_t rowBlock) {
        const int32_t firstRow = rowBlock * kRows, firstColumn = columnBlock * kColumns;
        const int32_t slices = ceilDiv(a.linear.features, kSlice);
        PerWarp<Lane<Fetched>, kWarps> fetched[kAhead];
        PerWarp<Lane<Norms>, kWarps> norms;
        PerWarp<Lane<Added>, kWarps> added;
        block.each([&](int warp) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int32_t slice = warp % kParts + i * kParts;
                if (slice < slices) {
                    eachLane([&](int lane) { fetched[i][warp][lane] = fetchedOf(a, firstColumn, slice, warp, lane); });
                }
            }
            if (kNormed > 0 && a.linear.norm) fetchNorms(norms[warp], a, warp % kParts);
            eachLane([&](int lane) { fetchBias(added[warp][lane], a.linear, firstColumn, warp * kWarp + lane); });
        });
        awaitKernelBefore();
        block.each([&](int warp) {
            fetchRows(block, shared.x[warp][0], a, firstRow, warp % kParts);
            if (a.linear.norm) sumSquares(shared.squares[warp], a, firstRow, warp);
            eachLane([&](int lane) {
                fetchResidual(added[warp][lane], a.linear, firstRow, firstColumn, warp * kWarp + lane);
            });
        });
        if (a.linear.norm) block.barrier();
        block.each([&](int warp) {
            Lane<Sums> sums;
            float factors[kRows];
            eachLane([&](int lane) { sums[lane] = Sums{}; });
            if (a.linear.norm) findFactors(factors, shared, a.linear);
            int32_t place = 0;
            for (int32_t first = warp % kParts; first < slices; first += kAhead * kParts) {
                block.awaitCopies();
                block.warpBarrier();
                if (a.linear.norm) {
                    norm(shared.x[warp][place], factors, a, first, first == warp % kParts ? &norms[warp] : nullptr);
                    block.warpBarrier();
                }
                fetchRows(block, shared.x[warp][1 - place], a, firstRow, first + kAhead * kParts);
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    const int32_t slice = first + i * kParts;
                    if (slice >= slices) break;
                    add(sums, fetched[i][warp], shared.x[warp][place][i]);
                    if (slice + kAhead * kParts < slices) {
                        eachLane([&](int lane) {
                            fetched[i][warp][lane] = fetchedOf(a, firstColumn, slice + kAhead * kParts, warp, lane);
                        });
                    }
                }
                place = 1 - place;
            }
            share(shared.sums[warp], sums);
        });
        block.barrier();
        block.each([&](int warp) {
            eachLane([&](int lane) {
                finish(shared.sums, a.linear, added[warp][lane], firstRow, firstColumn, warp * kWarp + lane);
            });
        });
    }

    // Computes a thread's results, from the sums of all warps.
    static IVC_WARP void finish(const float (&sums)[kWarps][kRows][kColumns], const Linear& a, const Added& added,
        int32_t firstRow, int32_t firstColumn, int thread) {
#pragma unroll
        for (int result = 0; result < kResults; ++result) {
            const int at = thread + result * kThreads, row = at / kColumns, i = at % kColumns;
            if (row >= kRows || firstRow + row >= a.rows || firstColumn + i >= a.out) continue;
            float products[kTiles] = {};
#pragma unroll
            for (int part = 0; part < kWarps; ++part) products[part / kParts] += sums[part][row][i];
            float y = activated<Value>(a.scale * products[0] + added.bias[result], a.activation, a.slope);
            if (kGated) y *= a.scale * products[kTiles - 1] + added.upBias[result];
            static_cast<Value*>(a.y)[static_cast<int64_t>(firstRow + row) * a.out + firstColumn + i] =
                static_cast<Value>(y + added.residual[result]);
        }
    }

    static IVC_WARP Fetched fetchedOf(const PackedProduct& a, int32_t firstColumn, int32_t slice, int warp, int lane) {
        Fetched found;
        const Packed& w = a.packed;
        const int32_t at = slice * kSlice + lane % 4 * kChunk;
        const bool there = at < w.blocks << w.blockBits;
        const auto blockOf = [&](int chunk) {
            return smaller((slice * kSlice + chunk * kChunk) >> w.blockBits, w.blocks - 1);
        };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int32_t column = smaller(firstColumn + lane / 4 + 8 * half, a.linear.out - 1) +
                                   (warp < kParts ? 0 : a.linear.out);
            found.words[half] = there ? w.stored<kBits, Words>(column, at) : Words{};
            found.zeros[half] = w.zero<kBits>(column, blockOf(lane % 4));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                found.scales[half][i] = w.scale<Value>(column, blockOf(2 * (lane % 2) + i));
            }
        }
        return found;
    }

    static IVC_WARP void fetchBias(Added& to, const Linear& a, int32_t firstColumn, int thread) {
        const Value* bias = static_cast<const Value*>(a.bias);
#pragma unroll
        for (int result = 0; result < kResults; ++result) {
            const int at = thread + result * kThreads;
            const int32_t column = firstColumn + at % kColumns;
            const bool there = bias && at < kRows * kColumns && column < a.out;
            to.bias[result] = there ? static_cast<float>(bias[column]) : 0;
            to.upBias[result] = kGated && there ? static_cast<float>(bias[a.out + column]) : 0;
        }
    }

    static IVC_WARP void fetchResidual(Added& to, const Linear& a, int32_t firstRow, int32_t firstColumn, int thread) {
        const Value* residual = static_cast<const Value*>(a.residual);
#pragma unroll
        for (int result = 0; result < kResults; ++result) {
            const int at = thread + result * kThreads;
            const int32_t row = firstRow + at / kColumns, column = firstColumn + at % kColumns;
            const bool there = residual && at < kRows * kColumns && row < a.rows && column < a.out;
            to.residual[result] = there ? static_cast<float>(residual[static_cast<int64_t>(row) * a.out + column]) : 0;
        }
    }

    // The norm's weights for the slices of one row that a warp loads first.
    static IVC_WARP void fetchNorms(Lane<Norms>& to, const PackedProduct& a, int32_t slice) {
        const Value* weight = static_cast<const Value*>(a.linear.norm);
        eachEight(a, slice, [&](int lane, int turn, int, int, int, int32_t at) {
            to[lane].x[turn] = a.whole ? octetOf<true>(weight, at, a.linear.features)
                                       : octetOf<false>(weight, at, a.linear.features);
        });
    }

    // A warp's part of the sum of squares of each row.
    static IVC_WARP void sumSquares(float (&to)[kRows], const PackedProduct& a, int32_t firstRow, int warp) {
        const int32_t features = a.linear.features;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const Value* x = static_cast<const Value*>(a.linear.x) +
                             static_cast<int64_t>(smaller(firstRow + row, a.linear.rows - 1)) * features;
            shareSum(to[row], [&](int lane) {
                float squares = 0;
                for (int32_t at = 8 * (warp * kWarp + lane); at < features; at += 8 * kThreads) {
                    const Octet<Value> octet = a.whole ? octetOf<true>(x, at, features) : octetOf<false>(x, at, features);
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const float value = static_cast<float>(octet.x[i]);
                        squares += value * value;
                    }
                }
                return squares;
            });
        }
    }

    static IVC_WARP void findFactors(float (&to)[kRows], const Shared& shared, const Linear& a) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            float squares = 0;
#pragma unroll
            for (int part = 0; part < kWarps; ++part) squares += shared.squares[part][row];
            to[row] = normFactor(a, squares);
        }
    }

    // Calls `work` for a slice's values of x, 8 at a time. Values after the last slice are left out.
    template <class Work>
    static IVC_WARP void eachEight(const PackedProduct& a, int32_t slice, Work work) {
        constexpr int kPieces = kSlice / 8, kEach = kAhead * kRows * kPieces;
        eachLane([&](int lane) {
#pragma unroll
            for (int turn = 0; turn < (kEach + kWarp - 1) / kWarp; ++turn) {
                const int first = turn * kWarp;
                const int piece = (first + lane) % kPieces, row = (first + lane) / kPieces % kRows;
                const int i = (first + lane) / kPieces / kRows;
                const int32_t at = (slice + i * kParts) * kSlice + 8 * piece;
                if (first + lane < kEach && at < ceilDiv(a.linear.features, kSlice) * kSlice) {
                    work(lane, turn, i, row, 8 * piece, at);
                }
            }
        });
    }

    // Loads the rows of kAhead slices of a warp, from `slice` on, with zeros after the end of x.
    static IVC_WARP void fetchRows(Block& block, Batch& to, const PackedProduct& a, int32_t firstRow, int32_t slice) {
        const int32_t features = a.linear.features;
        eachEight(a, slice, [&](int, int, int i, int row, int place, int32_t at) {
            const Value* x = static_cast<const Value*>(a.linear.x) +
                             static_cast<int64_t>(smaller(firstRow + row, a.linear.rows - 1)) * features;
            Value* target = &to[i][row][place];
            if (a.whole) {
                block.copy16(target, at < features ? x + at : x, at < features);
            } else {
                *reinterpret_cast<Octet<Value>*>(target) = octetOf<false>(x, at, features);
            }
        });
    }

    // Normalises in place, and rounds to Value as a separate kernel would.
    // norms: the weights, if they are loaded already.
    static IVC_WARP void norm(Batch& x, const float (&factors)[kRows], const PackedProduct& a, int32_t slice,
        Lane<Norms>* norms) {
        const Value* weight = static_cast<const Value*>(a.linear.norm);
        eachEight(a, slice, [&](int lane, int turn, int i, int row, int place, int32_t at) {
            const Octet<Value> by = kNormed > 0 && norms ? (*norms)[lane].x[turn]
                                    : a.whole            ? octetOf<true>(weight, at, a.linear.features)
                                                         : octetOf<false>(weight, at, a.linear.features);
            Octet<Value>& octet = *reinterpret_cast<Octet<Value>*>(&x[i][row][place]);
            float factor = factors[0];
#pragma unroll
            for (int other = 1; other < kRows; ++other) factor = row == other ? factors[other] : factor;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                octet.x[j] = static_cast<Value>(
                    static_cast<float>(octet.x[j]) * factor * static_cast<float>(by.x[j]));
            }
        });
    }

    static IVC_WARP void add(Lane<Sums>& sums, const Lane<Fetched>& fetched, const Value (&rows)[kRows][kSlice]) {
        addWith(sums, fetched, [&](int pair, int word, Lane<Fragment>& right) {
            eachLane([&](int lane) {
                const int row = 2 * pair + lane / 16, chunk = lane % 4;
                Octet<Value> octet{};
                if (lane / 4 % 4 == chunk && row < kRows) {
                    octet = *reinterpret_cast<const Octet<Value>*>(&rows[row][chunk * kChunk + 8 * word]);
                }
                interleave<Value, kBits>(right[lane], octet);
            });
        });
    }

    // rightOf(pair, word, right): gives the right matrices of a word and of two rows.
    template <class RightOf>
    static IVC_WARP void addWith(Lane<Sums>& sums, const Lane<Fetched>& fetched, RightOf rightOf) {
        Lane<Product> products[kPairs][2];
        eachLane([&](int lane) {
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                products[pair][0][lane] = Product{};
                products[pair][1][lane] = Product{};
            }
        });
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
            Lane<Fragment> left[2];
            eachLane([&](int lane) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t pairs[4];
                    integers<Value, kBits>(pairs, fetched[lane].words[half].x[word], fetched[lane].zeros[half]);
#pragma unroll
                    for (int i = 0; i < 4; ++i) left[i / 2][lane].x[i % 2 * 2 + half] = pairs[i];
                }
            });
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                Lane<Fragment> right;
                rightOf(pair, word, right);
                multiply<Value, 0>(products[pair][0], left[0], right);
                multiply<Value, 1>(products[pair][1], left[1], right);
            }
        }
        eachLane([&](int lane) {
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[lane].x[pair][i / 2] += static_cast<float>(fetched[lane].scales[i / 2][i % 2]) *
                                                 (products[pair][0][lane].x[i] + products[pair][1][lane].x[i]);
                }
            }
        });
    }

    // Writes a warp's sums by row of x and column.
    static IVC_WARP void share(float (&to)[kRows][kColumns], Lane<Sums>& sums) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Lane<float> sum, other;
                eachLane([&](int lane) { sum[lane] = sums[lane].x[pair][half]; });
                exchange(other, sum, 1);
                eachLane([&](int lane) {
                    const int row = 2 * pair + lane % 4 / 2;
                    if (lane % 2 == 0 && row < kRows) to[row][lane / 4 + 8 * half] = sum[lane] + other[lane];
                });
            }
        }
    }
};

// Unpacks weights, rounded to their type. A thread makes 8 values of a row.
template <class Value, int kBits>
struct Unpack {
    static constexpr int kWarps = 8, kThreads = kWarps * kWarp;

    struct Shared {};

    static int32_t columnBlocks(const Packed& w) {
        return static_cast<int32_t>((static_cast<int64_t>(w.columns) * ceilDiv(w.features, 8) + kThreads - 1) / kThreads);
    }

    // to: [columns, features], at a multiple of 16 bytes.
    static IVC_WARP void run(Block& block, const Packed& w, void* to, int32_t number) {
        block.each([&](int warp) {
            eachLane([&](int lane) {
                const int32_t each = ceilDiv(w.features, 8);
                const int64_t eight = static_cast<int64_t>(number) * kThreads + warp * kWarp + lane;
                const int32_t column = static_cast<int32_t>(eight / each), at = static_cast<int32_t>(eight % each) * 8;
                if (column >= w.columns) return;
                const int32_t block = at >> w.blockBits;
                const float scale = static_cast<float>(w.scale<Value>(column, block));
                const auto stored = w.stored<kBits, Eighth<kBits>>(column, at);
                const int32_t zero = w.zero<kBits>(column, block);
                Octet<Value> octet;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    octet.x[i] = static_cast<Value>(static_cast<float>(valueAt<kBits>(stored, i) - zero) * scale);
                }
                Value* row = static_cast<Value*>(to) + static_cast<int64_t>(column) * w.features;
                if (w.features % 8 == 0) {
                    put<true>(row, at, w.features, octet);
                } else {
                    put<false>(row, at, w.features, octet);
                }
            });
        });
    }
};

}  // namespace ivc
