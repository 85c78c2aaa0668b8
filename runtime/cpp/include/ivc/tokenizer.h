// tokenizer.json: text to token ids and back, with the same results as Hugging Face's `tokenizers`.
//
// Known are byte pair encodings on bytes (as GPT-2's and Qwen's) or with byte fallback (as Llama's), with the normalisers,
// pre-tokenizers and decoders that these have. Other tokenizers are refused with one sentence.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ivc/json.h"

namespace ivc {

class Regex;

// A token that is looked for in the text first, before the text is split.
struct AddedToken {
    int32_t id = 0;
    std::string text;
    bool singleWord = false, stripsLeft = false, stripsRight = false, normalized = false, special = false;
};

// The token ids of a text. The first `before` of them cover only what comes before a given place in the text.
struct Encoding {
    std::vector<int32_t> ids;
    size_t before = 0;
};

// A tokenizer. Several threads may use it at the same time.
class Tokenizer {
   public:
    // text: the content of a tokenizer.json. what: names it in errors. Throws if it is damaged, or of an unknown kind.
    Tokenizer(const std::string& text, const std::string& what);
    ~Tokenizer();
    // The same for a file of at most 128 MiB.
    static std::unique_ptr<Tokenizer> read(const std::string& path);

    // The ids of a text. begin: whether to add the tokens that a text begins (and ends) with. Throws if `text` is not UTF-8.
    std::vector<int32_t> encode(const std::string& text, bool begin) const;
    // The same, and how many ids come before byte `place`, by the offsets of `tokenizers`. A character must begin there.
    Encoding encodeFrom(const std::string& text, bool begin, size_t place) const;
    // The text of ids. Special tokens are left out. Incomplete characters become U+FFFD.
    std::string decode(const std::vector<int32_t>& ids) const;
    std::optional<int32_t> find(const std::string& token) const;   // the id of a token's text
    std::optional<std::string> tokenText(int32_t id) const;        // a token's text in the vocabulary

   private:
    using Normalizer = std::function<std::string(const std::string&)>;
    // A part of the text, and whether the text begins with it. ends: for each byte, where the character ends that it is
    // of, in the normalised text; none where nobody asks.
    struct Piece {
        std::string text;
        bool first = false;
        std::vector<size_t> ends = {};
    };
    using PreTokenizer = std::function<std::vector<Piece>(std::vector<Piece>)>;
    using DecoderStep = std::function<std::vector<std::string>(std::vector<std::string>)>;
    struct Merge {
        int32_t rank = 0, id = 0;
    };
    class Words;
    class Writer;

    void readModel(const Field& model);
    void readAdded(const Field& root);
    void readNormalizer(const Field& field);
    void readPreTokenizer(const Field& field);
    void readSplit(const Field& field);
    void readTemplate(const Field& field);
    void readDecoder(const Field& field);
    std::string normalize(std::string text) const;
    void encodeText(const std::string& text, bool first, size_t boundary, Writer& out) const;
    void encodeWord(const Piece& word, size_t boundary, Writer& out) const;
    void split(const std::string& text, bool normalized, const std::function<void(const std::string&, size_t)>& other,
        size_t boundary, Writer& out) const;
    size_t blanksBehind(int32_t id) const;

    std::unordered_map<std::string, int32_t> vocabulary_;
    std::unordered_map<int32_t, std::string> texts_;
    std::unordered_map<uint64_t, Merge> merges_;
    std::unordered_map<int32_t, AddedToken> added_;
    std::unordered_map<std::string, int32_t> addedIds_;
    std::vector<std::vector<AddedToken>> found_[2];  // by first byte, longest first; as written, and normalised
    bool byteFallback_ = false, fuseUnknown_ = false, ignoreMerges_ = false, trimsOffsets_ = false;
    std::optional<int32_t> unknown_;
    std::vector<Normalizer> normalizers_;
    std::vector<PreTokenizer> preTokenizers_;
    std::vector<DecoderStep> decoders_;
    std::vector<int32_t> before_, behind_;
};

// Decodes an answer id by id, and returns a piece whenever its characters are complete.
class TextStream {
   public:
    // Keep the tokenizer as long as the stream.
    explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
    // The text that one more id adds; empty while its last character is incomplete.
    std::string add(int32_t id);

   private:
    const Tokenizer& tokenizer_;
    std::vector<int32_t> ids_;
    std::string told_;
};

}  // namespace ivc
