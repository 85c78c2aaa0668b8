// Encoder attention for SM 90 alone: its code holds instructions of architecture 90a, which no later one has. CMakeLists
// defines IVC_SM_90A where it compiles this file for 90a.
#ifdef IVC_SM_90A

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attend_launch.h"

namespace ivc {

namespace {

struct Groups {
    cudaStream_t stream;

    template <class Value, Sight kSight, class S>
    cudaError_t tiles(const Attend& a) const {
        static_assert(S::kSharedBytes <= 227 * 1024, "more shared memory than SM 90 has");
        return launchTiles<Value, kSight, S>(a, stream);
    }
};

}  // namespace

cudaError_t attendInGroups(const IvcEncoder& c, const Attend& a, cudaStream_t stream) {
    return launchGroups<__half, __nv_bfloat16>(c, a, Groups{stream});
}

}  // namespace ivc

#endif
