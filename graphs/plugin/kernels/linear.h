// y = f(n(x) W^T + b) + r for few rows of x. Reads each weight once, multiplies in registers, and computes norm, bias,
// activation and residual in the same launch.
#pragma once

#include "ivc_types.h"
#include "warp.h"

namespace ivc {

// One product; see IvcLinear.
struct Linear {
    const void* x;         // [rows, features]
    const void* norm;      // [features], or [2 features] of a layer norm, or null
    const void* weight;    // [out, features], or [2 out, features], the rows of the gate first
    const void* bias;      // one value for each row of weight, or null
    const void* residual;  // [rows, out], or null
    void* y;               // [rows, out]
    int32_t rows, features, out;
    IvcActivation activation;
    float slope, scale, epsilon;
    int32_t layerNorm, wide;
    int32_t parts;   // warps that share a sum; for few rows only
    int32_t blocks;  // the most; for one row only
};

// Eight values, which a lane reads at once.
template <class Value>
struct alignas(16) Octet {
    Value x[8];
};

// x sigmoid(slope x). For types of 16 bits, the division is approximate: otherwise a kernel of many rows would wait for
// it.
template <class Value>
IVC_HD inline float swish(float x, float slope) {
#ifdef __CUDA_ARCH__
    if (sizeof(Value) == 2) return __fdividef(x, 1 + __expf(-slope * x));
#endif
    return x / (1 + expf(-slope * x));
}

template <class Value>
IVC_HD inline float activated(float x, IvcActivation activation, float slope) {
    switch (activation) {
        case IVC_SWISH: return swish<Value>(x, slope);
        case IVC_GELU: return 0.5f * x * (1 + erff(x * 0.70710678f));
        case IVC_GELU_TANH: return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
        default: return x;
    }
}

// Values at..at+7 of a row of `width` values, with zeros after its end. kWhole: see FewLinear.
template <bool kWhole, class Value>
IVC_WARP Octet<Value> octetOf(const Value* row, int32_t at, int32_t width) {
    if (kWhole && at < width) return *reinterpret_cast<const Octet<Value>*>(row + at);
    Octet<Value> found;
#pragma unroll
    for (int i = 0; i < 8; ++i) found.x[i] = !kWhole && at + i < width ? row[at + i] : static_cast<Value>(0.0f);
    return found;
}

// Writes those values of an octet that lie within a row of `width` values.
template <bool kWhole, class Value>
IVC_WARP void put(Value* row, int32_t at, int32_t width, const Octet<Value>& octet) {
    if (kWhole) {
        *reinterpret_cast<Octet<Value>*>(row + at) = octet;
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (at + i < width) row[at + i] = octet.x[i];
        }
    }
}

// Adds up over the lanes of a warp. Each lane gets the sum.
template <class Of>
IVC_WARP void addUp(Lane<float>& sum, Of of) {
    Lane<float> other;
    eachLane([&](int lane) { sum[lane] = of(lane); });
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        exchange(other, sum, mask);
        eachLane([&](int lane) { sum[lane] += other[lane]; });
    }
}

// Sums over the lanes of a warp, into shared memory.
template <class Of>
IVC_WARP void shareSum(float& to, Of of) {
    Lane<float> sum;
    addUp(sum, of);
    eachLane([&](int lane) {
        if (lane == 0) to = sum[lane];
    });
}

// Reads weights. Nothing reads them again, so they are kept out of the L1 cache.
template <class Value>
IVC_WARP Octet<Value> streamed(const Value* from) {
    Octet<Value> found;
#ifdef __CUDA_ARCH__
    constexpr int kLoads = sizeof found / 16;
    uint4 words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w)
            : "l"(reinterpret_cast<const uint4*>(from) + i));
    }
    memcpy(&found, words, sizeof found);
#else
    memcpy(static_cast<void*>(&found), from, sizeof found);
#endif
    return found;
}

// The factor by which a norm multiplies a row with this sum of squares.
IVC_WARP float normFactor(const Linear& a, float squares) {
    return 1 / sqrtf(squares / static_cast<float>(a.features) + a.epsilon);
}

// Writes one result, into the tensors' type or into a wide y.
template <class Value>
IVC_WARP void writeResult(const Linear& a, int64_t at, float y) {
    if (a.wide) {
        static_cast<float*>(a.y)[at] = y;
    } else {
        static_cast<Value*>(a.y)[at] = static_cast<Value>(y);
    }
}

