// The kernel that works by tiles, and its launch.
#pragma once

#include <cuda_runtime_api.h>

#include "attend_plan.h"
#include "device.h"

namespace ivc {

template <class Value, Sight kSight, class S>
__global__ void __launch_bounds__(S::kThreads) attendKernel(const __grid_constant__ Attend a) {
#ifdef IVC_TENSOR_CORES
    extern __shared__ __align__(128) char shared[];
    Block block;
    attend<Value, kSight, S>(block, shared, a, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(blockIdx.y),
        static_cast<int32_t>(blockIdx.z));
#endif
}

template <class Value, Sight kSight, class S>
cudaError_t launchTiles(const Attend& a, cudaStream_t stream) {
    const Blocks blocks = blocksOf<kSight, S>(a);
    const dim3 grid(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y), static_cast<unsigned>(blocks.z));
    const auto kernel = attendKernel<Value, kSight, S>;
    const cudaError_t allowed = allowShared(kernel, S::kSharedBytes);
    if (allowed != cudaSuccess) return allowed;
    kernel<<<grid, S::kThreads, S::kSharedBytes, stream>>>(a);
    return cudaGetLastError();
}

// launchGroups on the device (attend_groups.cu, for SM 90 alone).
cudaError_t attendInGroups(const IvcEncoder& c, const Attend& a, cudaStream_t stream);

}  // namespace ivc
