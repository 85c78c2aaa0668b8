// Products that a group of four neighbouring warps makes together, 16 rows each, with the right matrix in shared memory.
//
// These are SM 90's wgmma, which no other architecture has: a kernel that uses them is compiled for 90a, and is empty
// elsewhere. On a host, each warp makes its rows of the product, as warp.h says. Source of the layouts: PTX's manual,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include "warp.h"

namespace ivc {

#ifdef __CUDACC__

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define IVC_WARP_GROUPS 1
#endif

#define IVC_SUM(n) "+f"(sum[n].value.x[0]), "+f"(sum[n].value.x[1]), "+f"(sum[n].value.x[2]), "+f"(sum[n].value.x[3])
#define IVC_SUMS_2(n) IVC_SUM(n), IVC_SUM(n + 1)
#define IVC_SUMS_8(n) IVC_SUMS_2(n), IVC_SUMS_2(n + 2), IVC_SUMS_2(n + 4), IVC_SUMS_2(n + 6)
#define IVC_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define IVC_NAMES_40 IVC_NAMES_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39"
#define IVC_NAMES_64 IVC_NAMES_40 ", " \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
    "%56, %57, %58, %59, %60, %61, %62, %63"
// names: of the sums. The numbers after it: of the left matrix' registers, the right matrix, `add` and `kAcross`.
#define IVC_MULTIPLY_TOGETHER(columns, type, names, left0, left1, left2, left3, right, added, turned, ...)           \
    asm volatile(                                                                                                    \
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %" #added ", 0;\n"                                                   \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, {%" #left0 ", %" #left1 \
        ", %" #left2 ", %" #left3 "}, %" #right ", adds, 1, 1, %" #turned ";\n}"                                      \
        : __VA_ARGS__                                                                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int32_t>(add)), "n"(kAcross))

// sum = left * right, plus the old sum if `add`. Four warps call it together, each with 16 rows of the left matrix. The
// right matrix is 16 x kColumns, of a tile in which the 16-byte chunk c of row r lies at c * pitch + 16 r. Its column n
// is row n of the tile, or with kAcross its row k is row k. `tile` is the first chunk. `sum` and `left` must not be used
// between beginProducts and awaitProducts.
template <class Value, bool kAcross, int kCount>
__device__ __forceinline__ void multiplyTogether(
    Lane<Product> (&sum)[kCount], const Lane<Fragment>& left, const char* tile, int pitch, bool add) {
    constexpr int kColumns = 8 * kCount;
    static_assert(kColumns == 64 || kColumns == 80 || kColumns == 128, "the instructions are written out");
#ifdef IVC_WARP_GROUPS
    constexpr bool kHalf = std::is_same<Value, __half>::value;
    const uint32_t* a = left.value.x;
    const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
    // strides in units of 16 bytes: between chunks, and between groups of 8 rows
    const uint64_t chunks = static_cast<uint64_t>(pitch / 16), eights = 8;
    const uint64_t b = (start & 0x3ffff) >> 4 | (kAcross ? eights : chunks) << 16 | (kAcross ? chunks : eights) << 32;
    if constexpr (kColumns == 64 && kHalf) {
        IVC_MULTIPLY_TOGETHER(64, "f16", IVC_NAMES_32, 32, 33, 34, 35, 36, 37, 38, IVC_SUMS_8(0));
    } else if constexpr (kColumns == 64) {
        IVC_MULTIPLY_TOGETHER(64, "bf16", IVC_NAMES_32, 32, 33, 34, 35, 36, 37, 38, IVC_SUMS_8(0));
    } else if constexpr (kColumns == 80 && kHalf) {
        IVC_MULTIPLY_TOGETHER(80, "f16", IVC_NAMES_40, 40, 41, 42, 43, 44, 45, 46, IVC_SUMS_8(0), IVC_SUMS_2(8));
    } else if constexpr (kColumns == 80) {
        IVC_MULTIPLY_TOGETHER(80, "bf16", IVC_NAMES_40, 40, 41, 42, 43, 44, 45, 46, IVC_SUMS_8(0), IVC_SUMS_2(8));
    } else if constexpr (kHalf) {
        IVC_MULTIPLY_TOGETHER(128, "f16", IVC_NAMES_64, 64, 65, 66, 67, 68, 69, 70, IVC_SUMS_8(0), IVC_SUMS_8(8));
    } else {
        IVC_MULTIPLY_TOGETHER(128, "bf16", IVC_NAMES_64, 64, 65, 66, 67, 68, 69, 70, IVC_SUMS_8(0), IVC_SUMS_8(8));
    }
#endif
}

// Before the first product of a series, and after its last.
__device__ __forceinline__ void beginProducts() {
#ifdef IVC_WARP_GROUPS
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void endProducts() {
#ifdef IVC_WARP_GROUPS
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until all products are done.
__device__ __forceinline__ void awaitProducts() {
#ifdef IVC_WARP_GROUPS
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// Keeps the compiler from moving what uses these registers over products: a call stands before and after a series.
template <int kCount>
__device__ __forceinline__ void settled(Lane<Product> (&sum)[kCount]) {
#ifdef IVC_WARP_GROUPS
#pragma unroll
    for (int n = 0; n < kCount; ++n) asm volatile("" : IVC_SUM(n)::"memory");
#endif
}

template <int kCount>
__device__ __forceinline__ void settled(Lane<Fragment> (&left)[kCount]) {
#ifdef IVC_WARP_GROUPS
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        uint32_t* x = left[k].value.x;
        asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])::"memory");
    }
#endif
}

#else

// The product of one warp of the group: each has rows of its own.
template <class Value, bool kAcross, int kCount>
inline void multiplyTogether(
    Lane<Product> (&sum)[kCount], const Lane<Fragment>& left, const char* tile, int pitch, bool add) {
    for (int n = 0; n < kCount; n += 2) {
        Lane<Fragment> right;
        for (int lane = 0; lane < kWarp; ++lane) {
            for (int i = 0; i < 4; ++i) {
                uint16_t pair[2];
                for (int j = 0; j < 2; ++j) {
                    const int column = 8 * (n + i / 2) + lane / 4, k = 8 * (i % 2) + 2 * (lane % 4) + j;
                    const int row = kAcross ? k : column, at = kAcross ? column : k;
                    memcpy(pair + j, tile + at / 8 * pitch + 16 * row + 2 * (at % 8), sizeof *pair);
                }
                right[lane].x[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
            }
            if (!add) sum[n][lane] = sum[n + 1][lane] = Product{};
        }
        multiply<Value, 0>(sum[n], left, right);
        multiply<Value, 1>(sum[n + 1], left, right);
    }
}

inline void beginProducts() {}
inline void endProducts() {}
inline void awaitProducts() {}
template <class T, int kCount>
inline void settled(Lane<T> (&)[kCount]) {}

#endif

}  // namespace ivc
