#include "ivc_linear.h"
#include "linear_extents.h"

namespace {

constexpr int32_t kFewRows = 2;  // up to which our kernels are faster than cuBLASLt

// Up to how many rows our kernels multiply: cuBLASLt gets no wide y, which is for few rows.
int32_t fewRows(const IvcLinear& c) { return c.wide ? INT32_MAX : kFewRows; }

// Bytes of rows of a width, rounded up so that what follows is aligned.
size_t bytesOf(const IvcLinear& c, size_t width) {
    const size_t bytes = static_cast<size_t>(c.rows) * width * (c.type == IVC_FLOAT32 ? 4 : 2);
    return (bytes + 255) / 256 * 256;
}

// Bytes of normalised rows, if a launch of its own normalises them: kernels for up to `few` rows have RMS norms in them.
size_t normedBytes(const IvcLinear& c, bool normed, int32_t few) {
    return normed && (c.rows > few || c.layerNorm) ? bytesOf(c, static_cast<size_t>(c.features)) : 0;
}

bool empty(const IvcLinear& c) { return c.rows <= 0 || c.features <= 0 || c.out <= 0; }

// What follows the norm in ivcLinear.
cudaError_t multiply(const IvcLinear& c, const void* x, const void* weight, const void* bias, const void* residual,
    void* y, char* workspace, cudaStream_t stream) {
    if (ivc::inEpilogue(c, residual)) return ivcMatMul(&c, x, weight, bias, residual, y, workspace, stream);
    IvcLinear plain = c;
    plain.activation = IVC_NO_ACTIVATION;
    plain.gated = 0;
    if (c.gated) plain.out *= 2;
    void* const product = c.gated ? workspace + IVC_MATMUL_WORKSPACE : y;
    const cudaError_t multiplied = ivcMatMul(&plain, x, weight, nullptr, nullptr, product, workspace, stream);
    return multiplied ? multiplied : ivcActivate(&c, product, bias, residual, y, stream);
}

}  // namespace

size_t ivcLinearWorkspace(const IvcLinear* c, int32_t normed) {
    if (empty(*c)) return 0;
    const size_t rows = normedBytes(*c, normed, fewRows(*c));
    if (c->rows <= fewRows(*c)) return rows;
    return rows + IVC_MATMUL_WORKSPACE + (c->gated ? bytesOf(*c, 2 * static_cast<size_t>(c->out)) : 0);
}

cudaError_t ivcLinear(const IvcLinear* c, const void* x, const void* norm, const void* weight, const void* bias,
    const void* residual, void* y, void* workspace, cudaStream_t stream) {
    char* free = static_cast<char*>(workspace);
    if (const size_t bytes = empty(*c) ? 0 : normedBytes(*c, norm, fewRows(*c))) {
        const cudaError_t normed = ivcNormRows(c, x, norm, free, stream);
        if (normed) return normed;
        x = free;
        norm = nullptr;
        free += bytes;
    }
    if (c->rows <= fewRows(*c)) return ivcFusedLinear(c, x, norm, weight, bias, residual, y, stream);
    return multiply(*c, x, weight, bias, residual, y, free, stream);
}

size_t ivcLinearPackedWorkspace(const IvcLinear* c, int32_t normed) {
    if (empty(*c)) return 0;
    if (c->rows <= IVC_FEW_ROWS) return normedBytes(*c, normed, IVC_FEW_ROWS);
    const size_t weights = static_cast<size_t>(c->gated ? 2 : 1) * static_cast<size_t>(c->out);
    return ivcLinearWorkspace(c, normed) + 2 * weights * static_cast<size_t>(c->features);
}

cudaError_t ivcLinearPacked(const IvcLinear* c, const IvcPacked* w, const void* x, const void* norm, const void* bias,
    const void* residual, void* y, void* workspace, cudaStream_t stream) {
    if (c->rows > IVC_FEW_ROWS) {
        void* const weight = static_cast<char*>(workspace) + ivcLinearWorkspace(c, norm != nullptr);
        const cudaError_t unpacked = ivcUnpack(c, w, weight, stream);
        return unpacked ? unpacked : ivcLinear(c, x, norm, weight, bias, residual, y, workspace, stream);
    }
    if (norm && c->layerNorm) {
        const cudaError_t normed = ivcNormRows(c, x, norm, workspace, stream);
        if (normed) return normed;
        x = workspace;
        norm = nullptr;
    }
    return ivcFusedPacked(c, w, x, norm, bias, residual, y, stream);
}
