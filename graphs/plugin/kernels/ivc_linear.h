// Fused products of few or many rows, for the operators of both runtimes. Plain C.
//
// As in ivc_kernels.h, the functions do not synchronise or allocate device memory, and all calls can be captured.
// cuBLASLt is loaded at the first product of many rows: the library that the process has loaded already, or else an
// installed one.
#pragma once

#include "ivc_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of scratch memory that ivcLinear needs. The size follows from the extents and the kind of norm. The memory need
// not be cleared.
// normed: whether the product has a norm.
IVC_API size_t ivcLinearWorkspace(const IvcLinear* product, int32_t normed);

// Like ivcFusedLinear, which it calls for few rows. For more rows, cuBLASLt multiplies, and our kernels do what
// cuBLASLt has no epilogue for. Rows of any number may have a layer norm. Rows that are normalised before they are
// multiplied, and products before activations that cuBLASLt does not have, are rounded to the tensors' type.
IVC_API cudaError_t ivcLinear(const IvcLinear* product, const void* x, const void* norm, const void* weight,
    const void* bias, const void* residual, void* y, void* workspace, cudaStream_t stream);

// As ivcLinearWorkspace, for ivcLinearPacked.
IVC_API size_t ivcLinearPackedWorkspace(const IvcLinear* product, int32_t normed);

// Like ivcFusedPacked, which it calls for few rows. For more rows, it unpacks the weights into the workspace, and
// continues as ivcLinear does.
IVC_API cudaError_t ivcLinearPacked(const IvcLinear* product, const IvcPacked* weight, const void* x, const void* norm,
    const void* bias, const void* residual, void* y, void* workspace, cudaStream_t stream);

// Bytes of workspace that ivcMatMul needs.
#define IVC_MATMUL_WORKSPACE ((size_t)32 << 20)

// y = f(scale x W^T + b) + r by cuBLASLt. f is GELU by tanh, or nothing; with an r it is nothing.
//   workspace: IVC_MATMUL_WORKSPACE bytes
// Returns cudaErrorInvalidValue for impossible extents, for gates and for other activations;
// cudaErrorSharedObjectInitFailed if there is no cuBLASLt; cudaErrorNotSupported if it has no algorithm for the product.
IVC_API cudaError_t ivcMatMul(const IvcLinear* product, const void* x, const void* weight, const void* bias,
    const void* residual, void* y, void* workspace, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
