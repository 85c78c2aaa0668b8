// Encoder attention for SM 90 alone: its code holds instructions of architecture 90a, which no later one has. CMakeLists
// defines IVC_SM_90A where it compiles this file for 90a.
#ifdef IVC_SM_90A

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attend_grouped.h"
#include "attend_launch.h"

namespace ivc {

namespace {

template <class Value, class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    attendGroupedKernel(const __grid_constant__ Attend a, const __grid_constant__ AttendMaps maps) {
    extern __shared__ __align__(1024) char groupedTiles[];
    Block block;
    attendGrouped<Value, S>(block, groupedTiles, a, maps, static_cast<int32_t>(blockIdx.x),
        static_cast<int32_t>(blockIdx.y), static_cast<int32_t>(blockIdx.z));
}

// cuTensorMapEncodeTiled of the driver, which this library is not linked with. Null if the driver lacks it.
using MakeMap = decltype(&cuTensorMapEncodeTiled);
MakeMap findMakeMap() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 13000
    const cudaError_t status = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<MakeMap>(found) : nullptr;
}

// The map of tiles of `tileRows` rows.
cudaError_t makeMap(RowMap& map, const Attend& a, const void* start, const IvcStrides& stride, int tileRows) {
    static const MakeMap make = findMakeMap();
    if (!make) return cudaErrorNotSupported;
    const auto bytes = [](int64_t elements) { return static_cast<cuuint64_t>(larger<int64_t>(8, elements)) * 2; };
    const cuuint64_t extents[] = {static_cast<cuuint64_t>(a.headDim), static_cast<cuuint64_t>(a.keys),
        static_cast<cuuint64_t>(a.heads), static_cast<cuuint64_t>(a.frames)};
    const cuuint64_t strides[] = {bytes(stride.row), bytes(stride.head), bytes(stride.frame)};
    const cuuint32_t tile[] = {kPieceBytes / 2, static_cast<cuuint32_t>(tileRows), 1, 1}, steps[] = {1, 1, 1, 1};
    const CUresult made = make(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(start), extents, strides, tile,
        steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct Groups {
    cudaStream_t stream;

    template <class Value, class S>
    cudaError_t grouped(const Attend& a) const {
        static_assert(S::kSharedBytes <= 227 * 1024, "more shared memory than SM 90 has");
        AttendMaps maps{};
        cudaError_t status = makeMap(maps.q, a, a.q, a.qStride, S::kQueries);
        if (status == cudaSuccess) status = makeMap(maps.k, a, a.k, a.kStride, S::kKeys);
        if (status == cudaSuccess) status = makeMap(maps.v, a, a.v, a.vStride, S::kKeys);
        const auto kernel = attendGroupedKernel<Value, S>;
        if (status == cudaSuccess) status = allowShared(kernel, S::kSharedBytes);
        if (status != cudaSuccess) return status;
        const Blocks blocks = blocksOf<Sight::kFrame, S>(a);
        const dim3 grid(
            static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y), static_cast<unsigned>(blocks.z));
        kernel<<<grid, S::kThreads, S::kSharedBytes, stream>>>(a, maps);
        return cudaGetLastError();
    }
};

}  // namespace

cudaError_t attendInGroups(const IvcEncoder& c, const Attend& a, cudaStream_t stream) {
    return launchGroups<__half, __nv_bfloat16>(c, a, Groups{stream});
}

}  // namespace ivc

#endif
