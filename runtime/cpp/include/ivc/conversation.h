// The messages of a conversation, and their text as the chat template writes it.
#pragma once

#include <string>
#include <vector>

#include "ivc/manifest.h"

namespace ivc {

// A part of a message: a text, or the place of a picture.
struct Part {
    bool picture = false;
    std::string text;
};

// One message.
struct Message {
    // Who wrote the message.
    enum class Role { kSystem, kUser, kAssistant };
    Role role = Role::kUser;
    std::vector<Part> parts;  // the system's and the assistant's messages have one text
};

// The text of a conversation, up to the place where the assistant's answer begins. Throws if a system message is not the
// first one, or if the template takes none.
std::string render(const ChatSegments& chat, const std::vector<Message>& messages);

// A text and its pictures as parts of a message, in order. Pictures come at the text's `<image>` marks, or before the text
// if it has none. pictures: how many. Throws if there are marks, and they are not as many as the pictures.
std::vector<Part> placed(const std::string& text, size_t pictures);

}  // namespace ivc
