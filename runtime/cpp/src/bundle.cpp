#include "ivc/bundle.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "ivc/error.h"
#include "ivc/sha256.h"
#include "ivc/unicode.h"

namespace ivc {
namespace {

namespace fs = std::filesystem;

const char kAgain[] = "export the model again";
const char kCopy[] = "copy the bundle again, or export the model again";

bool exists(const std::string& path) {
    struct stat status {};
    return stat(path.c_str(), &status) == 0;
}

// The text of the token that begins a conversation, if tokenizer_config.json names one.
std::string beginning(const std::string& folder) {
    const std::string path = confined(folder, "tokenizer_config.json");
    if (!exists(path)) return "";
    const Json content = parseJson(readFile(path, kAgain), path, kAgain);
    const Field root(content, path, kAgain);
    if (!root.has("bos_token") || root["bos_token"].isNull()) return "";
    const Field bos = root["bos_token"];
    return bos.json().is_object() ? bos["content"].text() : bos.text();
}

// So many stored floats from the `first` on, in float32.
void widen(const char* table, size_t first, size_t count, const std::string& dtype, float* to) {
    if (dtype == "float32") {
        std::memcpy(to, table + 4 * first, 4 * count);
        return;
    }
    const auto bits = [&](size_t i) {
        uint16_t found;
        std::memcpy(&found, table + 2 * (first + i), 2);
        return found;
    };
    if (dtype == "float16") {
        for (size_t i = 0; i < count; ++i) to[i] = fromHalf(bits(i));
    } else {
        for (size_t i = 0; i < count; ++i) to[i] = fromBfloat16(bits(i));
    }
}

// Refuses a folder that an export left which was killed.
const std::string& finished(const std::string& folder) {
    std::error_code failed;
    const std::string name = fs::canonical(folder, failed).filename().string();
    if (failed || name.compare(0, 1, ".") != 0 || name.find(".partial-") == std::string::npos) return folder;
    throw Error(folder + " was left by an export that was killed: export the model again, which removes it");
}

// Refuses links that leave the folder, of whatever name: a runtime opens what graphs name.
void checkLinks(const std::string& folder) {
    std::error_code failed;
    for (fs::directory_iterator file(folder, failed), end; !failed && file != end; file.increment(failed)) {
        confined(folder, file->path().filename().string());
    }
    if (failed) throw Error(folder + " cannot be read (" + failed.message() + "): " + kCopy);
}

}  // namespace

Bundle::Bundle(const std::string& folder) : folder_(folder.empty() ? "." : folder), manifest_(readManifest(finished(folder_))) {
    checkLinks(folder_);
    const std::string path = confined(folder_, "tokenizer.json");
    if (!exists(path)) {
        throw Error(folder_ + " has no tokenizer.json: put the model's own files into the checkpoint folder and " +
                    "export again");
    }
    tokenizer_ = Tokenizer::read(path);
    weights_ = std::make_unique<MappedFile>(confined(folder_, manifest_.embedding.file), kCopy);
    for (const WeightFile& file : manifest_.weights) {  // of whose size the table lies within it
        if (file.file != manifest_.embedding.file || file.size == weights_->size()) continue;
        throw Error(folder_ + "/" + file.file + " changed while it was read: " + kCopy);
    }
    bos_ = beginning(folder_);
}

std::string Bundle::graphFile(const std::string& name) const {
    const Graph& graph = manifest_.graphs.at(name);
    const std::string path = confined(folder_, graph.file);
    const MappedFile file(path, kCopy);
    if (sha256(file.data(), file.size()) != graph.sha256) {
        throw Error(path + " is not the graph that was exported: " + kAgain);
    }
    return path;
}

// An id's row of the embedding table.
size_t Bundle::rowOf(int32_t token) const {
    if (token >= 0 && token < manifest_.decoder.vocabSize) return static_cast<size_t>(token);
    throw Error("token id " + std::to_string(token) + " has no embedding: export the model again");
}

const char* Bundle::storedEmbedding(int32_t token, const std::string& dtype) const {
    const EmbeddingTable& table = manifest_.embedding;
    if (table.block != 0 || table.dtype != dtype) return nullptr;
    const size_t size = static_cast<size_t>(manifest_.decoder.hiddenSize) * (dtype == "float32" ? 4 : 2);
    return weights_->data() + table.offset + rowOf(token) * size;
}

std::vector<float> Bundle::embed(const std::vector<int32_t>& tokens) const {
    const EmbeddingTable& table = manifest_.embedding;
    const auto hidden = static_cast<size_t>(manifest_.decoder.hiddenSize), block = static_cast<size_t>(table.block);
    std::vector<float> found(tokens.size() * hidden);
    float* to = found.data();
    for (const int32_t token : tokens) {
        const size_t row = rowOf(token);
        if (block == 0) {
            widen(weights_->data() + table.offset, row * hidden, hidden, table.dtype, to);
            to += hidden;
            continue;
        }
        const size_t blocks = (hidden + block - 1) / block;
        std::vector<float> scales(blocks);
        widen(weights_->data() + table.scales, row * blocks, blocks, table.dtype, scales.data());
        const char* stored = weights_->data() + table.offset + row * blocks * block;
        for (size_t i = 0; i < hidden; ++i) {
            *to++ = (static_cast<float>(static_cast<uint8_t>(stored[i])) - 128) * scales[i / block];
        }
    }
    return found;
}

std::vector<int32_t> Bundle::encode(const std::string& text, const std::vector<Grid>& pictures, bool begin) const {
    return encodeFrom(text, pictures, begin, 0).ids;
}

Prompt Bundle::conversation(const std::vector<Message>& messages, const std::vector<Grid>& pictures) const {
    const std::string rendered = render(messages);
    size_t place = 0;
    if (!pictures.empty() && messages.size() > 1) {  // where another question would make another text
        const std::vector<Part>& parts = messages.back().parts;
        const auto text = std::find_if(parts.begin(), parts.end(), [](const Part& part) { return !part.picture; });
        const bool a = text != parts.end() && stripLeft(text->text, Strip::kBlanks).substr(0, 1) == "A";
        std::vector<Message> others = messages;
        others.back().parts = {{false, a ? "B" : "A"}};
        const std::string other = render(others);
        const size_t most = std::min(rendered.size(), other.size());
        while (place < most && rendered[place] == other[place]) ++place;
        if (place == most) place = 0;
        while (place > 0 && (static_cast<uint8_t>(rendered[place]) & 0xc0) == 0x80) --place;
    }
    return encodeFrom(rendered, pictures, true, place);
}

Prompt Bundle::encodeFrom(const std::string& text, const std::vector<Grid>& pictures, bool begin, size_t place) const {
    const SpecialTokens& special = manifest_.tokens;
    const bool written = !bos_.empty() && text.compare(0, bos_.size(), bos_) == 0;
    const Encoding encoding = tokenizer_->encodeFrom(text, begin && !written, place);
    const std::vector<int32_t>& ids = encoding.ids;
    const auto visual = [&](int32_t id) { return special.isVisual(id); };
    const auto images = static_cast<size_t>(std::count_if(ids.begin(), ids.end(), visual));
    const bool video = special.video && std::find(ids.begin(), ids.end(), *special.video) != ids.end();
    if (images != pictures.size() || video) {
        throw Error("the prompt has " + std::to_string(images) + " image tokens, but there are " +
                    std::to_string(pictures.size()) + " pictures: write no image tokens into the text");
    }
    const auto last = std::find(ids.rbegin(), ids.rend(), special.image);
    if (!pictures.empty() && last - ids.rbegin() <= manifest_.selection.queryOffset) {
        throw Error("no text follows the picture, but the tokens to keep are chosen by that text: put the question " +
                    std::string("after the picture, in the prompt or in the chat template"));
    }
    const bool marks = !special.templateMarks && special.visionStart && special.visionEnd;
    Prompt prompt;
    std::vector<int32_t>& found = prompt.ids;
    size_t picture = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
        if (i == encoding.before) prompt.question = static_cast<int32_t>(found.size());
        if (ids[i] != special.image) {
            found.push_back(ids[i]);
            continue;
        }
        if (marks) found.push_back(*special.visionStart);
        found.insert(found.end(), static_cast<size_t>(pictures[picture++].visual()), ids[i]);
        if (marks) found.push_back(*special.visionEnd);
    }
    if (encoding.before == ids.size()) prompt.question = static_cast<int32_t>(found.size());
    return prompt;
}

std::string Bundle::render(const std::vector<Message>& messages) const {
    if (!manifest_.chat) {
        throw Error("the chat template of this bundle needs Jinja, which this library does not have: render the " +
                    std::string("conversation in Python, and give its text with --rendered"));
    }
    return ivc::render(*manifest_.chat, messages);
}

}  // namespace ivc
