// Chooses the kernel of a product with weights in 4 bits, and its blocks, from extents alone.
#pragma once

#include "int4.h"
#include "ivc_types.h"
#include "linear_plan.h"

namespace ivc {

// Rows of x, warps of a column, and slices that a warp loads at once.
enum class Int4Kernel { kOne12x4, kOne6x2, kOne4x2, kTwo12x2, kTwo4x2, kFour4x2, kEight4x2, kEight2x2 };

// The kernel for products of at most so many rows of x and of W.
struct Int4Choice {
    int32_t rows, columns;
    Int4Kernel kernel, gated;
};

// The first that fits is used. It was the fastest on an H200 at Qwen2-VL-2B's sizes, with blocks of 32.
constexpr Int4Choice kInt4Choices[] = {
    {1, 4096, Int4Kernel::kOne12x4, Int4Kernel::kOne6x2},
    {1, INT32_MAX, Int4Kernel::kOne6x2, Int4Kernel::kOne4x2},
    {2, 4096, Int4Kernel::kTwo12x2, Int4Kernel::kTwo4x2},
    {2, INT32_MAX, Int4Kernel::kTwo4x2, Int4Kernel::kTwo4x2},
    {4, INT32_MAX, Int4Kernel::kFour4x2, Int4Kernel::kFour4x2},
    {INT32_MAX, INT32_MAX, Int4Kernel::kEight4x2, Int4Kernel::kEight2x2},
};

inline bool possible(const IvcLinear& c, const IvcPacked& w) {
    return possible(c) && (c.type == IVC_FLOAT16 || c.type == IVC_BFLOAT16) && w.blockSize >= 16 &&
           w.blockSize <= 256 && (w.blockSize & (w.blockSize - 1)) == 0 && w.values && w.scales;
}

inline Int4Kernel int4ChoiceOf(const IvcLinear& c) {
    const int32_t columns = c.gated ? 2 * c.out : c.out;
    for (const Int4Choice& choice : kInt4Choices) {
        if (c.rows <= choice.rows && columns <= choice.columns) return c.gated ? choice.gated : choice.kernel;
    }
    return Int4Kernel::kEight2x2;
}

inline Packed planned(const IvcLinear& c, const IvcPacked& w) {
    Packed p{static_cast<const uint8_t*>(w.values), w.scales, static_cast<const uint8_t*>(w.zeroPoints),
        c.gated ? 2 * c.out : c.out, c.features, ceilDiv(c.features, w.blockSize), w.blockSize, 0};
    while (1 << p.blockBits < p.blockSize) ++p.blockBits;
    return p;
}

inline Int4 planned(const IvcLinear& c, const IvcPacked& w, const void* x, const void* norm, const void* bias,
    const void* residual, void* y) {
    return {planned(c, x, norm, nullptr, bias, residual, y), planned(c, w), inOctets(c.features, {x, norm})};
}

// Packed weights are read in 16 bytes, or in 8 for blocks of 16.
inline bool wellPlaced(const Packed& w) {
    return reinterpret_cast<uintptr_t>(w.values) % (w.blockSize == 16 ? 8 : 16) == 0 &&
           reinterpret_cast<uintptr_t>(w.scales) % 2 == 0;
}

// Calls launch.run<Kernel>(a) with the kernel of a planned product.
template <class Value, bool kGated, class Launch>
auto launchInt4(Int4Kernel kernel, const Int4& a, Launch launch) {
    if constexpr (!kGated) {  // as many warps for each half would be too many
        if (kernel == Int4Kernel::kOne12x4) return launch.template run<FewInt4<Value, 32, kGated, 1, 12, 4>>(a);
        if (kernel == Int4Kernel::kTwo12x2) return launch.template run<FewInt4<Value, 32, kGated, 2, 12, 2>>(a);
        if (kernel == Int4Kernel::kEight4x2) return launch.template run<FewInt4<Value, 32, kGated, 8, 4, 2>>(a);
    }
    switch (kernel) {
        case Int4Kernel::kOne6x2: return launch.template run<FewInt4<Value, 32, kGated, 1, 6, 2>>(a);
        case Int4Kernel::kOne4x2: return launch.template run<FewInt4<Value, 32, kGated, 1, 4, 2>>(a);
        case Int4Kernel::kTwo4x2: return launch.template run<FewInt4<Value, 32, kGated, 2, 4, 2>>(a);
        case Int4Kernel::kFour4x2: return launch.template run<FewInt4<Value, 32, kGated, 4, 4, 2>>(a);
        default: return launch.template run<FewInt4<Value, 32, kGated, 8, 2, 2>>(a);
    }
}

// Blocks of 16 are rare, and have two kernels only.
template <class Value, bool kGated, class Launch>
auto launchInt4(const IvcLinear& c, const IvcPacked& w, const Int4& a, Launch launch) {
    if (w.blockSize > 16) return launchInt4<Value, kGated>(int4ChoiceOf(c), a, launch);
    return c.rows == 1 ? launch.template run<FewInt4<Value, 16, kGated, 1, 6, 2>>(a)
                       : launch.template run<FewInt4<Value, 16, kGated, 8, 2, 2>>(a);
}

template <class Value, class Launch>
auto launchInt4(const IvcLinear& c, const IvcPacked& w, const Int4& a, Launch launch) {
    return c.gated ? launchInt4<Value, true>(c, w, a, launch) : launchInt4<Value, false>(c, w, a, launch);
}

// Calls `of` with a value of the tensors' type. `Half` and `Brain` are float16 and bfloat16.
template <class Half, class Brain, class Of>
auto withHalf(IvcType type, Of of) {
    return type == IVC_FLOAT16 ? of(Half{}) : of(Brain{});
}

}  // namespace ivc
