/* The C API.
 *
 * Errors are values: a function that can fail returns NULL on success, and an error otherwise. It then made no object.
 * No exception leaves the library.
 *
 * Texts are UTF-8 and end with a zero byte. The caller owns every object, and frees it with its own function. Free
 * objects in the opposite order in which you made them. Functions that free accept NULL.
 *
 * Several threads may use one bundle at the same time. Every other object serves one thread at a time. Asking
 * or freeing a chat also uses its device.
 */
#ifndef IVC_H
#define IVC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Objects that these functions make. Their content is private. */
typedef struct ivc_error ivc_error;
typedef struct ivc_bundle ivc_bundle;
typedef struct ivc_device ivc_device;
typedef struct ivc_picture ivc_picture;
typedef struct ivc_chat ivc_chat;

/* One sentence: what is wrong, and what to do. The text is valid until the error is freed. */
const char* ivc_error_message(const ivc_error* error);
/* Frees an error. */
void ivc_error_free(ivc_error* error);

/* Opens a bundle, the folder that ivc-export wrote, and checks its files. Fails if there is no bundle, if a file is
 * damaged or was edited, or if a path leads out of the folder. */
ivc_error* ivc_bundle_open(const char* folder, ivc_bundle** bundle);
/* Frees a bundle. Free its chats and devices before it. */
void ivc_bundle_free(ivc_bundle* bundle);

/* Opens a bundle's graphs on onnxruntime's CPU provider, in float32. The function is in the library ivc::onnxruntime.
 * threads: how many threads an operator uses; 0 takes one for each core. Keep the bundle until the device is freed. Fails
 * if a graph does not open, or if the bundle is not in float32 (export it with --dtype float32). */
ivc_error* ivc_onnxruntime_open(const ivc_bundle* bundle, int32_t threads, ivc_device** device);
/* Opens a bundle's TensorRT engines on the current CUDA device. The function is in the library ivc::tensorrt. The same
 * CUDA device must be current in every thread that asks a chat over it. engines: the folder that ivc-build wrote; NULL
 * takes the bundle's own engines for this TensorRT and GPU. plugin: the library that the engines were built with
 * (libivc_plugin.so), or NULL if they call none. No other library is ever loaded. */
ivc_error* ivc_tensorrt_open(const ivc_bundle* bundle, const char* engines, const char* plugin, ivc_device** device);
/* Frees a device. Free its chats before it. */
void ivc_device_free(ivc_device* device);

/* Reads a JPEG or PNG file, and turns it as its EXIF orientation says. Fails if the file is of another kind, is damaged,
 * or has several frames, a single pixel, or more than 80 million pixels. */
ivc_error* ivc_picture_read(const char* path, ivc_picture** picture);
/* Copies pixels of three bytes: RGB, or BGR, which many cameras give. width, height: in pixels. stride: bytes from the
 * beginning of a row to that of the next. Fails if rows would overlap, or if there is a single pixel, or more than 80
 * million. */
ivc_error* ivc_picture_rgb(const uint8_t* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
ivc_error* ivc_picture_bgr(const uint8_t* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
/* Copies a frame from the memory of the current CUDA device. The functions are in the library ivc::tensorrt. The frame
 * must be complete: synchronise the stream that writes it before the call. */
ivc_error* ivc_picture_rgb_on_device(
    const void* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
ivc_error* ivc_picture_bgr_on_device(
    const void* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
/* Frees a picture. Chats that were asked about it do not need it any more. */
void ivc_picture_free(ivc_picture* picture);

/* How a chat answers. A struct of zeros has all the defaults. */
typedef struct ivc_chat_options {
    double ratio;              /* fraction of visual tokens kept; 0 is the bundle's default */
    const char* system;        /* system message; NULL is the chat template's own */
    const char* method;        /* ivc-prune, foreground or random; NULL is the bundle's own */
    int64_t method_seed;       /* seed of the method random: 0 to 2^31 - 1 */
    double temperature;        /* 0 is greedy: the most likely token */
    double top_p;              /* probability mass to draw from; 0 is 1, all of it */
    int64_t top_k;             /* how many of the best tokens to draw from; 0 is all */
    double repetition_penalty; /* above 1, tokens that appeared become less likely; 0 is 1, no change */
    uint64_t seed;             /* seed of the draws, if the temperature is above 0 */
    int32_t max_tokens;        /* the most tokens of an answer; 0 is 128 */
    const char* follow_up;     /* how a later question is answered. again, or NULL: the whole conversation is pruned for
                                * it. compacted: it sees what earlier questions kept, and is answered sooner */
} ivc_chat_options;

/* Begins a chat. options: copied; NULL takes all the defaults. Keep bundle and device until the chat is freed. A device
 * serves one chat at a time. Fails if an option is out of range, or if there is a system message and the chat template
 * takes none. */
ivc_error* ivc_chat_begin(const ivc_bundle* bundle, ivc_device* device, const ivc_chat_options* options, ivc_chat** chat);

/* Called with each piece of the answer. The text is valid during the call. Return 0 to end the answer. user: the pointer
 * that was given to ivc_chat_ask. */
typedef int (*ivc_listener)(const char* piece, void* user);

/* Asks a question, and waits for the answer. pictures: `count` pictures, for the question's `<image>` marks; without marks
 * they come before the question. listener: may be NULL. answer: the whole answer, valid until the next question or until
 * the chat is freed; may be NULL. Fails if there is no text, if marks and pictures differ in number, or if the
 * conversation grows too long. The chat can then be asked something else. */
ivc_error* ivc_chat_ask(ivc_chat* chat, const char* question, const ivc_picture* const* pictures, size_t count,
    ivc_listener listener, void* user, const char** answer);
/* Frees a chat. Its device can then begin another. */
void ivc_chat_free(ivc_chat* chat);

#ifdef __cplusplus
}
#endif

#endif
