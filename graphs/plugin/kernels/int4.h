// y = x W^T over weights in 4 bits: a kernel for few rows, which reads weights once and multiplies in registers, and one
// for many, which dequantises tiles of weights into shared memory for tensor cores.
//
// W = (stored - zero point) scale. A stored value becomes a float without a conversion: as bits 16 to 19 of 128 it is
// 128 + value, exactly.
#pragma once

#include "warp.h"

namespace ivc {

constexpr int kInt4Zero = 8;  // the zero point where none is given
constexpr float kInt4Bias = 128;

// One product; x [rows, features], y [rows, out].
struct Int4 {
    const void* x;
    const uint8_t* packed;  // [out, blocks, blockSize / 2], the low half of a byte first
    const void* scales;     // [out, blocks]
    const uint8_t* points;  // [out, ceil(blocks / 2)], or null
    void* y;
    int32_t rows, features, out, blockSize, blocks;
    bool whole;     // 8 values of a row of x lie within it, and at a multiple of 16 bytes
    int32_t parts;  // warps that share a sum; few rows alone

    IVC_HD const uint8_t* stored(int32_t column, int32_t at) const {
        return packed + (static_cast<int64_t>(column) * blocks * blockSize + at) / 2;
    }

    template <class Value>
    IVC_HD Value scale(int32_t column, int32_t block) const {
        return static_cast<const Value*>(scales)[static_cast<int64_t>(column) * blocks + block];
    }

    // The byte with a block's zero point, which is its low half where blocks are even.
    IVC_HD uint8_t points2(int32_t column, int32_t block) const {
        if (!points) return kInt4Zero | kInt4Zero << 4;
        return points[static_cast<int64_t>(column) * ((blocks + 1) / 2) + block / 2];
    }

    // 128 and a block's zero point.
    static IVC_HD float zero(uint8_t points2, int32_t block) {
        return kInt4Bias + static_cast<float>(points2 >> 4 * (block % 2) & 15);
    }
};

template <class Value>
struct alignas(16) Eight {
    Value x[8];
};

// Values at..at+7 of a row of x, zeros behind its end.
template <class Value>
IVC_WARP Eight<Value> eightOf(const Int4& a, int32_t row, int32_t at) {
    const Value* from = static_cast<const Value*>(a.x) + static_cast<int64_t>(row) * a.features + at;
    if (a.whole && at < a.features) return *reinterpret_cast<const Eight<Value>*>(from);
    Eight<Value> found;
#pragma unroll
    for (int i = 0; i < 8; ++i) found.x[i] = at + i < a.features ? from[i] : static_cast<Value>(0.0f);
    return found;
}

// 128 + byte `i` of x, which is below 128.
IVC_HD inline float biased(uint32_t x, int i) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(__byte_perm(x, 0x43, 0x4055 | i << 8));
#else
    const uint32_t bits = 0x43000000 | (x >> 8 * i & 255) << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
#endif
}

// 128 + each of 8 stored values.
IVC_WARP void unpack(float (&found)[8], uint32_t word) {
    const uint32_t low = word & 0x0f0f0f0f, high = word >> 4 & 0x0f0f0f0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        found[2 * i] = biased(low, i);
        found[2 * i + 1] = biased(high, i);
    }
}

// kRows rows of x times kColumns rows of W in `parts` warps, whose lanes take chunks of kChunk values in turn. A chunk's
// products are summed unscaled, and its sum of x takes away the bias and the zero point.
template <class Value, int kChunk, int kRows, int kColumns>
struct FewRows {
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kWords = kChunk / 8;
    static_assert(kRows * kColumns <= kWarp, "a warp's sums are more than its lanes");

    struct Shared {
        float sums[kWarps][kRows][kColumns];
    };

    struct alignas(4 * kWords) Words {
        uint32_t x[kWords];
    };

    struct Chunk {
        Words words[kColumns];
        float scales[kColumns], zeros[kColumns];
    };

    struct Sums {
        float x[kRows][kColumns];
    };

    static int32_t columnBlocks(const Int4& a) { return ceilDiv(a.out, kColumns * (kWarps / a.parts)); }
    static int32_t rowBlocks(const Int4& a) { return ceilDiv(a.rows, kRows); }

