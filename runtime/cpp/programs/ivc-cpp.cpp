// Questions about pictures, without Python.
#include <iostream>

#include "devices.h"
#include "ivc/chat.h"
#include "ivc/json.h"
#include "ivc/unicode.h"
#include "options.h"

namespace {

const char kUsage[] =
    "usage: ivc-cpp BUNDLE --prompt TEXT [--image FILE]... [options]\n"
    "  --image FILE       a JPEG or PNG; several go to the <image> marks of the prompt, or come first\n"
    "  --ratio R          fraction of visual tokens kept\n"
    "  --method NAME      ivc-prune, foreground or random, with --method-seed N\n"
    "  --system TEXT      system message, instead of the chat template's own\n"
    "  --chat             read questions from standard input; /image FILE adds a picture, /quit ends the chat\n"
    "  --follow-up HOW    for later questions of --chat: again prunes the whole conversation again (default);\n"
    "                     compacted continues on what earlier questions kept, which is faster\n"
    "  --rendered FILE    a conversation to which the chat template has been applied already\n"
    "  --requests         answer one JSON object per line of standard input: image (a list), prompt, ratio, and\n"
    "                     then (a list of later questions)\n"
    "  --sampling checkpoint, --temperature T, --top-p P, --top-k K, --repetition-penalty P, --seed N, --max-tokens N\n"
    "  --show FILE        draw the kept tokens over the picture, as a PNG file\n"
    "  --json             print one JSON object per answer, with tokens, counts and timings\n";

struct Request {
    std::string bundle, prompt, rendered, show;
    std::vector<std::string> images;
    ivc::ChatOptions chat;
    bool asked = false, talks = false, json = false, requests = false, stored = false, help = false;
    ivc::DeviceChoice device;
};

Request readOptions(const std::vector<std::string>& words) {
    Request r;
    ivc::Options options;
    const auto text = [](std::string& to) { return [&to](const std::string&, const std::string& value) { to = value; }; };
    const auto number = [](double& to) {
        return [&to](const std::string& option, const std::string& value) { to = ivc::numberOf(option, value); };
    };
    options.valued = {{"--rendered", text(r.rendered)}, {"--show", text(r.show)},
        {"--method", text(r.chat.method.name)}, {"--temperature", number(r.chat.sampling.temperature)},
        {"--top-p", number(r.chat.sampling.topP)}, {"--repetition-penalty", number(r.chat.sampling.repetitionPenalty)}};
    options.valued["--prompt"] = [&](const std::string&, const std::string& value) {
        r.prompt = value;
        r.asked = true;
    };
    options.valued["--image"] = [&](const std::string&, const std::string& value) { r.images.push_back(value); };
    options.valued["--system"] = [&](const std::string&, const std::string& value) { r.chat.system = value; };
    options.valued["--ratio"] = [&](const std::string& o, const std::string& v) { r.chat.ratio = ivc::numberOf(o, v); };
    options.valued["--follow-up"] = [&](const std::string&, const std::string& v) { r.chat.followUp = ivc::followUpOf(v); };
    options.valued["--sampling"] = [&](const std::string& option, const std::string& value) {
        if (value != "checkpoint" && value != "greedy") throw ivc::Error(option + " takes checkpoint or greedy, not " + value);
        r.stored = value == "checkpoint";
    };
    const auto whole = [&](const char* name, int64_t least, int64_t most, std::function<void(int64_t)> take) {
        options.valued[name] = [=](const std::string& option, const std::string& value) {
            take(ivc::wholeOf(option, value, least, most));
        };
    };
    whole("--method-seed", 0, INT32_MAX, [&](int64_t n) { r.chat.method.seed = n; });
    whole("--seed", 0, int64_t{1} << 53, [&](int64_t n) { r.chat.sampling.seed = static_cast<uint64_t>(n); });
    whole("--top-k", 0, INT32_MAX, [&](int64_t n) { r.chat.sampling.topK = n; });
    whole("--max-tokens", 1, INT32_MAX, [&](int64_t n) { r.chat.sampling.maxTokens = static_cast<int32_t>(n); });
    ivc::addDeviceOptions(options, r.device);
    options.flags = {{"--chat", [&] { r.talks = true; }}, {"--json", [&] { r.json = true; }},
        {"--requests", [&] { r.requests = true; }}, {"--help", [&] { r.help = true; }}};
    options.word = [&](const std::string& word) {
        if (!r.bundle.empty()) throw ivc::Error("a second bundle was given, " + word + ": give one; --help lists the options");
        r.bundle = word;
    };
    options.read(words);
    if (r.help) return r;
    if (r.bundle.empty()) throw ivc::Error("no bundle was given: give its folder");
    if (!r.asked && !r.talks && !r.requests && r.rendered.empty()) throw ivc::Error("no prompt was given: give one with --prompt");
    if (!r.show.empty() && r.images.empty()) throw ivc::Error("--show needs a picture: give one with --image");
    return r;
}

ivc::Json facts(const ivc::Chat& chat, const ivc::Device& device, const std::string& answer) {
    const ivc::Run& run = chat.run();
    ivc::Json timings = ivc::Json::object(), grids = ivc::Json::array();
    for (const auto& [stage, time] : device.times) timings[stage] = {{"seconds", time.seconds}, {"runs", time.runs}};
    for (const ivc::Grid& grid : run.grids) {
        grids.push_back({{"rows", grid.rows}, {"columns", grid.columns}, {"tiles", grid.blocks().size()}});
    }
    const bool pictures = !run.grids.empty();
    return {{"answer", answer}, {"tokens", chat.tokens()}, {"finish", chat.finish()}, {"ratio", chat.ratio()},
        {"prompt_tokens", chat.prompt().size()}, {"visual_tokens", pictures ? run.visualIndex.size() : 0},
        {"kept_visual_tokens", pictures ? run.keepCount : 0}, {"keep_index", chat.keepIndex()}, {"grids", grids},
        {"backend", device.name()}, {"dtype", device.dtype()}, {"kv_cache_bytes", device.cacheBytes()},
        {"timings", timings}};
}

// The first picture of the last question, dark where no token was kept.
void show(const ivc::Chat& chat, ivc::Image image, const std::string& path) {
    const ivc::Run& run = chat.run();
    const ivc::Visual& visual = chat.visuals().front();
    const ivc::Grid& grid = visual.grid;
    std::vector<bool> kept, rows(static_cast<size_t>(run.rows()), false);
    for (const int32_t row : chat.keepIndex()) rows.at(static_cast<size_t>(row)) = true;
    for (const int32_t token : grid.cells()) kept.push_back(rows[static_cast<size_t>(run.visualIndex[static_cast<size_t>(token)])]);
    const ivc::Box& box = visual.spread;
    for (int32_t y = 0; y < image.height; ++y) {
        uint8_t* pixel = image.row(y);
        for (int32_t x = 0; x < image.width; ++x, pixel += 3) {
            const bool inside = x >= box.left && x < box.right && y >= box.top && y < box.bottom;
            const int64_t row = inside ? int64_t{y - box.top} * grid.rows / (box.bottom - box.top) : 0;
            const int64_t column = inside ? int64_t{x - box.left} * grid.columns / (box.right - box.left) : 0;
            if (inside && kept[static_cast<size_t>(row * grid.columns + column)]) continue;
            for (int32_t i = 0; i < 3; ++i) pixel[i] = static_cast<uint8_t>(pixel[i] / 4);
        }
    }
    ivc::writePng(image, path);
}

std::vector<ivc::Image> readImages(const std::vector<std::string>& paths) {
    std::vector<ivc::Image> images;
    for (const std::string& path : paths) images.push_back(ivc::readImage(path));
    return images;
}

void answerRequests(const ivc::Bundle& bundle, ivc::Device& device, const Request& request) {
    for (std::string line; std::getline(std::cin, line);) {
        const ivc::Json content = ivc::parseJson(line, "the request", "write one JSON object per line");
        const ivc::Field root(content, "the request", "write image, prompt and ratio");
        ivc::ChatOptions options = request.chat;
        if (root.has("ratio")) options.ratio = root["ratio"].number(0, 1);
        std::vector<std::string> paths;
        for (const ivc::Field& path : root["image"].items(100)) paths.push_back(path.text());
        ivc::Chat chat(bundle, device, options);
        const std::string answer = chat.ask(root["prompt"].text(), readImages(paths));
        ivc::Json found = facts(chat, device, answer);
        if (root.has("then")) {
            for (const ivc::Field& question : root["then"].items(100)) {
                const std::string next = chat.ask(question.text(), {});
                found["then"].push_back(facts(chat, device, next));
            }
        }
        std::cout << found.dump(-1, ' ', false, ivc::Json::error_handler_t::replace) << std::endl;
    }
}

// Questions from standard input until it ends. ask: answers one about pictures.
template <class Ask>
void converse(std::vector<std::string> images, const Ask& ask) {
    for (std::string line; std::getline(std::cin, line);) {
        if (line == "/quit") return;
        if (line.compare(0, 7, "/image ") == 0) {
            images.push_back(line.substr(7));
            continue;
        }
        if (ivc::stripLeft(line, ivc::Strip::kBlanks).empty()) continue;
        ask(line, images);
        images.clear();
    }
}

int run(const std::vector<std::string>& words) {
    Request request = readOptions(words);
    if (request.help) {
        std::cout << kUsage << ivc::kDeviceUsage;
        return 0;
    }
    const ivc::Bundle bundle(request.bundle);
    if (request.stored) request.chat.sampling = ivc::storedSampling(request.bundle, request.chat.sampling);
    request.chat.sampling.check();
    if (!request.chat.ratio) request.chat.ratio = bundle.manifest().defaultRatio;
    ivc::checkRatio(*request.chat.ratio);
    const std::vector<ivc::Image> images = readImages(request.images);
    const auto device = ivc::openDevice(bundle, request.device);
    if (request.requests) {
        answerRequests(bundle, *device, request);
        return 0;
    }
    ivc::Chat chat(bundle, *device, request.chat);
    const ivc::Listener print = [&](const std::string& piece) {
        if (!request.json) std::cout << piece << std::flush;
        return true;
    };
    const auto tell = [&](const std::string& answer) {
        if (request.json) std::cout << facts(chat, *device, answer).dump(-1, ' ', false, ivc::Json::error_handler_t::replace);
        std::cout << std::endl;
    };
    const bool begun = request.asked || !request.rendered.empty();
    if (begun) {
        const std::string answer =
            request.rendered.empty()
                ? chat.ask(request.prompt, images, print)
                : chat.askRendered(ivc::readFile(request.rendered, "check the path"), images, print);
        if (!request.show.empty()) show(chat, images.front(), request.show);
        tell(answer);
    }
    const auto ask = [&](const std::string& question, const std::vector<std::string>& paths) {
        tell(chat.ask(question, readImages(paths), print));
    };
    if (request.talks) converse(begun ? std::vector<std::string>() : request.images, ask);
    return 0;
}

}  // namespace

int main(int count, char** words) {
    try {
        return run({words + 1, words + count});
    } catch (const std::bad_alloc&) {
        std::cerr << "error: there is no memory left: close other programs, or use smaller pictures\n";
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
    }
    return 2;
}
