#include "cuda.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <memory>
#include <utility>

#include "ivc/error.h"

namespace ivc {

void checkCuda(cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // else the next call would report it, too
    if (status == cudaErrorMemoryAllocation) {
        throw Error("the GPU has no memory left: close other programs, or build engines with smaller maxima");
    }
    throw Error(std::string("CUDA says: ") + cudaGetErrorString(status) + "; check that the GPU and its driver work, and that the GPU is free");
}

std::string computeCapability() {
    int devices = 0, device = 0, major = 0, minor = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        cudaGetLastError();
        throw Error("there is no GPU that CUDA can use: check that its driver works, or run the graphs on onnxruntime");
    }
    checkCuda(cudaGetDevice(&device));
    checkCuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    checkCuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return std::to_string(major) + "." + std::to_string(minor);
}

CudaGpu::CudaGpu() {
    checkCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    void* found = nullptr;
    const cudaError_t status = cudaMallocHost(&found, kStaged);
    if (status != cudaSuccess) cudaStreamDestroy(stream_);
    checkCuda(status);
    staged_ = static_cast<char*>(found);
}

CudaGpu::~CudaGpu() {
    cudaStreamSynchronize(stream_);
    cudaFreeHost(staged_);
    cudaStreamDestroy(stream_);
}

// Pinned memory that a copy on the stream may use until it has run. size: at most kStaged.
void* CudaGpu::stage(size_t size) {
    size = (size + kAligned - 1) / kAligned * kAligned;
    if (size > kStaged - used_) synchronize();
    return staged_ + std::exchange(used_, used_ + size);
}

void* CudaGpu::allocate(size_t size) {
    void* address = nullptr;
    checkCuda(cudaMalloc(&address, size));
    const cudaError_t cleared = cudaMemsetAsync(address, 0, size, stream_);
    if (cleared != cudaSuccess) cudaFree(address);
    checkCuda(cleared);
    return address;
}

void CudaGpu::free(void* address) noexcept {
    cudaStreamSynchronize(stream_);
    cudaFree(address);
}

void CudaGpu::write(void* to, size_t size, const Fill& fill) {
    for (size_t at = 0; at < size; at += kPiece) {
        const size_t some = std::min(size - at, kPiece);
        void* const staged = stage(some);
        fill(staged, at, some);
        checkCuda(cudaMemcpyAsync(static_cast<char*>(to) + at, staged, some, cudaMemcpyHostToDevice, stream_));
    }
}

void CudaGpu::download(void* to, const void* from, size_t size) {
    for (size_t at = 0; at < size; at += kStaged) {
        const size_t some = std::min(size - at, kStaged);
        void* const staged = stage(some);
        checkCuda(cudaMemcpyAsync(staged, static_cast<const char*>(from) + at, some, cudaMemcpyDeviceToHost, stream_));
        synchronize();
        std::memcpy(static_cast<char*>(to) + at, staged, some);
    }
}

void CudaGpu::copy(void* to, const void* from, size_t size) {
    checkCuda(cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream_));
}

void CudaGpu::copyBlocks(const Pitched& to, const Pitched& from, size_t size, size_t rows, size_t slices) {
    if (size == 0 || rows == 0 || slices == 0) return;
    if (to.pitch > INT_MAX || from.pitch > INT_MAX) {  // more than a copy of blocks takes
        for (size_t i = 0; i < slices * rows; ++i) {
            const size_t slice = i / rows, row = i % rows;
            copy(static_cast<char*>(to.address) + (slice * to.height + row) * to.pitch + to.start,
                static_cast<const char*>(from.address) + (slice * from.height + row) * from.pitch + from.start, size);
        }
        return;
    }
    cudaMemcpy3DParms blocks{};
    blocks.dstPtr = {to.address, to.pitch, to.pitch, to.height};
    blocks.dstPos = {to.start, 0, 0};
    blocks.srcPtr = {from.address, from.pitch, from.pitch, from.height};
    blocks.srcPos = {from.start, 0, 0};
    blocks.extent = {size, rows, slices};
    blocks.kind = cudaMemcpyDeviceToDevice;
    checkCuda(cudaMemcpy3DAsync(&blocks, stream_));
}

void CudaGpu::synchronize() {
    checkCuda(cudaStreamSynchronize(stream_));
    used_ = 0;
}

std::function<void()> CudaGpu::capture(const std::function<void()>& work) {
    cudaGraph_t graph = nullptr;
    checkCuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    bool whole = true;
    try {
        work();
    } catch (...) {  // what cannot be captured; the capture has to be ended all the same
        whole = false;
    }
    whole = cudaStreamEndCapture(stream_, &graph) == cudaSuccess && whole;
    cudaGraphExec_t runnable = nullptr;
    if (whole) {
#if CUDART_VERSION >= 12000
        whole = cudaGraphInstantiate(&runnable, graph, 0) == cudaSuccess;
#else
        whole = cudaGraphInstantiate(&runnable, graph, nullptr, nullptr, 0) == cudaSuccess;
#endif
    }
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();
    if (!whole) return {};
    const std::shared_ptr<CUgraphExec_st> owned(runnable, [](cudaGraphExec_t exec) { cudaGraphExecDestroy(exec); });
    return [owned, stream = stream_] { checkCuda(cudaGraphLaunch(owned.get(), stream)); };
}

}  // namespace ivc
