// UTF-8, and what of Unicode text needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace ivc {

// Whether a text is valid UTF-8.
bool isUtf8(std::string_view text);

// The code point at `at` of UTF-8 text, and how many bytes it takes.
uint32_t codePoint(std::string_view text, size_t at, size_t& bytes);
size_t characterBefore(std::string_view text, size_t at);  // where the character begins that ends at `at`
void append(std::string& text, uint32_t point);             // adds a code point, in UTF-8

// Text of bytes: what is no UTF-8 becomes U+FFFD, one for each longest beginning of a character.
std::string lossy(std::string_view bytes);

// UTF-8 text in normal form C, by the tables of Unicode 9 that `tokenizers` has.
std::string nfc(const std::string& text);

bool isSpace(uint32_t point);   // White_Space
bool isWord(uint32_t point);    // a letter, mark, decimal number or connector, as \w
bool isBlank(uint32_t point);   // what Python's str.strip strips

// What is stripped: newlines, or what isBlank knows.
enum class Strip { kNewlines, kBlanks };
// The text without that at its beginning, or end.
std::string_view stripLeft(std::string_view text, Strip what);
std::string_view stripRight(std::string_view text, Strip what);

}  // namespace ivc
