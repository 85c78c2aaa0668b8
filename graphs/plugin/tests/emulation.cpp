// Runs the algorithms of the kernels on the host, block after block and thread after thread, so that they are tested
// without a GPU. The functions have the signatures of the kernels' functions, except that the stream gives the order:
// 0, or 1 for backwards. For ivcAttendJoined, twice the KiB of shared memory of a block of a cluster are added to it.
#include <stddef.h>
#include <stdlib.h>

#include <chrono>
#include <memory>

#include "../kernels/attend_grouped.h"
#include "../kernels/attend_plan.h"
#include "../kernels/packed_plan.h"
#include "../kernels/joined_plan.h"
#include "../kernels/linear_plan.h"
#include "../kernels/pixels.h"
#include "../kernels/rows.h"
#include "../kernels/selection.h"
#include "../kernels/step.h"
#include "../kernels/votes.h"

using namespace ivc;

namespace {

using Clock = std::chrono::steady_clock;
using Now = Clock::time_point;

uint32_t bitsOf(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

float floatOf(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// `bits` without the lowest `count`, rounded to the nearest, half to even.
uint32_t rounded(uint32_t bits, int count) {
    return (bits + (1u << (count - 1)) - 1 + (bits >> count & 1)) >> count;
}

struct BFloat16 {
    uint16_t bits;

    BFloat16() = default;
    explicit BFloat16(float value)
        : bits(static_cast<uint16_t>(isnan(value) ? 0x7fff : rounded(bitsOf(value), 16))) {}
    explicit operator float() const { return floatOf(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
    uint16_t bits;

    Float16() = default;
    explicit Float16(float value) {
        const uint32_t all = bitsOf(value), magnitude = all & 0x7fffffff;
        uint32_t found;
        if (magnitude > 0x7f800000) {
            found = 0x7fff;
        } else if (magnitude >= 0x38800000) {  // 2^-14 and more
            found = smaller(rounded(magnitude - 0x38000000, 13), 0x7c00u);
        } else {  // a multiple of 2^-24
            found = bitsOf(floatOf(magnitude) + 0.5f) - bitsOf(0.5f);
        }
        bits = static_cast<uint16_t>((all >> 16 & 0x8000) | found);
    }
    explicit operator float() const {
        static const std::vector<float> values = all();
        return values[bits];
    }

    static std::vector<float> all() {
        std::vector<float> values(1 << 16);
        for (uint32_t i = 0; i < values.size(); ++i) {
            const uint32_t exponent = i >> 10 & 31, fraction = i & 1023;
            const float magnitude = exponent == 31  ? floatOf(0x7f800000 | fraction << 13)
                                    : exponent == 0 ? static_cast<float>(fraction) / (1 << 24)
                                                    : floatOf((exponent + 112) << 23 | fraction << 13);
            values[i] = i >> 15 ? -magnitude : magnitude;
        }
        return values;
    }
};

// A launch of blocks x by y by z.
template <class Block>
void launch(int x, int y, int z, bool backwards, Block block) {
    const int total = x * y * z;
    for (int i = 0; i < total; ++i) {
        const int at = backwards ? total - 1 - i : i;
        block(at % x, at / x % y, at / x / y);
    }
}

template <class Value>
void votes(const Votes<Value>& v, bool backwards) {
    const Team team{kVoteThreads, backwards};
    VoteTile tile;
    launch(v.softmaxTiles(), ceilDiv(v.queries, kQueries), v.heads, backwards,
        [&](int keys, int queries, int head) { voteRows(team, tile, v, head, queries, keys); });
    launch(ceilDiv(v.visual, kKeys), v.splits, v.heads, backwards,
        [&](int keys, int split, int head) { voteColumns(team, tile, v, head, split, keys); });
}

template <class Value>
void scores(const IvcSelection& s, const void* values, const int32_t* visualIndex, const int32_t* queryIndex,
    float* tokenScore, int32_t* seedIndex, void* workspace, bool backwards) {
    const Team team{kChooseThreads, backwards};
    const Scratch scratch(s, workspace);
    const Scoring scoring = scratch.scoring(tokenScore, seedIndex);
    Choice choice;
    votes(scratch.textVotes(static_cast<const Value*>(values), visualIndex, queryIndex), backwards);
    scoreSeeds(team, choice, scoring);
    votes(scratch.seedVotes(static_cast<const Value*>(values), visualIndex, seedIndex), backwards);
    launch(ceilDiv(s.visual, kChooseThreads), 1, 1, backwards,
        [&](int block, int, int) { scoreTokens(team, scoring, block, ceilDiv(s.visual, kChooseThreads)); });
}

int copy(RowCopies& c, const IvcRows* tensors, int32_t count, int32_t copied, bool backwards) {
    const Team team{kRowThreads, backwards};
    for (int32_t first = 0; first < count && copied > 0; first += IVC_ROWS_PER_LAUNCH) {
        const int32_t blocks = planRows(c, tensors + first, smaller(count - first, IVC_ROWS_PER_LAUNCH), copied);
        if (blocks < 0) return 1;
        launch(blocks, 1, 1, backwards, [&](int block, int, int) { copyRows(team, c, block); });
    }
    return 0;
}

struct Attending {
    bool backwards;

    template <class Value, Sight kSight, class S>
    int tiles(const Attend& a) const {
        const Blocks blocks = blocksOf<kSight, S>(a);
        std::vector<Vector16> shared(S::kSharedBytes / sizeof(Vector16));
        launch(blocks.x, blocks.y, blocks.z, backwards, [&](int tile, int head, int part) {
            memset(shared.data(), 0xff, S::kSharedBytes);  // NaN
            Block block{S::kWarps, backwards};
            attend<Value, kSight, S>(block, reinterpret_cast<char*>(shared.data()), a, tile, head, part);
        });
        if (a.splits > 1) {
            launch(a.kvHeads * a.queries(), 1, 1, backwards, [&](int line, int, int) {
                Block block{Combining<Value>::kWarps, backwards};
                typename Combining<Value>::Shared shared;
                Combining<Value>::run(block, shared, a, line);
            });
        }
        return 0;
    }

    template <class Value, class S>
    int grouped(const Attend& a) const {
        const auto map = [&](const void* start, const IvcStrides& stride) {
            return RowMap{static_cast<const char*>(start), stride, a.keys, a.headDim};
        };
        const AttendMaps maps{map(a.q, a.qStride), map(a.k, a.kStride), map(a.v, a.vStride)};
        const Blocks blocks = blocksOf<Sight::kFrame, S>(a);
        std::vector<Vector16> shared(S::kSharedBytes / sizeof(Vector16));
        launch(blocks.x, blocks.y, blocks.z, backwards, [&](int tile, int head, int frame) {
            memset(shared.data(), 0xff, S::kSharedBytes);  // NaN
            Block block{S::Line::kWarps, backwards};
            attendGrouped<Value, S>(block, reinterpret_cast<char*>(shared.data()), a, maps, tile, head, frame);
        });
        return 0;
    }

    template <class Value, Sight kSight>
    int plain(Attend a) const {
        a.splits = 1;
        using Plain = PlainAttention<Value, kSight>;
        launch(a.queries(), a.kvHeads, a.frames, backwards, [&](int query, int head, int frame) {
            Block block{Plain::kWarps, backwards};
            typename Plain::Shared shared;
            Plain::run(block, shared, a, query, head, frame);
        });
        return 0;
    }
};

struct Joining : Attending {
    int before = 0;  // what shared memory holds at first: NaN, and in every second call large numbers

    explicit Joining(bool backwards) : Attending{backwards} {
        static int calls = 0;
        before = calls++ % 2 == 0 ? 0xff : 0x7b;
    }

    template <class Value>
    int turn(const Turn& t) const {
        launch(turnBlocks(t), 1, 1, backwards, [&](int number, int, int) {
            Block block{kTurnThreads / kWarp, backwards};
            turnHeads<Value>(block, t, number);
        });
        return 0;
    }

    template <class Value, class S>
    int row(const AttendRow& r) const {
        using Row = RowAttention<Value, S>;
        std::vector<Vector16> shared(Row::kSharedBytes / sizeof(Vector16));
        launch(r.a.kvHeads, r.a.splits, 1, backwards, [&](int head, int split, int) {
            memset(shared.data(), before, Row::kSharedBytes);
            Block block{S::kWarps, backwards};
            Row::run(block, reinterpret_cast<char*>(shared.data()), r, head, split);
        });
        return 0;
    }

    template <class Value, class S>
    int together(const AttendTogether& r) const {
        const size_t each = (Together<Value, S>::sharedBytes(r) + 127) / 128 * 128 / sizeof(Vector16);
        std::vector<Vector16> shared(each * r.blocks);
        const auto of = [&](int32_t rank) { return reinterpret_cast<char*>(shared.data() + rank * each); };
        for (int head = 0; head < r.a.kvHeads; ++head) {
            memset(shared.data(), before, shared.size() * sizeof(Vector16));
            for (const bool finishes : {false, true}) {
                launch(r.blocks, 1, 1, backwards, [&](int rank, int, int) {
                    Block block{S::kWarps, backwards};
                    const Together<Value, S> one(block, of(rank), r, head, rank);
                    if (finishes) {
                        one.finish();
                    } else {
                        one.attend(of);
                    }
                });
            }
        }
        return 0;
    }
};

// The device of products; see ivcEmulateShared.
Device device{1, 228 * 1024};

}  // namespace

// Launches whose weights wait in shared memory.
extern "C" int32_t ivcStagedLaunches;
int32_t ivcStagedLaunches = 0;

namespace {

struct Multiplying {
    bool backwards;

    template <class Kernel, class Operands>
    int staged(const Operands& a) const {
        ++ivcStagedLaunches;
        std::vector<Vector16> shared(static_cast<size_t>(Kernel::sharedBytes(a)) / sizeof(Vector16));
        launch(Kernel::columnBlocks(a), 1, 1, backwards, [&](int number, int, int) {
            memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(Vector16));  // NaN
            Block block{Kernel::kWarps, backwards};
            Kernel::run(block, reinterpret_cast<char*>(shared.data()), a, number);
        });
        return 0;
    }

    template <class Kernel, class Operands>
    int run(const Operands& a) const {
        auto shared = std::make_unique<typename Kernel::Shared>();
        launch(Kernel::columnBlocks(a), Kernel::rowBlocks(a), 1, backwards, [&](int columns, int rows, int) {
            memset(static_cast<void*>(shared.get()), 0xff, sizeof *shared);  // NaN
            Block block{Kernel::kWarps, backwards};
            Kernel::run(block, *shared, a, columns, rows);
        });
        return 0;
    }
};

template <class Value>
void product(const Linear& a) {
    const Value *x = static_cast<const Value*>(a.x), *weight = static_cast<const Value*>(a.weight);
    const Value *bias = static_cast<const Value*>(a.bias), *residual = static_cast<const Value*>(a.residual);
    for (int64_t row = 0; row < a.rows; ++row) {
        for (int64_t column = 0; column < a.out; ++column) {
            float sum = 0;
            for (int64_t k = 0; k < a.features; ++k) {
                sum += static_cast<float>(x[row * a.features + k]) * static_cast<float>(weight[column * a.features + k]);
            }
            sum = activated<Value>(sum * a.scale + (bias ? static_cast<float>(bias[column]) : 0), a.activation, a.slope);
            if (residual) sum += static_cast<float>(residual[row * a.out + column]);
            writeResult<Value>(a, row * a.out + column, sum);
        }
    }
}

}  // namespace

extern "C" {

// Emulates multiprocessors with so many bytes of shared memory for kernels that start early.
int ivcEmulateShared(size_t bytes, size_t) {
    device.earlyShared = static_cast<int32_t>(bytes);
    return 0;
}

int ivcFusedPacked(const IvcLinear* c, const IvcPacked* w, const void* x, const void* norm, const void* bias,
    const void* residual, void* y, size_t backwards) {
    if (!possible(*c, *w) || !possible(*c, norm)) return 1;
    const PackedProduct a = planned(*c, *w, x, norm, bias, residual, y);
    if (!wellPlaced(a.packed, *w)) return 1;
    return withHalf<Float16, BFloat16>(
        c->type, [&](auto value) { return launchPacked<decltype(value)>(*c, *w, a, device, Multiplying{backwards != 0}); });
}

int ivcUnpack(const IvcLinear* c, const IvcPacked* w, void* weight, size_t backwards) {
    if (!possible(*c, *w)) return 1;
    const Packed packed = planned(*c, *w);
    if (!wellPlaced(packed, *w)) return 1;
    return withUnpack<Float16, BFloat16>(*c, *w, [&](auto kernel) {
        using Kernel = decltype(kernel);
        launch(Kernel::columnBlocks(packed), 1, 1, backwards != 0, [&](int number, int, int) {
            Block block{Kernel::kWarps, backwards != 0};
            Kernel::run(block, packed, weight, number);
        });
        return 0;
    });
}

int ivcFusedLinear(const IvcLinear* c, const void* x, const void* norm, const void* weight, const void* bias,
    const void* residual, void* y, size_t backwards) {
    if (!possible(*c, norm)) return 1;
    const Linear a = planned(*c, x, norm, weight, bias, residual, y);
    return withType<Float16, BFloat16>(
        c->type, [&](auto value) { return launchLinear<decltype(value)>(*c, a, device, Multiplying{backwards != 0}); });
}

// Replaces cuBLASLt.
int ivcMatMul(const IvcLinear* c, const void* x, const void* weight, const void* bias, const void* residual, void* y,
    void*, size_t) {
    if (!possible(*c) || !inEpilogue(*c, residual)) return 1;
    const Linear a = planned(*c, x, nullptr, weight, bias, residual, y);
    withType<Float16, BFloat16>(c->type, [&](auto value) { product<decltype(value)>(a); });
    return 0;
}

int ivcNormRows(const IvcLinear* c, const void* x, const void* norm, void* y, size_t backwards) {
    if (!possible(*c)) return 1;
    const Linear a = planned(*c, x, norm, nullptr, nullptr, nullptr, y);
    return withType<Float16, BFloat16>(
        c->type, [&](auto value) { return launchNorm<decltype(value)>(*c, a, Multiplying{backwards != 0}); });
}

int ivcActivate(
    const IvcLinear* c, const void* x, const void* bias, const void* residual, void* y, size_t backwards) {
    if (!possible(*c)) return 1;
    const Linear a = planned(*c, x, nullptr, nullptr, bias, residual, y);
    return withType<Float16, BFloat16>(
        c->type, [&](auto value) { return launchActivate<decltype(value)>(*c, a, Multiplying{backwards != 0}); });
}

// The CUDA functions that custom operators call.
int cudaHostAlloc(void** to, size_t bytes, unsigned) {
    *to = malloc(bytes);
    return *to ? 0 : 2;
}

int cudaFreeHost(void* memory) {
    free(memory);
    return 0;
}

int cudaGetLastError() { return 0; }

int cudaStreamSynchronize(size_t) { return 0; }

int cudaStreamCreateWithFlags(void** stream, unsigned) {
    *stream = malloc(1);
    return 0;
}

int cudaStreamDestroy(void* stream) {
    free(stream);
    return 0;
}

int cudaEventCreateWithFlags(void** event, unsigned) {
    *event = malloc(sizeof(Now));
    return 0;
}

int cudaEventRecord(void* event, size_t) {
    *static_cast<Now*>(event) = Clock::now();
    return 0;
}

int cudaEventSynchronize(void*) { return 0; }

int cudaEventElapsedTime(float* milliseconds, void* from, void* to) {
    *milliseconds = std::chrono::duration<float, std::milli>(*static_cast<Now*>(to) - *static_cast<Now*>(from)).count();
    return 0;
}

int cudaEventDestroy(void* event) {
    free(event);
    return 0;
}

int cudaMemset(void* target, int value, size_t bytes) {
    memset(target, value, bytes);
    return 0;
}

int cudaMemcpyAsync(void* target, const void* source, size_t bytes, int, size_t) {
    memcpy(target, source, bytes);
    return 0;
}

size_t ivcAttendWorkspace(const IvcAttention* attention) {
    return possible(*attention) ? workspaceOf(*attention) : 0;
}

int ivcAttendInPlace(const IvcAttention* c, const void* q, const void* k, const void* v, void* keyCache,
    void* valueCache, const int32_t* pastLength, void* y, void* workspace, size_t backwards) {
    if (!possible(*c)) return 1;
    Attend a = planned(*c);
    a.q = q;
    a.k = k;
    a.v = v;
    a.keyCache = keyCache;
    a.valueCache = valueCache;
    a.pastLength = pastLength;
    a.y = y;
    a.partial = static_cast<float*>(workspace);
    if (!wellPlaced(a, c->type)) return 1;
    return launchDecoder<Float16, BFloat16>(*c, a, true, Attending{backwards != 0});
}

// With 2 or 3, warps multiply in groups, as on SM 90.
int ivcEncodeAttend(const IvcEncoder* c, const void* q, const void* k, const void* v, const int32_t* windowOfPlace,
    void* y, size_t order) {
    if (!possible(*c)) return 1;
    Attend a = planned(*c);
    a.q = q;
    a.k = k;
    a.v = v;
    a.windowOfPlace = windowOfPlace;
    a.y = y;
    if (!wellPlaced(a, c->type)) return 1;
    const Attending attending{order % 2 != 0};
    if (order > 1 && takesGroups(*c)) return launchGroups<Float16, BFloat16>(*c, a, attending);
    return launchEncoder<Float16, BFloat16>(*c, a, true, attending);
}

int ivcTurnHeads(const IvcJoined* c, const IvcJoinedRows* rows, void* q, void* k, void* v, size_t backwards) {
    if (!possible(*c, *rows)) return 1;
    return launchTurn<Float16, BFloat16>(*c, planned(*c, *rows, q, k, v), Joining(backwards != 0));
}

size_t ivcAttendJoinedWorkspace(const IvcJoined* c) { return workspaceOf(*c, true); }

int ivcAttendJoined(const IvcJoined* c, const IvcJoinedRows* rows, void* keyCache, void* valueCache,
    const int32_t* pastLength, void* y, void* workspace, int32_t* counters, size_t stream) {
    return attendJoined<Float16, BFloat16>(*c, *rows, keyCache, valueCache, pastLength, y, workspace, counters, true,
        static_cast<int>(stream / 2 * 1024), 1, Joining(stream % 2 != 0));
}

int ivcScalePixels(const IvcPixels* extents, const uint8_t* levels, float* pixels, size_t backwards) {
    if (!possible(*extents)) return 1;
    launch(static_cast<int>(pixelBlocks(*extents)), 1, 1, backwards != 0, [&](int number, int, int) {
        scalePixels(Team{kPixelThreads, backwards != 0}, Pixels{*extents, levels, pixels}, number);
    });
    return 0;
}

int ivcTakeStep(const IvcStep* c, const int32_t* step, const void* table, const void* row, const int32_t* before,
    const float* frequencies, void* embeds, float* cos, float* sin, int32_t* length, int32_t* wholeLength,
    size_t backwards) {
    if (!canBegin(*c)) return 1;
    const TakeStep t = planned(*c, step, table, row, before, frequencies, embeds, cos, sin, length, wholeLength);
    return withType<Float16, BFloat16>(c->type, [&](auto value) {
        Block block{kStepThreads / kWarp, backwards != 0};
        StepShared shared;
        takeStep<decltype(value)>(block, shared, t);
        return 0;
    });
}

int ivcGiveAnswer(const IvcStep* c, const void* x, const int32_t* wanted, float* logits, int32_t* best, float* told,
    int32_t* scratch, size_t backwards) {
    if (!canEnd(*c)) return 1;
    const GiveAnswer g = planned(*c, x, wanted, logits, best, told, scratch);
    launch(kAnswerBlocks, 1, 1, backwards != 0, [&](int number, int, int) {
        Block block{kStepThreads / kWarp, backwards != 0};
        AnswerShared shared{};
        switch (c->type) {
            case IVC_FLOAT32: return giveAnswer<float>(block, shared, g, number);
            case IVC_FLOAT16: return giveAnswer<Float16>(block, shared, g, number);
            default: return giveAnswer<BFloat16>(block, shared, g, number);
        }
    });
    return 0;
}

int32_t ivcSeedCount(int32_t visual, int32_t seedDivisor) { return seedCount(visual, seedDivisor); }

size_t ivcSelectionWorkspace(const IvcSelection* selection) { return Scratch(*selection, nullptr).bytes; }

int ivcTokenScores(const IvcSelection* s, const void* values, const int32_t* visualIndex, const int32_t* queryIndex,
    float* tokenScore, int32_t* seedIndex, void* workspace, size_t backwards) {
    if (!possible(*s)) return 1;
    const auto call = s->type == IVC_FLOAT32   ? scores<float>
                      : s->type == IVC_FLOAT16 ? scores<Float16>
                                               : scores<BFloat16>;
    call(*s, values, visualIndex, queryIndex, tokenScore, seedIndex, workspace, backwards != 0);
    return 0;
}

int ivcKeptRows(const IvcSelection* s, const float* tokenScore, const int32_t* seedIndex, const float* priority,
    const int32_t* visualIndex, const int32_t* textIndex, int32_t* keepIndex, void* workspace, size_t backwards) {
    if (!possible(*s)) return 1;
    Choice choice;
    keepRows(Team{kChooseThreads, backwards != 0}, choice,
        Scratch(*s, workspace).keeping(tokenScore, seedIndex, priority, visualIndex, textIndex, keepIndex));
    return 0;
}

int ivcSelectTokens(const IvcSelection* s, const void* values, const float* priority, const int32_t* visualIndex,
    const int32_t* textIndex, const int32_t* queryIndex, int32_t* keepIndex, float* tokenScore, int32_t* seedIndex,
    void* workspace, size_t backwards) {
    return ivcTokenScores(s, values, visualIndex, queryIndex, tokenScore, seedIndex, workspace, backwards) ||
           ivcKeptRows(s, tokenScore, seedIndex, priority, visualIndex, textIndex, keepIndex, workspace, backwards);
}

int ivcCacheIndex(const int32_t* keepIndex, int32_t kept, int32_t past, int32_t capacity, int32_t* cacheIndex,
    size_t backwards) {
    if (kept < 0 || past < 0 || capacity <= 0) return 1;
    const CacheRows c{keepIndex, cacheIndex, kept, past, capacity};
    const Team team{kRowThreads, backwards != 0};
    launch(ceilDiv(capacity, kRowThreads), 1, 1, backwards != 0,
        [&](int block, int, int) { indexCaches(team, c, block); });
    return 0;
}

int ivcCompactGather(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* keepIndex, int32_t kept,
    size_t backwards) {
    RowCopies c{};
    c.sourceRows = rows;
    c.targetRows = kept;
    c.gather = keepIndex;
    return copy(c, tensors, count, kept, backwards != 0);
}

int ivcCompactGatherInto(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* keepIndex, int32_t kept,
    const int32_t* pastLength, int32_t capacity, size_t backwards) {
    RowCopies c{};
    c.sourceRows = rows;
    c.targetRows = capacity;
    c.gather = keepIndex;
    c.offset = pastLength;
    return copy(c, tensors, count, kept, backwards != 0);
}

int ivcAppendRows(const IvcRows* tensors, int32_t count, int32_t rows, const int32_t* pastLength, int32_t capacity,
    size_t backwards) {
    RowCopies c{};
    c.sourceRows = rows;
    c.targetRows = capacity;
    c.offset = pastLength;
    return copy(c, tensors, count, rows, backwards != 0);
}
}
