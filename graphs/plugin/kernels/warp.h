// A block of warps for attend.h: matrix fragments, their products, and asynchronous copies into shared memory.
//
// The code of a warp is written once. On the GPU, the values of a lane are registers, and the operations are machine
// instructions of SM 80: ldmatrix, mma.sync and cp.async. On a host, a warp is 32 slots, and an operation is a loop
// over them that moves data as PTX's manual defines the layout of fragments. So the index arithmetic is tested without
// a GPU.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "team.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#endif

namespace ivc {

constexpr int kWarp = 32;

// Four registers of two 16-bit values each: one 16 x 16 left matrix, or two 16 x 8 right matrices.
struct Fragment {
    uint32_t x[4];
};

// A lane's part of a 16 x 8 product: columns 2 (lane % 4) and 2 (lane % 4) + 1 of rows lane / 4 and lane / 4 + 8.
struct Product {
    float x[4];
};

#ifdef __CUDACC__

#define IVC_WARP __device__ __forceinline__

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define IVC_TENSOR_CORES 1
#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define IVC_CLUSTERS 1
#endif

template <class T>
struct Lane {
    T value;
    __device__ T& operator[](int) { return value; }
    __device__ const T& operator[](int) const { return value; }
};

template <class T, int kWarps>
struct PerWarp {
    T value;
    __device__ T& operator[](int) { return value; }
};

template <class Work>
__device__ __forceinline__ void eachLane(Work work) {
    work(static_cast<int>(threadIdx.x) % kWarp);
}

struct Block {
    // Runs `work` in each warp, without a barrier after it.
    template <class Work>
    __device__ __forceinline__ void each(Work work) const {
        work(static_cast<int>(threadIdx.x) / kWarp);
    }

    __device__ __forceinline__ void barrier() const { __syncthreads(); }

    // A barrier for the lanes of a warp, within `each`.
    __device__ __forceinline__ void warpBarrier() const { __syncwarp(); }

    // Whether this block is the last of `count` blocks to get here. It can then read what all of them wrote before. The
    // counter is 0 before and after. `flag` is in shared memory.
    __device__ __forceinline__ bool last(int32_t* counter, int32_t count, int32_t* flag) const {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            *flag = atomicAdd(counter, 1) == count - 1;
            if (*flag) *counter = 0;
        }
        __syncthreads();
        if (!*flag) return false;
        __threadfence();
        return true;
    }

    // Starts an asynchronous copy of 16 bytes into shared memory. If not `valid`, it writes zeros and does not read
    // `source`.
    __device__ __forceinline__ void copy16(void* target, const void* source, bool valid) const {
#ifdef IVC_TENSOR_CORES
        const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(valid ? 16 : 0)
                     : "memory");
#endif
    }

    // Waits for the copies that this thread started.
    __device__ __forceinline__ void awaitCopies() const {
#ifdef IVC_TENSOR_CORES
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    }

    // Ends a group of copies. It may be empty.
    __device__ __forceinline__ void endCopies() const {
#ifdef IVC_TENSOR_CORES
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    // Waits for this thread's groups of copies, but for the last kLater.
    template <int kLater>
    __device__ __forceinline__ void awaitCopiesBut() const {
#ifdef IVC_TENSOR_CORES
        asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
#endif
    }

    // A barrier for all threads of a cluster, in two steps. What they write before the first can be read after the second.
    __device__ __forceinline__ void arriveAtCluster() const {
#ifdef IVC_CLUSTERS
        asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
    }
    __device__ __forceinline__ void awaitCluster() const {
#ifdef IVC_CLUSTERS
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
    }

    // The address of shared memory of this block in block `rank` of its cluster.
    __device__ __forceinline__ char* inBlock(char* shared, [[maybe_unused]] int32_t rank) const {
        char* found = shared;
#ifdef IVC_CLUSTERS
        asm("mapa.u64 %0, %1, %2;" : "=l"(found) : "l"(shared), "r"(rank));
#endif
        return found;
    }

    // Lets products of groups of warps read, after the next barrier, what this thread has copied.
    __device__ __forceinline__ void showCopies() const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    }
};

