// Structures that describe tensors to the functions of the kernels. This header needs no CUDA.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { IVC_FLOAT32 = 0, IVC_FLOAT16 = 1, IVC_BFLOAT16 = 2 } IvcType;

// The keys that the softmax of a vote runs over: the visual tokens, or all rows of the run.
typedef enum { IVC_SOFTMAX_VISUAL = 0, IVC_SOFTMAX_ALL = 1 } IvcSoftmax;

// Extents and attributes of one call of SelectTokens. graphs/README.md explains the names.
typedef struct {
    int32_t kvHeads;      // > 0
    int32_t rows;         // S: L + T
    int32_t headDim;      // D > 0
    int32_t visual;       // L > 0
    int32_t text;         // T >= 0
    int32_t queries;      // Q > 0
    int32_t keepCount;    // 1..L
    int32_t seedDivisor;  // > 0, even: the number of seeds is max(1, round(L / seedDivisor)), half to even
    IvcType type;         // type of the values; all arithmetic is in float32
    IvcSoftmax softmax;
} IvcSelection;

// A source and a target tensor of the shape [outer, rows, rowBytes]. Rows are copied from one to the other. The call
// gives both numbers of rows. Source and target must not overlap.
typedef struct {
    const void* source;
    void* target;
    int32_t outer;     // product of the axes before the row axis
    int32_t rowBytes;  // product of the axes after the row axis, times the element size
} IvcRows;

// Strides, in elements, of a tensor of heads and rows. The headDim elements of a row are contiguous. By its strides, a
// kernel reads [heads, rows, headDim], [rows, heads * headDim] and a part of a packed projection in the same way. For
// float16 and bfloat16, each stride is a multiple of 8, and addresses are multiples of 16 bytes.
typedef struct {
    int64_t frame;  // for encoders only
    int64_t head;
    int64_t row;
} IvcStrides;

// What happens to the fresh keys and values of a decoder layer. Attention reads them in both cases. If they are
// appended, they are also written into the caches.
typedef enum { IVC_FRESH_APART = 0, IVC_FRESH_APPENDED = 1 } IvcFresh;

// Extents and attributes of the attention of a decoder layer. graphs/README.md explains the names.
typedef struct {
    int32_t rows;      // S > 0, the fresh rows
    int32_t capacity;  // P >= 0, the rows of each cache; at least S if fresh rows are appended
    int32_t heads;     // a multiple of kvHeads
    int32_t kvHeads;   // > 0
    int32_t headDim;   // 64 or 128
    float scale;       // factor of the products of queries and keys
    IvcType type;      // of all tensors; sums of products and the softmax are in float32
    IvcFresh fresh;
    IvcStrides q, k, v;
} IvcAttention;

// Extents and attributes of the attention of an encoder layer.
typedef struct {
    int32_t frames;   // > 0
    int32_t heads;    // > 0
    int32_t rows;     // > 0, rows of a frame; with windows, its places
    int32_t headDim;  // 64, 72, 80 or 128
    float scale;
    IvcType type;
    int32_t blockSize;  // > 0: windows as in graphs/ops/WindowAttention.onnxtxt; 0: a row attends to its frame
    IvcStrides q, k, v;
} IvcEncoder;

// The order of heads in joined rows, in which one product gives query, key and value.
typedef enum {
    IVC_HEADS_APART = 0,    // all queries, then all keys, then all values
    IVC_HEADS_GROUPED = 1,  // for each key-value head: its queries, its key, its value
} IvcHeads;

// Extents of joined rows [rows, (heads + 2 kvHeads) headDim], and attributes of the operations on them.
typedef struct {
    int32_t rows;       // > 0
    int32_t angleRows;  // rows of cosines and sines, which divides rows; row r uses r % angleRows
    int32_t heads;      // a multiple of kvHeads
    int32_t kvHeads;    // > 0
    int32_t headDim;    // a multiple of 8, up to 128; 16, 32, 64 or 128 if heads are normalised
    IvcHeads order;
    IvcType type;
    float epsilon;     // of the norms of heads
    int32_t capacity;  // P, the rows of each cache, for attention
    float scale;       // factor of the products of queries and keys, for attention
    int32_t byHead;    // layout that ivcTurnHeads writes, 1: by frame of angleRows rows, then by head; 0: row by row
} IvcJoined;

