// Converts floats of 16 bits. The functions have no branches, so that compilers can vectorise loops over them.
#pragma once

#include <cstdint>
#include <cstring>

namespace ivc {

// A float16 (IEEE 754 binary16) in float32.
inline float fromHalf(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu, wide = magnitude << 13;
    float value;
    std::memcpy(&value, &wide, 4);
    value *= 0x1p112f;  // the exponents' bias, 127 and 15
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = sign | (magnitude >= 0x7c00u ? 0x7f800000u | wide : bits);
    std::memcpy(&value, &bits, 4);
    return value;
}

// A bfloat16 in float32.
inline float fromBfloat16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The nearest float16, ties to even.
inline uint16_t toHalf(float value) {
    uint32_t bits, small;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    std::memcpy(&value, &magnitude, 4);
    value += 0.5f;  // now the last bit has the value of the smallest float16
    std::memcpy(&small, &value, 4);
    const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    uint32_t half = magnitude < 0x38800000u ? small - 0x3f000000u : normal;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    return static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : half));
}

// The nearest bfloat16, ties to even.
inline uint16_t toBfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

}  // namespace ivc
