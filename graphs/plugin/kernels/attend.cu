#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attend_launch.h"
#include "device.h"
#include "ivc_kernels.h"
#include "joined_plan.h"

namespace ivc {

template <class Value, Sight kSight>
__global__ void __launch_bounds__(PlainAttention<Value, kSight>::kThreads)
    attendPlainKernel(const __grid_constant__ Attend a) {
    __shared__ typename PlainAttention<Value, kSight>::Shared shared;
    Block block;
    PlainAttention<Value, kSight>::run(block, shared, a, static_cast<int32_t>(blockIdx.x),
        static_cast<int32_t>(blockIdx.y), static_cast<int32_t>(blockIdx.z));
}

template <class Value>
__global__ void __launch_bounds__(Combining<Value>::kThreads) combineKernel(const __grid_constant__ Attend a) {
    __shared__ typename Combining<Value>::Shared shared;
    Block block;
    Combining<Value>::run(block, shared, a, static_cast<int32_t>(blockIdx.x));
}

template <class Value>
__global__ void __launch_bounds__(kTurnThreads) turnKernel(const __grid_constant__ Turn t) {
    Block block;
    turnHeads<Value>(block, t, static_cast<int32_t>(blockIdx.x));
}

template <class Value, class S>
__global__ void __launch_bounds__(S::kThreads) attendRowKernel(const __grid_constant__ AttendRow r) {
#ifdef IVC_TENSOR_CORES
    extern __shared__ __align__(128) char shared[];
    Block block;
    RowAttention<Value, S>::run(
        block, shared, r, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(blockIdx.y));
#endif
}

template <class Value, class S>
__global__ void __launch_bounds__(S::kThreads, S::kLeastBlocks)
    attendTogetherKernel([[maybe_unused]] const __grid_constant__ AttendTogether r) {
#ifdef IVC_CLUSTERS
    extern __shared__ __align__(128) char shared[];
    Block block;
    const Together<Value, S> together(
        block, shared, r, static_cast<int32_t>(blockIdx.y), static_cast<int32_t>(blockIdx.x));
    together.attend([&](int32_t rank) { return block.inBlock(shared, rank); });
    together.finish();
#endif
}

struct Launch {
    cudaStream_t stream;

    template <class Value>
    cudaError_t turn(const Turn& t) const {
        turnKernel<Value><<<static_cast<unsigned>(turnBlocks(t)), kTurnThreads, 0, stream>>>(t);
        return cudaGetLastError();
    }

    template <class Value, class S>
    cudaError_t row(const AttendRow& r) const {
        constexpr int kBytes = RowAttention<Value, S>::kSharedBytes;
        static_assert(kBytes <= 99 * 1024, "more shared memory than SM 86 has");
        const auto kernel = attendRowKernel<Value, S>;
        const cudaError_t allowed = allowShared(kernel, kBytes);
        if (allowed != cudaSuccess) return allowed;
        const dim3 grid(static_cast<unsigned>(r.a.kvHeads), static_cast<unsigned>(r.a.splits));
        return launchEarly(kernel, grid, S::kThreads, stream, r, kBytes);
    }

    template <class Value, class S>
    cudaError_t together(const AttendTogether& r) const {
        const int bytes = Together<Value, S>::sharedBytes(r);
        const auto kernel = attendTogetherKernel<Value, S>;
        const cudaError_t allowed = allowShared(kernel, bytes);
        if (allowed != cudaSuccess) return allowed;
        if (!runsInClusters(kernel, r.blocks, S::kThreads, bytes)) return row<Value, OneRow<S::kDepth>>(r);
        const dim3 grid(static_cast<unsigned>(r.blocks), static_cast<unsigned>(r.a.kvHeads));
        return launchEarly(kernel, grid, S::kThreads, stream, r, bytes, r.blocks);
    }

