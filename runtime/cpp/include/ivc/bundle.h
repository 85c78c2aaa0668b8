// A bundle on disk, and the parts that the host needs: manifest, tokenizer and embeddings.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ivc/conversation.h"
#include "ivc/files.h"
#include "ivc/floats.h"
#include "ivc/image.h"
#include "ivc/manifest.h"
#include "ivc/tokenizer.h"
#include "ivc/visual.h"

namespace ivc {

// Token ids of a conversation. Those from index `question` on are its last message.
struct Prompt {
    std::vector<int32_t> ids;
    int32_t question = 0;
};

// An open bundle. Several devices and threads may use it at the same time.
class Bundle {
   public:
    // folder: what ivc-export wrote. Throws if there is no bundle, if a file is damaged or was edited, or if a path
    // leads out of the folder.
    explicit Bundle(const std::string& folder);

    const std::string& folder() const { return folder_; }          // its folder
    const Manifest& manifest() const { return manifest_; }         // the content of manifest.json
    const Tokenizer& tokenizer() const { return *tokenizer_; }     // the tokenizer of tokenizer.json

    // The path of a graph's file. name: "vision", "prefix" or "decoder". Throws if the file is not the exported one.
    std::string graphFile(const std::string& name) const;
    // The rows of the embedding table for these ids, float32, [tokens, hidden]. Throws if an id has no row.
    std::vector<float> embed(const std::vector<int32_t>& tokens) const;
    // The row of an id as it is stored, [hidden]. nullptr if it is not stored in `dtype`. Throws if the id has no row.
    const char* storedEmbedding(int32_t token, const std::string& dtype) const;
    // The token ids of `text`. Its i-th image token is repeated for each visual token of picture i. begin: whether a
    // conversation begins here. The tokenizer then adds its first token, unless the text has it. Throws if image tokens
    // and pictures differ in number, or if no text follows the last picture.
    std::vector<int32_t> encode(const std::string& text, const std::vector<Grid>& pictures, bool begin) const;
    // The token ids of a whole conversation, and where its last message, the user's, begins. pictures: those of all
    // messages. `question` is 0 if nothing comes before that message, or no picture does.
    Prompt conversation(const std::vector<Message>& messages, const std::vector<Grid>& pictures) const;
    // The text of a conversation. Throws if only the chat template itself can write it.
    std::string render(const std::vector<Message>& messages) const;

   private:
    size_t rowOf(int32_t token) const;
    Prompt encodeFrom(const std::string& text, const std::vector<Grid>& pictures, bool begin, size_t place) const;

    std::string folder_;
    Manifest manifest_;
    std::unique_ptr<Tokenizer> tokenizer_;
    std::unique_ptr<MappedFile> weights_;
    std::string bos_;
};

}  // namespace ivc
