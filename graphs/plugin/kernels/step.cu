#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ivc_kernels.h"
#include "step.h"

namespace ivc {

__global__ void __launch_bounds__(kStepThreads) takeStepKernel(const __grid_constant__ TakeStep t) {
    Block block;
    takeStep(block, t);
}

template <class Value>
__global__ void __launch_bounds__(kStepThreads) giveAnswerKernel(const __grid_constant__ GiveAnswer g) {
    __shared__ AnswerShared shared;
    Block block;
    giveAnswer<Value>(block, shared, g, static_cast<int32_t>(blockIdx.x));
}

}  // namespace ivc

using namespace ivc;

cudaError_t ivcTakeStep(const IvcStep* c, const int32_t* step, const void* table, const void* row,
    const float* frequencies, void* embeds, float* cos, float* sin, int32_t* length, int32_t* wholeLength,
    cudaStream_t stream) {
    if (!canBegin(*c)) return cudaErrorInvalidValue;
    const TakeStep t{step, table ? table : row, table != nullptr, frequencies, embeds, cos, sin, {length, wholeLength},
        c->axes, c->pairs, c->hidden * (c->type == IVC_FLOAT32 ? 2 : 1), c->vocab, wholeLength ? 2 : 1};
    takeStepKernel<<<1, kStepThreads, 0, stream>>>(t);
    return cudaGetLastError();
}

cudaError_t ivcGiveAnswer(const IvcStep* c, const void* x, const int32_t* wanted, float* logits, int32_t* best,
    float* told, int32_t* scratch, cudaStream_t stream) {
    if (!canEnd(*c)) return cudaErrorInvalidValue;
    const GiveAnswer g{
        x, wanted, logits, told, best, reinterpret_cast<float*>(scratch + 1), scratch, c->vocab};
    if (c->type == IVC_FLOAT32) {
        giveAnswerKernel<float><<<kAnswerBlocks, kStepThreads, 0, stream>>>(g);
    } else if (c->type == IVC_FLOAT16) {
        giveAnswerKernel<__half><<<kAnswerBlocks, kStepThreads, 0, stream>>>(g);
    } else {
        giveAnswerKernel<__nv_bfloat16><<<kAnswerBlocks, kStepThreads, 0, stream>>>(g);
    }
    return cudaGetLastError();
}
