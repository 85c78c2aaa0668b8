// A bundle on disk, and what of it the host needs: manifest, tokenizer, embeddings.
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

// Token ids of a conversation, of which those from `question` on stand for its last message.
struct Prompt {
    std::vector<int32_t> ids;
    int32_t question = 0;
};

// A bundle, opened. Several devices and threads may use it at once.
class Bundle {
   public:
    // Throws where there is no bundle, or it is damaged, edited, or leaves its folder.
    explicit Bundle(const std::string& folder);

    const std::string& folder() const { return folder_; }          // where it is
    const Manifest& manifest() const { return manifest_; }         // what its manifest.json says
    const Tokenizer& tokenizer() const { return *tokenizer_; }     // of its tokenizer.json

    // The file of a graph, "vision", "prefix" or "decoder". Throws where it does not hold what was exported.
    std::string graphFile(const std::string& name) const;
    // Rows of the embedding table, one behind the other, in float32: [tokens, hidden]. Throws where an id has none.
    std::vector<float> embed(const std::vector<int32_t>& tokens) const;
    // Token ids of `text`, its i-th image token repeated once for each visual token of picture i. begin: whether a
    // conversation begins here, so that the tokenizer adds what that takes, unless it is written. Throws where image tokens
    // and pictures are not as many, or no text follows the last picture.
    std::vector<int32_t> encode(const std::string& text, const std::vector<Grid>& pictures, bool begin) const;
    // Token ids of a whole conversation, the user's message last, and where that begins. pictures: of all messages. The
    // question is 0 where nothing, or no picture, is before.
    Prompt conversation(const std::vector<Message>& messages, const std::vector<Grid>& pictures) const;
    // The text of a conversation; throws where only the chat template itself can write it.
    std::string render(const std::vector<Message>& messages) const;

   private:
    Prompt encodeFrom(const std::string& text, const std::vector<Grid>& pictures, bool begin, size_t place) const;

    std::string folder_;
    Manifest manifest_;
    std::unique_ptr<Tokenizer> tokenizer_;
    std::unique_ptr<MappedFile> weights_;
    std::string bos_;
};

}  // namespace ivc
