// The current CUDA device as a Gpu.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "gpu.h"

namespace ivc {

void checkCuda(cudaError_t status);

std::string computeCapability();  // of the current device, such as "8.7"; throws where there is none

class CudaGpu : public Gpu {
   public:
    CudaGpu();
    ~CudaGpu() override;
    CudaGpu(const CudaGpu&) = delete;
    CudaGpu& operator=(const CudaGpu&) = delete;

    cudaStream_t stream() const { return stream_; }

    void* allocate(size_t size) override;
    void free(void* address) noexcept override;
    void write(void* to, size_t size, const Fill& fill) override;
    void download(void* to, const void* from, size_t size) override;
    void copy(void* to, const void* from, size_t size) override;
    void copyBlocks(const Pitched& to, const Pitched& from, size_t size, size_t rows, size_t slices) override;
    void synchronize() override;
    std::function<void()> capture(const std::function<void()>& work) override;

   private:
    void* stage(size_t size);

    static constexpr size_t kStaged = size_t{4} << 20;     // bytes of pinned memory, which nothing else may use
    static constexpr size_t kPiece = size_t{512} << 10;    // that are copied while the next ones are made ready
    static constexpr size_t kAligned = 16;                 // where each begins

    cudaStream_t stream_ = nullptr;
    char* staged_ = nullptr;  // what copies to and from the host pass through: they are asynchronous from there alone
    size_t used_ = 0;         // of it, since the stream was last waited for
};

}  // namespace ivc