// Joined rows, with the angles that rotate heads and the weights that normalise them.
typedef struct {
    const void* rows;                 // [rows, (heads + 2 kvHeads) headDim]
    const float *cos, *sin;           // [angleRows, headDim / 2], at multiples of 16 bytes; null: no rotation
    const void *queryNorm, *keyNorm;  // weights [headDim] of an RMS norm of each head; null: no norm
} IvcJoinedRows;

// Extents of the first and the last kernel of a decode step.
typedef struct {
    int32_t axes;    // > 0, axes of rotary positions
    int32_t pairs;   // > 0, pairs of elements that are rotated
    int32_t hidden;  // > 0, elements of a row of embeddings
    int32_t vocab;   // > 0, up to 2^24
    IvcType type;    // of embeddings, and of the logits that the model gives
    float scale;     // factor of a row of embeddings
} IvcStep;

// Levels uint8 [outer, 3, given, inner] of pictures, and how pixels [outer, 3, frames, inner] are made of them.
typedef struct {
    int32_t outer;   // > 0
    int32_t given;   // > 0, frames of the levels
    int32_t frames;  // > 0; a multiple of `given`, whose frames are repeated
    int32_t inner;   // > 0
    float factor;    // of the levels
    float mean[3], std[3];  // of channels
} IvcPixels;

// Size of the scratch memory of ivcGiveAnswer, in int32 numbers.
#define IVC_ANSWER_SCRATCH 385

// The activation after a product: none, x sigmoid(slope x), GELU by the error function, or its approximation by tanh.
typedef enum { IVC_NO_ACTIVATION = 0, IVC_SWISH = 1, IVC_GELU = 2, IVC_GELU_TANH = 3 } IvcActivation;

// Extents and attributes of a fused product: a matrix product with its norm, bias, activation and residual.
typedef struct {
    int32_t rows;      // > 0, rows of x and y
    int32_t features;  // K > 0, elements of a row of x
    int32_t out;       // N > 0, elements of a row of y
    IvcType type;      // of all tensors, but for a wide y; all arithmetic is in float32
    IvcActivation activation;
    int32_t gated;  // 1: y is f(gate) * up; weights are [2 N, K], the rows of gate first
    float slope;    // of IVC_SWISH
    float scale;    // factor of the product, before the bias is added
    float epsilon;  // of the norm
    int32_t layerNorm;  // what `norm` has; 0: the weight [K] of an RMS norm; 1: weight and then bias of a layer norm, [2 K]
    int32_t wide;       // 1: y is float32, and not rounded; for ivcFusedLinear and ivcLinear
} IvcLinear;

// Weights in 4 or 8 bits of such a product: W = (stored - zero point) scale, stored as in
// graphs/ops/LinearNBitsZeroPoints.onnxtxt. A row has ceil(K / blockSize) blocks. What is stored after the K values of
// a row has no effect. The type of the product is float16 or bfloat16.
typedef struct {
    const void* values;      // uint8 [N, blocks, blockSize bits / 8], or [2 N, ..] if gated, the low half of a byte
                             // first, at an address that is a multiple of 16 bytes, or of 8 for blocks of 8 bytes
    const void* scales;      // of the product's type, one for each block
    const void* zeroPoints;  // uint8 [N, ceil(blocks bits / 8)], or [2 N, ..], in the same order; null: all are 8, or
                             // 128 in 8 bits
    int32_t blockSize;       // weights that share a scale: 16, 32, 64, 128 or 256
    int32_t bits;            // of a weight: 4 or 8
} IvcPacked;

// The most rows for which ivcFusedPacked reads each weight once.
#define IVC_FEW_ROWS 8

// The most tensors of one launch. More tensors need more launches.
#define IVC_ROWS_PER_LAUNCH 128

#ifdef __cplusplus
}
#endif
