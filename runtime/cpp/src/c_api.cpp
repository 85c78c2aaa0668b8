#include "c_objects.h"
#include "ivc/error.h"

using ivc::given;
using ivc::guarded;
using ivc::made;

extern "C" {

const char* ivc_error_message(const ivc_error* error) { return error == nullptr ? "" : error->message.c_str(); }

void ivc_error_free(ivc_error* error) {
    if (error != ivc::noMemory()) delete error;
}

ivc_error* ivc_bundle_open(const char* folder, ivc_bundle** bundle) {
    return made(bundle, [&] { return ivc::Bundle(given(folder, "folder")); });
}
void ivc_bundle_free(ivc_bundle* bundle) { delete bundle; }
void ivc_device_free(ivc_device* device) { delete device; }

ivc_error* ivc_picture_read(const char* path, ivc_picture** picture) {
    return made(picture, [&] { return ivc::readImage(given(path, "path")); });
}
ivc_error* ivc_picture_rgb(const uint8_t* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture) {
    return made(picture, [&] { return ivc::copyImage(given(pixels, "pixels"), width, height, stride, false); });
}
ivc_error* ivc_picture_bgr(const uint8_t* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture) {
    return made(picture, [&] { return ivc::copyImage(given(pixels, "pixels"), width, height, stride, true); });
}
void ivc_picture_free(ivc_picture* picture) { delete picture; }

ivc_error* ivc_chat_begin(const ivc_bundle* bundle, ivc_device* device, const ivc_chat_options* chosen,
    ivc_chat** chat) {
    return made(chat, [&] {
        const ivc_chat_options o = chosen == nullptr ? ivc_chat_options{} : *chosen;
        ivc::ChatOptions options;
        if (o.ratio != 0) options.ratio = o.ratio;
        if (o.system != nullptr) options.system = o.system;
        if (o.method != nullptr) options.method.name = o.method;
        options.method.seed = o.method_seed;
        options.sampling.temperature = o.temperature;
        if (o.top_p != 0) options.sampling.topP = o.top_p;
        options.sampling.topK = o.top_k;
        if (o.repetition_penalty != 0) options.sampling.repetitionPenalty = o.repetition_penalty;
        options.sampling.seed = o.seed;
        if (o.max_tokens != 0) options.sampling.maxTokens = o.max_tokens;
        if (o.follow_up != nullptr) options.followUp = ivc::followUpOf(o.follow_up);
        const ivc::Bundle& opened = given(bundle, "bundle")->bundle;
        return ivc::Chat(opened, *given(device, "device")->device, options);
    });
}

ivc_error* ivc_chat_ask(ivc_chat* chat, const char* question, const ivc_picture* const* pictures, size_t count,
    ivc_listener listener, void* user, const char** answer) {
    return guarded([&] {
        ivc_chat& asked = *given(chat, "chat");
        std::vector<ivc::Image> images;
        for (size_t i = 0; i < count; ++i) images.push_back(given(given(pictures, "list of pictures")[i], "picture")->image);
        ivc::Listener heard;
        if (listener != nullptr) heard = [&](const std::string& piece) { return listener(piece.c_str(), user) != 0; };
        asked.answer = asked.chat.ask(given(question, "question"), images, heard);
        if (answer != nullptr) *answer = asked.answer.c_str();
    });
}
void ivc_chat_free(ivc_chat* chat) { delete chat; }

}  // extern "C"
