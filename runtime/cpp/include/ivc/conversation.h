// What was said in a conversation, and its text as the chat template writes it.
#pragma once

#include <string>
#include <vector>

#include "ivc/manifest.h"

namespace ivc {

// Of a user's message: a text, or a picture's place.
struct Part {
    bool picture = false;
    std::string text;
};

// What one of them said.
struct Message {
    // Who speaks.
    enum class Role { kSystem, kUser, kAssistant };
    Role role = Role::kUser;
    std::vector<Part> parts;  // of a system's or an assistant's message one text
};

// The text of a conversation up to where the assistant speaks. Throws where a message of the system is not the first, or
// the template takes none.
std::string render(const ChatSegments& chat, const std::vector<Message>& messages);

// Text and so many pictures in order: pictures at the text's `<image>` marks, or in front where it has none. Throws
// where there are marks, and another number of pictures.
std::vector<Part> placed(const std::string& text, size_t pictures);

}  // namespace ivc
