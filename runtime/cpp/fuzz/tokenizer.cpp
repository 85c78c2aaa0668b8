// A tokenizer.json, and behind a zero byte a text that it encodes and decodes.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ivc/error.h"
#include "ivc/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const auto* zero = static_cast<const uint8_t*>(size > 0 ? std::memchr(data, 0, size) : nullptr);
    const size_t end = zero != nullptr ? static_cast<size_t>(zero - data) : size;
    const std::string file(reinterpret_cast<const char*>(data), end);
    const std::string text = zero != nullptr ? std::string(reinterpret_cast<const char*>(zero) + 1, size - end - 1) : "a b";
    try {
        const ivc::Tokenizer tokenizer(file, "the tokenizer");
        const std::vector<int32_t> ids = tokenizer.encode(text, true);
        tokenizer.decode(ids);
        ivc::TextStream stream(tokenizer);
        for (size_t i = 0; i < ids.size() && i < 50; ++i) stream.add(ids[i]);
    } catch (const ivc::Error&) {
    }
    return 0;
}
