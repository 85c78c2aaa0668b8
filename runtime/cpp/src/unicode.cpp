#include "ivc/unicode.h"

#include <utf8proc.h>

#include <cstdlib>

#include "ivc/error.h"

namespace ivc {
namespace {

constexpr char kReplacement[] = "\xef\xbf\xbd";

// Marks that Unicode 10 to 14 brought: `tokenizers` normalises by the tables of Unicode 9, in which they are no marks.
constexpr uint32_t kLaterMarks[][2] = {
    {0x7fd, 0x7fd}, {0x898, 0x89f}, {0x8ca, 0x8d3}, {0x9fe, 0x9fe}, {0xc3c, 0xc3c}, {0xd3b, 0xd3c}, {0xeba,
    0xeba}, {0x1715, 0x1715}, {0x1abf, 0x1ace}, {0x1df6, 0x1dfa}, {0xa82c, 0xa82c}, {0x10d24, 0x10d27},
    {0x10eab, 0x10eac}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b},
    {0x1145e, 0x1145e}, {0x11839, 0x1183a}, {0x1193d, 0x1193e}, {0x11930, 0x11930}, {0x11943, 0x11943},
    {0x119e0, 0x119e0}, {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42},
    {0x11d44, 0x11d45}, {0x11d97, 0x11d97}, {0x16ff0, 0x16ff1}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae},
    {0x1e2ec, 0x1e2ef}};

bool isLaterMark(uint32_t point) {
    for (const auto& range : kLaterMarks) {
        if (point >= range[0] && point <= range[1]) return true;
    }
    return false;
}

// Bytes of the character that begins at `at`, if it is whole and no other spelling of it is shorter; else 0, and in
// `good` how many of its bytes could begin one.
size_t whole(std::string_view text, size_t at, size_t& good) {
    const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[at + i]); };
    const uint8_t first = byte(0);
    good = 1;
    if (first < 0x80) return 1;
    const size_t size = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4) return 0;
    for (size_t i = 1; i < size; ++i) {
        if (at + i >= text.size()) return 0;
        uint8_t least = 0x80, most = 0xbf;
        if (i == 1 && first == 0xe0) least = 0xa0;
        if (i == 1 && first == 0xed) most = 0x9f;
        if (i == 1 && first == 0xf0) least = 0x90;
        if (i == 1 && first == 0xf4) most = 0x8f;
        if (byte(i) < least || byte(i) > most) return 0;
        good = i + 1;
    }
    return size;
}

}  // namespace

bool isUtf8(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
        size_t good = 0;
        const size_t size = whole(text, at, good);
        if (size == 0) return false;
        at += size;
    }
    return true;
}

uint32_t codePoint(std::string_view text, size_t at, size_t& bytes) {
    const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(text[at + i])); };
    const uint32_t first = byte(0);
    bytes = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    if (at + bytes > text.size()) bytes = text.size() - at;
    uint32_t point = bytes == 1 ? first : first & (0xffu >> (bytes + 1));
    for (size_t i = 1; i < bytes; ++i) point = point << 6 | (byte(i) & 63);
    return point;
}

size_t characterBefore(std::string_view text, size_t at) {
    do {
        --at;
    } while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xc0) == 0x80);
    return at;
}

void append(std::string& text, uint32_t point) {
    if (point < 0x80) {
        text += static_cast<char>(point);
    } else if (point < 0x800) {
        text += static_cast<char>(0xc0 | point >> 6);
        text += static_cast<char>(0x80 | (point & 63));
    } else if (point < 0x10000) {
        text += static_cast<char>(0xe0 | point >> 12);
        text += static_cast<char>(0x80 | (point >> 6 & 63));
        text += static_cast<char>(0x80 | (point & 63));
    } else {
        text += static_cast<char>(0xf0 | point >> 18);
        text += static_cast<char>(0x80 | (point >> 12 & 63));
        text += static_cast<char>(0x80 | (point >> 6 & 63));
        text += static_cast<char>(0x80 | (point & 63));
    }
}

std::string lossy(std::string_view bytes) {
    std::string found;
    for (size_t at = 0; at < bytes.size();) {
        size_t good = 0;
        const size_t size = whole(bytes, at, good);
        if (size > 0) {
            found.append(bytes.substr(at, size));
        } else {
            found += kReplacement;
        }
        at += size > 0 ? size : good;
    }
    return found;
}

std::string nfc(const std::string& text) {
    std::string found;
    size_t from = 0, bytes = 0;
    const auto compose = [&](size_t end) {
        if (end == from) return;
        utf8proc_uint8_t* composed = nullptr;
        const utf8proc_ssize_t size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data() + from),
            static_cast<utf8proc_ssize_t>(end - from), &composed,
            static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
        if (size < 0) {
            throw Error(std::string("text cannot be normalised (") + utf8proc_errmsg(size) + "): write it in UTF-8");
        }
        found.append(reinterpret_cast<char*>(composed), static_cast<size_t>(size));
        std::free(composed);
    };
    bool ascii = true;
    for (size_t at = 0; at < text.size(); at += bytes) {
        const uint32_t point = codePoint(text, at, bytes);
        ascii = ascii && point < 0x80;
        if (ascii || !isLaterMark(point)) continue;
        compose(at);
        found.append(text, at, bytes);
        from = at + bytes;
    }
    if (ascii) return text;
    compose(text.size());
    return found;
}

bool isSpace(uint32_t point) {
    return (point >= 9 && point <= 13) || point == 0x20 || point == 0x85 || point == 0xa0 || point == 0x1680 ||
           (point >= 0x2000 && point <= 0x200a) || point == 0x2028 || point == 0x2029 || point == 0x202f ||
           point == 0x205f || point == 0x3000;
}

bool isBlank(uint32_t point) { return isSpace(point) || (point >= 0x1c && point <= 0x1f); }

bool isWord(uint32_t point) {
    switch (utf8proc_category(static_cast<utf8proc_int32_t>(point))) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
        case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_MC:
        case UTF8PROC_CATEGORY_ME:
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_PC: return true;
        default: return false;
    }
}

std::string_view stripLeft(std::string_view text, Strip what) {
    size_t at = 0, bytes = 0;
    while (at < text.size()) {
        const uint32_t point = codePoint(text, at, bytes);
        if (!(what == Strip::kNewlines ? point == '\n' : isBlank(point))) break;
        at += bytes;
    }
    return text.substr(at);
}

std::string_view stripRight(std::string_view text, Strip what) {
    while (!text.empty()) {
        const size_t at = characterBefore(text, text.size());
        size_t bytes = 0;
        const uint32_t point = codePoint(text, at, bytes);
        if (!(what == Strip::kNewlines ? point == '\n' : isBlank(point))) break;
        text = text.substr(0, at);
    }
    return text;
}

}  // namespace ivc
