#include "ivc_linear.h"
#include "linear_extents.h"

namespace {

constexpr int32_t kFewRows = 2;  // up to which our kernels are faster than cuBLASLt

// Bytes of rows of a width, rounded up so that what follows is aligned.
size_t bytesOf(const IvcLinear& c, size_t width) {
    const size_t bytes = static_cast<size_t>(c.rows) * width * (c.type == IVC_FLOAT32 ? 4 : 2);
    return (bytes + 255) / 256 * 256;
}

}  // namespace

size_t ivcLinearWorkspace(const IvcLinear* c, int32_t normed) {
    if (c->rows <= kFewRows || c->features <= 0 || c->out <= 0) return 0;
    return IVC_MATMUL_WORKSPACE + (normed ? bytesOf(*c, static_cast<size_t>(c->features)) : 0) +
           (c->gated ? bytesOf(*c, 2 * static_cast<size_t>(c->out)) : 0);
}

cudaError_t ivcLinear(const IvcLinear* c, const void* x, const void* norm, const void* weight, const void* bias,
    const void* residual, void* y, void* workspace, cudaStream_t stream) {
    if (c->rows <= kFewRows) return ivcFusedLinear(c, x, norm, weight, bias, residual, y, stream);
    char* free = static_cast<char*>(workspace) + IVC_MATMUL_WORKSPACE;
    if (norm) {
        const cudaError_t normed = ivcNormRows(c, x, norm, free, stream);
        if (normed) return normed;
        x = free;
        free += bytesOf(*c, static_cast<size_t>(c->features));
    }
    if (ivc::inEpilogue(*c, residual)) return ivcMatMul(c, x, weight, bias, residual, y, workspace, stream);
    IvcLinear plain = *c;
    plain.activation = IVC_NO_ACTIVATION;
    plain.gated = 0;
    if (c->gated) plain.out *= 2;
    void* const product = c->gated ? free : y;
    const cudaError_t multiplied = ivcMatMul(&plain, x, weight, nullptr, nullptr, product, workspace, stream);
    return multiplied ? multiplied : ivcActivate(c, product, bias, residual, y, stream);
}

size_t ivcLinearInt4Workspace(const IvcLinear* c, int32_t normed) {
    if (c->rows <= IVC_FEW_ROWS || c->features <= 0 || c->out <= 0) return 0;
    const size_t weights = static_cast<size_t>(c->gated ? 2 : 1) * static_cast<size_t>(c->out);
    return ivcLinearWorkspace(c, normed) + 2 * weights * static_cast<size_t>(c->features);
}

cudaError_t ivcLinearInt4(const IvcLinear* c, const IvcPacked* w, const void* x, const void* norm, const void* bias,
    const void* residual, void* y, void* workspace, cudaStream_t stream) {
    if (c->rows <= IVC_FEW_ROWS) return ivcFusedInt4(c, w, x, norm, bias, residual, y, stream);
    void* const weight = static_cast<char*>(workspace) + ivcLinearWorkspace(c, norm != nullptr);
    const cudaError_t unpacked = ivcUnpack(c, w, weight, stream);
    return unpacked ? unpacked : ivcLinear(c, x, norm, weight, bias, residual, y, workspace, stream);
}
