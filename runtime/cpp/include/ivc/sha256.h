// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace ivc {

// Of bytes that come piece by piece.
class Sha256 {
   public:
    Sha256();
    void add(const char* data, size_t size);
    void add(const std::string& text) { add(text.data(), text.size()); }
    std::string digest() const;  // of all that was added, as sha256 gives it

   private:
    std::array<uint32_t, 8> state_;
    std::array<uint8_t, 64> rest_{};  // what fills no block yet
    uint64_t size_ = 0;               // of all that was added, in bytes
};

std::string sha256(const char* data, size_t size);  // as 64 hexadecimal digits

}  // namespace ivc
