// UTF-8, and the properties of characters that tokenizers need.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace ivc {

// Whether a text is valid UTF-8.
bool isUtf8(std::string_view text);

// The code point that begins at byte `at` of a UTF-8 text. bytes: set to its length.
uint32_t codePoint(std::string_view text, size_t at, size_t& bytes);
size_t characterBefore(std::string_view text, size_t at);  // the first byte of the character that ends at `at`
void append(std::string& text, uint32_t point);             // adds a code point, in UTF-8

// The text of bytes that may not be UTF-8. Each longest beginning of a character that is not completed becomes one U+FFFD.
std::string lossy(std::string_view bytes);

// A UTF-8 text in normal form C, by the tables of Unicode 9, which `tokenizers` uses.
std::string nfc(const std::string& text);

bool isSpace(uint32_t point);   // whether it has Unicode's property White_Space
bool isWord(uint32_t point);    // whether it is a letter, mark, decimal number or connector, as \w
bool isBlank(uint32_t point);   // whether Python's str.strip removes it

// What to strip: newlines, or all characters of isBlank.
enum class Strip { kNewlines, kBlanks };
// The text without these at its beginning, or at its end.
std::string_view stripLeft(std::string_view text, Strip what);
std::string_view stripRight(std::string_view text, Strip what);

}  // namespace ivc
