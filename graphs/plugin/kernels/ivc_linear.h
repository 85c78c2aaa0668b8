// Products with what surrounds them, of few rows or many: what the operators of both runtimes call. Plain C.
//
// As in ivc_kernels.h, nothing here synchronises or allocates device memory, and all calls can be captured. cuBLASLt is
// loaded at the first product of many rows: that of the process, or one that is installed.
#pragma once

#include "ivc_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of scratch memory that ivcLinear needs, from extents alone. It need not be cleared. normed: whether it norms.
IVC_API size_t ivcLinearWorkspace(const IvcLinear* product, int32_t normed);

// As ivcFusedLinear, which it calls for few rows; for more, cuBLASLt multiplies, between kernels of ours where it has no
// epilogue. It rounds normed rows, and products before activations that it does not know, to the tensors' type.
IVC_API cudaError_t ivcLinear(const IvcLinear* product, const void* x, const void* norm, const void* weight,
    const void* bias, const void* residual, void* y, void* workspace, cudaStream_t stream);

// Bytes of scratch memory that ivcLinearInt4 needs, likewise.
IVC_API size_t ivcLinearInt4Workspace(const IvcLinear* product, int32_t normed);

// As ivcFusedInt4, which it calls for few rows; for more, weights become values in the workspace, and it goes on as
// ivcLinear does.
IVC_API cudaError_t ivcLinearInt4(const IvcLinear* product, const IvcPacked* weight, const void* x, const void* norm,
    const void* bias, const void* residual, void* y, void* workspace, cudaStream_t stream);

// Of workspace, what ivcMatMul takes.
#define IVC_MATMUL_WORKSPACE ((size_t)32 << 20)

// y = f(scale x W^T + b) + r by cuBLASLt, f being GELU by tanh, or nothing; nothing where there is an r.
//   workspace: IVC_MATMUL_WORKSPACE bytes
// Returns cudaErrorInvalidValue for extents that cannot be and for gates and other activations,
// cudaErrorSharedObjectInitFailed where there is no cuBLASLt, cudaErrorNotSupported where it has no way to such a product.
IVC_API cudaError_t ivcMatMul(const IvcLinear* product, const void* x, const void* weight, const void* bias,
    const void* residual, void* y, void* workspace, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
