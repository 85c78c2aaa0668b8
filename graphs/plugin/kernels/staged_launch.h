// The launch of a kernel whose weights wait in shared memory.
#pragma once

#include "device.h"
#include "warp.h"

namespace ivc {

template <class Kernel, class Arguments>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksEach)
    stagedKernel(const __grid_constant__ Arguments a) {
#ifdef IVC_TENSOR_CORES
    extern __shared__ __align__(128) char memory[];
    Block block;
    Kernel::run(block, memory, a, static_cast<int32_t>(blockIdx.x));
#endif
}

template <class Kernel, class Arguments>
cudaError_t launchStaged(const Arguments& a, cudaStream_t stream) {
    const auto kernel = stagedKernel<Kernel, Arguments>;
    const int bytes = Kernel::sharedBytes(a);
    const cudaError_t allowed = allowShared(kernel, bytes);
    if (allowed != cudaSuccess) return allowed;
    return launchEarly(kernel, dim3(static_cast<unsigned>(Kernel::columnBlocks(a))), Kernel::kThreads, stream, a, bytes);
}

}  // namespace ivc
