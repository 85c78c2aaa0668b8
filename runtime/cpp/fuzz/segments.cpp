// A conversation of texts, one behind each zero byte: the segments' own first, then what is said.
#include <cstddef>
#include <cstdint>

#include "ivc/conversation.h"
#include "ivc/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 1) return 0;
    std::vector<std::string> texts{""};
    for (size_t i = 1; i < size; ++i) {
        if (data[i] == 0) {
            texts.emplace_back();
        } else {
            texts.back() += static_cast<char>(data[i]);
        }
    }
    size_t next = 0;
    const auto text = [&] { return next < texts.size() ? texts[next++] : std::string(); };
    const uint8_t bits = data[0];
    ivc::ChatSegments chat;
    chat.begin.emplace();
    chat.begin->before = chat.user.before = text();
    chat.begin->left = chat.text.left = (bits & 1) != 0 ? ivc::Blanks::kBlanks : ivc::Blanks::kNone;
    chat.text.right = chat.past.right = (bits & 2) != 0 ? ivc::Blanks::kNewlines : ivc::Blanks::kBlanks;
    chat.picture = text();
    chat.pictureLine = text();
    chat.picturesFirst = (bits & 4) != 0;
    if ((bits & 8) != 0) chat.thinkingEnd = text();
    chat.thinkingLeft = (bits & 16) != 0 ? ivc::Blanks::kNewlines : ivc::Blanks::kBlanks;
    std::vector<ivc::Message> messages;
    if ((bits & 32) != 0) messages.push_back({ivc::Message::Role::kSystem, {{false, text()}}});
    try {
        while (next < texts.size()) {
            const std::string question = text();
            messages.push_back({ivc::Message::Role::kUser, ivc::placed(question, bits >> 6)});
            ivc::render(chat, messages);
            messages.push_back({ivc::Message::Role::kAssistant, {{false, text()}}});
        }
    } catch (const ivc::Error&) {
    }
    return 0;
}