// Loads four 8 x 8 matrices of 16-bit values from shared memory. `address(lane)` is that of row lane % 8 of matrix lane
// / 8.
template <bool kTransposed, class Address>
__device__ __forceinline__ void loadMatrices(Lane<Fragment>& to, Address address) {
#ifdef IVC_TENSOR_CORES
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(address(static_cast<int>(threadIdx.x) % 32)));
    uint32_t* x = to.value.x;
    if (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(from)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(from)
                     : "memory");
    }
#endif
}

// sum += left * right, of a 16 x 16 left matrix and the 16 x 8 right matrix `part`, of two.
template <class Value, int kPart>
__device__ __forceinline__ void multiply(Lane<Product>& sum, const Lane<Fragment>& left, const Lane<Fragment>& right) {
#ifdef IVC_TENSOR_CORES
    float* c = sum.value.x;
    const uint32_t *a = left.value.x, *b = right.value.x + 2 * kPart;
    if constexpr (std::is_same<Value, __half>::value) {
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
}

// Whether `x` is true in some lane.
__device__ __forceinline__ bool anyLane(const Lane<bool>& x) { return __any_sync(0xffffffffu, x.value); }

// Gives each lane the `x` of lane `lane ^ mask`.
__device__ __forceinline__ void exchange(Lane<float>& to, const Lane<float>& x, int mask) {
    to.value = __shfl_xor_sync(0xffffffffu, x.value, mask);
}

// Gives every lane the `x` of lane `lane`.
__device__ __forceinline__ void spread(Lane<float>& to, const Lane<float>& x, int lane) {
    to.value = __shfl_sync(0xffffffffu, x.value, lane);
}

// Gives each lane the `x` of lane `from(lane)`.
template <class From>
__device__ __forceinline__ void gather(Lane<float>& to, const Lane<float>& x, From from) {
    to.value = __shfl_sync(0xffffffffu, x.value, from(static_cast<int>(threadIdx.x) % kWarp));
}

// Reads what other blocks of the same launch have written.
__device__ __forceinline__ float fromOthers(const float* from) {
    float found;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(found) : "l"(from) : "memory");
    return found;
}
__device__ __forceinline__ void fourFromOthers(float (&to)[4], const float* from) {
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "l"(from)
                 : "memory");
}

// 2 to the power of x.
__device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <class Value>
__device__ __forceinline__ uint32_t packed(float low, float high) {
    uint32_t bits;
    if constexpr (std::is_same<Value, __half>::value) {
        const __half2 pair = __floats2half2_rn(low, high);
        memcpy(&bits, &pair, sizeof bits);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        memcpy(&bits, &pair, sizeof bits);
    }
    return bits;
}

#else

#define IVC_WARP inline

template <class T>
struct Lane {
    T values[kWarp];
    T& operator[](int lane) { return values[lane]; }
    const T& operator[](int lane) const { return values[lane]; }
};

template <class T, int kWarps>
struct PerWarp {
    std::vector<T> values = std::vector<T>(kWarps);
    T& operator[](int warp) { return values[warp]; }
};

template <class Work>
inline void eachLane(Work work) {
    for (int lane = 0; lane < kWarp; ++lane) work(lane);
}

struct Block {
    struct Copy {
        void* target;
        const void* source;
        bool valid;

        void run() const {
            if (valid) {
                memcpy(target, source, 16);
            } else {
                memset(target, 0, 16);
            }
        }
    };

    int warps;
    bool backwards = false;  // the last warp runs first, and copies end as late as possible: no result may depend on this
    std::vector<Copy> copies{};
    std::vector<std::vector<Copy>> groups{};

    template <class Work>
    void each(Work work) {
        for (int i = 0; i < warps; ++i) work(backwards ? warps - 1 - i : i);
    }

    void barrier() {}

    void warpBarrier() {}

    bool last(int32_t* counter, int32_t count, int32_t*) const {
        if (++*counter < count) return false;
        *counter = 0;
        return true;
    }

    void copy16(void* target, const void* source, bool valid) {
        const Copy copy{target, source, valid};
        if (backwards) {
            copies.push_back(copy);
        } else {
            copy.run();
        }
    }

