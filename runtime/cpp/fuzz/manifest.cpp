// A manifest.json, and the chat segments within one.
#include <cstddef>
#include <cstdint>

#include "ivc/error.h"
#include "ivc/manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try {
        ivc::parseManifest(std::string(reinterpret_cast<const char*>(data), size), "the manifest");
    } catch (const ivc::Error&) {
    }
    return 0;
}
