// Products that a group of four neighbouring warps makes together, 16 rows each, with the right matrix in shared memory.
//
// These are SM 90's wgmma, which no other architecture has: a kernel that uses them is compiled for 90a, and is empty
// elsewhere. On a host, each warp makes its rows of the product, as warp.h says. Source of the layouts: PTX's manual,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include "warp.h"

namespace ivc {

// A tile of rows in shared memory holds the first piece of 32 bytes of all rows, then their second pieces, and so on.
// In every other four rows the two chunks of 16 bytes of a piece change places: the same chunks of eight rows lie in
// different banks. The pattern is one of addresses, so a tile starts at a multiple of its length.
constexpr int kPieceBytes = 32, kTileAlignment = 8 * kPieceBytes;

// Where a chunk of a row lies in a tile of `rows` rows.
IVC_HD inline int placeInTile(int rows, int row, int chunk) {
    return chunk / 2 * rows * kPieceBytes + row * kPieceBytes + 16 * ((chunk ^ row >> 2) & 1);
}

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
// type: of the values. arguments: the left matrix and the right one, then what follows `adds`.
#define IVC_MULTIPLY_80(type, left, right, add, rest, ...)                                                          \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " add ", 0;\n"                                              \
                 "wgmma.mma_async.sync.aligned.m64n80k16.f32." type "." type " {" IVC_NAMES_40 "}, " left ", " right \
                 ", adds, 1, 1, " rest ";\n}"                                                                        \
                 : IVC_SUMS_8(0), IVC_SUMS_2(8)                                                                      \
                 : __VA_ARGS__)

// The descriptor of a matrix in a tile. Its row k is row k of the tile with kAcross, else column k.
template <bool kAcross>
__device__ __forceinline__ uint64_t described(const char* tile, int rows) {
    const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
    // strides in units of 16 bytes: between pieces, if a product has several, and between groups of 8 rows
    const uint64_t pieces = kAcross ? static_cast<uint64_t>(rows * kPieceBytes / 16) : 1, eights = 8 * kPieceBytes / 16;
    const uint64_t swizzle = 3;  // of 32 bytes
    return (start & 0x3ffff) >> 4 | pieces << 16 | eights << 32 | swizzle << 62;
}

// sum = left * right, plus the old sum if `add`. Four warps call it together, each with 16 rows of the sum. The left
// matrix is 64 rows of the first piece of a tile, and column n of the right one is row n of such a piece. `warp` is the
// warp's number in its group. `sum` must not be used between beginProducts and awaitProducts.
template <class Value>
__device__ __forceinline__ void multiplyShared(
    Lane<Product> (&sum)[10], const char* left, int, const char* right, bool add) {
#ifdef IVC_WARP_GROUPS
    const uint64_t a = described<false>(left, 0), b = described<false>(right, 0);
    const int32_t adds = add;
    if constexpr (std::is_same<Value, __half>::value) {
        IVC_MULTIPLY_80("f16", "%40", "%41", "%42", "0, 0", "l"(a), "l"(b), "r"(adds));
    } else {
        IVC_MULTIPLY_80("bf16", "%40", "%41", "%42", "0, 0", "l"(a), "l"(b), "r"(adds));
    }
#endif
}

// sum += left * right. The left matrix is in registers, and row k of the right one is row k of a tile of `rows` rows.
// `left` must not be used either.
template <class Value>
__device__ __forceinline__ void multiplyAcross(
    Lane<Product> (&sum)[10], const Lane<Fragment>& left, const char* right, int rows) {
#ifdef IVC_WARP_GROUPS
    const uint32_t* a = left.value.x;
    const uint64_t b = described<true>(right, rows);
    const int32_t adds = 1;
    if constexpr (std::is_same<Value, __half>::value) {
        IVC_MULTIPLY_80("f16", "{%40, %41, %42, %43}", "%44", "%45", "1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
            "l"(b), "r"(adds));
    } else {
        IVC_MULTIPLY_80("bf16", "{%40, %41, %42, %43}", "%44", "%45", "1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
            "l"(b), "r"(adds));
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

// Waits until all products are done, but for those of the last kSeries series.
template <int kSeries>
__device__ __forceinline__ void awaitProducts() {
#ifdef IVC_WARP_GROUPS
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kSeries) : "memory");
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

// Keeps ptxas from waiting for products before these sums are computed. Without a branch that depends on them, it does.
__device__ __forceinline__ void computed(const Lane<float>& x, const Lane<float>& y) {
#ifdef IVC_WARP_GROUPS
    if (__any_sync(0xffffffffu, x.value + y.value < 0)) asm volatile("nanosleep.u32 0;");
#endif
}

// Says that these registers' values are not needed any more.
template <int kCount>
__device__ __forceinline__ void forgotten(Lane<Product> (&sum)[kCount]) {
#ifdef IVC_WARP_GROUPS
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
        float* x = sum[n].value.x;
        asm volatile("" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]));
    }
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

// The product of one warp of the group: each has rows of its own. at(column, k) is where a value of the right matrix lies.
template <class Value, class At>
inline void multiplyRows(Lane<Product> (&sum)[10], const Lane<Fragment>& left, bool add, At at) {
    for (int n = 0; n < 10; n += 2) {
        Lane<Fragment> right;
        for (int lane = 0; lane < kWarp; ++lane) {
            for (int i = 0; i < 4; ++i) {
                uint16_t pair[2];
                for (int j = 0; j < 2; ++j) {
                    memcpy(pair + j, at(8 * (n + i / 2) + lane / 4, 8 * (i % 2) + 2 * (lane % 4) + j), sizeof *pair);
                }
                right[lane].x[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
            }
            if (!add) sum[n][lane] = sum[n + 1][lane] = Product{};
        }
        multiply<Value, 0>(sum[n], left, right);
        multiply<Value, 1>(sum[n + 1], left, right);
    }
}

template <class Value>
inline void multiplyShared(Lane<Product> (&sum)[10], const char* left, int warp, const char* right, bool add) {
    Lane<Fragment> own;
    loadMatrices<false>(own, [&](int lane) { return left + placeInTile(0, 16 * warp + lane % 16, lane / 16); });
    multiplyRows<Value>(
        sum, own, add, [&](int column, int k) { return right + placeInTile(0, column, k / 8) + 2 * (k % 8); });
}

template <class Value>
inline void multiplyAcross(Lane<Product> (&sum)[10], const Lane<Fragment>& left, const char* right, int rows) {
    multiplyRows<Value>(
        sum, left, true, [&](int column, int k) { return right + placeInTile(rows, k, column / 8) + 2 * (column % 8); });
}

inline void beginProducts() {}
inline void endProducts() {}
template <int>
inline void awaitProducts() {}
inline void computed(const Lane<float>&, const Lane<float>&) {}
template <class T, int kCount>
inline void settled(Lane<T> (&)[kCount]) {}
template <int kCount>
inline void forgotten(Lane<Product> (&sum)[kCount]) {
    for (Lane<Product>& part : sum) {
        for (int lane = 0; lane < kWarp; ++lane) part[lane] = Product{{NAN, NAN, NAN, NAN}};
    }
}

#endif

}  // namespace ivc
