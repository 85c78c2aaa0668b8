// What the current device has.
#pragma once

#include <cuda_runtime_api.h>

namespace ivc {

// Whether it has what the kernels over tiles need.
inline cudaError_t hasTensorCores(bool& has) {
    int device = 0, major = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    has = major >= 8;
    return status;
}

// Whether a kernel may begin before the one before it has ended, also in a captured graph.
inline cudaError_t launchesEarly(bool& early) {
    int device = 0, major = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    early = major >= 9 && CUDART_VERSION >= 12030;
    return status;
}

}  // namespace ivc