    void awaitCopies() {
        endCopies();
        awaitCopiesBut<0>();
    }

    void endCopies() {
        groups.push_back(std::move(copies));
        copies.clear();
    }

    template <size_t kLater>
    void awaitCopiesBut() {
        for (; groups.size() > kLater; groups.erase(groups.begin())) {
            for (const Copy& copy : groups[0]) copy.run();
        }
    }

    void arriveAtCluster() const {}
    void awaitCluster() const {}

    void showCopies() {}
};

template <bool kTransposed, class Address>
inline void loadMatrices(Lane<Fragment>& to, Address address) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t rows[8][8];
        for (int row = 0; row < 8; ++row) memcpy(rows[row], address(8 * matrix + row), sizeof rows[row]);
        for (int lane = 0; lane < kWarp; ++lane) {
            const int at = lane / 4, pair = 2 * (lane % 4);
            const uint32_t low = kTransposed ? rows[pair][at] : rows[at][pair];
            const uint32_t high = kTransposed ? rows[pair + 1][at] : rows[at][pair + 1];
            to[lane].x[matrix] = low | high << 16;
        }
    }
}

template <class Value>
inline float valueOf(uint32_t bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    Value value;
    memcpy(&value, &half, sizeof half);
    return static_cast<float>(value);
}

template <class Value, int kPart>
inline void multiply(Lane<Product>& sum, const Lane<Fragment>& left, const Lane<Fragment>& right) {
    float a[16][16], b[8][16];
    for (int lane = 0; lane < kWarp; ++lane) {
        const int at = lane / 4, pair = 2 * (lane % 4);
        for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 4; ++j) {
                a[at + j % 2 * 8][pair + j / 2 * 8 + i] = valueOf<Value>(left[lane].x[j] >> 16 * i);
            }
            for (int j = 0; j < 2; ++j) {
                b[at][pair + 8 * j + i] = valueOf<Value>(right[lane].x[2 * kPart + j] >> 16 * i);
            }
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
            float total = 0;
            for (int k = 0; k < 16; ++k) total += a[row][k] * b[column][k];
            sum[lane].x[i] += total;
        }
    }
}

inline bool anyLane(const Lane<bool>& x) {
    for (int lane = 0; lane < kWarp; ++lane) {
        if (x[lane]) return true;
    }
    return false;
}

inline void exchange(Lane<float>& to, const Lane<float>& x, int mask) {
    const Lane<float> from = x;
    for (int lane = 0; lane < kWarp; ++lane) to[lane] = from[lane ^ mask];
}

inline void spread(Lane<float>& to, const Lane<float>& x, int lane) {
    const float value = x[lane];
    for (int i = 0; i < kWarp; ++i) to[i] = value;
}

template <class From>
inline void gather(Lane<float>& to, const Lane<float>& x, From from) {
    const Lane<float> all = x;
    for (int lane = 0; lane < kWarp; ++lane) to[lane] = all[from(lane)];
}

inline float fromOthers(const float* from) { return *from; }
inline void fourFromOthers(float (&to)[4], const float* from) { memcpy(to, from, sizeof to); }

inline float power2(float x) { return exp2f(x); }

template <class Value>
inline uint32_t packed(float low, float high) {
    const Value pair[2] = {static_cast<Value>(low), static_cast<Value>(high)};
    uint32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return bits;
}

#endif

// Lets the next kernel start, and waits for the end of the previous one, if this one was launched to start before that.
//
// A kernel ends after its own wait, so the previous one ended after all before it. What comes after the wait may hence
// read what any earlier kernel wrote, and write what any earlier one read. In each launch, some block must wait. Before
// the wait, however, any number of earlier kernels may still run, back to the last that lets none start early. A kernel
// may read there only what none of them writes: weights, and what a decode step has from before it.
IVC_WARP void awaitKernelBefore() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Waits first, and then lets the next kernel start. This one is then the only one that may still run while the next
// reads something before its wait.
IVC_WARP void awaitKernelBeforeNext() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Makes what this thread has written visible to kernels that read it without waiting for this kernel.
IVC_WARP void showWrites() {
#ifdef __CUDA_ARCH__
    __threadfence();
#endif
}

}  // namespace ivc
