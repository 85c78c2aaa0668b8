#include "ivc_kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "choose.h"
#include "device.h"
#include "pixels.h"
#include "rows.h"
#include "selection.h"
#include "votes.h"

namespace ivc {

template <class Value>
__global__ void __launch_bounds__(kVoteThreads) voteRowsKernel(Votes<Value> votes) {
    __shared__ VoteTile tile;
    voteRows(Team{}, tile, votes, blockIdx.z, blockIdx.y, blockIdx.x);
}

template <class Value>
__global__ void __launch_bounds__(kVoteThreads) voteColumnsKernel(Votes<Value> votes) {
    __shared__ VoteTile tile;
    voteColumns(Team{}, tile, votes, blockIdx.z, blockIdx.y, blockIdx.x);
}

__global__ void __launch_bounds__(kChooseThreads) seedsKernel(Scoring s) {
    __shared__ Choice choice;
    awaitKernelBefore();
    scoreSeeds(Team{}, choice, s);
}

__global__ void __launch_bounds__(kChooseThreads) scoresKernel(Scoring s) {
    awaitKernelBefore();
    scoreTokens(Team{}, s, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
}

__global__ void __launch_bounds__(kChooseThreads) endKernel(Ending e) {
    __shared__ Choice choice;
    awaitKernelBefore();
    scoreTokens(Team{}, e.scoring, 0, 1);
    keepRows(Team{}, choice, e.keeping);
}

__global__ void __launch_bounds__(kChooseThreads) rowsKernel(Keeping k) {
    __shared__ Choice choice;
    awaitKernelBefore();
    keepRows(Team{}, choice, k);
}

// For a decode step: keeps the only visual token. Its score is 1, from a softmax over itself alone.
__global__ void onlyTokenKernel(int32_t rows, int32_t* keepIndex, float* tokenScore, int32_t* seedIndex) {
    const int32_t i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < rows) keepIndex[i] = i;
    if (i == 0) {
        *tokenScore = 1.0f;
        *seedIndex = 0;
    }
}

__global__ void __launch_bounds__(kRowThreads) copyRowsKernel(const __grid_constant__ RowCopies copies) {
    copyRows(Team{}, copies, static_cast<int32_t>(blockIdx.x));
}

__global__ void __launch_bounds__(kPixelThreads) scalePixelsKernel(const __grid_constant__ Pixels p) {
    scalePixels(Team{}, p, blockIdx.x);
}

__global__ void __launch_bounds__(kRowThreads) cacheIndexKernel(CacheRows c) {
    awaitKernelBefore();
    indexCaches(Team{}, c, static_cast<int32_t>(blockIdx.x));
}

template <class Value>
cudaError_t launchVotes(const Votes<Value>& votes, cudaStream_t stream) {
    const dim3 rows(votes.softmaxTiles(), ceilDiv(votes.queries, kQueries), votes.heads);
    if (const cudaError_t status = launchEarly(voteRowsKernel<Value>, rows, kVoteThreads, stream, votes)) return status;
    const dim3 columns(ceilDiv(votes.visual, kKeys), votes.splits, votes.heads);
    return launchEarly(voteColumnsKernel<Value>, columns, kVoteThreads, stream, votes);
}

// All of SelectTokens before scoreTokens.
template <class Value>
cudaError_t launchAllVotes(const IvcSelection& s, const void* values, const int32_t* visualIndex, const int32_t* queryIndex,
    float* tokenScore, int32_t* seedIndex, void* workspace, cudaStream_t stream) {
    const Scratch scratch(s, workspace);
    const Scoring scoring = scratch.scoring(tokenScore, seedIndex);
    cudaError_t status =
        launchVotes(scratch.textVotes(static_cast<const Value*>(values), visualIndex, queryIndex), stream);
    if (!status) status = launchEarly(seedsKernel, 1, kChooseThreads, stream, scoring);
    if (!status) {
        status = launchVotes(scratch.seedVotes(static_cast<const Value*>(values), visualIndex, seedIndex), stream);
    }
    return status;
}

cudaError_t launchAllVotes(const IvcSelection& s, const void* values, const int32_t* visualIndex,
    const int32_t* queryIndex, float* tokenScore, int32_t* seedIndex, void* workspace, cudaStream_t stream) {
    const auto launch = s.type == IVC_FLOAT32   ? launchAllVotes<float>
                        : s.type == IVC_FLOAT16 ? launchAllVotes<__half>
                                                : launchAllVotes<__nv_bfloat16>;
    return launch(s, values, visualIndex, queryIndex, tokenScore, seedIndex, workspace, stream);
}

cudaError_t launchRows(RowCopies& c, const IvcRows* tensors, int32_t count, int32_t copied, cudaStream_t stream) {
    if (count < 0 || copied < 0 || c.sourceRows < 0 || c.targetRows < 0) return cudaErrorInvalidValue;
    for (int32_t first = 0; first < count && copied > 0; first += IVC_ROWS_PER_LAUNCH) {
        const int32_t blocks = planRows(c, tensors + first, smaller(count - first, IVC_ROWS_PER_LAUNCH), copied);
        if (blocks < 0) return cudaErrorInvalidValue;
        copyRowsKernel<<<blocks, kRowThreads, 0, stream>>>(c);
    }
    return cudaGetLastError();
}

}  // namespace ivc

