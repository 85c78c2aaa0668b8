// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace ivc {

// The hash of bytes that come piece by piece.
class Sha256 {
   public:
    // The hash of no bytes yet.
    Sha256();
    // Adds bytes.
    void add(const char* data, size_t size);
    void add(const std::string& text) { add(text.data(), text.size()); }
    // The hash of all bytes that were added, as 64 hexadecimal digits.
    std::string digest() const;

   private:
    std::array<uint32_t, 8> state_;
    std::array<uint8_t, 64> rest_{};  // bytes of an incomplete block
    uint64_t size_ = 0;               // bytes that were added
};

// The hash of `size` bytes, as 64 hexadecimal digits.
std::string sha256(const char* data, size_t size);

}  // namespace ivc
