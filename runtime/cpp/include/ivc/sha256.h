// SHA-256 (FIPS 180-4).
#pragma once

#include <cstddef>
#include <string>

namespace ivc {

std::string sha256(const char* data, size_t size);  // as 64 hexadecimal digits

}  // namespace ivc
