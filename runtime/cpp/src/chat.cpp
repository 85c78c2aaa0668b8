#include "ivc/chat.h"

#include <algorithm>

#include "ivc/error.h"
#include "ivc/unicode.h"

namespace ivc {
namespace {

constexpr char kThinkingEnd[] = "</think>";

}  // namespace

FollowUp followUpOf(const std::string& name) {
    if (name == "again") return FollowUp::kAgain;
    if (name == "compacted") return FollowUp::kCompacted;
    throw Error("there is no follow-up '" + name.substr(0, 40) + "': choose again or compacted");
}

Chat::Chat(const Bundle& bundle, Device& device, ChatOptions options)
    : bundle_(bundle), device_(device), options_(std::move(options)),
      ratio_(options_.ratio ? *options_.ratio : bundle.manifest().defaultRatio), sampler_(options_.sampling) {
    checkRatio(ratio_);
    checkMethod(bundle.manifest(), options_.method);
    if (options_.system) {
        if (bundle.manifest().chat && !bundle.manifest().chat->begin) {
            throw Error("the chat template of this bundle takes no system message: leave it out");
        }
        messages_.push_back({Message::Role::kSystem, {{false, *options_.system}}});
    }
    device_.begin(options_.rows);
}

bool Chat::stops(int32_t token) const {
    const std::vector<int32_t>& stop = bundle_.manifest().tokens.stop;
    return std::find(stop.begin(), stop.end(), token) != stop.end();
}

std::string Chat::finish() const { return !tokens_.empty() && stops(tokens_.back()) ? "stop" : "length"; }

std::string Chat::addition(const std::string& rendered) const {
    if (rendered.compare(0, told_.size(), told_) == 0) {
        const std::string rest = rendered.substr(told_.size());
        const auto bare = [](std::string_view text) {
            return std::string(stripRight(stripLeft(text, Strip::kBlanks), Strip::kBlanks));
        };
        const size_t thought = answer_.rfind(kThinkingEnd);  // dropped thoughts stay in the cache
        const size_t spoken = thought == std::string::npos ? 0 : thought + sizeof kThinkingEnd - 1;
        for (const std::string& answer : {answer_, bare(answer_), bare(answer_.substr(spoken))}) {
            const size_t at = rest.find(answer);
            if (at == std::string::npos) continue;
            if (answer.empty() || stripLeft(std::string_view(rest).substr(0, at), Strip::kBlanks).empty()) {
                return rest.substr(answer.empty() ? 0 : at + answer.size());
            }
        }
    }
    throw Error("the chat template rewrites earlier turns, which the cache already holds: use --follow-up again, or start a new chat");
}

const std::vector<float>& Chat::step(const Run& run, const std::vector<const Visual*>& pictures) {
    const std::vector<float>& logits = device_.run(run, pictures);
    position_ = run.nextPosition;
    return logits;
}

const std::vector<float>& Chat::step(int32_t token) {
    return step(planRun(bundle_.manifest(), {token}, {}, position_, ratio_, options_.method), {});
}

// Makes pictures ready behind those that a conversation has, where it prunes them again. Returns the grids of all.
std::vector<Grid> Chat::prepareAll(const std::vector<Image>& pictures) {
    if (options_.followUp == FollowUp::kCompacted) visuals_.clear();
    for (const Image& picture : pictures) visuals_.push_back(prepare(picture, bundle_.manifest()));
    std::vector<Grid> grids;
    for (const Visual& visual : visuals_) grids.push_back(visual.grid);
    return grids;
}

std::string Chat::ask(const std::string& question, const std::vector<Image>& pictures, const Listener& listener) {
    if (closed_) throw Error("a rendered conversation takes one question only: start a new chat");
    if (!isUtf8(question)) throw Error("the prompt is not UTF-8 text: write it in UTF-8");
    std::vector<Part> parts = placed(question, pictures.size());
    const auto blank = [](const Part& part) { return part.picture || stripLeft(part.text, Strip::kBlanks).empty(); };
    if (std::all_of(parts.begin(), parts.end(), blank)) throw Error("the prompt is empty: give some text");
    const auto pictureBehind = [](const Part& before, const Part& part) { return !before.picture && part.picture; };
    const bool within = std::adjacent_find(parts.begin(), parts.end(), pictureBehind) != parts.end();
    if (within && bundle_.manifest().chat && bundle_.manifest().chat->picturesFirst) {
        throw Error("the chat template of this bundle does not keep pictures within the text: put them before the text");
    }
    std::vector<Message> messages = messages_;
    messages.push_back({Message::Role::kUser, parts});
    const bool again = options_.followUp == FollowUp::kAgain;
    const size_t seen = visuals_.size();
    const std::string rendered = bundle_.render(messages);
    std::string said;
    try {
        const std::vector<Grid> grids = prepareAll(pictures);
        const Prompt prompt = again ? bundle_.conversation(messages, grids) : added(rendered, grids);
        if (again) {
            device_.begin(options_.rows);
            position_ = 0;
        }
        said = answer(prompt, listener);
    } catch (const TooLongError& error) {
        if (again) visuals_.resize(seen);
        if (!again || messages.size() <= 2) throw;
        throw TooLongError(std::string(error.what()) + ", or continue on the compacted cache (--follow-up compacted)");
    } catch (...) {
        if (again) visuals_.resize(seen);
        throw;
    }
    messages.push_back({Message::Role::kAssistant, {{false, said}}});
    messages_ = std::move(messages);
    told_ = rendered;
    answer_ = said;
    return said;
}

std::string Chat::askRendered(const std::string& text, const std::vector<Image>& pictures, const Listener& listener) {
    if (closed_ || !told_.empty()) throw Error("a rendered conversation can only be the first of a chat: start a new chat");
    const std::vector<Grid> grids = prepareAll(pictures);
    closed_ = true;
    return answer({bundle_.encode(text, grids, true), 0}, listener);
}

// What the chat template adds to the cache.
Prompt Chat::added(const std::string& rendered, const std::vector<Grid>& grids) {
    const std::vector<int32_t> ids = bundle_.encode(addition(rendered), grids, told_.empty());
    // The last id drawn is not in the cache. A stop token is in the template's addition; any other is not.
    if (!tokens_.empty() && finish() == "length") step(tokens_.back());
    return {ids, 0};
}

std::string Chat::answer(const Prompt& prompt, const Listener& listener) {
    std::vector<Grid> grids;
    std::vector<const Visual*> pictures;
    for (const Visual& visual : visuals_) {
        grids.push_back(visual.grid);
        pictures.push_back(&visual);
    }
    tokens_.clear();
    const Run run = planRun(bundle_.manifest(), prompt.ids, grids, position_, ratio_, options_.method, prompt.question);
    const std::vector<float>* logits = &step(run, pictures);
    for (Visual& visual : visuals_) {
        if (visual.seen) visual.pixels = {};
    }
    prompt_ = prompt.ids;
    run_ = run;
    keepIndex_ = device_.keepIndex();
    sampler_.read(prompt.ids);
    TextStream stream(bundle_.tokenizer());
    std::string said;  // not all tokens' text: bytes that make no whole character have none
    for (int32_t left = options_.sampling.maxTokens - 1;; --left) {
        const int32_t token = sampler_.draw(*logits);
        tokens_.push_back(token);
        const std::string piece = stream.add(token);
        said += piece;
        const bool heard = piece.empty() || !listener || listener(piece);
        const bool full = position_ >= bundle_.manifest().decoder.maxPositions || device_.room() == 0;
        if (stops(token) || left == 0 || full || !heard) break;
        logits = &step(token);
    }
    return said;
}

}  // namespace ivc
