// Times of a bundle's stages, as ivc-bench measures them: rounds in which every ratio takes its turn.
#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <numeric>

#include "devices.h"
#include "ivc/chat.h"
#include "ivc/json.h"
#include "options.h"

namespace {

const char kUsage[] =
    "usage: ivc-cpp-bench BUNDLE --image FILE --prompt TEXT [options]\n"
    "  --ratio R          fraction of visual tokens kept; may be given several times (default: 1 and the bundle's)\n"
    "  --tokens N         tokens of an answer (default: 16)\n"
    "  --rounds N, --warmups N (default: 5 and 2)\n"
    "  --json FILE        write the figures as ivc-bench does\n";

struct Settings {
    std::string bundle, image, prompt, json;
    std::vector<double> ratios;
    int32_t tokens = 16, rounds = 5, warmups = 2;
    ivc::DeviceChoice device;
    bool help = false;
};

// What one round gave, in milliseconds.
struct Answer {
    std::map<std::string, double> stages;
    double first = 0;
    std::vector<double> steps;
    std::vector<int32_t> tokens;
    int64_t cacheBytes = 0;
    int32_t visual = 0, kept = 0, text = 0;
};

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const size_t half = values.size() / 2;
    return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

template <class Of>
double medianOf(const std::vector<Answer>& answers, const Of& of) {
    std::vector<double> values;
    for (const Answer& answer : answers) values.push_back(of(answer));
    return median(values);
}

double sum(const std::map<std::string, double>& stages) {
    double found = 0;
    for (const auto& [name, time] : stages) found += time;
    return found;
}

Answer measure(const ivc::Bundle& bundle, ivc::Device& device, const ivc::Image& image, const Settings& s, double ratio) {
    using Clock = std::chrono::steady_clock;
    const auto milliseconds = [](Clock::duration time) { return std::chrono::duration<double, std::milli>(time).count(); };
    const ivc::Manifest& m = bundle.manifest();
    const std::vector<ivc::Message> messages{{ivc::Message::Role::kUser, ivc::placed(s.prompt, 1)}};
    device.begin(0);
    device.times.clear();
    Answer answer;
    const auto start = Clock::now();
    const ivc::Visual visual = ivc::prepare(image, m);
    const std::vector<int32_t> tokens = bundle.encode(bundle.render(messages), {visual.grid}, true);
    ivc::Run run = ivc::planRun(m, tokens, {visual.grid}, 0, ratio, {});
    ivc::Sampler sampler{ivc::Sampling{}};
    answer.tokens.push_back(sampler.draw(device.run(run, {&visual})));
    answer.first = milliseconds(Clock::now() - start);
    for (const auto& [name, time] : device.times) answer.stages[name] = 1000 * time.seconds;
    answer.visual = visual.grid.visual();
    answer.kept = run.keepCount;
    answer.text = run.rows() - answer.visual;
    while (static_cast<int32_t>(answer.tokens.size()) < s.tokens) {
        const auto before = Clock::now();
        run = ivc::planRun(m, {answer.tokens.back()}, {}, run.nextPosition, ratio, {});
        answer.tokens.push_back(sampler.draw(device.run(run, {})));
        answer.steps.push_back(milliseconds(Clock::now() - before));
    }
    answer.cacheBytes = device.cacheBytes();
    return answer;
}

ivc::Json rowOf(const std::vector<Answer>& answers, const ivc::Device& device, double ratio) {
    const Answer& last = answers.back();
    ivc::Json stages = ivc::Json::object();
    for (const auto& entry : last.stages) {
        const std::string& name = entry.first;
        stages[name] = medianOf(answers, [&](const Answer& a) { return a.stages.at(name); });
    }
    stages["host"] = medianOf(answers, [](const Answer& a) { return a.first - sum(a.stages); });
    std::vector<double> steps;
    for (const Answer& answer : answers) steps.insert(steps.end(), answer.steps.begin(), answer.steps.end());
    return {{"side", device.name() + " (C++)"}, {"dtype", device.dtype()}, {"ratio", ratio},
        {"visual_tokens", last.visual}, {"kept_tokens", last.kept}, {"text_tokens", last.text}, {"stages", stages},
        {"prefill", medianOf(answers, [](const Answer& a) { return sum(a.stages) - a.stages.at("vision"); })},
        {"first_token", medianOf(answers, [](const Answer& a) { return a.first; })}, {"decode", median(steps)},
        {"decode_mean", medianOf(answers,
                            [](const Answer& a) {
                                return std::accumulate(a.steps.begin(), a.steps.end(), 0.0) /
                                       static_cast<double>(a.steps.size());
                            })},
        {"cache_bytes", last.cacheBytes}, {"tokens", last.tokens}};
}

Settings readOptions(const std::vector<std::string>& words) {
    Settings s;
    ivc::Options options;
    const auto text = [](std::string& to) { return [&to](const std::string&, const std::string& value) { to = value; }; };
    const auto whole = [](int32_t& to, int32_t least) {
        return [&to, least](const std::string& option, const std::string& value) {
            to = static_cast<int32_t>(ivc::wholeOf(option, value, least, 100'000));
        };
    };
    options.valued = {{"--image", text(s.image)}, {"--prompt", text(s.prompt)}, {"--json", text(s.json)},
        {"--tokens", whole(s.tokens, 2)}, {"--rounds", whole(s.rounds, 1)}, {"--warmups", whole(s.warmups, 0)}};
    ivc::addDeviceOptions(options, s.device);
    options.valued["--ratio"] = [&](const std::string& option, const std::string& value) {
        s.ratios.push_back(ivc::numberOf(option, value));
        ivc::checkRatio(s.ratios.back());
    };
    options.flags = {{"--help", [&] { s.help = true; }}};
    options.word = [&](const std::string& word) { s.bundle = word; };
    options.read(words);
    if (!s.help && (s.bundle.empty() || s.image.empty() || s.prompt.empty())) {
        throw ivc::Error("a bundle, --image or --prompt is missing: give all three; --help lists the options");
    }
    return s;
}

int run(const std::vector<std::string>& words) {
    Settings s = readOptions(words);
    if (s.help) {
        std::cout << kUsage << ivc::kDeviceUsage;
        return 0;
    }
    const ivc::Bundle bundle(s.bundle);
    const ivc::Image image = ivc::readImage(s.image);
    if (s.ratios.empty()) s.ratios = {1.0, bundle.manifest().defaultRatio};
    const auto device = ivc::openDevice(bundle, s.device);
    std::vector<std::vector<Answer>> answers(s.ratios.size());
    for (int32_t round = 0; round < s.warmups + s.rounds; ++round) {
        for (size_t i = 0; i < s.ratios.size(); ++i) {
            const size_t turn = round % 2 == 0 ? i : s.ratios.size() - 1 - i;
            Answer answer = measure(bundle, *device, image, s, s.ratios[turn]);
            if (round >= s.warmups) answers[turn].push_back(std::move(answer));
        }
    }
    ivc::Json rows = ivc::Json::array();
    for (size_t i = 0; i < s.ratios.size(); ++i) {
        const ivc::Json row = rowOf(answers[i], *device, s.ratios[i]);
        std::cout << "ratio " << s.ratios[i] << ": first token " << row["first_token"].get<double>() << " ms, then "
                  << row["decode"].get<double>() << " ms per token\n";
        rows.push_back(row);
    }
    if (s.json.empty()) return 0;
    std::ofstream file(s.json);
    file << ivc::Json{{"rows", rows}, {"rounds", s.rounds}, {"warmups", s.warmups}}.dump(2) << "\n";
    if (!file) throw ivc::Error(s.json + " cannot be written: check the folder");
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
