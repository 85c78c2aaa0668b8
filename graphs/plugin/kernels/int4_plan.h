// Which kernel a product over weights in 4 bits runs, in which blocks, from extents alone.
#pragma once

#include "int4.h"
#include "ivc_types.h"

namespace ivc {

// Of FewRows, rows by columns; of ManyRows, the least tile that a row of them fills.
enum class Int4Kernel { kOneByOne, kOneByFour, kTwoByTwo, kFourByFour, kTiles16, kTiles64, kTiles128 };

// For products of at most so many rows and columns of y: the kernel, and of FewRows how many warps may share a sum.
struct Int4Choice {
    int32_t rows, out;
    Int4Kernel kernel;
    int32_t parts;
};

// The first that fits is taken. Those of FewRows were measured on an H200 at Qwen2-VL-2B's sizes.
constexpr Int4Choice kInt4Choices[] = {
    {1, 1024, Int4Kernel::kOneByOne, 4},
    {1, INT32_MAX, Int4Kernel::kOneByFour, 4},
    {2, INT32_MAX, Int4Kernel::kTwoByTwo, 4},
    {16, INT32_MAX, Int4Kernel::kFourByFour, 4},
    {128, INT32_MAX, Int4Kernel::kTiles16, 1},
    {INT32_MAX, 4096, Int4Kernel::kTiles64, 1},
    {INT32_MAX, INT32_MAX, Int4Kernel::kTiles128, 1},
};

inline bool possible(const IvcInt4& c) {
    return c.rows > 0 && c.rows <= INT32_MAX - 128 && c.features > 0 && c.features <= INT32_MAX / 2 && c.out > 0 &&
           c.out <= INT32_MAX - 128 && c.blockSize >= 16 && c.blockSize <= 256 &&
           (c.blockSize & (c.blockSize - 1)) == 0 && (c.type == IVC_FLOAT16 || c.type == IVC_BFLOAT16);
}

// Without tensor cores, few rows at a time.
inline Int4Choice choiceOf(const IvcInt4& c, bool tensorCores) {
    for (const Int4Choice& choice : kInt4Choices) {
        if (c.rows > choice.rows || c.out > choice.out) continue;
        if (choice.kernel < Int4Kernel::kTiles16 || tensorCores) return choice;
    }
    return {c.rows, c.out, Int4Kernel::kFourByFour, 1};
}

// A row of x is read by 16 bytes where it allows it; packed weights always are, or by 8 in blocks of 16.
inline bool wellPlaced(const IvcInt4& c, const Int4& a) {
    return reinterpret_cast<uintptr_t>(a.packed) % (c.blockSize == 16 ? 8 : 16) == 0 &&
           (reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.y) |
               reinterpret_cast<uintptr_t>(a.scales)) % 2 == 0;
}

inline Int4 planned(const IvcInt4& c, const void* x, const void* packed, const void* scales, const void* points,
    void* y, const Int4Choice& choice) {
    Int4 a{};
    a.x = x;
    a.packed = static_cast<const uint8_t*>(packed);
    a.scales = scales;
    a.points = static_cast<const uint8_t*>(points);
    a.y = y;
    a.rows = c.rows;
    a.features = c.features;
    a.out = c.out;
    a.blockSize = c.blockSize;
    a.blocks = ceilDiv(c.features, c.blockSize);
    a.whole = c.features % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    a.parts = choice.parts;
    while (a.parts > 1 && a.parts / 2 * kWarp * 32 >= c.features) a.parts /= 2;  // a warp reads 32 values a lane at once
    return a;
}

// Hands the kernel of a planned product to launch.run<Kernel>(a).
template <class Value, int kChunk, class Launch>
auto launchInt4(Int4Kernel kernel, const Int4& a, Launch launch) {
    switch (kernel) {
        case Int4Kernel::kOneByOne: return launch.template run<FewRows<Value, kChunk, 1, 1>>(a);
        case Int4Kernel::kOneByFour: return launch.template run<FewRows<Value, kChunk, 1, 4>>(a);
        case Int4Kernel::kTwoByTwo: return launch.template run<FewRows<Value, kChunk, 2, 2>>(a);
        case Int4Kernel::kFourByFour: return launch.template run<FewRows<Value, kChunk, 4, 4>>(a);
        case Int4Kernel::kTiles16: return launch.template run<ManyRows<Value, 1, 4, 1, 1>>(a);
        case Int4Kernel::kTiles64: return launch.template run<ManyRows<Value, 2, 2, 2, 2>>(a);
        default: return launch.template run<ManyRows<Value, 2, 4, 4, 2>>(a);
    }
}

template <class Value, class Launch>
auto launchInt4(Int4Kernel kernel, const Int4& a, Launch launch) {
    return a.blockSize == 16 ? launchInt4<Value, 16>(kernel, a, launch) : launchInt4<Value, 32>(kernel, a, launch);
}

// `Half` and `Brain` are float16 and bfloat16.
template <class Half, class Brain, class Launch>
auto launchInt4(const IvcInt4& c, Int4Kernel kernel, const Int4& a, Launch launch) {
    return c.type == IVC_FLOAT16 ? launchInt4<Half>(kernel, a, launch) : launchInt4<Brain>(kernel, a, launch);
}

}  // namespace ivc
