// The kernels behind the ivc operators: plain C, CUDA only, no TensorRT.
//
// All pointers are device pointers. Nothing here synchronises with the host, allocates, or reads device memory on the
// host, so every call can be captured into a CUDA graph. Extents are host values; what they hold stays on the device.
// Indices outside their range are clamped, so that a builder which times kernels on arbitrary memory does no harm.
// Calls return cudaErrorInvalidValue for extents that cannot be, and otherwise what the launch returned.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>

#include "ivc_types.h"

#ifdef __cplusplus
extern "C" {
#endif

#define IVC_API __attribute__((visibility("default")))

// Raised when a signature or a structure changes.
#define IVC_KERNELS_VERSION 2
IVC_API int32_t ivcKernelsVersion(void);

// The number of seeds, as graphs/ops/SelectTokens.onnxtxt counts them.
IVC_API int32_t ivcSeedCount(int32_t visual, int32_t seedDivisor);

// Bytes of scratch memory that the calls below need, from extents alone. It need not be cleared.
IVC_API size_t ivcSelectionWorkspace(const IvcSelection* selection);

// SelectTokens: ivcTokenScores, then ivcKeptRows.
//   values [kvHeads, S, D]; priority float32 [L]; visualIndex [L], textIndex [T], queryIndex [Q], all int32
//   keepIndex int32 [T + keepCount], ascending; tokenScore float32 [L]; seedIndex int32 [seeds], best first
IVC_API cudaError_t ivcSelectTokens(const IvcSelection* selection, const void* values, const float* priority,
    const int32_t* visualIndex, const int32_t* textIndex, const int32_t* queryIndex, int32_t* keepIndex,
    float* tokenScore, int32_t* seedIndex, void* workspace, cudaStream_t stream);

// The scores and the seeds alone. Equal scores rank by index, the lower first.
IVC_API cudaError_t ivcTokenScores(const IvcSelection* selection, const void* values, const int32_t* visualIndex,
    const int32_t* queryIndex, float* tokenScore, int32_t* seedIndex, void* workspace, cudaStream_t stream);

// The rows to keep, from scores and seeds: all text, then seeds, priorities and scores up to keepCount visual tokens.
IVC_API cudaError_t ivcKeptRows(const IvcSelection* selection, const float* tokenScore, const int32_t* seedIndex,
    const float* priority, const int32_t* visualIndex, const int32_t* textIndex, int32_t* keepIndex, void* workspace,
    cudaStream_t stream);

// CompactGather on many tensors: target[:, m] = source[:, keepIndex[m]] for m < kept.
//   source [outer, rows, rowBytes]; target [outer, kept, rowBytes]; keepIndex int32 [kept]
IVC_API cudaError_t ivcCompactGather(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* keepIndex,
    int32_t kept, cudaStream_t stream);

// The same into caches: target[:, pastLength + m] = source[:, keepIndex[m]] for m < kept, as far as they have room.
//   target [outer, capacity, rowBytes]; pastLength int32 [1], read on the device, or null for 0
IVC_API cudaError_t ivcCompactGatherInto(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* keepIndex,
    int32_t kept, const int32_t* pastLength, int32_t capacity, cudaStream_t stream);

// Appends rows to caches: target[:, pastLength + m] = source[:, m] for m < rows, where pastLength + m < capacity.
//   source [outer, rows, rowBytes]; target [outer, capacity, rowBytes]; pastLength int32 [1], read on the device
IVC_API cudaError_t ivcAppendRows(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* pastLength,
    int32_t capacity, cudaStream_t stream);

// Bytes of scratch memory that ivcAttendInPlace needs, from extents alone. It need not be cleared.
IVC_API size_t ivcAttendWorkspace(const IvcAttention* attention);

// A decoder layer's attention: fresh row r sees rows 0..pastLength-1 of the caches and the fresh rows 0..r.
//   q [heads, S, headDim], k and v [kvHeads, S, headDim], by their strides; y [S, heads * headDim], without gaps
//   keyCache, valueCache [kvHeads, P, headDim], without gaps: read, and with IVC_FRESH_APPENDED written at rows
//     pastLength..pastLength+S-1; they may be null where P is 0. What their rows behind pastLength hold, NaN or
//     infinity too, has no effect.
//   pastLength int32 [1], read on the device; clamped to 0..P - S where fresh rows are appended, else to 0..P
// Where past and present caches are two buffers, copy the past into the present first, and hand over the present.
IVC_API cudaError_t ivcAttendInPlace(const IvcAttention* attention, const void* q, const void* k, const void* v,
    void* keyCache, void* valueCache, const int32_t* pastLength, void* y, void* workspace, cudaStream_t stream);

// An encoder layer's attention, within a frame or within a window.
//   q, k, v [frames, heads, rows, headDim], by their strides
//   windowOfPlace int32 [rows], -1 where nothing is; null, and not read, where blockSize is 0
//   y [frames, rows - 2 blockSize, heads * headDim], without gaps; zeros where a place is of no window. What k and v
//     hold at such places has no effect.
IVC_API cudaError_t ivcEncodeAttend(const IvcEncoder* encoder, const void* q, const void* k, const void* v,
    const int32_t* windowOfPlace, void* y, cudaStream_t stream);

// Splits rows by head; queries and keys are normed, and then turned as graphs/ops/Rotate.onnxtxt says, in float32.
//   q [rows, heads headDim]; k, v [rows, kvHeads headDim]; v may be null, and is then left out; with byHead
//     [rows / angleRows, heads, angleRows, headDim]
IVC_API cudaError_t ivcTurnHeads(
    const IvcJoined* joined, const IvcJoinedRows* rows, void* q, void* k, void* v, cudaStream_t stream);

// Bytes of scratch memory that ivcAttendJoined needs, from extents alone. It need not be cleared.
IVC_API size_t ivcAttendJoinedWorkspace(const IvcJoined* joined);

// ivcTurnHeads, then ivcAttendInPlace with IVC_FRESH_APPENDED; for one row of a type with tensor cores in one launch.
//   keyCache, valueCache, pastLength: not written by a kernel of ours that was launched just before, whose end one row's
//     does not await to read them
//   counters int32 [kvHeads]: zeros, which it leaves as such; no two calls may share them at one time
IVC_API cudaError_t ivcAttendJoined(const IvcJoined* joined, const IvcJoinedRows* rows, void* keyCache,
    void* valueCache, const int32_t* pastLength, void* y, void* workspace, int32_t* counters, cudaStream_t stream);

// A decode step from what the host says, in memory that it shares with the device (pinned) and that is read when the
// kernel runs: step int32 [1 + axes + 1 or 2], the token, its positions, and valid rows of caches.
//   table [vocab, hidden], or null, and row [hidden], in such memory, in its place; frequencies float32 [axes, pairs]
//   embeds [hidden]; cos, sin float32 [pairs], of the sum of positions times frequencies; length int32 [1];
//   wholeLength int32 [1], or null
IVC_API cudaError_t ivcTakeStep(const IvcStep* step, const int32_t* given, const void* table, const void* row,
    const float* frequencies, void* embeds, float* cos, float* sin, int32_t* length, int32_t* wholeLength,
    cudaStream_t stream);

// What the host is told of logits x [vocab], in such memory: best int32 [2], the first of the best ids, and 1 if logits
// are numbers, else 0; told float32 [vocab], all of them, where wanted int32 [1], in such memory too, is not 0.
//   logits float32 [vocab]; scratch int32 [IVC_ANSWER_SCRATCH], zeros at first, one run's at a time
IVC_API cudaError_t ivcGiveAnswer(const IvcStep* step, const void* x, const int32_t* wanted, float* logits,
    int32_t* best, float* told, int32_t* scratch, cudaStream_t stream);

// y = f(scale n(x) W^T + b) + r: n an RMS norm or nothing, f an activation; where gated f(g) * u, of W's halves. Reads
// each weight once for 4 rows; begins with that before the kernel in front has ended, which must not write weights.
//   x [rows, K]; norm [K], the norm's weight, or null; weight [N, K], or [2 N, K] where gated; bias, one a row of weight,
//   or null; residual [rows, N], or null; y [rows, N]
IVC_API cudaError_t ivcFusedLinear(const IvcLinear* product, const void* x, const void* norm, const void* weight,
    const void* bias, const void* residual, void* y, cudaStream_t stream);

// The same over weights in 4 bits, by tensor cores: cudaErrorNotSupported before SM 80. Products are of exact weights;
// normed rows are rounded to the tensors' type.
IVC_API cudaError_t ivcFusedInt4(const IvcLinear* product, const IvcPacked* weight, const void* x, const void* norm,
    const void* bias, const void* residual, void* y, cudaStream_t stream);

// Weights in 4 bits as values of the product's type, [N, K], or [2 N, K] where gated, at a multiple of 16 bytes.
IVC_API cudaError_t ivcUnpack(
    const IvcLinear* product, const IvcPacked* packed, void* weight, cudaStream_t stream);

// y = n(x) alone, [rows, K]: what a product of more rows is given.
IVC_API cudaError_t ivcNormRows(
    const IvcLinear* product, const void* x, const void* norm, void* y, cudaStream_t stream);

// y = f(x + b) + r alone: what is done with a product of more rows. x [rows, N], which may be y, or [rows, 2 N].
IVC_API cudaError_t ivcActivate(const IvcLinear* product, const void* x, const void* bias, const void* residual,
    void* y, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
