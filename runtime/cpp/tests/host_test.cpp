// What the host computes, for tests that compare it with Python: a command a line of standard input, as JSON, and an
// answer a line of standard output: {"error": ...} where it is refused.
#include <iostream>
#include <memory>

#include "ivc/bundle.h"
#include "ivc/error.h"
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
        return {{"grid", gridOf(visual.grid)}, {"shape", visual.shape}, {"pixels", digest(visual.pixels)},
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
