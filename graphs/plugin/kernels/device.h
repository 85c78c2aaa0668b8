// Properties of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <tuple>

#include "remembered.h"

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

// The bytes of shared memory that a block of a cluster may have, or 0 where there are no clusters.
inline cudaError_t sharedOfClusters(int& bytes) {
    int device = 0, major = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (!status) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!status) status = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (major < 9) bytes = 0;
    return status;
}

#ifdef __CUDACC__

// Allows a kernel to use more shared memory than the default limit.
template <class Kernel>
cudaError_t allowShared(Kernel kernel, int bytes) {
    if (bytes <= 48 * 1024) return cudaSuccess;
    return cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Whether the current device can run a kernel in clusters of so many blocks. A part of a GPU (MIG) may have too few
// multiprocessors for that, and code for an older device has no clusters.
template <class Arguments>
bool runsInClusters(void (*kernel)(Arguments), int blocks, int threads, int shared) {
    using Key = std::tuple<int, const void*, int, int>;
    static Remembered<Key, bool, 64> known;
    const void* function = reinterpret_cast<const void*>(kernel);
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    return known.get(Key{device, function, blocks, shared}, [&] {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = static_cast<size_t>(shared);
        config.attrs = &attribute;
        config.numAttrs = 1;
        cudaFuncAttributes compiled{};
        int clusters = 0;
        if (cudaFuncGetAttributes(&compiled, function) == cudaSuccess && compiled.ptxVersion >= 90 &&
            cudaOccupancyMaxActiveClusters(&clusters, function, &config) == cudaSuccess) {
            return clusters > 0;
        }
        cudaGetLastError();  // the other kernel is launched instead
        return false;
    });
}

// Launches a kernel that calls awaitKernelBefore (or awaitKernelBeforeNext). What it does before this call overlaps the
// kernels before it, if the device allows it. shared: bytes of dynamic shared memory. cluster: blocks of the grid's x
// that form a cluster.
template <class Arguments>
cudaError_t launchEarly(
    void (*kernel)(Arguments), dim3 grid, int threads, cudaStream_t stream, const Arguments& arguments, int shared = 0,
    int cluster = 1) {
    bool early = false;
    const cudaError_t known = launchesEarly(early);
    if (known != cudaSuccess) return known;
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (early) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    return cudaLaunchKernelEx(&config, kernel, arguments);
}

#endif

}  // namespace ivc
