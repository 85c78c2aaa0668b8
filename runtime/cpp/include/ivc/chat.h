// Questions and answers, with a picture in any turn, as ivc_export.runtime.chat holds them.
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

// Called with each piece of an answer; false ends it.
using Listener = std::function<bool(const std::string& piece)>;

// How a conversation goes on: pruned again for each question, or over what an earlier one left.
enum class FollowUp { kAgain, kCompacted };

FollowUp followUpOf(const std::string& name);  // "again" or "compacted"; throws where it is another

// How a chat's questions are answered.
struct ChatOptions {
    std::optional<double> ratio;  // of visual tokens kept; none takes the bundle's default
    std::optional<std::string> system;  // told before all questions; none leaves that to the chat template
    Method method;      // how visual tokens are chosen
    Sampling sampling;  // how tokens are drawn
    int32_t rows = 0;  // of caches that cannot grow; 0 leaves that to the device
    FollowUp followUp = FollowUp::kAgain;
};

// By default each turn prunes again: prefix and decoder run over the whole conversation, in which the last question
// alone votes, so that an answer is that of the same conversation told at once. A device that keeps what vision made of
// a picture runs vision once for each. With kCompacted a turn runs only what the chat template adds to the conversation
// so far: what an earlier turn pruned is gone.
class Chat {
   public:
    // Both outlive the chat, and a device serves one chat at a time. Throws where an option is out of range, or the chat
    // template takes no system message.
    Chat(const Bundle& bundle, Device& device, ChatOptions options);

    // Pictures stand at the question's `<image>` marks, or in front where it has none. Returns the whole answer. Throws
    // where there is no text, marks and pictures do not fit each other, or the conversation grows too long (TooLongError);
    // the chat may then be asked something else.
    std::string ask(const std::string& question, const std::vector<Image>& pictures, const Listener& listener = {});
    // The same with a conversation whose text the chat template has written already, image tokens included. It begins
    // the chat, and no question can follow it.
    std::string askRendered(const std::string& text, const std::vector<Image>& pictures, const Listener& listener = {});

    const std::vector<int32_t>& tokens() const { return tokens_; }  // of the last answer, stop token included
    const std::vector<int32_t>& prompt() const { return prompt_; }  // ids that the last question's prefill ran
    const Run& run() const { return run_; }                         // of the last question
    const std::vector<int32_t>& keepIndex() const { return keepIndex_; }  // rows of that run that went on, ascending
    // Pictures of the last question; of all so far, where each turn prunes again. Their pixels may be gone.
    const std::vector<Visual>& visuals() const { return visuals_; }
    double ratio() const { return ratio_; }  // of visual tokens kept
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
    std::string told_, answer_;  // what the last turn's prefill had been told so far, and what came of it
    bool closed_ = false;
    std::vector<int32_t> tokens_, prompt_, keepIndex_;
    Run run_;
    std::vector<Visual> visuals_;
    int32_t position_ = 0;
};

}  // namespace ivc
