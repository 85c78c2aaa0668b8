#include "ivc/tokenizer.h"

#include <algorithm>
#include <cctype>
#include <queue>

#include "ivc/error.h"
#include "ivc/files.h"
#include "ivc/unicode.h"
#include "regex.h"

namespace ivc {
namespace {

constexpr uint64_t kMostFileBytes = 128u << 20;
constexpr size_t kMostText = 64u << 20;  // bytes that are encoded at once
constexpr char kAgain[] = "export the model again";
constexpr char kReplacement[] = "\xef\xbf\xbd";
const std::string kGpt2Words = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

bool startsWith(std::string_view text, std::string_view beginning) {
    return text.substr(0, beginning.size()) == beginning;
}

bool endsWith(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

std::string replaced(const std::string& text, const std::string& old, const std::string& by) {
    std::string found;
    size_t from = 0;
    for (size_t at = text.find(old); at != std::string::npos; at = text.find(old, from)) {
        found.append(text, from, at - from).append(by);
        from = at + old.size();
        if (found.size() > 2 * kMostText) throw Error("the text becomes too long: shorten it");
    }
    return found.append(text, from, std::string::npos);
}

// The characters that stand for bytes: those that can be seen stand for themselves, the others for U+0100 and on.
struct ByteCharacters {
    std::string text[256];
    std::unordered_map<uint32_t, uint8_t> byte;

    ByteCharacters() {
        uint32_t next = 0x100;
        for (uint32_t i = 0; i < 256; ++i) {
            const bool seen = (i >= '!' && i <= '~') || (i >= 0xa1 && i <= 0xac) || i >= 0xae;
            const uint32_t point = seen ? i : next++;
            append(text[i], point);
            byte[point] = static_cast<uint8_t>(i);
        }
    }
};

const ByteCharacters& byteCharacters() {
    static const ByteCharacters kCharacters;
    return kCharacters;
}

// The byte that "<0x0A>" stands for, or -1.
int32_t fallbackByte(const std::string& token) {
    if (token.size() != 6 || token.compare(0, 3, "<0x") != 0 || token[5] != '>') return -1;
    int32_t value = 0;
    for (const char c : token.substr(3, 2)) {
        const size_t digit = std::string("0123456789ABCDEFabcdef").find(c);
        if (digit == std::string::npos) return -1;
        value = value * 16 + static_cast<int32_t>(digit < 16 ? digit : digit - 6);
    }
    return value;
}

std::string byteToken(uint8_t byte) {
    const char* digits = "0123456789ABCDEF";
    return std::string("<0x") + digits[byte >> 4] + digits[byte & 15] + ">";
}

std::vector<std::string> joinFallbackBytes(const std::vector<std::string>& tokens) {
    std::vector<std::string> found;
    std::string bytes;
    const auto flush = [&] {
        if (bytes.empty()) return;
        if (isUtf8(bytes)) {
            found.push_back(bytes);
        } else {
            for (size_t i = 0; i < bytes.size(); ++i) found.push_back(kReplacement);
        }
        bytes.clear();
    };
    for (const std::string& token : tokens) {
        const int32_t byte = fallbackByte(token);
        if (byte >= 0) {
            bytes += static_cast<char>(byte);
        } else {
            flush();
            found.push_back(token);
        }
    }
    flush();
    return found;
}

std::vector<std::string> joinByteCharacters(const std::vector<std::string>& tokens) {
    std::string bytes;
    for (const std::string& token : tokens) {
        std::string own;
        bool known = true;
        for (size_t at = 0, size = 0; at < token.size() && known; at += size) {
            const auto byte = byteCharacters().byte.find(codePoint(token, at, size));
            known = byte != byteCharacters().byte.end();
            if (known) own += static_cast<char>(byte->second);
        }
        bytes += known ? own : token;
    }
    return {lossy(bytes)};
}

// A regular expression that matches a text alone.
std::string literal(const std::string& text) {
    std::string found;
    for (const char c : text) {
        const bool plain = static_cast<uint8_t>(c) >= 0x80 || std::isalnum(static_cast<uint8_t>(c)) != 0;
        if (!plain) found += '\\';
        found += c;
    }
    return found;
}

// The pattern of Split and Replace: a text, or a regular expression.
std::string patternOf(const Field& pattern, bool& regex) {
    regex = pattern.has("Regex");
    return pattern[regex ? "Regex" : "String"].text();
}

// For each byte, where the character ends that it is of.
std::vector<size_t> characterEnds(const std::string& text) {
    std::vector<size_t> found;
    for (size_t at = 0, size = 0; at < text.size(); at += size) {
        codePoint(text, at, size);
        found.insert(found.end(), size, at + size);
    }
    return found;
}

// Bytes of whole characters that both texts begin with.
size_t shared(const std::string& one, const std::string& other) {
    const size_t most = std::min(one.size(), other.size());
    size_t at = static_cast<size_t>(std::mismatch(one.begin(), one.begin() + static_cast<ptrdiff_t>(most), other.begin()).first - one.begin());
    while (at > 0 && at < one.size() && (static_cast<uint8_t>(one[at]) & 0xc0) == 0x80) --at;
    return at;
}

// The one character that a Metaspace step writes for a blank.
std::string markOf(const Field& field) {
    const std::string mark = field["replacement"].text();
    size_t size = 0;
    if (!mark.empty()) codePoint(mark, 0, size);
    if (mark.empty() || size != mark.size()) field["replacement"].refuse("is not a single character");
    return mark;
}

std::vector<Field> steps(const Field& field, const char* list) {
    const std::string type = field["type"].text();
    return type == "Sequence" ? field[list].items(100) : std::vector<Field>{field};
}

}  // namespace

Tokenizer::~Tokenizer() = default;

std::unique_ptr<Tokenizer> Tokenizer::read(const std::string& path) {
    return std::make_unique<Tokenizer>(readFile(path, kAgain, kMostFileBytes), path);
}

Tokenizer::Tokenizer(const std::string& text, const std::string& what) {
    const Json content = parseJson(text, what, kAgain);
    const Field root(content, what, kAgain);
    readModel(root["model"]);
    if (root.has("normalizer") && !root["normalizer"].isNull()) {
        for (const Field& step : steps(root["normalizer"], "normalizers")) readNormalizer(step);
    }
    if (root.has("pre_tokenizer") && !root["pre_tokenizer"].isNull()) {
        for (const Field& step : steps(root["pre_tokenizer"], "pretokenizers")) readPreTokenizer(step);
    }
    if (root.has("decoder") && !root["decoder"].isNull()) {
        for (const Field& step : steps(root["decoder"], "decoders")) readDecoder(step);
    }
    readAdded(root);
    if (root.has("post_processor") && !root["post_processor"].isNull()) {
        for (const Field& step : steps(root["post_processor"], "processors")) {
            if (step["type"].choice({"ByteLevel", "TemplateProcessing"}) != "ByteLevel") {
                readTemplate(step);
            } else {
                trimsOffsets_ = !step.has("trim_offsets") || step["trim_offsets"].boolean();
            }
        }
    }
}

void Tokenizer::readModel(const Field& model) {
    if (model.has("type")) model["type"].choice({"BPE"});
    for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
        if (model.has(name) && !model[name].isNull()) model[name].choice({""});
    }
    if (model.has("dropout") && !model["dropout"].isNull()) model["dropout"].number(0, 0);
    const auto flag = [&](const char* name) { return model.has(name) && !model[name].isNull() && model[name].boolean(); };
    byteFallback_ = flag("byte_fallback");
    fuseUnknown_ = flag("fuse_unk");
    ignoreMerges_ = flag("ignore_merges");
    const Field stored = model["vocab"];
    if (!stored.json().is_object()) stored.refuse("is not an object");
    vocabulary_.reserve(stored.json().size());
    for (const auto& entry : stored.json().items()) {
        const auto& id = entry.value();
        if (!id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) stored.refuse("holds an invalid id");
        vocabulary_[entry.key()] = id.get<int32_t>();
        texts_[id.get<int32_t>()] = entry.key();
    }
    const auto known = [&](const std::string& token, const Field& field) {
        const auto entry = vocabulary_.find(token);
        if (entry == vocabulary_.end()) field.refuse("names a token that is not in the vocabulary");
        return entry->second;
    };
    if (model.has("unk_token") && !model["unk_token"].isNull()) {
        unknown_ = known(model["unk_token"].text(), model["unk_token"]);
    }
    const Field merges = model["merges"];
    if (!merges.json().is_array()) merges.refuse("is not a list");
    merges_.reserve(merges.json().size());
    int32_t rank = 0;
    for (const Json& merge : merges.json()) {
        std::string left, right;
        if (merge.is_string()) {
            const std::string both = merge.get<std::string>();
            const size_t space = both.find(' ');
            if (space == std::string::npos) merges.refuse("has an entry that is not a pair");
            left = both.substr(0, space);
            right = both.substr(space + 1);
        } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
            left = merge[0].get<std::string>();
            right = merge[1].get<std::string>();
        } else {
            merges.refuse("has an entry that is not a pair");
        }
        const auto pair = static_cast<uint64_t>(known(left, merges)) << 32 | static_cast<uint64_t>(known(right, merges));
        merges_[pair] = {rank++, known(left + right, merges)};
    }
}

