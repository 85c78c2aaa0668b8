// tokenizer.json: text to token ids and back, as Hugging Face's `tokenizers` does.
//
// Byte pair encodings on bytes (GPT-2's and Qwen's kind) or with byte fallback (Llama's kind), with the normalisers,
// pre-tokenizers and decoders that these have. Anything else is refused with a sentence.
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

// A token that is found in the text as it is written, before anything else.
struct AddedToken {
    int32_t id = 0;
    std::string text;
    bool singleWord = false, stripsLeft = false, stripsRight = false, normalized = false, special = false;
};

// Token ids of a text, of which the first `before` stand for what is before some place in it alone.
struct Encoding {
    std::vector<int32_t> ids;
    size_t before = 0;
};

// A tokenizer, read once. Several threads may use it at once.
class Tokenizer {
   public:
    // text: of a tokenizer.json; `what` names it in errors. Throws where it is damaged, or of a kind that is not known.
    Tokenizer(const std::string& text, const std::string& what);
    ~Tokenizer();
    // The same of a file, of at most 128 MiB.
    static std::unique_ptr<Tokenizer> read(const std::string& path);

    // begin: whether to add what a text begins (and ends) with. Throws where `text` is not UTF-8.
    std::vector<int32_t> encode(const std::string& text, bool begin) const;
    // The same, and how many ids are before byte `place`, where a character begins, as the offsets of `tokenizers` say.
    Encoding encodeFrom(const std::string& text, bool begin, size_t place) const;
    // Special tokens are left out; unfinished characters are U+FFFD.
    std::string decode(const std::vector<int32_t>& ids) const;
    std::optional<int32_t> find(const std::string& token) const;   // the id of a token's text
    std::optional<std::string> tokenText(int32_t id) const;        // a token's text, as the vocabulary has it

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

// Pieces of an answer, as soon as the ids so far make whole characters.
class TextStream {
   public:
    // The tokenizer outlives it.
    explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
    // What one more id adds to the text; empty as long as its last character is not whole.
    std::string add(int32_t id);

   private:
    const Tokenizer& tokenizer_;
    std::vector<int32_t> ids_;
    std::string told_;
};

}  // namespace ivc