    static IVC_WARP void run(Block& block, Shared& shared, const Int4& a, int32_t columnBlock, int32_t rowBlock) {
        const int32_t groups = kWarps / a.parts, firstRow = rowBlock * kRows;
        const int32_t firstColumn = columnBlock * groups * kColumns;
        block.each([&](int warp) {
            const int32_t column = firstColumn + warp / a.parts * kColumns;
            Lane<Sums> sums;
            eachLane([&](int lane) {
                sums[lane] = partOf(a, firstRow, column, lane + kWarp * (warp % a.parts), kWarp * a.parts);
            });
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
#pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                    Lane<float> sum, other;
                    eachLane([&](int lane) { sum[lane] = sums[lane].x[row][i]; });
#pragma unroll
                    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
                        exchange(other, sum, mask);
                        eachLane([&](int lane) { sum[lane] += other[lane]; });
                    }
                    eachLane([&](int lane) {
                        if (lane == 0) shared.sums[warp][row][i] = sum[lane];
                    });
                }
            }
        });
        block.barrier();
        block.each([&](int warp) {
            eachLane([&](int lane) {
                const int32_t row = lane / kColumns, i = lane % kColumns, column = firstColumn + warp * kColumns + i;
                if (warp >= groups || row >= kRows || firstRow + row >= a.rows || column >= a.out) return;
                float sum = 0;
                for (int part = 0; part < a.parts; ++part) sum += shared.sums[warp * a.parts + part][row][i];
                static_cast<Value*>(a.y)[static_cast<int64_t>(firstRow + row) * a.out + column] =
                    static_cast<Value>(sum);
            });
        });
    }

    static IVC_WARP Chunk chunkOf(const Int4& a, int32_t firstColumn, int32_t chunk) {
        Chunk found;
        const int32_t block = chunk * kChunk / a.blockSize;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int32_t column = smaller(firstColumn + i, a.out - 1);
            found.words[i] = *reinterpret_cast<const Words*>(a.stored(column, chunk * kChunk));
            found.scales[i] = static_cast<float>(a.scale<Value>(column, block));
            found.zeros[i] = Int4::zero(a.points2(column, block), block);
        }
        return found;
    }

    // One lane's sums, over chunks first, first + step, ...
    static IVC_WARP Sums partOf(const Int4& a, int32_t firstRow, int32_t firstColumn, int32_t first, int32_t step) {
        Sums total{};
        const int32_t chunks = a.blocks * (a.blockSize / kChunk);
        if (first >= chunks) return total;
        Chunk next = chunkOf(a, firstColumn, first);
        for (int32_t chunk = first; chunk < chunks; chunk += step) {
            const Chunk now = next;
            if (chunk + step < chunks) next = chunkOf(a, firstColumn, chunk + step);
            float sums[kRows][kColumns] = {}, plain[kRows] = {};
#pragma unroll
            for (int word = 0; word < kWords; ++word) {
                float x[kRows][8];
#pragma unroll
                for (int row = 0; row < kRows; ++row) {
                    const int32_t from = smaller(firstRow + row, a.rows - 1);
                    const Eight<Value> eight = eightOf<Value>(a, from, chunk * kChunk + 8 * word);
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        x[row][i] = static_cast<float>(eight.x[i]);
                        plain[row] += x[row][i];
                    }
                }
#pragma unroll
                for (int column = 0; column < kColumns; ++column) {
                    float values[8];
                    unpack(values, now.words[column].x[word]);
#pragma unroll
                    for (int row = 0; row < kRows; ++row) {
#pragma unroll
                        for (int i = 0; i < 8; ++i) sums[row][column] += values[i] * x[row][i];
                    }
                }
            }
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
#pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                    total.x[row][i] += now.scales[i] * (sums[row][i] - now.zeros[i] * plain[row]);
                }
            }
        }
        return total;
    }
};

