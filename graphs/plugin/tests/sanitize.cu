// Calls of every function of ivc_kernels.h with many extents, for compute-sanitizer. kKinds at the end lists them. Every
// buffer has its own allocation of exactly the needed size, and cache rows that no call may read are not initialised.
//
//   nvcc -std=c++17 -arch=native sanitize.cu ../kernels/*.cu -o sanitize
//   compute-sanitizer --tool memcheck|racecheck|initcheck ./sanitize [part of a kind's name [cases of a kind]]
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <random>
#include <vector>

#include "../kernels/ivc_kernels.h"

namespace {

std::mt19937 generator(1);

int between(int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); }

void require(cudaError_t status) {
    if (status == cudaSuccess) return;
    printf("%s\n", cudaGetErrorString(status));
    exit(1);
}

size_t bytesOf(IvcType type) { return type == IVC_FLOAT32 ? 4 : 2; }

struct Buffer {
    void* data = nullptr;
    size_t bytes;

    explicit Buffer(size_t size) : bytes(size) {
        if (bytes > 0) require(cudaMalloc(&data, bytes));
    }
    ~Buffer() { cudaFree(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // Small numbers of a type.
    void fill(IvcType type) {
        std::vector<uint16_t> bits(bytes / 2);
        for (size_t i = 0; i < bits.size(); ++i) {
            const uint32_t drawn = generator();
            const uint16_t sign = static_cast<uint16_t>(drawn >> 31 << 15), some = static_cast<uint16_t>(drawn % 128);
            bits[i] = static_cast<uint16_t>(sign | (type == IVC_FLOAT16 ? 0x3800 + some : 0x3f00 + some));
        }
        if (bytes > 0) require(cudaMemcpy(data, bits.data(), bytes, cudaMemcpyHostToDevice));
    }
    void fill(const std::vector<int32_t>& values) {
        if (bytes > 0) require(cudaMemcpy(data, values.data(), bytes, cudaMemcpyHostToDevice));
    }
    int32_t* integers() const { return static_cast<int32_t*>(data); }
    float* floats() const { return static_cast<float*>(data); }
};

// Memory of the host that the device reads and writes.
struct Pinned {
    int32_t* data = nullptr;

    explicit Pinned(size_t size) { require(cudaHostAlloc(reinterpret_cast<void**>(&data), size, cudaHostAllocDefault)); }
    ~Pinned() { cudaFreeHost(data); }
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;
};

// Waits, and reads what calls have written.
void read(std::initializer_list<const Buffer*> buffers) {
    for (const Buffer* buffer : buffers) {
        std::vector<char> answer(buffer->bytes);
        if (buffer->bytes > 0) require(cudaMemcpy(answer.data(), buffer->data, buffer->bytes, cudaMemcpyDeviceToHost));
    }
}

void decoder(int number) {
    IvcAttention c{};
    c.type = static_cast<IvcType>(number % 3);
    c.headDim = number % 2 ? 64 : 128;
    c.kvHeads = between(1, 2);
    c.heads = c.kvHeads * between(1, 8);
    c.rows = number % 4 ? between(1, 90) : 1;
    if (number == 1 || number == 4) {  // more tiles of queries than a GPU runs at a time
        c.heads = c.kvHeads = 129;
        c.rows = 70;
    }
    c.fresh = static_cast<IvcFresh>(between(0, 1));
    c.capacity = between(0, 300) + (c.fresh == IVC_FRESH_APPENDED ? c.rows : 0);
    c.scale = 0.1f;
    const int room = c.fresh == IVC_FRESH_APPENDED ? c.capacity - c.rows : c.capacity, past = between(0, room);
    const size_t size = c.type == IVC_FLOAT32 ? 4 : 2, row = static_cast<size_t>(c.headDim) * size;
    c.q = {0, static_cast<int64_t>(c.rows) * c.headDim, c.headDim};
    c.k = c.v = {0, c.headDim, static_cast<int64_t>(c.kvHeads) * c.headDim};
    const size_t fresh = c.kvHeads * c.rows * row, ours = c.heads * c.rows * row;
    Buffer q(ours), k(fresh), v(fresh), y(ours);
    Buffer keys(c.kvHeads * c.capacity * row), values(c.kvHeads * c.capacity * row), length(4);
    Buffer workspace(ivcAttendWorkspace(&c));
    for (Buffer* x : {&q, &k, &v}) x->fill(c.type);
    for (Buffer* cache : {&keys, &values}) {
        for (int head = 0; head < c.kvHeads; ++head) {
            Buffer part(past * row);
            part.fill(c.type);
            char* to = static_cast<char*>(cache->data) + head * c.capacity * row;
            if (past > 0) require(cudaMemcpy(to, part.data, part.bytes, cudaMemcpyDeviceToDevice));
        }
    }
    length.fill({past});
    require(ivcAttendInPlace(&c, q.data, k.data, v.data, keys.data, values.data, static_cast<int32_t*>(length.data),
        y.data, workspace.data, nullptr));
    read({&y});
}

void encoder(int number) {
    static const int kSizes[] = {64, 72, 80, 128};
    IvcEncoder c{};
    c.type = static_cast<IvcType>(number % 3);
    c.headDim = kSizes[number % 4];
    c.heads = between(1, 3);
    c.frames = between(1, 2);
    c.blockSize = number % 2 ? between(1, 70) : 0;
    c.rows = c.blockSize ? c.blockSize * between(3, 5) : between(1, 300);
    if (number == 2 || number == 10) {  // enough blocks for SM 90's own kernels
        c.heads = 64;
        c.frames = 2;
        c.rows = 70;
    }
    c.scale = 0.1f;
    const size_t size = bytesOf(c.type);
    const size_t bytes = static_cast<size_t>(c.frames) * c.heads * c.rows * c.headDim * size;
    c.q = c.k = c.v = {static_cast<int64_t>(c.heads) * c.rows * c.headDim, static_cast<int64_t>(c.rows) * c.headDim,
        c.headDim};
    Buffer q(bytes), k(bytes), v(bytes), y(bytes / c.rows * (c.rows - 2 * c.blockSize)), windows(4 * c.rows);
    for (Buffer* x : {&q, &k, &v}) x->fill(c.type);
    std::vector<int32_t> numbers(c.rows, -1);
    for (int i = c.blockSize; i < c.rows - c.blockSize; ++i) numbers[i] = i % 5 ? i / (c.blockSize + 1) : -1;
    windows.fill(numbers);
    const auto* places = c.blockSize ? static_cast<int32_t*>(windows.data) : nullptr;
    require(ivcEncodeAttend(&c, q.data, k.data, v.data, places, y.data, nullptr));
    read({&y});
}

void joined(int number) {
    IvcJoined c{};
    c.type = static_cast<IvcType>(number % 3);
    c.headDim = number % 2 ? 64 : 128;
    c.kvHeads = between(1, 2);
    c.heads = c.kvHeads * between(1, 16);
    c.rows = c.angleRows = number % 4 ? 1 : between(1, 20);
    c.order = number % 5 ? IVC_HEADS_APART : IVC_HEADS_GROUPED;
    c.epsilon = 1e-6f;
    c.capacity = c.rows + between(0, 300);
    c.scale = 0.1f;
    const int past = between(0, c.capacity - c.rows);
    const size_t row = c.headDim * bytesOf(c.type), rows = c.rows;
    Buffer x(rows * (c.heads + 2 * c.kvHeads) * row), cos(2 * rows * c.headDim), sin(cos.bytes), norm(row), length(4);
    Buffer keys(c.capacity * c.kvHeads * row), values(keys.bytes), y(rows * c.heads * row), counters(4 * c.kvHeads);
    Buffer workspace(ivcAttendJoinedWorkspace(&c)), q(y.bytes), k(rows * c.kvHeads * row), v(k.bytes);
    for (Buffer* one : {&x, &norm}) one->fill(c.type);
    for (Buffer* one : {&cos, &sin}) one->fill(IVC_BFLOAT16);
    for (Buffer* cache : {&keys, &values}) {
        for (int head = 0; head < c.kvHeads; ++head) {
            Buffer part(past * row);
            part.fill(c.type);
            char* to = static_cast<char*>(cache->data) + head * c.capacity * row;
            if (past > 0) require(cudaMemcpy(to, part.data, part.bytes, cudaMemcpyDeviceToDevice));
        }
    }
    length.fill({past});
    require(cudaMemset(counters.data, 0, counters.bytes));
    const IvcJoinedRows given{x.data, static_cast<float*>(cos.data), static_cast<float*>(sin.data),
        number % 7 ? norm.data : nullptr, norm.data};
    require(ivcTurnHeads(&c, &given, q.data, k.data, number % 3 ? v.data : nullptr, nullptr));
    require(ivcAttendJoined(&c, &given, keys.data, values.data, static_cast<int32_t*>(length.data), y.data,
        workspace.data, static_cast<int32_t*>(counters.data), nullptr));
    read({&y});
}

// Heads alone, of every size: eight elements of each half for a lane, or four where a half is no multiple of eight.
void turned(int number) {
    static const int kSizes[] = {64, 128, 16, 32, 80, 72, 8, 24, 104};
    IvcJoined c{};
    c.type = static_cast<IvcType>(number % 3);
    c.headDim = kSizes[number % 9];
    c.kvHeads = between(1, 3);
    c.heads = c.kvHeads * between(1, 4);
    c.angleRows = between(1, 30);
    c.rows = c.angleRows * between(1, 3);
    c.order = number % 2 ? IVC_HEADS_APART : IVC_HEADS_GROUPED;
    c.epsilon = 1e-6f;
    c.byHead = number / 2 % 2;
    const size_t row = c.headDim * bytesOf(c.type), rows = c.rows;
    const bool normed = (c.headDim & (c.headDim - 1)) == 0 && c.headDim >= 16 && number % 4, rotated = number % 5 != 0;
    Buffer x(rows * (c.heads + 2 * c.kvHeads) * row), norm(row), cos(rotated ? 2 * c.angleRows * c.headDim : 0), sin(cos.bytes);
    Buffer q(rows * c.heads * row), k(rows * c.kvHeads * row), v(number % 3 ? k.bytes : 0);
    for (Buffer* one : {&x, &norm}) one->fill(c.type);
    for (Buffer* one : {&cos, &sin}) one->fill(IVC_BFLOAT16);
    const IvcJoinedRows given{x.data, cos.floats(), sin.floats(), normed ? norm.data : nullptr, normed ? norm.data : nullptr};
    require(ivcTurnHeads(&c, &given, q.data, k.data, v.data, nullptr));
    read({&q, &k, &v});
}

// Sizes of products, one for each kernel that extents can choose.
struct Size {
    int rows, features, out;
};

// Products of every plan: few and most octets of a row, rows that are longer, many columns, several rows, and rows that
// cannot be read in octets.
void linear(int number) {
    static const Size kSizes[] = {{1, 72, 40}, {1, 6152, 24}, {1, 10248, 16}, {1, 64, 16392}, {1, 24, 2000}, {1, 40, 5000},
        {4, 64, 100}, {7, 200, 4200}, {3, 37, 10}, {1, 33, 5}, {12, 2056, 9}, {1, 1536, 3000}};
    const Size size = kSizes[number % 12];
    const int turn = number / 12;
    IvcLinear c{};
    c.type = static_cast<IvcType>(turn % 3);
    c.rows = size.rows;
    c.features = size.features;
    c.out = size.out;
    c.activation = static_cast<IvcActivation>(number % 4);
    c.gated = turn / 3 % 2;
    c.slope = c.scale = 1;
    c.epsilon = 1e-6f;
    const size_t one = bytesOf(c.type), features = one * c.features, rows = c.rows, results = one * rows * c.out;
    const size_t columns = static_cast<size_t>(c.gated + 1) * c.out;
    Buffer x(rows * features), weight(columns * features), y(results), activated(results);
    Buffer norm(number % 5 ? features : 0), bias(number % 7 ? one * columns : 0), residual(number % 3 ? results : 0);
    Buffer sums(one * rows * columns), both(2 * features), normed(rows * features), centred(rows * features);
    for (Buffer* buffer : {&x, &weight, &norm, &bias, &residual, &sums, &both}) buffer->fill(c.type);
    require(ivcFusedLinear(&c, x.data, norm.data, weight.data, bias.data, residual.data, y.data, nullptr));
    require(ivcActivate(&c, sums.data, bias.data, residual.data, activated.data, nullptr));
    if (norm.bytes > 0) require(ivcNormRows(&c, x.data, norm.data, normed.data, nullptr));
    c.layerNorm = 1;  // weight, then bias
    require(ivcNormRows(&c, x.data, both.data, centred.data, nullptr));
    read({&y, &activated, norm.bytes > 0 ? &normed : &y, &centred});
}

// The same with packed weights, in blocks of every size.
void packed(int number) {
    static const Size kSizes[] = {{1, 40, 50}, {1, 64, 4100}, {2, 72, 60}, {2, 64, 4100}, {4, 136, 33}, {7, 96, 70}, {12, 48, 20},
        {1, 37, 11}, {5, 300, 9}, {1, 544, 24}, {1, 1640, 30}, {1, 1600, 4100}, {1, 1536, 4097},
        {1, 1500, 6400}};
    const Size size = kSizes[number % 14];
    const int turn = number / 14, blockSize = 16 << number % 5, bits = turn % 2 ? 8 : 4;
    IvcLinear c{};
    c.type = turn / 2 % 2 ? IVC_FLOAT16 : IVC_BFLOAT16;
    c.rows = size.rows;
    c.features = size.features;
    c.out = size.out;
    c.activation = static_cast<IvcActivation>(number % 4);
    c.gated = turn / 4 % 2;
    c.slope = c.scale = 1;
    c.epsilon = 1e-6f;
    const size_t blocks = (c.features + blockSize - 1) / blockSize, features = c.features, rows = c.rows;
    const size_t columns = static_cast<size_t>(c.gated + 1) * c.out, results = rows * c.out;
    Buffer x(2 * rows * features), values(columns * blocks * blockSize * bits / 8), scales(2 * columns * blocks);
    Buffer points(number % 2 ? (columns * ((blocks * bits + 7) / 8) + 1) / 2 * 2 : 0), weight(2 * columns * features);
    Buffer norm(number % 3 ? 2 * features : 0), bias(number % 7 ? 2 * columns : 0), residual(number % 5 ? 2 * results : 0);
    Buffer y(2 * results);
    for (Buffer* buffer : {&x, &values, &scales, &points, &norm, &bias, &residual}) buffer->fill(c.type);
    const IvcPacked given{values.data, scales.data, points.data, blockSize, bits};
    require(ivcFusedPacked(&c, &given, x.data, norm.data, bias.data, residual.data, y.data, nullptr));
    require(ivcUnpack(&c, &given, weight.data, nullptr));
    read({&y, &weight});
}

// Votes, seeds, scores and kept rows, and the compaction that follows.
void selection(int number) {
    static const int kSizes[] = {64, 128, 8, 80, 20};
    IvcSelection c{};
    c.type = static_cast<IvcType>(number % 3);
    c.softmax = number % 2 ? IVC_SOFTMAX_ALL : IVC_SOFTMAX_VISUAL;
    c.kvHeads = between(1, 3);
    c.headDim = kSizes[number % 5];
    c.visual = number % 7 ? between(1, 400) : number % 2 + 1;
    c.text = between(1, 90);
    if (number % 10 == 3) {  // more than one launch scores and keeps
        c.kvHeads = 1;
        c.visual = 4100;
        c.text = 5;
    }
    c.rows = c.visual + c.text;
    c.queries = between(1, c.text);
    c.keepCount = between(1, c.visual);
    c.seedDivisor = 2 * between(1, 50);
    std::vector<int32_t> order(c.rows);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator);
    std::vector<int32_t> visual(order.begin(), order.begin() + c.visual), text(order.begin() + c.visual, order.end());
    std::sort(visual.begin(), visual.end());
    std::sort(text.begin(), text.end());
    const int kept = c.text + c.keepCount, past = between(0, 9), capacity = past + kept + between(0, 5);
    const size_t row = c.headDim * bytesOf(c.type);
    Buffer values(c.kvHeads * c.rows * row), priority(4 * c.visual), seeds(4 * ivcSeedCount(c.visual, c.seedDivisor));
    Buffer visualIndex(4 * c.visual), textIndex(4 * c.text), queryIndex(4 * c.queries), workspace(ivcSelectionWorkspace(&c));
    Buffer keepIndex(4 * kept), scores(4 * c.visual), gathered(c.kvHeads * kept * row), length(4), origin(4 * capacity);
    values.fill(c.type);
    priority.fill(IVC_BFLOAT16);
    visualIndex.fill(visual);
    textIndex.fill(text);
    queryIndex.fill(std::vector<int32_t>(text.end() - c.queries, text.end()));
    length.fill({past});
    require(ivcSelectTokens(&c, values.data, priority.floats(), visualIndex.integers(), textIndex.integers(),
        queryIndex.integers(), keepIndex.integers(), scores.floats(), seeds.integers(), workspace.data, nullptr));
    Buffer again(keepIndex.bytes), apart(scores.bytes), first(seeds.bytes), other(workspace.bytes);
    require(ivcTokenScores(&c, values.data, visualIndex.integers(), queryIndex.integers(), apart.floats(), first.integers(),
        other.data, nullptr));
    require(ivcKeptRows(&c, apart.floats(), first.integers(), priority.floats(), visualIndex.integers(), textIndex.integers(),
        again.integers(), other.data, nullptr));
    require(ivcCacheIndex(keepIndex.integers(), kept, past, capacity, origin.integers(), nullptr));
    const auto bytes = static_cast<int32_t>(row);
    const IvcRows rows{values.data, gathered.data, c.kvHeads, bytes};
    require(ivcCompactGather(&rows, 1, c.rows, keepIndex.integers(), kept, nullptr));
    Buffer cache(c.kvHeads * capacity * row), appended(c.kvHeads * capacity * row);
    const IvcRows into{values.data, cache.data, c.kvHeads, bytes}, behind{gathered.data, appended.data, c.kvHeads, bytes};
    require(ivcCompactGatherInto(&into, 1, c.rows, keepIndex.integers(), kept, length.integers(), capacity, nullptr));
    require(ivcAppendRows(&behind, 1, kept, length.integers(), capacity, nullptr));
    read({&keepIndex, &scores, &seeds, &again, &apart, &first, &origin, &gathered});
    Buffer written(c.kvHeads * kept * row);  // caches' other rows are not initialised
    for (const Buffer* one : {&cache, &appended}) {
        require(cudaMemcpy2D(written.data, kept * row, static_cast<char*>(one->data) + past * row, capacity * row, kept * row,
            c.kvHeads, cudaMemcpyDeviceToDevice));
        read({&written});
    }
}

// Pixels of levels, of pictures and of frames.
void pixels(int number) {
    IvcPixels c{};
    c.outer = between(1, 90);
    c.given = number % 2 ? between(1, 2) : 1;
    c.frames = c.given * between(1, 2);
    c.inner = number % 3 ? 196 : between(1, 3000);
    c.factor = 1 / 255.0f;
    for (float& deviation : c.std) deviation = 0.25f;
    const size_t size = size_t{3} * c.outer * c.inner;
    Buffer levels((size * c.given + 1) / 2 * 2), made(4 * size * c.frames);
    levels.fill(IVC_FLOAT16);
    require(ivcScalePixels(&c, static_cast<const uint8_t*>(levels.data), made.floats(), nullptr));
    read({&made});
}

// The first and the last kernel of a decode step.
void step(int number) {
    static const int kHidden[] = {64, 1536, 37, 4104}, kVocab[] = {5, 1000, 33000, 151936};
    IvcStep c{};
    c.type = static_cast<IvcType>(number % 3);
    c.axes = number % 2 ? 3 : between(1, 6);
    c.pairs = number % 2 ? 64 : between(1, 70);
    c.hidden = kHidden[number % 4];
    c.vocab = kVocab[number / 2 % 4];
    c.scale = 2;
    const size_t one = bytesOf(c.type), lengths = number % 3 ? 2 : 1;
    const bool ofTable = number % 5 != 0;
    const int rows = ofTable ? std::min(c.vocab, 1000) : 1;
    Pinned given(4 * (1 + c.axes + lengths)), row(one * c.hidden), wanted(4), best(8), told(4 * c.vocab);
    for (size_t i = 0; i < 1 + c.axes + lengths; ++i) given.data[i] = between(0, rows - 1);
    if (number % 4 == 1) given.data[0] = -1;  // the token of the answer before
    best.data[0] = rows - 1;
    memset(row.data, 0, one * c.hidden);
    *wanted.data = number / 3 % 2;
    IvcStep begin = c;
    begin.vocab = rows;
    Buffer table(ofTable ? one * rows * c.hidden : 0), frequencies(4 * c.axes * c.pairs), embeds(one * c.hidden);
    Buffer cos(4 * c.pairs), sin(4 * c.pairs), length(4), whole(lengths == 2 ? 4 : 0);
    Buffer x(one * c.vocab), logits(4 * c.vocab), scratch(4 * IVC_ANSWER_SCRATCH);
    for (Buffer* buffer : {&table, &x}) buffer->fill(c.type);
    frequencies.fill(IVC_BFLOAT16);
    require(cudaMemset(scratch.data, 0, scratch.bytes));
    for (int i = 0; i < 2; ++i) {
        require(ivcTakeStep(&begin, given.data, table.data, row.data, number % 2 ? best.data : nullptr,
            frequencies.floats(), embeds.data, cos.floats(), sin.floats(), length.integers(), whole.integers(),
            nullptr));
        require(ivcGiveAnswer(&c, x.data, wanted.data, logits.floats(), best.data,
            reinterpret_cast<float*>(told.data), scratch.integers(), nullptr));
    }
    read({&embeds, &cos, &sin, &length, &whole, &logits, &scratch});
}

struct Kind {
    const char* name;
    void (*run)(int number);
    int cases;
};

// Cases of a kind are numbered from 0 on.
const Kind kKinds[] = {{"decoder", decoder, 30}, {"encoder", encoder, 24}, {"joined", joined, 30}, {"turned", turned, 36},
    {"linear", linear, 72}, {"packed", packed, 112}, {"selection", selection, 30}, {"pixels", pixels, 12},
    {"step", step, 24}};

}  // namespace

int main(int count, char** arguments) {
    printf("kernels of version %d\n", ivcKernelsVersion());
    for (const Kind& kind : kKinds) {
        if (count > 1 && !strstr(kind.name, arguments[1])) continue;
        const int cases = count > 2 ? atoi(arguments[2]) : kind.cases;
        for (int i = 0; i < cases; ++i) kind.run(i);
        require(cudaDeviceSynchronize());
        printf("%s: %d cases ran\n", kind.name, cases);
        fflush(stdout);
    }
}
