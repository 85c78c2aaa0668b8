// What the host computes, for tests that compare it with Python: a command a line of standard input, as JSON, and an
// answer a line of standard output: {"error": ...} where it is refused.
#include <iostream>
#include <memory>

#include "ivc/bundle.h"
#include "ivc/chat.h"
#include "ivc/error.h"
#include "ivc/ivc.h"
#include "ivc/plan.h"
#include "ivc/resize.h"
#include "ivc/sampling.h"
#include "ivc/sha256.h"
#include "ivc/unicode.h"

namespace {

using ivc::Json;

// Bytes as they were, in hexadecimal digits.
std::string bytesOf(const std::string& digits) {
    std::string found;
    for (size_t i = 0; i + 1 < digits.size(); i += 2) found += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
    return found;
}

template <class T>
std::string digest(const std::vector<T>& values) {
    return ivc::sha256(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

ivc::Method methodOf(const Json& given) {
    return {given.value("method", ""), given.value("seed", int64_t{0})};
}

std::vector<ivc::Message> messagesOf(const Json& given) {
    std::vector<ivc::Message> messages;
    for (const Json& one : given) {
        ivc::Message message;
        const std::string role = one["role"];
        message.role = role == "user"     ? ivc::Message::Role::kUser
                       : role == "system" ? ivc::Message::Role::kSystem
                                          : ivc::Message::Role::kAssistant;
        for (const Json& part : one["parts"]) {
            message.parts.push_back({part.is_null(), part.is_null() ? "" : part.get<std::string>()});
        }
        messages.push_back(message);
    }
    return messages;
}

// Rows, columns, tile; and of views left, top, right and bottom of what shows the picture.
Json gridOf(const ivc::Grid& grid) {
    Json found = {grid.rows, grid.columns, grid.tile};
    if (grid.content) {
        const ivc::Box& box = *grid.content;
        for (const int32_t side : {box.left, box.top, box.right, box.bottom}) found.push_back(side);
    }
    return found;
}

std::vector<ivc::Grid> gridsOf(const Json& given) {
    std::vector<ivc::Grid> grids;
    for (const Json& g : given) {
        ivc::Grid grid{g[0], g[1], g[2]};
        if (g.size() > 3) grid.content = ivc::Box{g[3], g[4], g[5], g[6]};
        grids.push_back(grid);
    }
    return grids;
}

// Draws what it is told to, and takes so many rows at once.
class ScriptedDevice : public ivc::Device {
   public:
    ScriptedDevice(const ivc::Manifest& manifest, int32_t most) : manifest_(manifest), most_(most) {}

    std::vector<int32_t> draws;
    int32_t looks = 0;  // at pictures, by vision

    void begin(int32_t) override { length_ = 0; }
    const std::vector<float>& run(const ivc::Run& run, const std::vector<const ivc::Visual*>& pictures) override {
        if (run.rows() > most_) throw ivc::TooLongError("these caches hold " + std::to_string(most_) + " rows: build larger ones");
        for (const ivc::Visual* picture : pictures) {
            if (picture->seen) continue;
            picture->seen = std::make_shared<ivc::Seen>();
            ++looks;
        }
        length_ += run.kept();
        logits_.assign(static_cast<size_t>(manifest_.decoder.vocabSize), 0.0f);
        logits_.at(static_cast<size_t>(draws.at(next_++))) = 1.0f;
        return logits_;
    }
    const std::vector<int32_t>& keepIndex() const override { return draws; }
    int32_t length() const override { return length_; }
    int32_t room() const override { return INT32_MAX; }
    int64_t cacheBytes() const override { return 0; }
    std::string name() const override { return "scripted"; }
    std::string dtype() const override { return "float32"; }

   private:
    const ivc::Manifest& manifest_;
    std::vector<float> logits_;
    size_t next_ = 0;
    int32_t most_, length_ = 0;
};

// A conversation whose answers are told: of each turn the prompt's ids, who votes, and what was said.
Json converse(const ivc::Bundle& bundle, const Json& command) {
    ScriptedDevice device(bundle.manifest(), command.value("most", INT32_MAX));
    ivc::ChatOptions options;
    options.followUp = ivc::followUpOf(command["follow_up"]);
    options.sampling.maxTokens = command["max_tokens"];
    ivc::Chat chat(bundle, device, options);
    Json turns = Json::array();
    for (const Json& turn : command["turns"]) {
        for (const Json& id : turn["draws"]) device.draws.push_back(id);
        std::vector<ivc::Image> images;
        for (const Json& path : turn["images"]) images.push_back(ivc::readImage(path));
        try {
            const std::string said = chat.ask(turn["question"], images);
            turns.push_back({{"answer", said}, {"prompt", chat.prompt()}, {"query_index", chat.run().queryIndex},
                {"position_ids", chat.run().positionIds}, {"looks", device.looks}, {"tokens", chat.tokens()}});
        } catch (const ivc::Error& error) {
            turns.push_back({{"error", error.what()}});
        }
    }
    return turns;
}

// What the C API says to pointers that lead nowhere.
Json withoutPointers() {
    ivc_bundle* bundle = nullptr;
    ivc_picture* picture = nullptr;
    ivc_chat* chat = nullptr;
    const uint8_t pixels[12] = {};
    Json said = Json::array();
    for (ivc_error* error : {ivc_bundle_open(nullptr, &bundle), ivc_bundle_open("nowhere", nullptr),
             ivc_picture_read(nullptr, &picture), ivc_picture_rgb(nullptr, 2, 2, 6, &picture),
             ivc_picture_bgr(pixels, 2, 2, 5, &picture), ivc_picture_rgb(pixels, 2, 2, 6, nullptr),
             ivc_chat_begin(nullptr, nullptr, nullptr, &chat),
             ivc_chat_ask(nullptr, "?", nullptr, 1, nullptr, nullptr, nullptr)}) {
        said.push_back(ivc_error_message(error));
        ivc_error_free(error);
    }
    ivc_bundle_free(bundle);
    ivc_picture_free(picture);
    ivc_chat_free(chat);
    return said;
}

struct State {
    std::unique_ptr<ivc::Tokenizer> tokenizer;
    ivc::Manifest manifest;
    std::unique_ptr<ivc::Bundle> bundle;
};

Json answer(State& state, const Json& command) {
    const std::string what = command["do"];
    if (what == "tokenizer") {
        state.tokenizer = ivc::Tokenizer::read(command["path"]);
        return {};
    }
    if (what == "encode") return state.tokenizer->encode(bytesOf(command["text"]), command.value("begin", false));
    if (what == "before") return state.tokenizer->encodeFrom(bytesOf(command["text"]), command["begin"], command["place"]).before;
    if (what == "c_api") return withoutPointers();
    if (what == "chat") return converse(*state.bundle, command);
    if (what == "decode") return state.tokenizer->decode(command["ids"]);
    if (what == "stream") {
        ivc::TextStream stream(*state.tokenizer);
        Json pieces = Json::array();
        for (const Json& id : command["ids"]) {
            const std::string piece = stream.add(id);
            if (!piece.empty()) pieces.push_back(piece);
        }
        return pieces;
    }
    if (what == "sha256") {
        ivc::Sha256 hash;
        for (const Json& piece : command["pieces"]) hash.add(bytesOf(piece));
        return hash.digest();
    }
    if (what == "nfc") return ivc::nfc(command["text"]);
    if (what == "manifest") {
        state.manifest = ivc::parseManifest(ivc::readFile(command["path"], "check the path"), command["path"]);
        return {};
    }
    if (what == "bundle") {
        state.bundle = std::make_unique<ivc::Bundle>(command["path"].get<std::string>());
        state.manifest = state.bundle->manifest();
        for (const char* name : {"vision", "prefix", "decoder"}) state.bundle->graphFile(name);
        return {};
    }
    if (what == "embed") return digest(state.bundle->embed(command["tokens"]));
    if (what == "render") return ivc::render(*state.manifest.chat, messagesOf(command["messages"]));
    if (what == "prompt") {
        const std::string text = state.bundle->render(messagesOf(command["messages"]));
        return state.bundle->encode(text, gridsOf(command["grids"]), command["begin"]);
    }
    if (what == "image") {
        const ivc::Image image = ivc::readImage(command["path"]);
        return {{"size", {image.width, image.height}}, {"pixels", digest(image.pixels)}};
    }
    if (what == "resize") {
        const ivc::Image image = ivc::readImage(command["path"]);
        ivc::Image part(command["width"], command["height"]);
        ivc::resize(image, part.width, part.height, ivc::resampleOf(command["filter"]), 0, 0, part);
        return digest(part.pixels);
    }
    if (what == "prepare") {
        const ivc::Visual visual = ivc::prepare(ivc::readImage(command["path"]), state.manifest);
        return {{"grid", gridOf(visual.grid)}, {"shape", visual.shape}, {"pixels", digest(visual.pixels.normalised())},
            {"positions", digest(visual.patchPosition)}, {"source", visual.tokenSource}, {"cells", visual.grid.cells()},
            {"covered", {visual.covered.left, visual.covered.top, visual.covered.right, visual.covered.bottom}}};
    }
    if (what == "plan") {
        const ivc::Run run = ivc::planRun(state.manifest, command["tokens"], gridsOf(command["grids"]), command["start"],
            command["ratio"], methodOf(command), command["question"]);
        return {{"position_ids", run.positionIds}, {"visual_index", run.visualIndex}, {"text_index", run.textIndex},
            {"query_index", run.queryIndex}, {"ivc_priority", run.ivcPriority}, {"keep_count", run.keepCount},
            {"next_position", run.nextPosition}, {"thumbnail_index", run.thumbnailIndex}, {"tile_map", run.tileMap},
            {"candidate_index", run.candidateIndex}};
    }
    if (what == "draw") {
        ivc::Sampling sampling;
        sampling.temperature = command["temperature"];
        sampling.topP = command["top_p"];
        sampling.topK = command["top_k"];
        sampling.repetitionPenalty = command["repetition_penalty"];
        sampling.seed = command["seed"];
        ivc::Sampler sampler(sampling);
        std::vector<int32_t> drawn;
        for (const Json& logits : command["logits"]) drawn.push_back(sampler.draw(logits));
        return drawn;
    }
    if (what == "halves") {
        std::vector<float> values;
        for (uint32_t i = 0; i < 65536; ++i) values.push_back(ivc::fromHalf(static_cast<uint16_t>(i)));
        std::vector<uint16_t> again;
        for (const float value : values) again.push_back(ivc::toHalf(value));
        return {{"values", digest(values)}, {"again", digest(again)}};
    }
    if (what == "to_halves") {
        std::vector<uint16_t> halves;
        for (const float value : command["values"].get<std::vector<float>>()) halves.push_back(ivc::toHalf(value));
        return halves;
    }
    throw ivc::Error("there is no command " + what);
}

}  // namespace

int main() {
    State state;
    for (std::string line; std::getline(std::cin, line);) {
        Json found;
        try {
            found = {{"answer", answer(state, Json::parse(line))}};
        } catch (const ivc::Error& error) {
            found = {{"error", error.what()}};
        }
        std::cout << found.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
    }
}
