// What runs of engines need of a GPU and of one engine. CUDA and TensorRT give it, and in tests the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace ivc {

using Shape = std::vector<int64_t>;

enum class Type { kFloat32, kFloat16, kBfloat16, kInt32 };

size_t bytes(Type type);
const char* nameOf(Type type);

// Values of a tensor; throws where no memory could hold them.
int64_t count(const Shape& shape);

// A block of rows within memory where rows begin `pitch` bytes apart, and slices `height` rows.
struct Pitched {
    void* address = nullptr;
    size_t pitch = 0, height = 0, start = 0;  // start: bytes from a row's begin to the block's
};

// A device's memory, by addresses, in the order of one stream.
class Gpu {
   public:
    virtual ~Gpu() = default;
    virtual void* allocate(size_t size) = 0;  // zeros, at a multiple of 256 bytes
    virtual void free(void* address) noexcept = 0;
    // Copies `size` bytes to the device, which `fill` writes to host memory piece by piece: `some` of them from the byte
    // `first` on. `first` is a multiple of 8, and the host memory lies at one.
    using Fill = std::function<void(void* to, size_t first, size_t some)>;
    virtual void write(void* to, size_t size, const Fill& fill) = 0;
    virtual void download(void* to, const void* from, size_t size) = 0;  // waits until it is there
    virtual void copy(void* to, const void* from, size_t size) = 0;
    // Copies `rows` rows of `size` bytes of each of `slices` slices.
    virtual void copyBlocks(const Pitched& to, const Pitched& from, size_t size, size_t rows, size_t slices) = 0;
    virtual void synchronize() = 0;
    // What puts on the stream, in one launch, all that `work` would; none where that cannot be captured.
    virtual std::function<void()> capture(const std::function<void()>& work) = 0;

    void upload(void* to, const void* from, size_t size) {  // `from` may change afterwards
        write(to, size, [from](void* at, size_t first, size_t some) { std::memcpy(at, static_cast<const char*>(from) + first, some); });
    }
};

// An input or an output of an engine; -1 in its shape where a run decides.
struct EngineTensor {
    bool input = false;
    Type type = Type::kFloat32;
    Shape shape;
    bool host = false;  // whether the engine reads or writes it in host memory, as it does inputs that shapes depend on
};

// One engine, with an execution context for each of its profiles.
class Engine {
   public:
    virtual ~Engine() = default;
    virtual const std::map<std::string, EngineTensor>& tensors() const = 0;
    virtual size_t scratch() const = 0;  // bytes that any context works in
    virtual void useScratch(void* address) = 0;
    // False where the profile does not take it.
    virtual bool setInput(size_t profile, const std::string& name, const Shape& shape, void* address) = 0;
    virtual bool setOutput(size_t profile, const std::string& name, void* address) = 0;
    // Of an output, once all inputs are set; -1 where that is not known.
    virtual Shape shape(size_t profile, const std::string& name) const = 0;
    virtual bool start(size_t profile) = 0;
};

}  // namespace ivc
