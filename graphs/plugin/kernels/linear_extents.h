// Which products there are, whatever computes them.
#pragma once

#include "ivc_types.h"

namespace ivc {

inline bool possible(const IvcLinear& c) {
    return c.rows > 0 && c.rows <= 8 * 65535 && c.features > 0 && c.features <= INT32_MAX / 2 && c.out > 0 &&
           c.out <= INT32_MAX / 2 && c.activation >= IVC_NO_ACTIVATION && c.activation <= IVC_GELU_TANH;
}

// Whether one launch does all that is before a product: layer norms have a launch of their own.
inline bool possible(const IvcLinear& c, const void* norm) { return possible(c) && !(norm && c.layerNorm); }

// Whether cuBLASLt does all that is behind a product.
inline bool inEpilogue(const IvcLinear& c, const void* residual) {
    return !c.gated && (c.activation == IVC_NO_ACTIVATION || (c.activation == IVC_GELU_TANH && !residual));
}

}  // namespace ivc
