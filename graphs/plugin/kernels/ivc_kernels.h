// The kernels behind the ivc operators: plain C, CUDA only, no TensorRT.
//
// All pointers are device pointers, unless a comment says otherwise. The functions do not synchronise with the host,
// allocate memory or read device memory on the host, so every call can be captured into a CUDA graph. Extents are host
// values. Indices that lie in device memory are clamped to their range, so that a builder can time kernels on arbitrary
// memory. The functions return cudaErrorInvalidValue for impossible extents, and else the result of the launch.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>

#include "ivc_types.h"

#ifdef __cplusplus
extern "C" {
#endif

#define IVC_API __attribute__((visibility("default")))

// Increased when a signature or a structure changes.
#define IVC_KERNELS_VERSION 2
IVC_API int32_t ivcKernelsVersion(void);

// The number of seeds, as graphs/ops/SelectTokens.onnxtxt defines it.
IVC_API int32_t ivcSeedCount(int32_t visual, int32_t seedDivisor);

// Bytes of scratch memory that the functions below need. The size follows from the extents. The memory need not be
// cleared.
IVC_API size_t ivcSelectionWorkspace(const IvcSelection* selection);

// SelectTokens: ivcTokenScores, then ivcKeptRows.
//   values [kvHeads, S, D]; priority float32 [L]; visualIndex [L], textIndex [T], queryIndex [Q], all int32
//   keepIndex int32 [T + keepCount], ascending; tokenScore float32 [L]; seedIndex int32 [seeds], best first
IVC_API cudaError_t ivcSelectTokens(const IvcSelection* selection, const void* values, const float* priority,
    const int32_t* visualIndex, const int32_t* textIndex, const int32_t* queryIndex, int32_t* keepIndex,
    float* tokenScore, int32_t* seedIndex, void* workspace, cudaStream_t stream);

// Only the scores and the seeds. Of equal scores, the lower index comes first.
IVC_API cudaError_t ivcTokenScores(const IvcSelection* selection, const void* values, const int32_t* visualIndex,
    const int32_t* queryIndex, float* tokenScore, int32_t* seedIndex, void* workspace, cudaStream_t stream);

// Only the rows to keep: all text rows, and keepCount visual tokens: the seeds first, then those of the highest
// priorities and scores.
IVC_API cudaError_t ivcKeptRows(const IvcSelection* selection, const float* tokenScore, const int32_t* seedIndex,
    const float* priority, const int32_t* visualIndex, const int32_t* textIndex, int32_t* keepIndex, void* workspace,
    cudaStream_t stream);

// The row from which each row of a cache comes by compaction, int32 [capacity]: row past + m comes from row past +
// keepIndex[m] for m < kept, every other row from itself. keepIndex int32 [kept]
IVC_API cudaError_t ivcCacheIndex(const int32_t* keepIndex, int32_t kept, int32_t past, int32_t capacity,
    int32_t* cacheIndex, cudaStream_t stream);

// CompactGather on many tensors: target[:, m] = source[:, keepIndex[m]] for m < kept.
//   source [outer, rows, rowBytes]; target [outer, kept, rowBytes]; keepIndex int32 [kept]
IVC_API cudaError_t ivcCompactGather(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* keepIndex,
    int32_t kept, cudaStream_t stream);

// The same, into caches: target[:, pastLength + m] = source[:, keepIndex[m]] for m < kept. Rows that do not fit are
// left out.
//   target [outer, capacity, rowBytes]; pastLength int32 [1], read on the device, or null for 0
IVC_API cudaError_t ivcCompactGatherInto(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* keepIndex,
    int32_t kept, const int32_t* pastLength, int32_t capacity, cudaStream_t stream);

// Appends rows to caches: target[:, pastLength + m] = source[:, m] for m < rows, where pastLength + m < capacity.
//   source [outer, rows, rowBytes]; target [outer, capacity, rowBytes]; pastLength int32 [1], read on the device
IVC_API cudaError_t ivcAppendRows(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* pastLength,
    int32_t capacity, cudaStream_t stream);

// Bytes of scratch memory that ivcAttendInPlace needs. The size follows from the extents. The memory need not be
// cleared.
IVC_API size_t ivcAttendWorkspace(const IvcAttention* attention);

// Attention of a decoder layer. Fresh row r attends to rows 0..pastLength-1 of the caches and to the fresh rows 0..r.
//   q [heads, S, headDim], k and v [kvHeads, S, headDim], by their strides; y [S, heads * headDim], contiguous
//   keyCache, valueCache [kvHeads, P, headDim], contiguous: read, and with IVC_FRESH_APPENDED written at rows
//     pastLength..pastLength+S-1; they may be null if P is 0. Rows after pastLength have no effect, even if they hold
//     NaN or infinity.
//   pastLength int32 [1], read on the device; clamped to 0..P - S if fresh rows are appended, else to 0..P
// If past and present caches are two buffers, copy the past into the present first, and pass the present.
IVC_API cudaError_t ivcAttendInPlace(const IvcAttention* attention, const void* q, const void* k, const void* v,
    void* keyCache, void* valueCache, const int32_t* pastLength, void* y, void* workspace, cudaStream_t stream);

// Attention of an encoder layer, within a frame or within a window.
//   q, k, v [frames, heads, rows, headDim], by their strides
//   windowOfPlace int32 [rows], -1 at empty places; not read, and may be null, if blockSize is 0
//   y [frames, rows - 2 blockSize, heads * headDim], contiguous; zeros at places that belong to no window. What k and
//     v hold at such places has no effect.
IVC_API cudaError_t ivcEncodeAttend(const IvcEncoder* encoder, const void* q, const void* k, const void* v,
    const int32_t* windowOfPlace, void* y, cudaStream_t stream);

// Splits joined rows into heads, normalises queries and keys, and then rotates them as graphs/ops/Rotate.onnxtxt
// defines, in float32.
//   q [rows, heads headDim]; k, v [rows, kvHeads headDim]; if v is null, values are not written; with byHead [rows /
//     angleRows, heads, angleRows, headDim]
IVC_API cudaError_t ivcTurnHeads(
    const IvcJoined* joined, const IvcJoinedRows* rows, void* q, void* k, void* v, cudaStream_t stream);

// Bytes of scratch memory that ivcAttendJoined needs. The size follows from the extents. The memory need not be
// cleared.
IVC_API size_t ivcAttendJoinedWorkspace(const IvcJoined* joined);

// ivcTurnHeads, then ivcAttendInPlace with IVC_FRESH_APPENDED. For one row of a type with tensor cores, one launch does
// both.
//   keyCache, valueCache, pastLength: with one row, this kernel is an early one (see ivcFusedLinear) and reads them
//     before it waits.
//   counters int32 [kvHeads]: zeros before and after the call; two calls must not use them at the same time
IVC_API cudaError_t ivcAttendJoined(const IvcJoined* joined, const IvcJoinedRows* rows, void* keyCache,
    void* valueCache, const int32_t* pastLength, void* y, void* workspace, int32_t* counters, cudaStream_t stream);

// Normalises pixels: pixels[o, c, f, i] = (levels[o, c, f % given, i] factor - mean[c]) / std[c], rounded to float32 after
// each step.
//   levels uint8 [outer, 3, given, inner]; pixels float32 [outer, 3, frames, inner]
IVC_API cudaError_t ivcScalePixels(const IvcPixels* extents, const uint8_t* levels, float* pixels, cudaStream_t stream);

// The first kernel of a decode step. It reads what the host has written into memory that host and device share (pinned
// memory), when it runs. It starts after the end of all that was launched before, and the next kernel starts after its
// end. So the kernels of a step may read caches and lengths early.
//   step int32 [1 + axes + 1 or 2], in pinned memory: the token, its positions, and the numbers of valid rows in the
//     caches
//   before int32 [2], in pinned memory, or null: `best` of the step before, whose token is taken if step has none (-1)
//   table [vocab, hidden], the embeddings; or null, and row [hidden], in pinned memory, is the embedding; frequencies
//     float32 [axes, pairs]
//   embeds [hidden], the row times `scale`; cos, sin float32 [pairs], of the sum of positions times frequencies; length int32 [1];
//     wholeLength int32 [1], or null
IVC_API cudaError_t ivcTakeStep(const IvcStep* step, const int32_t* given, const void* table, const void* row,
    const int32_t* before, const float* frequencies, void* embeds, float* cos, float* sin, int32_t* length,
    int32_t* wholeLength, cudaStream_t stream);

// The last kernel of a decode step. It writes what the host needs of the logits x [vocab] into pinned memory. It reads
// `wanted` before the kernels before it have ended.
//   best int32 [2]: the lowest id of the largest logit; and 1 if no logit is NaN and the largest is finite, else 0
//   told float32 [vocab]: all logits, if wanted int32 [1], in pinned memory too, is not 0
//   logits float32 [vocab]; scratch int32 [IVC_ANSWER_SCRATCH]: zeros before the first call; two calls must not use
//     it at the same time
IVC_API cudaError_t ivcGiveAnswer(const IvcStep* step, const void* x, const int32_t* wanted, float* logits,
    int32_t* best, float* told, int32_t* scratch, cudaStream_t stream);

// y = f(scale n(x) W^T + b) + r. n is an RMS norm or nothing, and no layer norm; f is an activation. If gated, y = f(g) * u + r, where g and
// u are the products with the two halves of W. Each weight is read once for 4 rows.
//
// This kernel, like those of ivcFusedPacked, ivcAttendJoined of one row and ivcGiveAnswer, is an early one from SM 90 on.
// It starts before the kernels before it have ended, reads weights, and then waits for their end. Early kernels may be
// launched one after the other. None of them may write the weights, nor the kernel before the first of them.
//   x [rows, K]; norm [K], the weight of the norm, or null; weight [N, K], or [2 N, K] if gated; bias, one value for
//     each row of weight, or null; residual [rows, N], or null; y [rows, N]
IVC_API cudaError_t ivcFusedLinear(const IvcLinear* product, const void* x, const void* norm, const void* weight,
    const void* bias, const void* residual, void* y, cudaStream_t stream);

// The same with weights in 4 or 8 bits, on tensor cores. Returns cudaErrorNotSupported before SM 80. Products use the exact
// weights. Normalised rows are rounded to the tensors' type.
IVC_API cudaError_t ivcFusedPacked(const IvcLinear* product, const IvcPacked* weight, const void* x, const void* norm,
    const void* bias, const void* residual, void* y, cudaStream_t stream);

// Unpacks such weights to the product's type, [N, K], or [2 N, K] if gated, at an address that is a multiple of 16
// bytes.
IVC_API cudaError_t ivcUnpack(
    const IvcLinear* product, const IvcPacked* packed, void* weight, cudaStream_t stream);

// Only y = n(x), [rows, K], with a norm of either kind: the input of a product of many rows.
IVC_API cudaError_t ivcNormRows(
    const IvcLinear* product, const void* x, const void* norm, void* y, cudaStream_t stream);

// Only y = f(x + b) + r: the step after a product of many rows. x is [rows, N], and may be y; or [rows, 2 N] if gated.
IVC_API cudaError_t ivcActivate(const IvcLinear* product, const void* x, const void* bias, const void* residual,
    void* y, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
