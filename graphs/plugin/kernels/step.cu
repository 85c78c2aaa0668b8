#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.h"
#include "ivc_kernels.h"
#include "step.h"

namespace ivc {

template <class Value>
__global__ void __launch_bounds__(kStepThreads) takeStepKernel(const __grid_constant__ TakeStep t) {
    __shared__ StepShared shared;
    Block block;
    takeStep<Value>(block, shared, t);
}

template <class Value>
__global__ void __launch_bounds__(kStepThreads) giveAnswerKernel(const __grid_constant__ GiveAnswer g) {
    __shared__ AnswerShared shared;
    Block block;
    giveAnswer<Value>(block, shared, g, static_cast<int32_t>(blockIdx.x));
}

}  // namespace ivc

using namespace ivc;

// It is not launched early itself, and lets no kernel start before its end: what the step before reads and writes is its
// own until it ends, and attention reads caches and lengths before it waits.
cudaError_t ivcTakeStep(const IvcStep* c, const int32_t* step, const void* table, const void* row,
    const int32_t* before, const float* frequencies, void* embeds, float* cos, float* sin, int32_t* length,
    int32_t* wholeLength, cudaStream_t stream) {
    if (!canBegin(*c)) return cudaErrorInvalidValue;
    const TakeStep t = planned(*c, step, table, row, before, frequencies, embeds, cos, sin, length, wholeLength);
    return withType<__half, __nv_bfloat16>(c->type, [&](auto value) {
        takeStepKernel<decltype(value)><<<1, kStepThreads, 0, stream>>>(t);
        return cudaGetLastError();
    });
}

cudaError_t ivcGiveAnswer(const IvcStep* c, const void* x, const int32_t* wanted, float* logits, int32_t* best,
    float* told, int32_t* scratch, cudaStream_t stream) {
    if (!canEnd(*c)) return cudaErrorInvalidValue;
    const GiveAnswer g = planned(*c, x, wanted, logits, best, told, scratch);
    return withType<__half, __nv_bfloat16>(c->type, [&](auto value) {
        return launchEarly(giveAnswerKernel<decltype(value)>, dim3(kAnswerBlocks), kStepThreads, stream, g);
    });
}
