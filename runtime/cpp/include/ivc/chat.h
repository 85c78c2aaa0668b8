// Questions and answers, with pictures in any turn. It does what ivc_export.runtime.chat does in Python.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "ivc/bundle.h"
#include "ivc/device.h"
#include "ivc/plan.h"
#include "ivc/sampling.h"

namespace ivc {

// Called with each piece of an answer. Return false to end the answer.
using Listener = std::function<bool(const std::string& piece)>;

// How a later question is answered: the whole conversation is pruned again for it, or it goes on over the compacted
// cache.
enum class FollowUp { kAgain, kCompacted };

FollowUp followUpOf(const std::string& name);  // the one named "again" or "compacted"; throws for any other name

// How a chat answers.
struct ChatOptions {
    std::optional<double> ratio;  // fraction of visual tokens kept; none is the bundle's default
    std::optional<std::string> system;  // system message; none is the chat template's own
    Method method;      // how visual tokens are selected
    Sampling sampling;  // how tokens are drawn
    int32_t rows = 0;  // rows of caches that cannot grow; 0 lets the device choose
    FollowUp followUp = FollowUp::kAgain;
};

// A conversation.
//
// By default each turn prunes again. Prefix and decoder run over the whole conversation, and only the last question
// votes for visual tokens. So the answer is the same as if the conversation had been given at once. A device that keeps
// vision's output runs vision once for each picture.
//
// With FollowUp::kCompacted a turn runs only the new part of the conversation. What an earlier turn pruned is gone.
class Chat {
   public:
    // Keep bundle and device as long as the chat. A device serves one chat at a time. Throws if an option is out of
    // range, or if there is a system message and the chat template takes none.
    Chat(const Bundle& bundle, Device& device, ChatOptions options);

    // Asks a question, and returns the whole answer. pictures: for the question's `<image>` marks; without marks they
    // come before the question. Throws if there is no text, if marks and pictures differ in number, or if the
    // conversation grows too long (TooLongError). The chat can then be asked something else.
    std::string ask(const std::string& question, const std::vector<Image>& pictures, const Listener& listener = {});
    // The same for a text that a chat template has written already, with its image tokens. It must be the first in its
    // chat, and no question can follow it.
    std::string askRendered(const std::string& text, const std::vector<Image>& pictures, const Listener& listener = {});

    const std::vector<int32_t>& tokens() const { return tokens_; }  // the last answer's ids, with the stop token
    const std::vector<int32_t>& prompt() const { return prompt_; }  // the ids of the last question's prefill
    const Run& run() const { return run_; }                         // the last question's run
    const std::vector<int32_t>& keepIndex() const { return keepIndex_; }  // the rows of that run that were kept, ascending
    // The pictures of the last question, or of the whole conversation if each turn prunes again. Their pixels may be
    // gone.
    const std::vector<Visual>& visuals() const { return visuals_; }
    double ratio() const { return ratio_; }  // fraction of visual tokens kept
    std::string finish() const;  // why the last answer ended: "stop" or "length"

   private:
    Prompt added(const std::string& rendered, const std::vector<Grid>& grids);
    std::string answer(const Prompt& prompt, const Listener& listener);
    std::string addition(const std::string& rendered) const;
    std::vector<Grid> prepareAll(const std::vector<Image>& pictures);
    bool stops(int32_t token) const;
    const std::vector<float>& step(const Run& run, const std::vector<const Visual*>& pictures);
    const std::vector<float>& step(int32_t token);

    const Bundle& bundle_;
    Device& device_;
    ChatOptions options_;
    double ratio_;
    Sampler sampler_;
    std::vector<Message> messages_;
    std::string told_, answer_;  // the text of the last turn's prefill so far, and the answer to it
    bool closed_ = false;
    std::vector<int32_t> tokens_, prompt_, keepIndex_;
    Run run_;
    std::vector<Visual> visuals_;
    int32_t position_ = 0;
};

}  // namespace ivc