void Tokenizer::readAdded(const Field& root) {
    for (auto& found : found_) found.resize(256);
    if (!root.has("added_tokens") || root["added_tokens"].isNull()) return;
    for (const Field& entry : root["added_tokens"].items()) {
        const auto flag = [&](const char* name) { return entry.has(name) && entry[name].boolean(); };
        AddedToken token;
        token.id = static_cast<int32_t>(entry["id"].integer(0, INT32_MAX));
        token.text = entry["content"].text();
        if (token.text.empty()) continue;
        token.singleWord = flag("single_word");
        token.stripsLeft = flag("lstrip");
        token.stripsRight = flag("rstrip");
        token.normalized = flag("normalized");
        token.special = flag("special");
        added_[token.id] = token;
        addedIds_[token.text] = token.id;
        AddedToken sought = token;
        if (token.normalized) sought.text = normalize(token.text);
        if (sought.text.empty()) continue;
        found_[token.normalized ? 1 : 0][static_cast<uint8_t>(sought.text[0])].push_back(sought);
    }
    for (auto& tables : found_) {
        for (auto& tokens : tables) {
            std::stable_sort(tokens.begin(), tokens.end(),
                [](const AddedToken& a, const AddedToken& b) { return a.text.size() > b.text.size(); });
        }
    }
}