// Computes one result from a column's product; if gated, from the products of the gate's and the gated column.
template <class Value, bool kGated>
IVC_WARP void putResult(const Linear& a, float product, float up, int32_t row, int32_t column) {
    const Value* bias = static_cast<const Value*>(a.bias);
    float y = activated<Value>(product + (bias ? static_cast<float>(bias[column]) : 0), a.activation, a.slope);
    if (kGated) y *= up + (bias ? static_cast<float>(bias[a.out + column]) : 0);
    const int64_t at = static_cast<int64_t>(row) * a.out + column;
    if (a.residual) y += static_cast<float>(static_cast<const Value*>(a.residual)[at]);
    writeResult<Value>(a, at, y);
}

// Computes kRows rows of x times kOut columns of y in `parts` warps, whose lanes take octets in turn. Gated columns
// have two rows of weights. kWhole: octets lie within a row, and at a multiple of 16 bytes. The factor of a row's norm
// is computed in the same loop as the products, and multiplies their sums.
template <class Value_, int kRows, int kOut, bool kGated, bool kWhole>
struct FewLinear {
    using Value = Value_;
    static constexpr int kWarps = 8, kThreads = kWarps * kWarp, kStep = 8 * kWarp, kBlocksEach = 1;
    static constexpr int kColumns = kGated ? 2 * kOut : kOut;
    static_assert(kRows * kOut <= kWarp, "a warp's results are more than its lanes");

    struct Shared {
        float sums[kWarps][kRows][kColumns];
        float squares[kWarps][kRows];
    };

    struct Sums {
        float x[kRows][kColumns], squares[kRows];
    };

    struct Weights {
        Octet<Value> x[kColumns];
    };

    static int32_t columnBlocks(const Linear& a) { return ceilDiv(a.out, kOut * (kWarps / a.parts)); }
    static int32_t rowBlocks(const Linear& a) { return ceilDiv(a.rows, kRows); }

    static IVC_WARP void run(Block& block, Shared& shared, const Linear& a, int32_t columnBlock, int32_t rowBlock) {
        const int32_t groups = kWarps / a.parts, firstRow = rowBlock * kRows;
        const int32_t firstColumn = columnBlock * groups * kOut;
        block.each([&](int warp) {
            const int32_t column = firstColumn + warp / a.parts * kOut;
            Lane<Sums> sums;
            eachLane([&](int lane) {
                sums[lane] = partOf(a, firstRow, column, warp % a.parts * kStep + 8 * lane, a.parts * kStep);
            });
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
#pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                    shareSum(shared.sums[warp][row][i], [&](int lane) { return sums[lane].x[row][i]; });
                }
                if (a.norm) shareSum(shared.squares[warp][row], [&](int lane) { return sums[lane].squares[row]; });
            }
        });
        block.barrier();
        block.each([&](int warp) {
            eachLane([&](int lane) {
                const int32_t row = lane / kOut, i = lane % kOut, column = firstColumn + warp * kOut + i;
                if (warp >= groups || row >= kRows || firstRow + row >= a.rows || column >= a.out) return;
                finish(shared, a, warp * a.parts, row, i, firstRow + row, column);
            });
        });
    }

    // Computes one result, from the sums of a.parts warps.
    static IVC_WARP void finish(
        const Shared& shared, const Linear& a, int first, int row, int i, int32_t yRow, int32_t column) {
        float sum = 0, up = 0, squares = 0;
        for (int warp = first; warp < first + a.parts; ++warp) {
            sum += shared.sums[warp][row][i];
            if (kGated) up += shared.sums[warp][row][kColumns - kOut + i];
            if (a.norm) squares += shared.squares[warp][row];
        }
        const float factor = a.norm ? a.scale * normFactor(a, squares) : a.scale;
        putResult<Value, kGated>(a, sum * factor, up * factor, yRow, column);
    }

    static IVC_WARP const Value* rowOf(const Linear& a, const void* tensor, int32_t row) {
        return static_cast<const Value*>(tensor) + static_cast<int64_t>(row) * a.features;
    }

    static IVC_WARP Weights weightsOf(const Linear& a, int32_t firstColumn, int32_t at) {
        Weights found;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int32_t column = smaller(firstColumn + i % kOut, a.out - 1) + (i < kOut ? 0 : a.out);
            const Value* weights = rowOf(a, a.weight, column);
            found.x[i] =
                kWhole && at < a.features ? streamed(weights + at) : octetOf<kWhole>(weights, at, a.features);
        }
        return found;
    }

    // One lane's sums, over octets at first, first + step, ...
    static IVC_WARP Sums partOf(const Linear& a, int32_t firstRow, int32_t firstColumn, int32_t first, int32_t step) {
        Sums sums{};
        Weights next = weightsOf(a, firstColumn, first);
        awaitKernelBefore();
        for (int32_t at = first; at < a.features; at += step) {
            const Weights now = next;
            if (at + step < a.features) next = weightsOf(a, firstColumn, at + step);
            const Octet<Value> norm = a.norm ? octetOf<kWhole>(rowOf(a, a.norm, 0), at, a.features) : Octet<Value>{};
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                const Value* xRow = rowOf(a, a.x, smaller(firstRow + row, a.rows - 1));
                const Octet<Value> octet = octetOf<kWhole>(xRow, at, a.features);
                float x[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(octet.x[i]);
                if (a.norm) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        sums.squares[row] += x[i] * x[i];
                        x[i] *= static_cast<float>(norm.x[i]);
                    }
                }
#pragma unroll
                for (int column = 0; column < kColumns; ++column) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        sums.x[row][column] += static_cast<float>(now.x[column].x[i]) * x[i];
                    }
                }
            }
        }
        return sums;
    }
};

