#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.h"
#include "packed_plan.h"
#include "staged_launch.h"
#include "ivc_kernels.h"

namespace ivc {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksEach) packedKernel(const __grid_constant__ PackedProduct a) {
#ifdef IVC_TENSOR_CORES
    __shared__ typename Kernel::Shared shared;
    Block block;
    Kernel::run(block, shared, a, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(blockIdx.y));
#endif
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) unpackKernel(const __grid_constant__ Packed w, void* to) {
    Block block;
    Kernel::run(block, w, to, static_cast<int32_t>(blockIdx.x));
}

struct PackedLaunch {
    cudaStream_t stream;

    template <class Kernel>
    cudaError_t run(const PackedProduct& a) const {
        const dim3 grid(
            static_cast<unsigned>(Kernel::columnBlocks(a)), static_cast<unsigned>(Kernel::rowBlocks(a)));
        return launchEarly(packedKernel<Kernel>, grid, Kernel::kThreads, stream, a);
    }

    template <class Kernel>
    cudaError_t staged(const PackedProduct& a) const {
        return launchStaged<Kernel>(a, stream);
    }
};

}  // namespace ivc

using namespace ivc;

cudaError_t ivcFusedPacked(const IvcLinear* c, const IvcPacked* w, const void* x, const void* norm, const void* bias,
    const void* residual, void* y, cudaStream_t stream) {
    if (!possible(*c, *w) || !possible(*c, norm)) return cudaErrorInvalidValue;
    bool tensorCores = false;
    const cudaError_t known = hasTensorCores(tensorCores);
    if (known != cudaSuccess) return known;
    if (!tensorCores) return cudaErrorNotSupported;
    Device device{};
    if (const cudaError_t counted = countProcessors(device.processors)) return counted;
    if (const cudaError_t found = findEarlyShared(device.earlyShared)) return found;
    const PackedProduct a = planned(*c, *w, x, norm, bias, residual, y);
    if (!wellPlaced(a.packed, *w)) return cudaErrorInvalidValue;
    return withHalf<__half, __nv_bfloat16>(
        c->type, [&](auto value) { return launchPacked<decltype(value)>(*c, *w, a, device, PackedLaunch{stream}); });
}

cudaError_t ivcUnpack(const IvcLinear* c, const IvcPacked* w, void* weight, cudaStream_t stream) {
    if (!possible(*c, *w)) return cudaErrorInvalidValue;
    const Packed packed = planned(*c, *w);
    if (!wellPlaced(packed, *w)) return cudaErrorInvalidValue;
    const auto launch = [&](auto kernel) {
        using Kernel = decltype(kernel);
        unpackKernel<Kernel>
            <<<static_cast<unsigned>(Kernel::columnBlocks(packed)), Kernel::kThreads, 0, stream>>>(packed, weight);
        return cudaGetLastError();
    };
    return withUnpack<__half, __nv_bfloat16>(*c, *w, launch);
}