void Tokenizer::readNormalizer(const Field& field) {
    const std::string type = field["type"].choice({"NFC", "Prepend", "Replace", "Sequence"});
    if (type == "Sequence") {
        for (const Field& step : field["normalizers"].items(100)) readNormalizer(step);
    } else if (type == "NFC") {
        normalizers_.push_back(nfc);
    } else if (type == "Prepend") {
        const std::string text = field["prepend"].text();
        normalizers_.push_back([text](const std::string& given) { return given.empty() ? given : text + given; });
    } else {
        bool regex = false;
        const std::string pattern = patternOf(field["pattern"], regex), content = field["content"].text();
        if (regex) field["pattern"].refuse("is a regular expression, which this version does not support here");
        if (pattern.empty()) field["pattern"].refuse("is empty");
        normalizers_.push_back([=](const std::string& given) { return replaced(given, pattern, content); });
    }
}

void Tokenizer::readSplit(const Field& field) {
    field["behavior"].choice({"Isolated"});
    if (field.has("invert") && field["invert"].boolean()) field["invert"].refuse("is true, which this version does not support");
    bool isRegex = false;
    std::string pattern = patternOf(field["pattern"], isRegex);
    if (!isRegex) pattern = literal(pattern);
    const auto regex = std::make_shared<Regex>(pattern);
    preTokenizers_.push_back([regex](const std::vector<Piece>& pieces) {
        std::vector<Piece> found;
        for (const Piece& piece : pieces) {
            bool first = piece.first;
            regex->parts(piece.text, [&](std::string_view part, bool) {
                found.push_back({std::string(part), first});
                first = false;
                if (piece.ends.empty()) return;
                const auto from = piece.ends.begin() + (part.data() - piece.text.data());
                found.back().ends.assign(from, from + static_cast<ptrdiff_t>(part.size()));
            });
        }
        return found;
    });
}

