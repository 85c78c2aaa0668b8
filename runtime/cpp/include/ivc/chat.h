// Questions and answers over one compacted cache, with a picture in any turn, as ivc_export.runtime.chat holds them.
#pragma once

#include <functional>
#include <memory>
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

struct ChatOptions {
    std::optional<double> ratio;  // of visual tokens kept; none takes the bundle's default
    std::optional<std::string> system;
    Method method;
    Sampling sampling;
    int32_t rows = 0;  // of caches that cannot grow; 0 leaves that to the device
};

class Chat {
   public:
    // Both outlive the chat, and a device serves one chat at a time.
    Chat(const Bundle& bundle, Device& device, ChatOptions options);

    // Pictures stand at the question's `<image>` marks, or in front where it has none. Returns the whole answer.
    std::string ask(const std::string& question, const std::vector<Image>& pictures, const Listener& listener = {});
    // The same with a conversation whose text the chat template has written already, image tokens included. It begins
    // the chat, and no question can follow it.
    std::string askRendered(const std::string& text, const std::vector<Image>& pictures, const Listener& listener = {});

    const std::vector<int32_t>& tokens() const { return tokens_; }  // of the last answer, stop token included
    const std::vector<int32_t>& prompt() const { return prompt_; }  // ids of the last question
    const Run& run() const { return run_; }                         // of the last question
    const std::vector<int32_t>& keepIndex() const { return keepIndex_; }
    const std::vector<Visual>& visuals() const { return visuals_; }  // of the last question
    double ratio() const { return ratio_; }
    std::string finish() const;  // why the last answer ended: "stop" or "length"

   private:
    std::string go(const std::string& added, const Listener& listener);
    std::string addition(const std::string& rendered) const;
    bool stops(int32_t token) const;
    const std::vector<float>& step(const std::vector<int32_t>& tokens, const std::vector<Visual>& pictures);

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
