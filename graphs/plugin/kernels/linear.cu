#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.h"
#include "ivc_kernels.h"
#include "linear_plan.h"
#include "staged_launch.h"

namespace ivc {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksEach) linearKernel(const __grid_constant__ Linear a) {
    __shared__ typename Kernel::Shared shared;
    Block block;
    Kernel::run(block, shared, a, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(blockIdx.y));
}

struct LinearLaunch {
    cudaStream_t stream;

    template <class Kernel>
    cudaError_t run(const Linear& a) const {
        const dim3 grid(
            static_cast<unsigned>(Kernel::columnBlocks(a)), static_cast<unsigned>(Kernel::rowBlocks(a)));
        return launchEarly(linearKernel<Kernel>, grid, Kernel::kThreads, stream, a);
    }

    template <class Kernel>
    cudaError_t staged(const Linear& a) const {
        return launchStaged<Kernel>(a, stream);
    }
};

}  // namespace ivc

using namespace ivc;

cudaError_t ivcFusedLinear(const IvcLinear* c, const void* x, const void* norm, const void* weight, const void* bias,
    const void* residual, void* y, cudaStream_t stream) {
    if (!possible(*c, norm)) return cudaErrorInvalidValue;
    Device device{};
    if (const cudaError_t counted = countProcessors(device.processors)) return counted;
    if (const cudaError_t found = findEarlyShared(device.earlyShared)) return found;
    const Linear a = planned(*c, x, norm, weight, bias, residual, y);
    return withType<__half, __nv_bfloat16>(
        c->type, [&](auto value) { return launchLinear<decltype(value)>(*c, a, device, LinearLaunch{stream}); });
}

cudaError_t ivcNormRows(const IvcLinear* c, const void* x, const void* norm, void* y, cudaStream_t stream) {
    if (!possible(*c)) return cudaErrorInvalidValue;
    const Linear a = planned(*c, x, norm, nullptr, nullptr, nullptr, y);
    return withType<__half, __nv_bfloat16>(
        c->type, [&](auto value) { return launchNorm<decltype(value)>(*c, a, LinearLaunch{stream}); });
}

cudaError_t ivcActivate(const IvcLinear* c, const void* x, const void* bias, const void* residual, void* y,
    cudaStream_t stream) {
    if (!possible(*c)) return cudaErrorInvalidValue;
    const Linear a = planned(*c, x, nullptr, nullptr, bias, residual, y);
    return withType<__half, __nv_bfloat16>(
        c->type, [&](auto value) { return launchActivate<decltype(value)>(*c, a, LinearLaunch{stream}); });
}
