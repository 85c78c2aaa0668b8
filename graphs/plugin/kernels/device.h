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

}  // namespace ivc
