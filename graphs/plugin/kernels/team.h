// A block of threads that works in phases, with a barrier after each phase.
//
// The algorithms in votes.h, choose.h and rows.h use nothing else. On the GPU, each thread of the block runs a phase
// once. On a host, a loop runs the phase for every thread. So the algorithms are tested without a GPU.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define IVC_HD __host__ __device__
#else
#define IVC_HD
#include <vector>
#endif

namespace ivc {

template <class T>
IVC_HD inline T smaller(T a, T b) {
    return b < a ? b : a;
}

template <class T>
IVC_HD inline T larger(T a, T b) {
    return a < b ? b : a;
}

// `index`, limited to 0..extent-1.
IVC_HD inline int32_t clamped(int32_t index, int32_t extent) { return larger(0, smaller(index, extent - 1)); }

IVC_HD inline int32_t ceilDiv(int32_t a, int32_t b) { return (a + b - 1) / b; }

#ifdef __CUDACC__

struct Team {
    // A value that a thread keeps from one phase to the next.
    template <class T>
    struct Local {
        T value{};
        __device__ explicit Local(const Team&) {}
        __device__ T& operator[](int) { return value; }
    };

    __device__ int threads() const { return static_cast<int>(blockDim.x); }

    template <class Phase>
    __device__ void each(Phase phase) const {
        phase(static_cast<int>(threadIdx.x));
        __syncthreads();
    }

    __device__ static void add(uint32_t* counter) { atomicAdd(counter, 1u); }

    // Replaces each thread's number by the sum of the numbers of the threads before it, and returns the sum of all. There
    // are at most 32 warps. shared: one number for each warp.
    template <class T>
    __device__ T sumsBefore(Local<T>& numbers, T* shared) const {
        const unsigned all = 0xffffffffu;
        const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
        const auto upTo = [&](T sum) {  // the sums of a warp's lanes, each with its own
            for (int step = 1; step < 32; step *= 2) {
                const T before = __shfl_up_sync(all, sum, step);
                if (lane >= step) sum += before;
            }
            return sum;
        };
        const T own = numbers.value, sum = upTo(own);
        if (lane == 31) shared[warp] = sum;
        __syncthreads();
        const T warps = upTo(lane < threads() / 32 ? shared[lane] : T{});
        const T before = __shfl_sync(all, warps, (warp + 31) % 32), total = __shfl_sync(all, warps, 31);
        numbers.value = sum - own + (warp ? before : T{});
        __syncthreads();
        return total;
    }
};

#define IVC_BLOCK __device__ inline

#else

struct Team {
    int count;
    bool backwards = false;  // the last thread runs first: no result may depend on this

    template <class T>
    struct Local {
        std::vector<T> values;
        explicit Local(const Team& team) : values(team.count) {}
        T& operator[](int thread) { return values[thread]; }
    };

    int threads() const { return count; }

    template <class Phase>
    void each(Phase phase) const {
        for (int i = 0; i < count; ++i) phase(backwards ? count - 1 - i : i);
    }

    static void add(uint32_t* counter) { ++*counter; }

    template <class T>
    T sumsBefore(Local<T>& numbers, T*) const {
        T sum{};
        for (T& number : numbers.values) {
            const T own = number;
            number = sum;
            sum += own;
        }
        return sum;
    }
};

#define IVC_BLOCK inline

#endif

}  // namespace ivc
