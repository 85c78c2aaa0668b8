/* The C API. No exception crosses it: what can fail returns an error, or NULL where all is well.
 *
 * Texts are UTF-8 and end with a zero byte. Objects belong to the caller, who frees each with its own function, in the
 * opposite order of their making; functions that free take NULL, too. Where an error is returned nothing was made. One
 * thread uses an object at a time, but bundles, which many may use. Whoever asks or frees a chat uses its device, too.
 */
#ifndef IVC_H
#define IVC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Objects that these functions make, and whose inside is theirs. */
typedef struct ivc_error ivc_error;
typedef struct ivc_bundle ivc_bundle;
typedef struct ivc_device ivc_device;
typedef struct ivc_picture ivc_picture;
typedef struct ivc_chat ivc_chat;

/* One sentence that says what is wrong and what to do. Valid until the error is freed. */
const char* ivc_error_message(const ivc_error* error);
/* Frees an error. */
void ivc_error_free(ivc_error* error);

/* Opens the bundle in a folder, as ivc-export wrote it, and checks what its files say. Fails where there is none, or it is
 * damaged, edited, or leaves its folder. */
ivc_error* ivc_bundle_open(const char* folder, ivc_bundle** bundle);
/* Frees a bundle. Its devices and chats are freed before. */
void ivc_bundle_free(ivc_bundle* bundle);

/* Opens a bundle's graphs on onnxruntime's CPU provider, in float32. Declared here, and there in the library
 * ivc::onnxruntime alone. threads: 0 takes one a core. The bundle outlives it. Fails where a graph does not open, or the
 * bundle is in another dtype. */
ivc_error* ivc_onnxruntime_open(const ivc_bundle* bundle, int32_t threads, ivc_device** device);
/* The same in the library ivc::tensorrt, on the current CUDA device, which has to be current in every thread that asks a
 * chat over it. engines: the folder that ivc-build wrote, or NULL for the bundle's own for this TensorRT and GPU. plugin:
 * our plugin's library where engines call it, or NULL; no other is ever loaded. */
ivc_error* ivc_tensorrt_open(const ivc_bundle* bundle, const char* engines, const char* plugin, ivc_device** device);
/* Frees a device. Its chats are freed before. */
void ivc_device_free(ivc_device* device);

/* Reads a JPEG or PNG file, turned as its EXIF orientation says. Fails where it is none, is damaged, has several frames,
 * one pixel, or more than 80 million. */
ivc_error* ivc_picture_read(const char* path, ivc_picture** picture);
/* Copies pixels of three bytes, rows `stride` bytes apart, RGB, or BGR as cameras give them. width, height: in pixels.
 * Fails where rows would overlap, or there is one pixel, or more than 80 million. */
ivc_error* ivc_picture_rgb(const uint8_t* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
ivc_error* ivc_picture_bgr(const uint8_t* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
/* The same of a frame in the memory of the current CUDA device, in the library ivc::tensorrt. What writes the frame has to
 * be done: synchronise its stream before the call. */
ivc_error* ivc_picture_rgb_on_device(
    const void* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
ivc_error* ivc_picture_bgr_on_device(
    const void* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
/* Frees a picture. Chats that were asked about it do not need it. */
void ivc_picture_free(ivc_picture* picture);

/* How a chat's questions are answered; all of it zero is the default. */
typedef struct ivc_chat_options {
    double ratio;              /* of visual tokens kept; 0 takes the bundle's default */
    const char* system;        /* what the model is told before all questions; NULL leaves that to the chat template */
    const char* method;        /* ivc-prune, foreground or random; NULL is the bundle's own */
    int64_t method_seed;       /* of random, from 0 on and below 2^31 */
    double temperature;        /* 0 is greedy */
    double top_p;              /* 0 is 1: all */
    int64_t top_k;             /* 0 is all */
    double repetition_penalty; /* 0 is 1: none */
    uint64_t seed;             /* of the draws, where the temperature is above 0 */
    int32_t max_tokens;        /* of an answer at most; 0 is 128 */
    const char* follow_up;     /* a later question: again (NULL too) prunes the whole conversation for it; compacted sees
                                * what earlier questions kept, and comes sooner */
} ivc_chat_options;

/* Begins a chat. options: NULL is all of it zero; they are copied. Bundle and device outlive the chat, and a device serves
 * one chat at a time. Fails where an option is out of range, or the chat template takes no system message. */
ivc_error* ivc_chat_begin(const ivc_bundle* bundle, ivc_device* device, const ivc_chat_options* options, ivc_chat** chat);

/* Called with each piece of the answer, which is valid during the call; returns 0 to end the answer. user: as given to
 * ivc_chat_ask. */
typedef int (*ivc_listener)(const char* piece, void* user);

/* Asks a question, and waits for the answer. pictures: `count` of them, which stand at the question's `<image>` marks, or in
 * front where it has none. listener: may be NULL. answer: the whole of it, valid until the next question or the chat's
 * end; may be NULL. Fails where there is no text, marks and pictures do not fit each other, or the conversation grows too
 * long; the chat may then be asked something else. */
ivc_error* ivc_chat_ask(ivc_chat* chat, const char* question, const ivc_picture* const* pictures, size_t count,
    ivc_listener listener, void* user, const char** answer);
/* Frees a chat; its device may begin another. */
void ivc_chat_free(ivc_chat* chat);

#ifdef __cplusplus
}
#endif

#endif