using namespace ivc;

int32_t ivcKernelsVersion(void) { return IVC_KERNELS_VERSION; }

int32_t ivcSeedCount(int32_t visual, int32_t seedDivisor) { return seedCount(visual, seedDivisor); }

size_t ivcSelectionWorkspace(const IvcSelection* selection) { return Scratch(*selection, nullptr).bytes; }

cudaError_t ivcTokenScores(const IvcSelection* s, const void* values, const int32_t* visualIndex,
    const int32_t* queryIndex, float* tokenScore, int32_t* seedIndex, void* workspace, cudaStream_t stream) {
    if (!possible(*s)) return cudaErrorInvalidValue;
    const cudaError_t status =
        launchAllVotes(*s, values, visualIndex, queryIndex, tokenScore, seedIndex, workspace, stream);
    if (status != cudaSuccess) return status;
    const Scoring scoring = Scratch(*s, workspace).scoring(tokenScore, seedIndex);
    return launchEarly(scoresKernel, ceilDiv(s->visual, kChooseThreads), kChooseThreads, stream, scoring);
}

cudaError_t ivcKeptRows(const IvcSelection* s, const float* tokenScore, const int32_t* seedIndex,
    const float* priority, const int32_t* visualIndex, const int32_t* textIndex, int32_t* keepIndex, void* workspace,
    cudaStream_t stream) {
    if (!possible(*s)) return cudaErrorInvalidValue;
    const Scratch scratch(*s, workspace);
    return launchEarly(rowsKernel, 1, kChooseThreads, stream,
        scratch.keeping(tokenScore, seedIndex, priority, visualIndex, textIndex, keepIndex));
}

cudaError_t ivcSelectTokens(const IvcSelection* s, const void* values, const float* priority,
    const int32_t* visualIndex, const int32_t* textIndex, const int32_t* queryIndex, int32_t* keepIndex,
    float* tokenScore, int32_t* seedIndex, void* workspace, cudaStream_t stream) {
    if (!possible(*s)) return cudaErrorInvalidValue;
    if (s->visual == 1 && s->softmax == IVC_SOFTMAX_VISUAL) {
        const int32_t rows = smaller(s->rows, s->text + s->keepCount);
        onlyTokenKernel<<<ceilDiv(rows, kChooseThreads), kChooseThreads, 0, stream>>>(
            rows, keepIndex, tokenScore, seedIndex);
        return cudaGetLastError();
    }
    if (s->visual <= kNear) {  // one block is enough for scores, too
        const cudaError_t voted =
            launchAllVotes(*s, values, visualIndex, queryIndex, tokenScore, seedIndex, workspace, stream);
        if (voted != cudaSuccess) return voted;
        const Scratch scratch(*s, workspace);
        const Ending ending{scratch.scoring(tokenScore, seedIndex),
            scratch.keeping(tokenScore, seedIndex, priority, visualIndex, textIndex, keepIndex)};
        return launchEarly(endKernel, 1, kChooseThreads, stream, ending);
    }
    const cudaError_t scored =
        ivcTokenScores(s, values, visualIndex, queryIndex, tokenScore, seedIndex, workspace, stream);
    if (scored != cudaSuccess) return scored;
    return ivcKeptRows(s, tokenScore, seedIndex, priority, visualIndex, textIndex, keepIndex, workspace, stream);
}

cudaError_t ivcCacheIndex(const int32_t* keepIndex, int32_t kept, int32_t past, int32_t capacity, int32_t* cacheIndex,
    cudaStream_t stream) {
    if (kept < 0 || past < 0 || capacity <= 0) return cudaErrorInvalidValue;
    const CacheRows c{keepIndex, cacheIndex, kept, past, capacity};
    return launchEarly(cacheIndexKernel, ceilDiv(capacity, kRowThreads), kRowThreads, stream, c);
}

cudaError_t ivcCompactGather(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* keepIndex,
    int32_t kept, cudaStream_t stream) {
    RowCopies c{};
    c.sourceRows = rows;
    c.targetRows = kept;
    c.gather = keepIndex;
    return launchRows(c, tensors, count, kept, stream);
}

cudaError_t ivcCompactGatherInto(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* keepIndex,
    int32_t kept, const int32_t* pastLength, int32_t capacity, cudaStream_t stream) {
    RowCopies c{};
    c.sourceRows = rows;
    c.targetRows = capacity;
    c.gather = keepIndex;
    c.offset = pastLength;
    return launchRows(c, tensors, count, kept, stream);
}

cudaError_t ivcAppendRows(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* pastLength,
    int32_t capacity, cudaStream_t stream) {
    RowCopies c{};
    c.sourceRows = rows;
    c.targetRows = capacity;
    c.offset = pastLength;
    return launchRows(c, tensors, count, rows, stream);
}

cudaError_t ivcScalePixels(const IvcPixels* extents, const uint8_t* levels, float* pixels, cudaStream_t stream) {
    const int64_t blocks = possible(*extents) ? pixelBlocks(*extents) : 0;
    if (blocks == 0 || blocks > INT32_MAX) return cudaErrorInvalidValue;
    scalePixelsKernel<<<static_cast<unsigned>(blocks), kPixelThreads, 0, stream>>>(Pixels{*extents, levels, pixels});
    return cudaGetLastError();
}