void Tokenizer::readPreTokenizer(const Field& field) {
    const std::string type = field["type"].choice({"ByteLevel", "Digits", "Metaspace", "Sequence", "Split"});
    const auto flag = [&](const char* name, bool fallback) { return field.has(name) ? field[name].boolean() : fallback; };
    if (type == "Sequence") {
        for (const Field& step : field["pretokenizers"].items(100)) readPreTokenizer(step);
    } else if (type == "Split") {
        readSplit(field);
    } else if (type == "Digits") {
        const Json split = {{"behavior", "Isolated"},
            {"pattern", {{"Regex", flag("individual_digits", false) ? "\\p{N}" : "\\p{N}+"}}}};
        readSplit(Field(split, "the pre-tokenizer", kAgain));
    } else if (type == "Metaspace") {
        const std::string mark = markOf(field);
        const std::string scheme = field.has("prepend_scheme")
                                       ? field["prepend_scheme"].choice({"always", "first", "never"})
                                       : flag("add_prefix_space", true) ? "always" : "never";
        if (flag("split", true)) field.refuse("splits words, which this version does not support");
        preTokenizers_.push_back([=](std::vector<Piece> pieces) {
            for (Piece& piece : pieces) {
                std::vector<size_t> ends;
                for (size_t i = 0; i < piece.ends.size(); ++i) {
                    ends.insert(ends.end(), piece.text[i] == ' ' ? mark.size() : 1, piece.ends[i]);
                }
                piece.text = replaced(piece.text, " ", mark);
                const bool wanted = scheme == "always" || (scheme == "first" && piece.first);
                if (wanted && !startsWith(piece.text, mark)) {
                    piece.text = mark + piece.text;
                    if (!ends.empty()) ends.insert(ends.begin(), mark.size(), ends.front());
                }
                piece.ends = std::move(ends);
            }
            return pieces;
        });
    } else {
        const bool space = flag("add_prefix_space", true), words = flag("use_regex", true);
        const auto regex = words ? std::make_shared<Regex>(kGpt2Words) : nullptr;
        preTokenizers_.push_back([=](const std::vector<Piece>& pieces) {
            std::vector<Piece> found;
            for (const Piece& piece : pieces) {
                const size_t more = space && !startsWith(piece.text, " ") ? 1 : 0;
                const std::string text = std::string(more, ' ') + piece.text;
                const auto add = [&](std::string_view part) {
                    Piece mapped;
                    mapped.first = piece.first;
                    auto at = static_cast<size_t>(part.data() - text.data());
                    for (const char c : part) {
                        const std::string& character = byteCharacters().text[static_cast<uint8_t>(c)];
                        mapped.text += character;
                        if (!piece.ends.empty()) {
                            mapped.ends.insert(mapped.ends.end(), character.size(), piece.ends[std::max(at, more) - more]);
                        }
                        ++at;
                    }
                    found.push_back(std::move(mapped));
                };
                if (regex) {
                    regex->parts(text, [&](std::string_view part, bool) { add(part); });
                } else {
                    add(text);
                }
            }
            return found;
        });
    }
}

void Tokenizer::readTemplate(const Field& field) {
    std::vector<int32_t>* ids = &before_;
    for (const Field& part : field["single"].items(100)) {
        if (part.has("Sequence")) {
            ids = &behind_;
            continue;
        }
        const std::string name = part["SpecialToken"]["id"].text();
        for (const Field& id : field["special_tokens"][name]["ids"].items(100)) {
            ids->push_back(static_cast<int32_t>(id.integer(0, INT32_MAX)));
        }
    }
}

