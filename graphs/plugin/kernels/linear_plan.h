// Chooses the kernel of a fused product, and its blocks, from extents alone.
#pragma once

#include <initializer_list>

#include "linear.h"
#include "linear_extents.h"
#include "linear_stages.h"

namespace ivc {

// Rows by columns of y that a warp of FewLinear computes.
enum class LinearKernel { kOneByTwo, kOneByFour, kFourByTwo };

// For products of at most so many rows and columns of y: the kernel, and the number of warps that share a sum.
struct LinearChoice {
    int32_t rows, out;
    LinearKernel kernel;
    int32_t parts;
};

// The first that fits is used. Measured on an H200 at Qwen2-VL-2B's sizes.
constexpr LinearChoice kLinearChoices[] = {
    {1, 1536, LinearKernel::kOneByFour, 8},
    {1, 4096, LinearKernel::kOneByTwo, 4},
    {1, 16384, LinearKernel::kOneByTwo, 2},
    {1, INT32_MAX, LinearKernel::kOneByFour, 1},
    {INT32_MAX, 4096, LinearKernel::kFourByTwo, 4},
    {INT32_MAX, INT32_MAX, LinearKernel::kFourByTwo, 1},
};

// Octets of a row that a lane of OneRowLinear has: few if a few warps are enough for the row, else the most. FewLinear
// takes longer rows, and reads them repeatedly.
constexpr int kFewOctets = 3, kMostOctets = 5;
constexpr int kFewNormed = 5, kMostNormed = 8;  // those of NormRows, which reads the rest of longer rows repeatedly
constexpr int32_t kManyColumns = 16384;  // of y; from this number on, a warp computes four at a time

// What the launches of one row need to know of a device.
struct Device {
    int32_t processors;
    int32_t earlyShared;  // bytes of shared memory of a multiprocessor, if kernels can start early, else 0
};

// Whether the blocks that Staged wants on a multiprocessor find room there. Each has 1 KiB beside its own.
template <class Staged, class Operands>
bool hasRoom(const Device& device, const Operands& a) {
    return Staged::kBlocksEach * (Staged::sharedBytes(a) + 1024) <= device.earlyShared;
}

inline LinearChoice choiceOf(const IvcLinear& c) {
    for (const LinearChoice& choice : kLinearChoices) {
        if (c.rows <= choice.rows && c.out <= choice.out) return choice;
    }
    return kLinearChoices[0];  // not reached: the last choice fits everything
}

inline Linear planned(const IvcLinear& c, const void* x, const void* norm, const void* weight, const void* bias,
    const void* residual, void* y) {
    return {x, norm, weight, bias, residual, y, c.rows, c.features, c.out, c.activation, c.slope, c.scale, c.epsilon,
        c.layerNorm, c.wide, 1, 1};
}

// The number of warps that share a sum so that a lane has at most `octets` octets; 0 if a block has fewer warps.
inline int32_t partsFor(int32_t features, int octets, int32_t warps) {
    int32_t parts = 1;
    while (parts <= warps && ceilDiv(features, 8 * kWarp * parts) > octets) parts *= 2;
    return parts <= warps ? parts : 0;
}

inline bool inOctets(int32_t width, std::initializer_list<const void*> tensors) {
    uintptr_t together = static_cast<uintptr_t>(width % 8);
    for (const void* tensor : tensors) together |= reinterpret_cast<uintptr_t>(tensor);
    return together % 16 == 0;
}

template <class Kernel, class Launch>
auto launchOneRow(Linear a, const Device& device, Launch launch) {
    a.blocks = device.processors * Kernel::kBlocksEach;
    return launch.template run<Kernel>(a);
}

// Calls launch.run<Kernel>(a) or launch.staged<Kernel>(a) with the kernel of a product. Rows that cannot be read in
// octets are rare, and have one kernel.
template <class Value, bool kGated, class Launch>
auto launchLinear(const LinearChoice& choice, Linear a, const Device& device, Launch launch) {
    a.parts = choice.parts;
    while (a.parts > 1 && a.parts / 2 * 8 * kWarp >= a.features) a.parts /= 2;  // a warp reads 8 values per lane at once
    if (!inOctets(a.features, {a.x, a.norm, a.weight})) {
        return launch.template run<FewLinear<Value, 1, 1, kGated, false>>(a);
    }
    if constexpr (sizeof(Value) == 2) {  // rows of wider values do not fit into registers
        Linear one = a;
        one.parts = a.rows == 1 ? partsFor(a.features, kFewOctets, 8) : 0;
        if (one.parts > 0 && !kGated && a.out >= kManyColumns) {
            return launchOneRow<OneRowLinear<Value, 4, false, kFewOctets, 2>>(one, device, launch);
        }
        if (one.parts > 0) {
            if constexpr (kGated) {
                using Staged = StagedLinear<Value, 2, true, kFewOctets, 2, 2>;
                Linear staged = one;
                staged.blocks = device.processors * Staged::kBlocksEach;
                if (hasRoom<Staged>(device, staged)) return launch.template staged<Staged>(staged);
            }
            return launchOneRow<OneRowLinear<Value, 2, kGated, kFewOctets, kGated ? 2 : 3>>(one, device, launch);
        }
        one.parts = a.rows == 1 ? partsFor(a.features, kMostOctets, 8) : 0;
        if (one.parts > 0) {
            return launchOneRow<OneRowLinear<Value, kGated ? 1 : 2, kGated, kMostOctets, 2>>(one, device, launch);
        }
    }
    switch (choice.kernel) {
        case LinearKernel::kOneByTwo: return launch.template run<FewLinear<Value, 1, 2, kGated, true>>(a);
        case LinearKernel::kOneByFour: return launch.template run<FewLinear<Value, 1, 4, kGated, true>>(a);
        default: return launch.template run<FewLinear<Value, 4, 2, kGated, true>>(a);
    }
}

template <class Value, class Launch>
auto launchLinear(const IvcLinear& c, const Linear& a, const Device& device, Launch launch) {
    const LinearChoice choice = choiceOf(c);
    return c.gated ? launchLinear<Value, true>(choice, a, device, launch)
                   : launchLinear<Value, false>(choice, a, device, launch);
}

template <class Value, class Launch>
auto launchNorm(const IvcLinear&, const Linear& a, Launch launch) {
    if (!inOctets(a.features, {a.x, a.norm, a.y})) return launch.template run<NormRows<Value, 1, false>>(a);
    return a.features <= 8 * kWarp * kFewNormed ? launch.template run<NormRows<Value, kFewNormed, true>>(a)
                                                : launch.template run<NormRows<Value, kMostNormed, true>>(a);
}

template <class Value, class Launch>
auto launchActivate(const IvcLinear& c, const Linear& a, Launch launch) {
    const bool whole = inOctets(a.out, {a.x, a.bias, a.residual, a.y});
    if (c.gated) {
        return whole ? launch.template run<Activate<Value, true, true>>(a)
                     : launch.template run<Activate<Value, true, false>>(a);
    }
    return whole ? launch.template run<Activate<Value, false, true>>(a)
                 : launch.template run<Activate<Value, false, false>>(a);
}

// Calls `of` with a value of the tensors' type. `Half` and `Brain` are float16 and bfloat16.
template <class Half, class Brain, class Of>
auto withType(IvcType type, Of of) {
    return type == IVC_FLOAT32 ? of(float{}) : type == IVC_FLOAT16 ? of(Half{}) : of(Brain{});
}

}  // namespace ivc
