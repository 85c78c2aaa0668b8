#include "ivc/sha256.h"

#include <algorithm>
#include <cstring>

namespace ivc {
namespace {

uint32_t rotated(uint32_t x, int by) { return x >> by | x << (32 - by); }

// The first 32 bits of the fractional parts of the `power`-th roots of the first primes.
template <size_t kCount>
std::array<uint32_t, kCount> roots(bool cube) {
    std::array<uint32_t, kCount> found{};
    size_t count = 0;
    for (uint64_t number = 2; count < kCount; ++number) {
        bool prime = true;
        for (uint64_t divisor = 2; divisor * divisor <= number; ++divisor) prime = prime && number % divisor != 0;
        if (!prime) continue;
        // floor(root * 2^32), found bit by bit in whole numbers, which no machine rounds
        unsigned __int128 root = 0;
        for (int bit = 36; bit >= 0; --bit) {
            const unsigned __int128 next = root | (static_cast<unsigned __int128>(1) << bit);
            const bool fits = cube ? next * next <= ((static_cast<unsigned __int128>(number) << 96) / next)
                                   : next * next <= (static_cast<unsigned __int128>(number) << 64);
            if (fits) root = next;
        }
        found[count++] = static_cast<uint32_t>(root);
    }
    return found;
}

void mix(std::array<uint32_t, 8>& state, const uint8_t* block) {
    static const std::array<uint32_t, 64> kRounds = roots<64>(true);
    uint32_t words[64];
    for (int i = 0; i < 16; ++i) {
        words[i] = static_cast<uint32_t>(block[4 * i]) << 24 | static_cast<uint32_t>(block[4 * i + 1]) << 16 |
                   static_cast<uint32_t>(block[4 * i + 2]) << 8 | block[4 * i + 3];
    }
    for (int i = 16; i < 64; ++i) {
        const uint32_t a = words[i - 15], b = words[i - 2];
        words[i] = words[i - 16] + words[i - 7] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) +
                   (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
    }
    std::array<uint32_t, 8> s = state;
    for (int i = 0; i < 64; ++i) {
        const uint32_t one = s[7] + (rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25)) +
                             ((s[4] & s[5]) ^ (~s[4] & s[6])) + kRounds[static_cast<size_t>(i)] + words[i];
        const uint32_t two = (rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22)) +
                             ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        s = {one + two, s[0], s[1], s[2], s[3] + one, s[4], s[5], s[6]};
    }
    for (size_t i = 0; i < 8; ++i) state[i] += s[i];
}

}  // namespace

Sha256::Sha256() : state_(roots<8>(false)) {}

void Sha256::add(const char* data, size_t size) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(data);
    const size_t held = size_ % rest_.size();
    size_ += size;
    if (held > 0) {
        const size_t taken = std::min(size, rest_.size() - held);
        if (taken > 0) std::memcpy(&rest_[held], bytes, taken);
        if (held + taken < rest_.size()) return;
        mix(state_, rest_.data());
        bytes += taken;
        size -= taken;
    }
    for (; size >= rest_.size(); bytes += rest_.size(), size -= rest_.size()) mix(state_, bytes);
    if (size > 0) std::memcpy(rest_.data(), bytes, size);
}

std::string Sha256::digest() const {
    std::array<uint32_t, 8> state = state_;
    uint8_t last[128] = {};
    const size_t left = size_ % rest_.size(), blocks = left < 56 ? 1 : 2;
    std::memcpy(last, rest_.data(), left);
    last[left] = 0x80;
    const uint64_t bits = size_ * 8;
    for (size_t i = 0; i < 8; ++i) last[64 * blocks - 1 - i] = static_cast<uint8_t>(bits >> (8 * i));
    for (size_t i = 0; i < blocks; ++i) mix(state, last + 64 * i);
    std::string found;
    for (const uint32_t word : state) {
        for (int shift = 28; shift >= 0; shift -= 4) found += "0123456789abcdef"[word >> shift & 15];
    }
    return found;
}

std::string sha256(const char* data, size_t size) {
    Sha256 hash;
    hash.add(data, size);
    return hash.digest();
}

}  // namespace ivc