void Tokenizer::readDecoder(const Field& field) {
    const std::string type =
        field["type"].choice({"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"});
    if (type == "Sequence") {
        for (const Field& step : field["decoders"].items(100)) readDecoder(step);
    } else if (type == "ByteFallback") {
        decoders_.push_back(joinFallbackBytes);
    } else if (type == "ByteLevel") {
        decoders_.push_back(joinByteCharacters);
    } else if (type == "Fuse") {
        decoders_.push_back([](const std::vector<std::string>& tokens) {
            std::string text;
            for (const std::string& token : tokens) text += token;
            return std::vector<std::string>{text};
        });
    } else if (type == "Replace") {
        bool regex = false;
        const std::string pattern = patternOf(field["pattern"], regex), content = field["content"].text();
        if (regex || pattern.empty()) field["pattern"].refuse("is not a text");
        decoders_.push_back([=](std::vector<std::string> tokens) {
            for (std::string& token : tokens) token = replaced(token, pattern, content);
            return tokens;
        });
    } else if (type == "Metaspace") {
        const std::string mark = markOf(field);
        const bool prefix = !field.has("prepend_scheme") || field["prepend_scheme"].text() != "never";
        decoders_.push_back([=](std::vector<std::string> tokens) {
            for (size_t i = 0; i < tokens.size(); ++i) {
                if (i == 0 && prefix && startsWith(tokens[0], mark)) tokens[0].erase(0, mark.size());
                tokens[i] = replaced(tokens[i], mark, " ");
            }
            return tokens;
        });
    } else {
        const std::string content = field["content"].text();
        if (content.size() != 1) field["content"].refuse("is not a single character");
        const auto start = field["start"].integer(0, 1000), stop = field["stop"].integer(0, 1000);
        decoders_.push_back([=](std::vector<std::string> tokens) {
            for (std::string& token : tokens) {
                for (int64_t i = 0; i < start && startsWith(token, content); ++i) token.erase(0, 1);
                for (int64_t i = 0; i < stop && endsWith(token, content); ++i) token.pop_back();
            }
            return tokens;
        });
    }
}

std::string Tokenizer::normalize(std::string text) const {
    for (const Normalizer& step : normalizers_) text = step(text);
    return text;
}

// Ids, and how many of the first of them are before the place that is asked about.
class Tokenizer::Writer {
   public:
    void add(int32_t id, bool isBefore) {
        beyond_ = beyond_ || !isBefore;
        if (!beyond_) ++found_.before;
        found_.ids.push_back(id);
    }
    void add(const std::vector<int32_t>& ids) {  // of no text
        for (const int32_t id : ids) add(id, true);
    }
    Encoding take() { return std::move(found_); }

   private:
    Encoding found_;
    bool beyond_ = false;
};

// Blanks at the end of a token, which are not counted to it where offsets are trimmed, unless it is nothing else.
size_t Tokenizer::blanksBehind(int32_t id) const {
    const std::optional<std::string> text = trimsOffsets_ ? tokenText(id) : std::nullopt;
    size_t count = 0, bytes = 0;
    for (size_t end = text ? text->size() : 0; end > 0; ++count) {
        const size_t at = characterBefore(*text, end);
        const uint32_t point = codePoint(*text, at, bytes);
        if (point != 0x120 && !isSpace(point)) return count;  // GPT-2's character for a blank
        end = at;
    }
    return 0;
}

// Ids of the added tokens within a text; `other` is called with what lies between them, and where it begins. boundary:
// of the text, before which ids count as before.
void Tokenizer::split(const std::string& text, bool normalized,
    const std::function<void(const std::string&, size_t)>& other, size_t boundary, Writer& out) const {
    size_t told = 0, at = 0;
    const auto bounded = [&](size_t begin, size_t end) {
        size_t bytes = 0;
        if (begin > 0 && isWord(codePoint(text, characterBefore(text, begin), bytes))) return false;
        return end == text.size() || !isWord(codePoint(text, end, bytes));
    };
    while (at < text.size()) {
        const AddedToken* match = nullptr;
        for (const AddedToken& token : found_[normalized ? 1 : 0][static_cast<uint8_t>(text[at])]) {
            if (text.compare(at, token.text.size(), token.text) != 0) continue;
            match = &token;
            break;
        }
        if (match == nullptr) {
            ++at;
            continue;
        }
        size_t begin = at, end = at + match->text.size(), bytes = 0;
        at = end;
        if (match->singleWord && !bounded(begin, end)) continue;
        while (match->stripsLeft && begin > told) {
            const size_t before = characterBefore(text, begin);
            if (before < told || !isSpace(codePoint(text, before, bytes))) break;
            begin = before;
        }
        while (match->stripsRight && end < text.size() && isSpace(codePoint(text, end, bytes))) end += bytes;
        if (begin > told) other(text.substr(told, begin - told), told);
        out.add(match->id, end - blanksBehind(match->id) <= boundary);
        told = end;
        at = std::max(at, end);
    }
    if (told < text.size()) other(text.substr(told), told);
}

