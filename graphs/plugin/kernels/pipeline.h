// A pipeline in one block of threads: one thread starts copies to shared memory, and kGroups groups of four warps
// compute.
//
// The work has steps. The copies of a step go to its stage of shared memory, one of kStages that steps use in turn. A
// stage is copied to as soon as all groups are done with its last step. A group begins a step as soon as its copies are
// complete: groups do not wait for each other.
//
// These are instructions of SM 90. Its tensor memory accelerator copies rows, and barriers in shared memory (mbarrier)
// count bytes and warps. Groups that compute get the registers that the copying group does not need. On a host, steps
// run one after the other. Source: PTX's manual, "Asynchronous Barrier" and "Tensors".
#pragma once

#ifdef __CUDACC__
#include <cuda.h>
#endif

#include "ivc_types.h"
#include "rows.h"
#include "warp_group.h"

namespace ivc {

// A tensor [frames, heads, rows, depth] of 16-bit values, of which tiles of rows are copied.
#ifdef __CUDACC__
using RowMap = CUtensorMap;
#else
struct RowMap {
    const char* start;
    IvcStrides stride;
    int32_t rows, depth;
};
#endif

template <int kGroups, int kStages>
struct Pipeline {
    static constexpr int kWarps = 4 * kGroups;            // that compute
    static constexpr int kThreads = kWarp * (kWarps + 4);  // with the copying group: registers are given to groups
    static constexpr int kBytes = 2 * 8 * kStages;

#ifdef __CUDACC__

    uint32_t barriers;  // in shared memory: kStages that wait for copies, then kStages that wait for computations

    __device__ Pipeline(Block&, char* shared) : barriers(addressOf(shared)) {}

    __device__ __forceinline__ static uint32_t addressOf(const char* shared) {
        return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    }
    __device__ __forceinline__ uint32_t copied(int32_t step) const { return barriers + 8 * (step % kStages); }
    __device__ __forceinline__ uint32_t done(int32_t step) const { return copied(step) + 8 * kStages; }

    __device__ __forceinline__ static void create(uint32_t barrier, int count) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
    }
    // Waits for the end of the barrier's phase for `step`.
    __device__ __forceinline__ static void await(uint32_t barrier, int32_t step) {
        uint32_t over;
        do {
            asm volatile(
                "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                "selp.u32 %0, 1, 0, over;\n}"
                : "=r"(over)
                : "r"(barrier), "r"(step / kStages % 2)
                : "memory");
        } while (!over);
    }

    // Says how many bytes the copies of a step bring. Comes before them.
    __device__ __forceinline__ void expect(int32_t step, int32_t bytes) const {
#ifdef IVC_WARP_GROUPS
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(copied(step)), "r"(bytes) : "memory");
#endif
    }

    // Starts to copy rows of a head of a frame, from `row` on, for `step`. `map` knows their number. A tile has kPieces
    // pieces (warp_group.h). What lies outside of the tensor becomes zeros.
    template <int kRows, int kPieces>
    __device__ __forceinline__ void copyRows(
        int32_t step, char* tile, const RowMap& map, int32_t row, int32_t head, int32_t frame) const {
#ifdef IVC_WARP_GROUPS
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            asm volatile(
                "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(addressOf(tile) + piece * kRows * kPieceBytes),
                "l"(&map), "r"(copied(step)), "r"(piece * kPieceBytes / 2), "r"(row), "r"(head), "r"(frame)
                : "memory");
        }
#endif
    }

    // copy(step, stage) starts copies. first(stage, warp), middle(step, stage, warp) and last(stage, warp) compute.
    // There are steps 0 to `end`, and at least two.
    template <class Copy, class First, class Middle, class Last>
    __device__ __forceinline__ void run(int32_t end, Copy copy, First first, Middle middle, Last last) const {
#ifdef IVC_WARP_GROUPS
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                create(copied(stage), 1);
                create(done(stage), kWarps);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
        __syncthreads();
        const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarp, 0);  // equal over the warp
        constexpr int kMost = 65536 / kThreads / 8 * 8;  // registers with which a thread starts
        constexpr int kFewer = 40, kMore = (kMost * (kGroups + 1) - kFewer) / kGroups / 8 * 8;
        if (warp >= kWarps) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFewer));
            if (threadIdx.x != kWarps * kWarp) return;
            for (int32_t step = 0; step <= end; ++step) {
                if (step >= kStages) await(done(step), step - kStages);
                copy(step, step % kStages);
            }
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMore));
            await(copied(0), 0);
            first(0, warp);
            for (int32_t step = 1; step < end; ++step) {
                await(copied(step), step);
                middle(step, step % kStages, warp);
            }
            await(copied(end), end);
            last(end % kStages, warp);
        }
#endif
    }

    // Says that this warp does not read the stage of `step` any more.
    __device__ __forceinline__ void free(int32_t step) const {
#ifdef IVC_WARP_GROUPS
        __syncwarp();
        if (threadIdx.x % kWarp == 0) {
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(done(step)) : "memory");
        }
#endif
    }

#else

    Block& block;

    Pipeline(Block& of, char*) : block(of) {}

    void expect(int32_t, int32_t) const {}

    template <int kRows, int kPieces>
    void copyRows(int32_t, char* tile, const RowMap& map, int32_t row, int32_t head, int32_t frame) const {
        for (int at = 0; at < kRows; ++at) {
            const int64_t from = frame * map.stride.frame + head * map.stride.head + (row + at) * map.stride.row;
            for (int chunk = 0; chunk < 2 * kPieces; ++chunk) {
                const bool within = row + at < map.rows && 8 * chunk < map.depth;
                const char* source = within ? map.start + 2 * (from + 8 * chunk) : nullptr;
                block.copy16(tile + placeInTile(kRows, at, chunk), source, within);
            }
        }
    }

    template <class Copy, class First, class Middle, class Last>
    void run(int32_t end, Copy copy, First first, Middle middle, Last last) const {
        int32_t begun = 0;
        for (int32_t step = 0; step <= end; ++step) {
            // as late as possible, or as early: then all stages but this step's last are overwritten already
            const int32_t to = block.backwards ? smaller(end, step + kStages - 1) : step;
            for (; begun <= to; ++begun) copy(begun, begun % kStages);
            block.awaitCopies();
            block.each([&](int warp) {
                const int stage = step % kStages;
                if (step == 0) {
                    first(stage, warp);
                } else if (step < end) {
                    middle(step, stage, warp);
                } else {
                    last(stage, warp);
                }
            });
        }
    }

    void free(int32_t) const {}

#endif
};

}  // namespace ivc
