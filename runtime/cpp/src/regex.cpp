#include "regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "ivc/error.h"

namespace ivc {
namespace {

constexpr char kSpace[] = "\\t-\\r\\x{85}\\p{Z}";  // White_Space; PCRE2's own \s holds U+180E besides
constexpr size_t kMostPattern = 10'000;
constexpr uint32_t kMostSteps = 20'000'000, kMostHeapKiB = 64 << 10;

// A pattern in PCRE2's spelling.
std::string translated(const std::string& pattern) {
    std::string found;
    bool inClass = false;
    for (size_t i = 0; i < pattern.size(); ++i) {
        const char c = pattern[i];
        if (c == '\\' && i + 1 < pattern.size()) {
            const char next = pattern[++i];
            if (next == 's') {
                found += inClass ? kSpace : std::string("[") + kSpace + "]";
            } else if (next == 'S' && !inClass) {
                found += std::string("[^") + kSpace + "]";
            } else {
                found += {c, next};
            }
            continue;
        }
        if (c == '[' && !inClass) {
            inClass = true;
            found += c;
            if (i + 1 < pattern.size() && pattern[i + 1] == '^') found += pattern[++i];
            continue;
        }
        if (c == ']') inClass = false;
        found += c;
    }
    return found;
}

}  // namespace

struct Regex::Code {
    pcre2_code* code = nullptr;
    pcre2_match_context* context = nullptr;

    ~Code() {
        pcre2_code_free(code);
        pcre2_match_context_free(context);
    }
};

Regex::Regex(const std::string& pattern) : code_(std::make_unique<Code>()) {
    if (pattern.size() > kMostPattern) throw Error("a tokenizer's regular expression is too long: export the model again");
    const std::string text = translated(pattern);
    int error = 0;
    PCRE2_SIZE at = 0;
    code_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
        PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &at, nullptr);
    if (code_->code == nullptr) {
        PCRE2_UCHAR message[200];
        pcre2_get_error_message(error, message, sizeof message);
        throw Error(std::string("a tokenizer's regular expression cannot be read (") +
                    reinterpret_cast<const char*>(message) + "): export the model again");
    }
    pcre2_jit_compile(code_->code, PCRE2_JIT_COMPLETE);  // where there is none it is interpreted
    code_->context = pcre2_match_context_create(nullptr);
    if (code_->context == nullptr) throw Error("there is no memory for a regular expression: close other programs");
    pcre2_set_match_limit(code_->context, kMostSteps);
    pcre2_set_heap_limit(code_->context, kMostHeapKiB);
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;

void Regex::parts(std::string_view text, const std::function<void(std::string_view, bool)>& part) const {
    const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> match(
        pcre2_match_data_create_from_pattern(code_->code, nullptr), pcre2_match_data_free);
    if (!match) throw Error("there is no memory for a regular expression: close other programs");
    size_t told = 0, at = 0;
    while (at <= text.size()) {
        const int count = pcre2_match(code_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
            PCRE2_NO_UTF_CHECK, match.get(), code_->context);
        if (count == PCRE2_ERROR_NOMATCH) break;
        if (count < 0) throw Error("a tokenizer's regular expression takes too long for this text: shorten it");
        const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(match.get());
        if (ends[0] > ends[1] || ends[0] < told) break;  // \K within a look-around
        if (ends[0] > told) part(text.substr(told, ends[0] - told), false);
        if (ends[1] > ends[0]) part(text.substr(ends[0], ends[1] - ends[0]), true);
        told = ends[1];
        at = ends[1];
        if (ends[1] == ends[0]) {  // an empty match: look on behind the next character
            ++at;
            while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) ++at;
        }
    }
    if (told < text.size()) part(text.substr(told), false);
}

}  // namespace ivc
