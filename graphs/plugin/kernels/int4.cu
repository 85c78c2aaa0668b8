#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.h"
#include "int4_plan.h"
#include "ivc_kernels.h"

namespace ivc {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) int4Kernel(const __grid_constant__ Int4 a) {
    __shared__ typename Kernel::Shared shared;
    Block block;
    Kernel::run(block, shared, a, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(blockIdx.y));
}

struct Int4Launch {
    cudaStream_t stream;

    template <class Kernel>
    cudaError_t run(const Int4& a) const {
        const int32_t rows = Kernel::rowBlocks(a);
        if (rows > 65535) return cudaErrorInvalidValue;
        const dim3 grid(static_cast<unsigned>(Kernel::columnBlocks(a)), static_cast<unsigned>(rows));
        int4Kernel<Kernel><<<grid, Kernel::kThreads, 0, stream>>>(a);
        return cudaGetLastError();
    }
};

}  // namespace ivc

using namespace ivc;

cudaError_t ivcMatMulInt4(const IvcInt4* c, const void* x, const void* packed, const void* scales,
    const void* zeroPoints, void* y, cudaStream_t stream) {
    if (!possible(*c)) return cudaErrorInvalidValue;
    bool tensorCores = false;
    const cudaError_t known = hasTensorCores(tensorCores);
    if (known != cudaSuccess) return known;
    const Int4Choice choice = choiceOf(*c, tensorCores);
    const Int4 a = planned(*c, x, packed, scales, zeroPoints, y, choice);
    if (!wellPlaced(*c, a)) return cudaErrorInvalidValue;
    return launchInt4<__half, __nv_bfloat16>(*c, choice.kernel, a, Int4Launch{stream});
}