std::vector<int32_t> Tokenizer::encode(const std::string& text, bool begin) const {
    return encodeFrom(text, begin, 0).ids;
}

Encoding Tokenizer::encodeFrom(const std::string& text, bool begin, size_t place) const {
    if (!isUtf8(text)) throw Error("the prompt is not UTF-8 text: write it in UTF-8");
    if (text.size() > kMostText) throw Error("the prompt is too long: shorten it");
    Writer out;
    if (begin) out.add(before_);
    const auto written = [&](const std::string& part, size_t at) {
        const std::string normal = normalize(part);
        size_t boundary = 0;
        if (at + part.size() <= place) {
            boundary = normal.size();
        } else if (at < place) {
            boundary = shared(normal, normalize(part.substr(0, place - at)));
        }
        const auto rest = [&](const std::string& piece, size_t within) {
            encodeText(piece, at + within == 0, std::max(boundary, within) - within, out);
        };
        split(normal, true, rest, boundary, out);
    };
    split(text, false, written, place, out);
    if (begin) out.add(behind_);
    return out.take();
}

void Tokenizer::encodeText(const std::string& text, bool first, size_t boundary, Writer& out) const {
    std::vector<Piece> pieces{{text, first}};
    if (boundary > 0 && boundary < text.size()) pieces[0].ends = characterEnds(text);
    for (const PreTokenizer& step : preTokenizers_) pieces = step(std::move(pieces));
    for (const Piece& piece : pieces) {
        if (!piece.text.empty()) encodeWord(piece, boundary, out);
    }
}

// One word's symbols, merged pair by pair, of all pairs the one of the lowest rank first, and of equals the first.
class Tokenizer::Words {
   public:
    explicit Words(const std::unordered_map<uint64_t, Merge>& merges) : merges_(merges) {}

    void add(int32_t id, size_t end) {
        const auto at = static_cast<int32_t>(symbols_.size());
        symbols_.push_back({id, at - 1, at + 1, end, true});
    }

    // Calls `take` with each id, and where its part of the word ends.
    template <class Take>
    void merge(const Take& take) {
        if (symbols_.empty()) return;
        symbols_.back().next = -1;
        for (int32_t at = 0; symbols_[static_cast<size_t>(at)].next >= 0; ++at) consider(at);
        while (!queue_.empty()) {
            const Candidate best = queue_.top();
            queue_.pop();
            Symbol& left = symbols_[static_cast<size_t>(best.at)];
            if (!left.alive || left.next < 0) continue;
            const Merge* merge = find(left);
            if (merge == nullptr || merge->id != best.id) continue;  // its symbols are others by now
            Symbol& right = symbols_[static_cast<size_t>(left.next)];
            right.alive = false;
            left.id = best.id;
            left.end = right.end;
            left.next = right.next;
            if (left.next >= 0) symbols_[static_cast<size_t>(left.next)].previous = best.at;
            if (left.previous >= 0) consider(left.previous);
            if (left.next >= 0) consider(best.at);
        }
        for (const Symbol& symbol : symbols_) {
            if (symbol.alive) take(symbol.id, symbol.end);
        }
    }

