// Chooses the kernel of a product with weights in 4 or 8 bits, and its blocks, from extents alone.
#pragma once

#include "ivc_types.h"
#include "linear_plan.h"
#include "packed_stages.h"

namespace ivc {

// Rows of x, warps of a column, and slices that a warp loads at once; or one row that stays in registers.
enum class PackedKernel { kHeld, kOne12x1, kOne12x4, kOne6x2, kTwo12x2, kTwo4x2, kFour4x2, kEight4x2, kEight2x2 };

// The kernel for products of at most so many rows of x, so long, and of at least so many rows of W.
struct PackedChoice {
    int32_t rows, features, columns;
    PackedKernel kernel, gated;
};

constexpr int32_t kHeldFeatures = 1536;  // of a row that stays in registers

// The first that fits is used. It was the fastest on an H200 at Qwen2-VL-2B's sizes, with blocks of 32.
constexpr PackedChoice kInt4Choices[] = {
    {1, kHeldFeatures, 4097, PackedKernel::kHeld, PackedKernel::kHeld},
    {1, kHeldFeatures, 0, PackedKernel::kOne12x1, PackedKernel::kOne6x2},
    {1, INT32_MAX, 4097, PackedKernel::kOne6x2, PackedKernel::kOne6x2},
    {1, INT32_MAX, 0, PackedKernel::kOne12x4, PackedKernel::kOne6x2},
    {2, INT32_MAX, 4097, PackedKernel::kTwo4x2, PackedKernel::kTwo4x2},
    {2, INT32_MAX, 0, PackedKernel::kTwo12x2, PackedKernel::kTwo4x2},
    {4, INT32_MAX, 0, PackedKernel::kFour4x2, PackedKernel::kFour4x2},
    {INT32_MAX, INT32_MAX, 0, PackedKernel::kEight4x2, PackedKernel::kEight2x2},
};
constexpr PackedChoice kInt8Choices[] = {
    {1, kHeldFeatures, 4097, PackedKernel::kHeld, PackedKernel::kHeld},
    {1, INT32_MAX, 0, PackedKernel::kOne6x2, PackedKernel::kOne6x2},
    {2, INT32_MAX, 0, PackedKernel::kTwo4x2, PackedKernel::kTwo4x2},
    {4, INT32_MAX, 0, PackedKernel::kFour4x2, PackedKernel::kFour4x2},
    {INT32_MAX, INT32_MAX, 0, PackedKernel::kEight2x2, PackedKernel::kEight2x2},
};

inline bool possible(const IvcLinear& c, const IvcPacked& w) {
    return possible(c) && (c.type == IVC_FLOAT16 || c.type == IVC_BFLOAT16) && w.blockSize >= 16 &&
           w.blockSize <= 256 && (w.blockSize & (w.blockSize - 1)) == 0 && w.values && w.scales &&
           (w.bits == 4 || w.bits == 8);
}

template <size_t kCount>
PackedKernel packedChoiceOf(const IvcLinear& c, const PackedChoice (&choices)[kCount]) {
    const int32_t columns = c.gated ? 2 * c.out : c.out;
    for (const PackedChoice& choice : choices) {
        if (c.rows <= choice.rows && c.features <= choice.features && columns >= choice.columns) {
            return c.gated ? choice.gated : choice.kernel;
        }
    }
    return PackedKernel::kEight2x2;
}

inline PackedKernel packedChoiceOf(const IvcLinear& c, int32_t bits) {
    return bits == 4 ? packedChoiceOf(c, kInt4Choices) : packedChoiceOf(c, kInt8Choices);
}

inline Packed planned(const IvcLinear& c, const IvcPacked& w) {
    Packed p{static_cast<const uint8_t*>(w.values), w.scales, static_cast<const uint8_t*>(w.zeroPoints),
        c.gated ? 2 * c.out : c.out, c.features, ceilDiv(c.features, w.blockSize), w.blockSize, 0};
    while (1 << p.blockBits < p.blockSize) ++p.blockBits;
    return p;
}

inline PackedProduct planned(const IvcLinear& c, const IvcPacked& w, const void* x, const void* norm, const void* bias,
    const void* residual, void* y) {
    return {planned(c, x, norm, nullptr, bias, residual, y), planned(c, w), inOctets(c.features, {x, norm})};
}

// Packed weights are read in 16 bytes, or in 8 for blocks of 16 values of 4 bits.
inline bool wellPlaced(const Packed& p, const IvcPacked& w) {
    return reinterpret_cast<uintptr_t>(p.values) % (w.blockSize * w.bits == 64 ? 8 : 16) == 0 &&
           reinterpret_cast<uintptr_t>(p.scales) % 2 == 0;
}

// Calls launch.run<Kernel>(a) or launch.staged<Kernel>(a) with the kernel of a planned product.
template <class Value, int kBits, bool kGated, class Launch>
auto launchPacked(PackedKernel kernel, PackedProduct a, const Device& device, Launch launch) {
    if (kernel == PackedKernel::kHeld) {
        using Held = OneRowPacked<Value, kBits, kGated, 6, 2, kGated ? 1 : 2>;
        static_assert(Held::kMostFeatures == kHeldFeatures, "rows that fit are known");
        if constexpr (kGated && kBits == 4) {  // of 8 bits, they are slower
            using Staged = StagedPacked<Value, 12, 3, 2>;
            static_assert(Staged::kMostFeatures == kHeldFeatures, "rows that fit are known");
            a.linear.blocks = device.processors * Staged::kBlocksEach;
            if (Staged::fits(a) && hasRoom<Staged>(device, a)) return launch.template staged<Staged>(a);
        }
        a.linear.blocks = device.processors * Held::kBlocksEach;
        return launch.template run<Held>(a);
    }
    if constexpr (kBits == 4 && !kGated) {  // as many warps for each half would be too many
        if (kernel == PackedKernel::kOne12x1) return launch.template run<FewPacked<Value, kBits, 32, kGated, 1, 12, 1, 2>>(a);
        if (kernel == PackedKernel::kOne12x4) return launch.template run<FewPacked<Value, kBits, 32, kGated, 1, 12, 4>>(a);
        if (kernel == PackedKernel::kTwo12x2) return launch.template run<FewPacked<Value, kBits, 32, kGated, 2, 12, 2>>(a);
        if (kernel == PackedKernel::kEight4x2) return launch.template run<FewPacked<Value, kBits, 32, kGated, 8, 4, 2>>(a);
    }
    switch (kernel) {
        case PackedKernel::kOne6x2: return launch.template run<FewPacked<Value, kBits, 32, kGated, 1, 6, 2>>(a);
        case PackedKernel::kTwo4x2: return launch.template run<FewPacked<Value, kBits, 32, kGated, 2, 4, 2>>(a);
        case PackedKernel::kFour4x2: return launch.template run<FewPacked<Value, kBits, 32, kGated, 4, 4, 2>>(a);
        default: return launch.template run<FewPacked<Value, kBits, 32, kGated, 8, 2, 2>>(a);
    }
}

// Blocks of 16 are rare, and have two kernels only.
template <class Value, int kBits, bool kGated, class Launch>
auto launchPacked(const IvcLinear& c, const IvcPacked& w, const PackedProduct& a, const Device& device, Launch launch) {
    if (w.blockSize > 16) return launchPacked<Value, kBits, kGated>(packedChoiceOf(c, kBits), a, device, launch);
    return c.rows == 1 ? launch.template run<FewPacked<Value, kBits, 16, kGated, 1, 6, 2>>(a)
                       : launch.template run<FewPacked<Value, kBits, 16, kGated, 8, 2, 2>>(a);
}

template <class Value, int kBits, class Launch>
auto launchPacked(const IvcLinear& c, const IvcPacked& w, const PackedProduct& a, const Device& device, Launch launch) {
    return c.gated ? launchPacked<Value, kBits, true>(c, w, a, device, launch)
                   : launchPacked<Value, kBits, false>(c, w, a, device, launch);
}

template <class Value, class Launch>
auto launchPacked(const IvcLinear& c, const IvcPacked& w, const PackedProduct& a, const Device& device, Launch launch) {
    return w.bits == 4 ? launchPacked<Value, 4>(c, w, a, device, launch)
                       : launchPacked<Value, 8>(c, w, a, device, launch);
}

// Calls `of` with a value of the tensors' type. `Half` and `Brain` are float16 and bfloat16.
template <class Half, class Brain, class Of>
auto withHalf(IvcType type, Of of) {
    return type == IVC_FLOAT16 ? of(Half{}) : of(Brain{});
}

// Calls `of` with the kernel that unpacks weights.
template <class Half, class Brain, class Of>
auto withUnpack(const IvcLinear& c, const IvcPacked& w, Of of) {
    return withHalf<Half, Brain>(c.type, [&](auto value) {
        return w.bits == 4 ? of(Unpack<decltype(value), 4>{}) : of(Unpack<decltype(value), 8>{});
    });
}

}  // namespace ivc
