// What the host calls beside onnxruntime, on the stream on which all sessions of a model run.
#pragma once

#include <cuda_runtime_api.h>

#include "../kernels/ivc_kernels.h"

// Whether a CUDA call failed. If so, its error is taken here, else the next launch of a kernel would report it.
static bool failed(cudaError_t status) {
    if (status) cudaGetLastError();
    return status != cudaSuccess;
}

// Memory that host and device both read and write, or null; and the function that frees it.
extern "C" IVC_API void* ivcSharedMemory(size_t bytes) {
    void* memory = nullptr;
    return failed(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped)) ? nullptr : memory;
}
extern "C" IVC_API void ivcFreeSharedMemory(void* memory) { cudaFreeHost(memory); }

// A stream on which all sessions of a model run, so that the host need not wait between them, or null; and the functions
// that wait for all that it was given, and tell whether all has succeeded, and that free it.
extern "C" IVC_API void* ivcStream() {
    cudaStream_t stream = nullptr;
    return failed(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)) ? nullptr : stream;
}
extern "C" IVC_API int ivcAwaitStream(void* stream) {
    return !failed(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}
extern "C" IVC_API void ivcFreeStream(void* stream) { cudaStreamDestroy(static_cast<cudaStream_t>(stream)); }

// Copies bytes in the order of the stream, from or to memory that host and device share. Whether CUDA has taken it.
extern "C" IVC_API int ivcCopy(void* stream, void* to, const void* from, size_t bytes) {
    return !failed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
}

// Writes rows `index`, int32 [count], of a table [rows, rowBytes] to y [count, rowBytes]. Whether CUDA has taken it.
extern "C" IVC_API int ivcTakeRows(void* stream, const void* table, int32_t rows, int32_t rowBytes, const void* index,
    int32_t count, void* y) {
    const IvcRows one{table, y, 1, rowBytes};
    return !failed(ivcCompactGather(
        &one, 1, rows, static_cast<const int32_t*>(index), count, static_cast<cudaStream_t>(stream)));
}

// Normalises pixels as ivcScalePixels does. Whether CUDA has taken it.
extern "C" IVC_API int ivcMakePixels(void* stream, const IvcPixels* extents, const void* levels, void* pixels) {
    return !failed(ivcScalePixels(extents, static_cast<const uint8_t*>(levels), static_cast<float*>(pixels),
        static_cast<cudaStream_t>(stream)));
}

// A mark behind what the stream was given so far, or null; and the seconds between two marks, or a negative number. It waits
// until the stream has reached the second.
extern "C" IVC_API void* ivcMark(void* stream) {
    cudaEvent_t mark = nullptr;
    if (failed(cudaEventCreateWithFlags(&mark, cudaEventDefault))) return nullptr;
    if (!failed(cudaEventRecord(mark, static_cast<cudaStream_t>(stream)))) return mark;
    cudaEventDestroy(mark);
    return nullptr;
}
// Moves a mark behind all that the stream was given since. Whether CUDA has taken it.
extern "C" IVC_API int ivcMoveMark(void* mark, void* stream) {
    return !failed(cudaEventRecord(static_cast<cudaEvent_t>(mark), static_cast<cudaStream_t>(stream)));
}
// Waits until the device has done all that is before a mark, and tells whether all has succeeded.
extern "C" IVC_API int ivcAwaitMark(void* mark) {
    return !failed(cudaEventSynchronize(static_cast<cudaEvent_t>(mark)));
}
extern "C" IVC_API double ivcSeconds(void* from, void* to) {
    const auto start = static_cast<cudaEvent_t>(from), end = static_cast<cudaEvent_t>(to);
    float milliseconds = 0;
    if (failed(cudaEventSynchronize(end)) || failed(cudaEventElapsedTime(&milliseconds, start, end))) return -1;
    return 1e-3 * static_cast<double>(milliseconds);
}
extern "C" IVC_API void ivcFreeMark(void* mark) { cudaEventDestroy(static_cast<cudaEvent_t>(mark)); }
