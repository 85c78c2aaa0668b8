// Calls with many extents, of attention and of products, for compute-sanitizer. Every buffer has its own allocation of
// exactly the needed size, and cache rows that no call may read are not initialised.
//
//   nvcc -std=c++17 -arch=native sanitize.cu ../kernels/*.cu -o sanitize
//   compute-sanitizer --tool memcheck|racecheck|initcheck ./sanitize [cases]
#include <stdio.h>
#include <stdlib.h>

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
            const uint16_t sign = static_cast<uint16_t>(between(0, 1) << 15);
            const uint16_t some = static_cast<uint16_t>(between(0, 127));
            bits[i] = static_cast<uint16_t>(sign | (type == IVC_FLOAT16 ? 0x3800 + some : 0x3f00 + some));
        }
        if (bytes > 0) require(cudaMemcpy(data, bits.data(), bytes, cudaMemcpyHostToDevice));
    }
    void fill(const std::vector<int32_t>& values) {
        require(cudaMemcpy(data, values.data(), bytes, cudaMemcpyHostToDevice));
    }
};

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
    std::vector<char> answer(y.bytes);
    require(cudaMemcpy(answer.data(), y.data, y.bytes, cudaMemcpyDeviceToHost));
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
    c.scale = 0.1f;
    const size_t size = c.type == IVC_FLOAT32 ? 4 : 2;
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
    std::vector<char> answer(y.bytes);
    require(cudaMemcpy(answer.data(), y.data, y.bytes, cudaMemcpyDeviceToHost));
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
    const size_t row = c.headDim * (c.type == IVC_FLOAT32 ? 4 : 2), rows = c.rows;
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
    std::vector<char> answer(y.bytes);
    require(cudaMemcpy(answer.data(), y.data, y.bytes, cudaMemcpyDeviceToHost));
}

void product(int number) {
    static const int kRows[] = {1, 2, 4, 7, 12};
    IvcLinear c{};
    c.type = number % 2 ? IVC_FLOAT16 : IVC_BFLOAT16;
    c.rows = kRows[number / 5 % 5];
    c.features = number % 3 ? between(1, 300) : 8 * between(1, 60);
    c.out = number % 4 ? between(1, 200) : between(1000, 1300);
    c.activation = IVC_SWISH;
    c.gated = number % 2;
    c.slope = c.scale = 1;
    const int blockSize = 16 << number % 5, bits = number / 3 % 2 ? 8 : 4;
    const size_t blocks = (c.features + blockSize - 1) / blockSize, features = c.features, rows = c.rows;
    const size_t columns = static_cast<size_t>(c.gated + 1) * c.out, results = rows * c.out;
    Buffer x(2 * rows * features), values(columns * blocks * blockSize * bits / 8), scales(2 * columns * blocks), y(2 * results);
    Buffer points(number % 2 ? (columns * ((blocks * bits + 7) / 8) + 1) / 2 * 2 : 0), weight(2 * columns * features);
    Buffer norm(number % 5 ? 2 * features : 0), bias(number % 7 ? 2 * columns : 0), residual(number % 3 ? 2 * results : 0);
    for (Buffer* buffer : {&x, &values, &scales, &points, &norm, &bias, &residual}) buffer->fill(c.type);
    const IvcPacked packed{values.data, scales.data, points.data, blockSize, bits};
    require(ivcFusedPacked(&c, &packed, x.data, norm.data, bias.data, residual.data, y.data, nullptr));
    require(ivcUnpack(&c, &packed, weight.data, nullptr));
    Buffer again(2 * results), normed(2 * rows * features), sums(2 * rows * columns), activated(2 * results);
    sums.fill(c.type);
    require(cudaDeviceSynchronize());  // weights are read before the previous kernel has ended
    require(ivcFusedLinear(
        &c, x.data, norm.data, weight.data, bias.data, residual.data, again.data, nullptr));
    if (norm.bytes > 0) require(ivcNormRows(&c, x.data, norm.data, normed.data, nullptr));
    IvcLinear layer = c;
    layer.layerNorm = 1;
    Buffer both(4 * features), centred(2 * rows * features);
    both.fill(c.type);
    require(ivcNormRows(&layer, x.data, both.data, centred.data, nullptr));
    require(ivcActivate(&c, sums.data, bias.data, residual.data, activated.data, nullptr));
    for (const Buffer* buffer : {&y, &weight, &again, norm.bytes > 0 ? &normed : &y, &centred, &activated}) {
        std::vector<char> answer(buffer->bytes);
        require(cudaMemcpy(answer.data(), buffer->data, buffer->bytes, cudaMemcpyDeviceToHost));
    }
}

}  // namespace

int main(int count, char** arguments) {
    const int cases = count > 1 ? atoi(arguments[1]) : 40;
    for (int i = 0; i < cases; ++i) {
        decoder(i);
        encoder(i);
        joined(i);
        product(i);
    }
    require(cudaDeviceSynchronize());
    printf("%d cases ran\n", 4 * cases);
}