// Computes one row of x, which stays in registers. Each block takes columns in turn, and reads the next columns'
// weights while it adds up sums. `parts` warps share a sum, and each lane has at most kOctets octets of the row. Gated
// columns have two rows of weights. Octets lie within a row, and at a multiple of 16 bytes. kEach: blocks that a
// multiprocessor runs at a time.
template <class Value_, int kOut, bool kGated, int kOctets, int kEach>
struct OneRowLinear {
    using Value = Value_;
    static constexpr int kWarps = 8, kThreads = kWarps * kWarp, kColumns = kGated ? 2 * kOut : kOut;
    static constexpr int kBlocksEach = kEach;

    struct Shared {
        float sums[2][kWarps][kColumns];
        float squares[kWarps];
    };

    struct Weights {
        Octet<Value> x[kColumns][kOctets];
    };

    struct Row {
        float x[kOctets][8], squares;
    };

    // What is added to one result.
    struct Added {
        float bias, upBias, residual;
    };

    static IVC_HD int32_t steps(const Linear& a) { return ceilDiv(a.out, kOut * (kWarps / a.parts)); }
    static IVC_HD int32_t columnBlocks(const Linear& a) { return smaller(steps(a), a.blocks); }
    static int32_t rowBlocks(const Linear&) { return 1; }