    template <class Value, Sight kSight, class S>
    cudaError_t tiles(const Attend& a) const {
        static_assert(S::kSharedBytes <= 99 * 1024, "more shared memory than SM 86 has");
        const cudaError_t status = launchTiles<Value, kSight, S>(a, stream);
        if (status == cudaSuccess && a.splits > 1) {
            const unsigned lines = static_cast<unsigned>(a.kvHeads) * static_cast<unsigned>(a.queries());
            combineKernel<Value><<<lines, Combining<Value>::kThreads, 0, stream>>>(a);
            return cudaGetLastError();
        }
        return status;
    }

    template <class Value, Sight kSight>
    cudaError_t plain(Attend a) const {
        a.splits = 1;
        const dim3 grid(
            static_cast<unsigned>(a.queries()), static_cast<unsigned>(a.kvHeads), static_cast<unsigned>(a.frames));
        attendPlainKernel<Value, kSight><<<grid, PlainAttention<Value, kSight>::kThreads, 0, stream>>>(a);
        return cudaGetLastError();
    }
};

}  // namespace ivc

using namespace ivc;

size_t ivcAttendWorkspace(const IvcAttention* attention) {
    return possible(*attention) ? workspaceOf(*attention) : 0;
}

cudaError_t ivcAttendInPlace(const IvcAttention* c, const void* q, const void* k, const void* v, void* keyCache,
    void* valueCache, const int32_t* pastLength, void* y, void* workspace, cudaStream_t stream) {
    if (!possible(*c)) return cudaErrorInvalidValue;
    Attend a = planned(*c);
    a.q = q;
    a.k = k;
    a.v = v;
    a.keyCache = keyCache;
    a.valueCache = valueCache;
    a.pastLength = pastLength;
    a.y = y;
    a.partial = static_cast<float*>(workspace);
    if (!wellPlaced(a, c->type)) return cudaErrorInvalidValue;
    bool tensorCores = false;
    const cudaError_t known = hasTensorCores(tensorCores);
    if (known != cudaSuccess) return known;
    return launchDecoder<__half, __nv_bfloat16>(*c, a, tensorCores, Launch{stream});
}

cudaError_t ivcEncodeAttend(const IvcEncoder* c, const void* q, const void* k, const void* v,
    const int32_t* windowOfPlace, void* y, cudaStream_t stream) {
    if (!possible(*c)) return cudaErrorInvalidValue;
    Attend a = planned(*c);
    a.q = q;
    a.k = k;
    a.v = v;
    a.windowOfPlace = windowOfPlace;
    a.y = y;
    if (!wellPlaced(a, c->type)) return cudaErrorInvalidValue;
    int major = 0;
    const cudaError_t known = majorCapability(major);
    if (known != cudaSuccess) return known;
#ifdef IVC_SM_90A
    if (major == 9 && takesGroups(*c) && fasterInGroups(*c)) return attendInGroups(*c, a, stream);
#endif
    return launchEncoder<__half, __nv_bfloat16>(*c, a, major >= 8, Launch{stream});
}

cudaError_t ivcTurnHeads(
    const IvcJoined* c, const IvcJoinedRows* rows, void* q, void* k, void* v, cudaStream_t stream) {
    if (!possible(*c, *rows)) return cudaErrorInvalidValue;
    return launchTurn<__half, __nv_bfloat16>(*c, planned(*c, *rows, q, k, v), Launch{stream});
}

size_t ivcAttendJoinedWorkspace(const IvcJoined* c) {
    bool tensorCores = false;
    return hasTensorCores(tensorCores) == cudaSuccess ? workspaceOf(*c, tensorCores) : 0;
}

cudaError_t ivcAttendJoined(const IvcJoined* c, const IvcJoinedRows* rows, void* keyCache, void* valueCache,
    const int32_t* pastLength, void* y, void* workspace, int32_t* counters, cudaStream_t stream) {
    bool tensorCores = false;
    int clusterBytes = 0;
    cudaError_t known = hasTensorCores(tensorCores);
    if (known == cudaSuccess) known = sharedOfClusters(clusterBytes);
    if (known != cudaSuccess) return known;
    return attendJoined<__half, __nv_bfloat16>(*c, *rows, keyCache, valueCache, pastLength, y, workspace, counters,
        tensorCores, clusterBytes, cudaErrorInvalidValue, Launch{stream});
}
