// Encoder attention for SM 90 alone: its code holds instructions of architecture 90a, which no later one has.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attend_launch.h"

namespace ivc {

#ifdef IVC_SM_90A

namespace {

struct Groups {
    cudaStream_t stream;

    template <class Value, Sight kSight, class S>
    cudaError_t tiles(const Attend& a) const {
        static_assert(S::kLeastBlocks * (S::kSharedBytes + 1024) <= 228 * 1024, "more shared memory than SM 90 has");
        return launchTiles<Value, kSight, S>(a, stream);
    }
};

}  // namespace

cudaError_t encodeInGroups(const IvcEncoder& c, const Attend& a, cudaStream_t stream) {
    return launchEncoderTiles<__half, __nv_bfloat16, GroupedPatches>(c, a, Groups{stream});
}

#endif

}  // namespace ivc
