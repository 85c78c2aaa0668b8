// CudaGpu over a stand-in for CUDA that does nothing before it must: what is on the stream runs when somebody waits for it.
// Prints nothing where all is so, and fails at the first fact that is none.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <utility>
#include <vector>

#include "../tensorrt/cuda.h"
#include "ivc/error.h"

namespace {

using Work = std::vector<std::function<void()>>;

struct Stream {
    Work waiting;
    bool capturing = false;
    Work captured;
};

std::map<char*, size_t> pinned, device;  // memory that is held, and its bytes
int streams = 0, waits = 0;

void require(bool fact, const char* what) {
    if (fact) return;
    std::cerr << "it is not so that " << what << "\n";
    std::exit(1);
}

bool within(const std::map<char*, size_t>& held, const void* address, size_t size) {
    const auto* at = static_cast<const char*>(address);
    for (const auto& [begin, bytes] : held) {
        if (at >= begin && at + size <= begin + bytes) return true;
    }
    return false;
}

Stream* of(cudaStream_t stream) { return reinterpret_cast<Stream*>(stream); }

void put(cudaStream_t stream, std::function<void()> work) {
    (of(stream)->capturing ? of(stream)->captured : of(stream)->waiting).push_back(std::move(work));
}

cudaError_t held(std::map<char*, size_t>& memory, void** address, size_t size) {
    *address = std::malloc(size);
    std::memset(*address, 0xA5, size);
    memory[static_cast<char*>(*address)] = size;
    return cudaSuccess;
}

cudaError_t released(std::map<char*, size_t>& memory, void* address) {
    if (address != nullptr) require(memory.erase(static_cast<char*>(address)) == 1, "memory is given back once");
    std::free(address);
    return cudaSuccess;
}

void copyRows(const cudaMemcpy3DParms& p) {
    const auto at = [](const cudaPitchedPtr& memory, const cudaPos& begin, size_t row, size_t slice) {
        return static_cast<char*>(memory.ptr) + (slice * memory.ysize + row) * memory.pitch + begin.x;
    };
    for (size_t i = 0; i < p.extent.depth * p.extent.height; ++i) {
        const size_t slice = i / p.extent.height, row = i % p.extent.height;
        std::memcpy(at(p.dstPtr, p.dstPos, row, slice), at(p.srcPtr, p.srcPos, row, slice), p.extent.width);
    }
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* number) { return *number = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    return *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 7, cudaSuccess;
}
cudaError_t cudaMalloc(void** address, size_t size) { return held(device, address, size); }
cudaError_t cudaFree(void* address) { return released(device, address); }
cudaError_t cudaMallocHost(void** address, size_t size) { return held(pinned, address, size); }
cudaError_t cudaFreeHost(void* address) { return released(pinned, address); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = reinterpret_cast<cudaStream_t>(new Stream);
    ++streams;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    require(of(stream)->waiting.empty(), "a stream is idle when it is destroyed");
    delete of(stream);
    --streams;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    ++waits;
    for (const auto& work : std::exchange(of(stream)->waiting, {})) work();
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t stream) {
    put(stream, [=] { std::memset(address, value, size); });
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
    if (kind == cudaMemcpyHostToDevice) require(within(pinned, from, size), "what goes up is in pinned memory");
    if (kind == cudaMemcpyDeviceToHost) require(within(pinned, to, size), "what comes down goes to pinned memory");
    put(stream, [=] {
        require(kind == cudaMemcpyDeviceToHost || within(device, to, size), "a copy goes to memory of the device");
        std::memcpy(to, from, size);
    });
    return cudaSuccess;
}
cudaError_t cudaMemcpy3DAsync(const cudaMemcpy3DParms* given, cudaStream_t stream) {
    put(stream, [p = *given] { copyRows(p); });
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    of(stream)->capturing = true;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    of(stream)->capturing = false;
    *graph = reinterpret_cast<cudaGraph_t>(new Work(std::exchange(of(stream)->captured, {})));
    return cudaSuccess;
}
#if CUDART_VERSION >= 12000
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* runnable, cudaGraph_t graph, unsigned long long) {
#else
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* runnable, cudaGraph_t graph, cudaGraphNode_t*, char*, size_t) {
#endif
    *runnable = reinterpret_cast<cudaGraphExec_t>(new Work(*reinterpret_cast<Work*>(graph)));
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete reinterpret_cast<Work*>(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t runnable) {
    delete reinterpret_cast<Work*>(runnable);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t runnable, cudaStream_t stream) {
    for (const auto& work : *reinterpret_cast<Work*>(runnable)) put(stream, work);
    return cudaSuccess;
}

}  // extern "C"

namespace {

std::vector<char> values(size_t size, size_t seed) {
    std::vector<char> found(size);
    for (size_t i = 0; i < size; ++i) found[i] = static_cast<char>((i * 31 + i / 255 + seed) % 251);
    return found;
}

std::vector<char> downloaded(ivc::Gpu& gpu, const void* address, size_t size) {
    std::vector<char> found(size);
    gpu.download(found.data(), address, size);
    return found;
}

void test() {
    const size_t mebi = size_t{1} << 20;
    const std::vector<size_t> sizes{0, 1, 4, 511, mebi / 2, mebi / 2 + 1, 4 * mebi - 3, 4 * mebi, 4 * mebi + 1, 13 * mebi + 7};
    ivc::CudaGpu gpu;
    std::vector<void*> places;
    for (size_t i = 0; i < sizes.size(); ++i) {
        places.push_back(gpu.allocate(sizes[i] + 1));
        std::vector<char> given = values(sizes[i], i);
        gpu.upload(places[i], given.data(), given.size());
        given.assign(given.size(), 'x');  // as who has uploaded it may
    }
    for (size_t i = 0; i < sizes.size(); ++i) {
        require(downloaded(gpu, places[i], sizes[i]) == values(sizes[i], i), "what went up is what comes down");
        require(downloaded(gpu, static_cast<char*>(places[i]) + sizes[i], 1)[0] == 0, "nothing behind it is written to");
    }
    const int before = waits;
    for (char i = 0; i < 100; ++i) gpu.upload(places[3], &i, 1);
    require(waits == before, "small inputs go up without a wait");

    void* const copy = gpu.allocate(4 * mebi);
    const auto replay = gpu.capture([&] { gpu.copy(copy, places[7], 4 * mebi); });
    require(static_cast<bool>(replay), "copies within the device can be captured");
    replay();
    require(downloaded(gpu, copy, 4 * mebi) == values(4 * mebi, 7), "what was captured runs when it is replayed");

    gpu.upload(copy, sizes.data(), sizeof(size_t));
    gpu.free(copy);  // which waits: the upload goes to memory that is there
    for (void* place : places) gpu.free(place);
    gpu.upload(gpu.allocate(1), "y", 1);  // is still to run when the GPU is given up
}

}  // namespace

int main() {
    test();
    require(streams == 0 && pinned.empty(), "streams and pinned memory are given back");
    require(ivc::computeCapability() == "8.7", "a compute capability is read");
    for (const auto& entry : device) std::free(entry.first);
    return 0;
}