// A tile of y in kRowWarps x kColumnWarps warps of 16 kRowTiles rows and 16 kColumnTiles columns each. Weights are
// rounded to Value as they are dequantised; while a slice of kDepth features is multiplied, the next kAhead are on their
// way, in registers.
template <class Value, int kRowWarps, int kColumnWarps, int kRowTiles, int kColumnTiles>
struct ManyRows {
    static constexpr int kWarps = kRowWarps * kColumnWarps, kThreads = kWarps * kWarp;
    static constexpr int kRows = 16 * kRowWarps * kRowTiles, kColumns = 16 * kColumnWarps * kColumnTiles;
    static constexpr int kDepth = 32, kAhead = 4, kPitch = kDepth + 8;                      // rows of 16 bytes in banks of their own
    static constexpr int kLeftParts = kRows * kDepth / 8, kRightParts = kColumns * kDepth / 16;  // 8, or 16, values each
    static constexpr int kLeftEach = (kLeftParts + kThreads - 1) / kThreads;
    static constexpr int kRightEach = (kRightParts + kThreads - 1) / kThreads;

    struct Slice {
        alignas(16) Value left[kRows][kPitch], right[kColumns][kPitch];
    };

    struct Shared {
        Slice slices[2];
    };
    static_assert(sizeof(Shared) <= 48 * 1024, "more than static shared memory may be");
    static_assert(kAhead % 2 == 0, "a slice in flight has its place by its number");

    struct alignas(8) Words {
        uint32_t x[2];
    };

    // What a lane brings of a slice, as it is loaded: nothing waits for it before it is put.
    struct Fetched {
        Eight<Value> left[kLeftEach];
        Words right[kRightEach];
        Value scales[kRightEach];
        uint8_t points2[kRightEach];
    };

    struct Sums {
        Lane<Product> x[kRowTiles][2 * kColumnTiles];
    };

    static int32_t columnBlocks(const Int4& a) { return ceilDiv(a.out, kColumns); }
    static int32_t rowBlocks(const Int4& a) { return ceilDiv(a.rows, kRows); }

