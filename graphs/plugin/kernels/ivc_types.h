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

// Elements between neighbours of a tensor of heads and rows; a row's headDim elements lie side by side. Thereby
// [heads, rows, headDim], [rows, heads * headDim] and a part of a packed projection are all the same to a kernel.
// For float16 and bfloat16 tensors each is a multiple of 8, and addresses are multiples of 16 bytes.
typedef struct {
    int64_t frame;  // encoders alone
    int64_t head;
    int64_t row;
} IvcStrides;

// What becomes of the fresh keys and values of a decoder layer: they are attended to and left where they are, or
// written into the caches as well.
typedef enum { IVC_FRESH_APART = 0, IVC_FRESH_APPENDED = 1 } IvcFresh;

// Extents and attributes of a decoder layer's attention; names as in graphs/README.md.
typedef struct {
    int32_t rows;      // S > 0, the fresh rows
    int32_t capacity;  // P >= 0, the rows of each cache; at least S where fresh rows are appended
    int32_t heads;     // a multiple of kvHeads
    int32_t kvHeads;   // > 0
    int32_t headDim;   // 64 or 128
    float scale;       // of the products of queries and keys
    IvcType type;      // of all tensors; products are summed and the softmax is taken in float32
    IvcFresh fresh;
    IvcStrides q, k, v;
} IvcAttention;

// Extents and attributes of an encoder layer's attention.
typedef struct {
    int32_t frames;   // > 0
    int32_t heads;    // > 0
    int32_t rows;     // > 0, of a frame; with windows, its places
    int32_t headDim;  // 64, 72, 80 or 128
    float scale;
    IvcType type;
    int32_t blockSize;  // > 0: windows as in graphs/ops/WindowAttention.onnxtxt; 0: a row sees all rows of its frame
    IvcStrides q, k, v;
} IvcEncoder;

// Rows in which one product has put the heads of query, key and value side by side, as it gives them.
typedef enum {
    IVC_HEADS_APART = 0,    // all queries, all keys, all values
    IVC_HEADS_GROUPED = 1,  // by key-value head: its queries, its key, its value
} IvcHeads;

// Extents of such rows [rows, (heads + 2 kvHeads) headDim], and attributes of what is done with them.
typedef struct {
    int32_t rows;       // > 0
    int32_t angleRows;  // of cosines and sines, which rows take in turn: rows is a multiple of it
    int32_t heads;      // a multiple of kvHeads
    int32_t kvHeads;    // > 0
    int32_t headDim;    // a multiple of 8, up to 128; 16, 32, 64 or 128 where heads are normed
    IvcHeads order;
    IvcType type;
    float epsilon;     // of the norms of heads
    int32_t capacity;  // P, of attention: the rows of each cache
    float scale;       // of attention
    int32_t byHead;    // of what ivcTurnHeads writes, 1: by frame of angleRows rows, then by head; 0: row by row
} IvcJoined;

// Rows of joined heads, and what turns and norms them.
typedef struct {
    const void* rows;                 // [rows, (heads + 2 kvHeads) headDim]
    const float *cos, *sin;           // [angleRows, headDim / 2]; null: nothing is turned
    const void *queryNorm, *keyNorm;  // weights [headDim] of an RMS norm of each head; null: none
} IvcJoinedRows;

// Extents of a decode step's beginning and end.
typedef struct {
    int32_t axes;    // > 0, of rotary positions
    int32_t pairs;   // > 0, of elements that are turned
    int32_t hidden;  // > 0, of a row of embeddings
    int32_t vocab;   // > 0, up to 2^24
    IvcType type;    // of embeddings, and of logits before they are told
} IvcStep;

// Numbers of scratch memory that ivcGiveAnswer needs.
#define IVC_ANSWER_SCRATCH 193

// What is taken of a product: itself, x sigmoid(slope x), or GELU by the error function or its approximation by tanh.
typedef enum { IVC_NO_ACTIVATION = 0, IVC_SWISH = 1, IVC_GELU = 2, IVC_GELU_TANH = 3 } IvcActivation;

// Extents and attributes of a product with what surrounds it.
typedef struct {
    int32_t rows;      // > 0, of x and y
    int32_t features;  // K > 0, of a row of x
    int32_t out;       // N > 0, of a row of y
    IvcType type;      // of all tensors; all arithmetic is in float32
    IvcActivation activation;
    int32_t gated;  // 1: y is f(gate) * up, of weights [2 N, K], the rows of gates first
    float slope;    // of IVC_SWISH
    float scale;    // of the product, before its bias is added
    float epsilon;  // of the norm
} IvcLinear;

// Weights in 4 bits of such a product, W = (stored - zero point) scale, as graphs/ops/LinearNBitsZeroPoints.onnxtxt has
// them; blocks are ceil(K / blockSize), and what lies behind a row's K values has no effect. The product's type is
// float16 or bfloat16.
typedef struct {
    const void* values;      // uint8 [N, blocks, blockSize / 2], or [2 N, ..] where gated, the low half of a byte first,
                             // at a multiple of 16 bytes, or of 8 in blocks of 16
    const void* scales;      // of the product's type, one a block
    const void* zeroPoints;  // uint8 [N, ceil(blocks / 2)], or [2 N, ..], the same way; null: all are 8
    int32_t blockSize;       // weights that share a scale: 16, 32, 64, 128 or 256
} IvcPacked;

// Rows that ivcFusedInt4 reads weights once for.
#define IVC_FEW_ROWS 8

// Tensors that one launch takes; more need one launch for each so many.
#define IVC_ROWS_PER_LAUNCH 128

#ifdef __cplusplus
}
#endif