    static IVC_WARP void run(Block& block, Shared& shared, const Linear& a, int32_t number, int32_t) {
        const int32_t teams = kWarps / a.parts, end = steps(a), blocks = columnBlocks(a);
        PerWarp<Lane<Weights>, kWarps> weights;
        PerWarp<Lane<Row>, kWarps> rows;
        PerWarp<Lane<Added>, kWarps> added;
        block.each([&](int warp) {
            eachLane([&](int lane) { weights[warp][lane] = weightsOf(a, number, warp, lane); });
        });
        awaitKernelBefore();
        block.each([&](int warp) {
            eachLane([&](int lane) { rows[warp][lane] = rowOf(a, warp, lane); });
            if (a.norm) shareSum(shared.squares[warp], [&](int lane) { return rows[warp][lane].squares; });
        });
        int32_t turn = 0;
        for (int32_t step = number; step < end; step += blocks, turn ^= 1) {
            block.each([&](int warp) {
                Lane<Sums> sums;
                eachLane([&](int lane) {
                    added[warp][lane] = addedOf(a, step * teams + warp, warp < teams ? lane : kOut);
                    sums[lane] = product(weights[warp][lane], rows[warp][lane]);
                    if (step + blocks < end) weights[warp][lane] = weightsOf(a, step + blocks, warp, lane);
                });
#pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                    shareSum(shared.sums[turn][warp][i], [&](int lane) { return sums[lane].x[i]; });
                }
            });
            block.barrier();  // all have read the turn before the last: they passed this barrier since
            block.each([&](int warp) {
                eachLane([&](int lane) {
                    const int32_t column = (step * teams + warp) * kOut + lane;
                    if (warp >= teams || lane >= kOut || column >= a.out) return;
                    finish(shared, a, turn, warp * a.parts, lane, column, added[warp][lane]);
                });
            });
        }
    }

    struct Sums {
        float x[kColumns];
    };

    static IVC_WARP int32_t placeOf(const Linear& a, int warp, int lane, int octet) {
        return 8 * (lane + kWarp * (warp % a.parts + a.parts * octet));
    }

    // Row i of the weight's rows that a warp multiplies with in a turn.
    static IVC_WARP const Value* weightRow(const Linear& a, int32_t step, int warp, int i) {
        const int32_t first = (step * (kWarps / a.parts) + warp / a.parts) * kOut;
        const int32_t column = smaller(first + i % kOut, a.out - 1) + (i < kOut ? 0 : a.out);
        return static_cast<const Value*>(a.weight) + static_cast<int64_t>(column) * a.features;
    }

    static IVC_WARP Weights weightsOf(const Linear& a, int32_t step, int warp, int lane) {
        Weights found;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const Value* row = weightRow(a, step, warp, i);
#pragma unroll
            for (int octet = 0; octet < kOctets; ++octet) {
                const int32_t at = placeOf(a, warp, lane, octet);
                found.x[i][octet] = at < a.features ? streamed(row + at) : octetOf<true>(row, at, a.features);
            }
        }
        return found;
    }

    static IVC_WARP Row rowOf(const Linear& a, int warp, int lane) {
        Row found;
        found.squares = 0;
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
            const int32_t at = placeOf(a, warp, lane, octet);
            const Octet<Value> x = octetOf<true>(static_cast<const Value*>(a.x), at, a.features);
            const Octet<Value> norm =
                a.norm ? octetOf<true>(static_cast<const Value*>(a.norm), at, a.features) : Octet<Value>{};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float value = static_cast<float>(x.x[i]);
                found.squares += value * value;
                found.x[octet][i] = a.norm ? value * static_cast<float>(norm.x[i]) : value;
            }
        }
        return found;
    }

    static IVC_WARP Sums product(const Weights& weights, const Row& row) {
        Sums sums{};
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
#pragma unroll
            for (int octet = 0; octet < kOctets; ++octet) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    sums.x[i] += static_cast<float>(weights.x[i][octet].x[j]) * row.x[octet][j];
                }
            }
        }
        return sums;
    }

    static IVC_WARP Added addedOf(const Linear& a, int32_t team, int lane) {
        const int32_t column = team * kOut + lane;
        if (lane >= kOut || column >= a.out) return {};
        const Value *bias = static_cast<const Value*>(a.bias), *residual = static_cast<const Value*>(a.residual);
        return {bias ? static_cast<float>(bias[column]) : 0,
            kGated && bias ? static_cast<float>(bias[a.out + column]) : 0,
            residual ? static_cast<float>(residual[column]) : 0};
    }

    // Computes one result, from the sums of a.parts warps.
    static IVC_WARP void finish(const Shared& shared, const Linear& a, int32_t turn, int first, int i, int32_t column,
        const Added& added) {
        float sum = 0, up = 0, squares = 0;
        for (int warp = first; warp < first + a.parts; ++warp) {
            sum += shared.sums[turn][warp][i];
            if (kGated) up += shared.sums[turn][warp][kColumns - kOut + i];
            if (a.norm) squares += shared.squares[warp];
        }
        const float factor = a.norm ? a.scale * normFactor(a, squares) : a.scale;
        float y = activated<Value>(sum * factor + added.bias, a.activation, a.slope);
        if (kGated) y *= up * factor + added.upBias;
        writeResult<Value>(a, column, y + added.residual);
    }
};

// y = n(x), one warp per row: the input of a product of many rows. Of each lane, kOctets octets stay in registers.
template <class Value_, int kOctets, bool kWhole>
struct NormRows {
    using Value = Value_;
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kBlocksEach = 1;

    struct Shared {};

    struct Held {
        Octet<Value> x[kOctets];
    };

    static int32_t columnBlocks(const Linear& a) { return ceilDiv(a.rows, kWarps); }
    static int32_t rowBlocks(const Linear&) { return 1; }

    static IVC_WARP void run(Block& block, Shared&, const Linear& a, int32_t number, int32_t) {
        awaitKernelBefore();
        block.each([&](int warp) {
            const int32_t row = number * kWarps + warp;
            if (row < a.rows) norm(a, row);
        });
    }

