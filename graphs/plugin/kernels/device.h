// Properties of the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace ivc {

// The first number of its compute capability.
inline cudaError_t majorCapability(int& major) {
    int device = 0;
    const cudaError_t status = cudaGetDevice(&device);
    return status ? status : cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
}

// Whether it has the tensor cores that kernels over tiles need.
inline cudaError_t hasTensorCores(bool& has) {
    int major = 0;
    const cudaError_t status = majorCapability(major);
    has = major >= 8;
    return status;
}

// The number of its streaming multiprocessors.
inline cudaError_t countProcessors(int& count) {
    int device = 0;
    const cudaError_t status = cudaGetDevice(&device);
    return status ? status : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// Whether a kernel can start before the previous one has ended, also in a captured graph.
inline cudaError_t launchesEarly(bool& early) {
    int major = 0;
    const cudaError_t status = majorCapability(major);
    early = major >= 9 && CUDART_VERSION >= 12030;
    return status;
}

// Bytes of shared memory of a multiprocessor, if kernels can start early, else 0.
inline cudaError_t findEarlyShared(int& bytes) {
    bool early = false;
    bytes = 0;
    int device = 0;
    cudaError_t status = launchesEarly(early);
    if (status || !early) return status;
    status = cudaGetDevice(&device);
    return status ? status : cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
}

#ifdef __CUDACC__

// Allows a kernel to use more shared memory than the default limit.
template <class Kernel>
cudaError_t allowShared(Kernel kernel, int bytes) {
    if (bytes <= 48 * 1024) return cudaSuccess;
    return cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Launches a kernel that calls awaitKernelBefore (or awaitKernelBeforeNext). What it does before this call overlaps the
// kernels before it, if the device allows it. shared: bytes of dynamic shared memory.
template <class Arguments>
cudaError_t launchEarly(
    void (*kernel)(Arguments), dim3 grid, int threads, cudaStream_t stream, const Arguments& arguments, int shared = 0) {
    bool early = false;
    const cudaError_t known = launchesEarly(early);
    if (known != cudaSuccess) return known;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments);
}

#endif

}  // namespace ivc
