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
};

#define IVC_BLOCK inline

#endif

}  // namespace ivc
