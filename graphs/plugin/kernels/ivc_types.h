// What the kernels' calls are told about tensors; needs no CUDA.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { IVC_FLOAT32 = 0, IVC_FLOAT16 = 1, IVC_BFLOAT16 = 2 } IvcType;

// What a vote's softmax runs over: the visual tokens, or every row of the run.
typedef enum { IVC_SOFTMAX_VISUAL = 0, IVC_SOFTMAX_ALL = 1 } IvcSoftmax;

// Extents and attributes of one SelectTokens call; names as in graphs/README.md.
typedef struct {
    int32_t kvHeads;      // > 0
    int32_t rows;         // S: L + T
    int32_t headDim;      // D > 0
    int32_t visual;       // L > 0
    int32_t text;         // T >= 0
    int32_t queries;      // Q > 0
    int32_t keepCount;    // 1..L
    int32_t seedDivisor;  // > 0, even: the number of seeds is max(1, round(L / seedDivisor)), half to even
    IvcType type;         // of the values; all arithmetic is in float32
    IvcSoftmax softmax;
} IvcSelection;

// A tensor as [outer, rows, rowBytes], of which rows are copied to another [outer, rows, rowBytes]. The extents of
// both row axes are the call's. Source and target do not overlap.
typedef struct {
    const void* source;
    void* target;
    int32_t outer;     // product of the axes before the row axis
    int32_t rowBytes;  // product of the axes behind it, times the element's size
} IvcRows;

// Tensors that one launch takes; more need one launch for each so many.
#define IVC_ROWS_PER_LAUNCH 128

#ifdef __cplusplus
}
#endif
