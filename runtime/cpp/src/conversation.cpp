#include "ivc/conversation.h"

#include <algorithm>
#include <string_view>

#include "ivc/error.h"
#include "ivc/unicode.h"

namespace ivc {
namespace {

constexpr char kMark[] = "<image>";

std::string stripped(std::string_view text, Blanks left, Blanks right) {
    if (left != Blanks::kNone) text = stripLeft(text, left == Blanks::kNewlines ? Strip::kNewlines : Strip::kBlanks);
    if (right != Blanks::kNone) text = stripRight(text, right == Blanks::kNewlines ? Strip::kNewlines : Strip::kBlanks);
    return std::string(text);
}

std::string spoken(const Spoken& segment, const std::string& text) {
    return segment.before + stripped(text, segment.left, segment.right) + segment.behind;
}

std::string pastAnswer(const ChatSegments& chat, std::string text) {
    const size_t at = chat.thinkingEnd ? text.rfind(*chat.thinkingEnd) : std::string::npos;
    if (at != std::string::npos) {
        text = stripped(text.substr(at + chat.thinkingEnd->size()), chat.thinkingLeft, Blanks::kNone);
    }
    return spoken(chat.past, text);
}

std::string userText(const ChatSegments& chat, std::vector<Part> parts) {
    if (chat.picturesFirst) {
        std::stable_partition(parts.begin(), parts.end(), [](const Part& part) { return part.picture; });
    }
    std::string found;
    bool textSeen = false;
    for (size_t i = 0; i < parts.size(); ++i) {
        if (!parts[i].picture) {
            found += spoken(chat.text, parts[i].text);
            textSeen = true;
            continue;
        }
        const bool followed = i + 1 < parts.size() && !parts[i + 1].picture;
        const std::string& line = chat.pictureLine;
        const bool begins = followed && parts[i + 1].text.compare(0, line.size(), line) == 0;
        found += chat.picture + (textSeen || begins ? "" : line);
    }
    return found;
}

}  // namespace

std::string render(const ChatSegments& chat, const std::vector<Message>& messages) {
    std::string found = chat.beginWithoutSystem;
    bool first = true;
    for (size_t i = 0; i < messages.size(); ++i) {
        const Message& message = messages[i];
        if (message.role == Message::Role::kUser) {
            const Segment& segment = first ? chat.firstUser : chat.user;
            found += segment.before + userText(chat, message.parts) + segment.behind;
            first = false;
        } else if (message.role == Message::Role::kAssistant) {
            found += pastAnswer(chat, message.parts.at(0).text);
        } else if (i > 0) {
            throw Error("a system message is not the first message: put it first, or leave it out");
        } else if (!chat.begin) {
            throw Error("the chat template of this bundle takes no system message: leave it out");
        } else {
            found = spoken(*chat.begin, message.parts.at(0).text);
        }
    }
    return found + chat.assistantOpen;
}

std::vector<Part> placed(const std::string& text, size_t pictures) {
    std::vector<std::string> pieces{""};
    size_t from = 0;
    for (size_t at = text.find(kMark); at != std::string::npos; at = text.find(kMark, from)) {
        pieces.back() = text.substr(from, at - from);
        pieces.emplace_back();
        from = at + sizeof kMark - 1;
    }
    pieces.back() = text.substr(from);
    std::vector<Part> parts;
    if (pieces.size() == 1) {
        parts.assign(pictures, {true, ""});
        parts.push_back({false, text});
        return parts;
    }
    if (pieces.size() - 1 != pictures) {
        throw Error("the prompt has " + std::to_string(pieces.size() - 1) + " " + kMark + " marks, but there are " +
                    std::to_string(pictures) + " pictures: write one mark for each, or none to put them first");
    }
    for (size_t i = 0; i < pieces.size(); ++i) {
        if (i > 0) parts.push_back({true, ""});
        if (!pieces[i].empty()) parts.push_back({false, pieces[i]});
    }
    return parts;
}

}  // namespace ivc