    static IVC_WARP void norm(const Linear& a, int32_t row) {
        const int64_t first = static_cast<int64_t>(row) * a.features;
        const Value *x = static_cast<const Value*>(a.x) + first, *weight = static_cast<const Value*>(a.norm);
        const Value* bias = a.layerNorm ? weight + a.features : nullptr;
        Value* y = static_cast<Value*>(a.y) + first;
        Lane<Held> held;
        Lane<float> mean, squares;
        eachLane([&](int lane) {
            mean[lane] = 0;
#pragma unroll
            for (int i = 0; i < kOctets; ++i) held[lane].x[i] = octetOf<kWhole>(x, placeOf(lane, i), a.features);
        });
        if (a.layerNorm) {
            addUp(mean, [&](int lane) {
                float sum = 0;
                eachOctet(a, x, held[lane], lane, [&](const Octet<Value>& octet, int32_t) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) sum += static_cast<float>(octet.x[i]);
                });
                return sum / static_cast<float>(a.features);
            });
        }
        addUp(squares, [&](int lane) {
            float sum = 0;
            eachOctet(a, x, held[lane], lane, [&](const Octet<Value>& octet, int32_t at) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float value = static_cast<float>(octet.x[i]) - mean[lane];
                    if (kWhole || at + i < a.features) sum += value * value;
                }
            });
            return sum;
        });
        eachLane([&](int lane) {
            const float factor = normFactor(a, squares[lane]);
            eachOctet(a, x, held[lane], lane, [&](const Octet<Value>& octet, int32_t at) {
                const Octet<Value> weights = octetOf<kWhole>(weight, at, a.features);
                const Octet<Value> biases = bias ? octetOf<kWhole>(bias, at, a.features) : Octet<Value>{};
                Octet<Value> found;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float value = (static_cast<float>(octet.x[i]) - mean[lane]) * factor;
                    const float added = bias ? static_cast<float>(biases.x[i]) : 0;
                    found.x[i] = static_cast<Value>(value * static_cast<float>(weights.x[i]) + added);
                }
                put<kWhole>(y, at, a.features, found);
            });
        });
    }

    static IVC_HD int32_t placeOf(int lane, int octet) { return 8 * (lane + kWarp * octet); }

    // Calls of(octet, its place) for each octet of a lane. Those that are not held are read again.
    template <class Of>
    static IVC_WARP void eachOctet(const Linear& a, const Value* x, const Held& held, int lane, Of of) {
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
            const int32_t at = placeOf(lane, i);
            if (at < a.features) of(held.x[i], at);
        }
        for (int32_t at = placeOf(lane, kOctets); at < a.features; at += 8 * kWarp) {
            of(octetOf<kWhole>(x, at, a.features), at);
        }
    }
};

// y = f(x + b) + r for rows of x [rows, out], or [rows, 2 out] if gated: the step after a product of many rows.
template <class Value_, bool kGated, bool kWhole>
struct Activate {
    using Value = Value_;
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kBlocksEach = 1;

    struct Shared {};

    static IVC_HD int32_t blocksOfRow(const Linear& a) { return ceilDiv(a.out, 8 * kThreads); }
    static int32_t columnBlocks(const Linear& a) { return a.rows * blocksOfRow(a); }
    static int32_t rowBlocks(const Linear&) { return 1; }

    static IVC_WARP void run(Block& block, Shared&, const Linear& a, int32_t number, int32_t) {
        awaitKernelBefore();
        const int32_t row = number / blocksOfRow(a), columnBlock = number % blocksOfRow(a);
        const Value *x = static_cast<const Value*>(a.x), *bias = static_cast<const Value*>(a.bias);
        const Value* residual = static_cast<const Value*>(a.residual);
        x += static_cast<int64_t>(row) * a.out * (kGated ? 2 : 1);
        const int64_t first = static_cast<int64_t>(row) * a.out;
        block.each([&](int warp) {
            eachLane([&](int lane) {
                const int32_t at = 8 * ((columnBlock * kWarps + warp) * kWarp + lane);
                if (at >= a.out) return;
                float y[8], up[8];
                sum(y, x, bias, at, a.out);
                if (kGated) sum(up, x + a.out, bias ? bias + a.out : bias, at, a.out);
                const Octet<Value> added = residual ? octetOf<kWhole>(residual + first, at, a.out) : Octet<Value>{};
                Octet<Value> found;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float value = activated<Value>(y[i], a.activation, a.slope);
                    if (kGated) value *= up[i];
                    if (residual) value += static_cast<float>(added.x[i]);
                    found.x[i] = static_cast<Value>(value);
                }
                put<kWhole>(static_cast<Value*>(a.y) + first, at, a.out, found);
            });
        });
    }

    static IVC_WARP void sum(float (&found)[8], const Value* x, const Value* bias, int32_t at, int32_t out) {
        const Octet<Value> octet = octetOf<kWhole>(x, at, out);
        const Octet<Value> added = bias ? octetOf<kWhole>(bias, at, out) : Octet<Value>{};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            found[i] = static_cast<float>(octet.x[i]) + (bias ? static_cast<float>(added.x[i]) : 0);
        }
    }
};

}  // namespace ivc