   private:
    struct Symbol {
        int32_t id, previous, next;
        size_t end;
        bool alive;
    };
    struct Candidate {
        int32_t rank, at, id;
        bool operator<(const Candidate& other) const {
            return rank != other.rank ? rank > other.rank : at > other.at;
        }
    };

    const Merge* find(const Symbol& left) const {
        const auto right = static_cast<uint64_t>(symbols_[static_cast<size_t>(left.next)].id);
        const auto found = merges_.find(static_cast<uint64_t>(left.id) << 32 | right);
        return found == merges_.end() ? nullptr : &found->second;
    }

    void consider(int32_t at) {
        const Merge* merge = find(symbols_[static_cast<size_t>(at)]);
        if (merge != nullptr) queue_.push({merge->rank, at, merge->id});
    }

    const std::unordered_map<uint64_t, Merge>& merges_;
    std::vector<Symbol> symbols_;
    std::priority_queue<Candidate> queue_;
};

void Tokenizer::encodeWord(const Piece& piece, size_t boundary, Writer& out) const {
    const std::string& word = piece.text;
    const auto take = [&](int32_t id, size_t end) {
        out.add(id, piece.ends.empty() ? boundary > 0 : piece.ends[end - 1] - blanksBehind(id) <= boundary);
    };
    if (ignoreMerges_) {
        const auto whole = vocabulary_.find(word);
        if (whole != vocabulary_.end()) {
            take(whole->second, word.size());
            return;
        }
    }
    Words symbols(merges_);
    bool unknown = false;  // one is due
    size_t unknownEnd = 0;
    for (size_t at = 0, size = 0; at < word.size(); at += size) {
        codePoint(word, at, size);
        const std::string character = word.substr(at, size);
        const auto known = vocabulary_.find(character);
        if (known != vocabulary_.end()) {
            if (unknown) symbols.add(*unknown_, unknownEnd);
            unknown = false;
            symbols.add(known->second, at + size);
            continue;
        }
        std::vector<int32_t> bytes;
        for (size_t i = 0; i < size && byteFallback_; ++i) {
            const auto byte = vocabulary_.find(byteToken(static_cast<uint8_t>(character[i])));
            if (byte != vocabulary_.end()) bytes.push_back(byte->second);
        }
        if (byteFallback_ && bytes.size() == size) {
            for (const int32_t byte : bytes) symbols.add(byte, at + size);
        } else if (unknown_) {
            if (unknown && !fuseUnknown_) symbols.add(*unknown_, unknownEnd);
            unknown = true;
            unknownEnd = at + size;
        }
    }
    if (unknown) symbols.add(*unknown_, unknownEnd);
    symbols.merge(take);
}

std::optional<int32_t> Tokenizer::find(const std::string& token) const {
    const auto added = addedIds_.find(token);
    if (added != addedIds_.end()) return added->second;
    const auto known = vocabulary_.find(token);
    if (known != vocabulary_.end()) return known->second;
    return std::nullopt;
}

std::optional<std::string> Tokenizer::tokenText(int32_t id) const {
    const auto added = added_.find(id);
    if (added != added_.end()) return added->second.text;
    const auto known = texts_.find(id);
    if (known != texts_.end()) return known->second;
    return std::nullopt;
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids) const {
    std::vector<std::string> tokens;
    for (const int32_t id : ids) {
        const auto added = added_.find(id);
        if (added != added_.end() && added->second.special) continue;
        const auto text = tokenText(id);
        if (text) tokens.push_back(*text);
    }
    std::string found;
    if (decoders_.empty()) {
        for (size_t i = 0; i < tokens.size(); ++i) found += (i > 0 ? " " : "") + tokens[i];
        return found;
    }
    for (const DecoderStep& step : decoders_) tokens = step(std::move(tokens));
    for (const std::string& token : tokens) found += token;
    return found;
}

std::string TextStream::add(int32_t id) {
    ids_.push_back(id);
    const std::string text = tokenizer_.decode(ids_);
    if (text.size() <= told_.size() || endsWith(text, kReplacement) || !startsWith(text, told_)) return "";
    std::string piece = text.substr(told_.size());
    told_ = text;
    return piece;
}

}  // namespace ivc