    static IVC_WARP void run(Block& block, Shared& shared, const Int4& a, int32_t columnBlock, int32_t rowBlock) {
        const int32_t firstRow = rowBlock * kRows, firstColumn = columnBlock * kColumns;
        const int32_t slices = ceilDiv(a.features, kDepth);
        PerWarp<Sums, kWarps> sums;
        PerWarp<Lane<Fetched>, kWarps> fetched[kAhead];
        const auto fetch = [&](PerWarp<Lane<Fetched>, kWarps>& to, int32_t slice) {
            block.each([&](int warp) {
                eachLane([&](int lane) {
                    to[warp][lane] = fetchedOf(a, firstRow, firstColumn, slice * kDepth, warp * kWarp + lane);
                });
            });
        };
        block.each([&](int warp) { clear(sums[warp]); });
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (i < slices) fetch(fetched[i], i);
        }
        for (int32_t first = 0; first < slices; first += kAhead) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int32_t slice = first + i;
                if (slice >= slices) break;
                Slice& here = shared.slices[i % 2];
                block.each([&](int warp) {
                    eachLane([&](int lane) {
                        put(here, fetched[i][warp][lane], a, slice * kDepth, warp * kWarp + lane);
                    });
                });
                block.barrier();  // the slice before may still be read, and is put over after the next barrier alone
                if (slice + kAhead < slices) fetch(fetched[i], slice + kAhead);
                block.each([&](int warp) { multiplySlice(sums[warp], here, warp); });
            }
        }
        block.each([&](int warp) {
            write(a, sums[warp], firstRow + warp / kColumnWarps * 16 * kRowTiles,
                firstColumn + warp % kColumnWarps * 16 * kColumnTiles);
        });
    }

    static IVC_WARP void clear(Sums& sums) {
        eachLane([&](int lane) {
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
                for (int j = 0; j < 2 * kColumnTiles; ++j) sums.x[i][j][lane] = Product{};
            }
        });
    }

    static IVC_WARP Fetched fetchedOf(const Int4& a, int32_t firstRow, int32_t firstColumn, int32_t at, int thread) {
        Fetched found;
#pragma unroll
        for (int i = 0; i < kLeftEach; ++i) {
            const int32_t part = thread + i * kThreads, row = part / (kDepth / 8);
            if (part < kLeftParts) {
                found.left[i] = eightOf<Value>(a, smaller(firstRow + row, a.rows - 1), at + part % (kDepth / 8) * 8);
            }
        }
#pragma unroll
        for (int i = 0; i < kRightEach; ++i) {
            const int32_t part = thread + i * kThreads, column = smaller(firstColumn + part / 2, a.out - 1);
            const int32_t from = at + part % 2 * 16;
            found.scales[i] = static_cast<Value>(0.0f);  // behind a row's last block, where x is 0
            found.points2[i] = 0;
            found.right[i] = Words{};
            if (part < kRightParts && from < a.blocks * a.blockSize) {
                const int32_t block = from / a.blockSize;
                found.right[i] = *reinterpret_cast<const Words*>(a.stored(column, from));
                found.scales[i] = a.scale<Value>(column, block);
                found.points2[i] = a.points2(column, block);
            }
        }
        return found;
    }

    static IVC_WARP void put(Slice& to, const Fetched& from, const Int4& a, int32_t at, int thread) {
#pragma unroll
        for (int i = 0; i < kLeftEach; ++i) {
            const int part = thread + i * kThreads;
            if (part < kLeftParts) {
                *reinterpret_cast<Eight<Value>*>(&to.left[part / (kDepth / 8)][part % (kDepth / 8) * 8]) = from.left[i];
            }
        }
#pragma unroll
        for (int i = 0; i < kRightEach; ++i) {
            const int part = thread + i * kThreads;
            if (part >= kRightParts) continue;
            const float scale = static_cast<float>(from.scales[i]);
            const float zero = Int4::zero(from.points2[i], (at + part % 2 * 16) / a.blockSize);
#pragma unroll
            for (int word = 0; word < 2; ++word) {
                float values[8];
                unpack(values, from.right[i].x[word]);
                Eight<Value> eight;
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    const uint32_t pair = packed<Value>((values[j] - zero) * scale,
                        (values[j + 1] - zero) * scale);
                    memcpy(&eight.x[j], &pair, sizeof pair);
                }
                *reinterpret_cast<Eight<Value>*>(&to.right[part / 2][part % 2 * 16 + 8 * word]) = eight;
            }
        }
    }

    static IVC_WARP void multiplySlice(Sums& sums, const Slice& from, int warp) {
        const int firstRow = warp / kColumnWarps * 16 * kRowTiles;
        const int firstColumn = warp % kColumnWarps * 16 * kColumnTiles;
#pragma unroll
        for (int at = 0; at < kDepth; at += 16) {
            Lane<Fragment> left[kRowTiles];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
                loadMatrices<false>(left[i], [&](int lane) {
                    return &from.left[firstRow + 16 * i + lane % 16][at + lane / 16 * 8];
                });
            }
#pragma unroll
            for (int j = 0; j < kColumnTiles; ++j) {
                Lane<Fragment> right;
                loadMatrices<false>(right, [&](int lane) {
                    return &from.right[firstColumn + 16 * j + lane % 8 + lane / 16 * 8][at + lane / 8 % 2 * 8];
                });
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) {
                    multiply<Value, 0>(sums.x[i][2 * j], left[i], right);
                    multiply<Value, 1>(sums.x[i][2 * j + 1], left[i], right);
                }
            }
        }
    }

    static IVC_WARP void write(const Int4& a, Sums& sums, int32_t firstRow, int32_t firstColumn) {
        eachLane([&](int lane) {
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
                for (int j = 0; j < 2 * kColumnTiles; ++j) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const int32_t row = firstRow + 16 * i + lane / 4 + k / 2 * 8;
                        const int32_t column = firstColumn + 8 * j + 2 * (lane % 4) + k % 2;
                        if (row < a.rows && column < a.out) {
                            static_cast<Value*>(a.y)[static_cast<int64_t>(row) * a.out + column] =
                                static_cast<Value>(sums.x[i][j][lane].x[k]);
                        }
                    }
                }
            }
        });
    }
};

}  // namespace ivc
