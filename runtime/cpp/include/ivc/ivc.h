/* The C API. No exception crosses it: what can fail returns an error, or NULL where all is well.
 *
 * Texts are UTF-8 and end with a zero byte. Objects belong to the caller, who frees each with its own function, in the
 * opposite order of their making. One thread uses an object at a time.
 */
#ifndef IVC_H
#define IVC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ivc_error ivc_error;
typedef struct ivc_bundle ivc_bundle;
typedef struct ivc_device ivc_device;
typedef struct ivc_picture ivc_picture;
typedef struct ivc_chat ivc_chat;

/* One sentence that says what is wrong and what to do. Valid until the error is freed. */
const char* ivc_error_message(const ivc_error* error);
void ivc_error_free(ivc_error* error);

ivc_error* ivc_bundle_open(const char* folder, ivc_bundle** bundle);
void ivc_bundle_free(ivc_bundle* bundle);

/* Declared here, and there in the library ivc::onnxruntime alone. threads: 0 takes one a core. The bundle outlives it. */
ivc_error* ivc_onnxruntime_open(const ivc_bundle* bundle, int32_t threads, ivc_device** device);
/* The same in the library ivc::tensorrt, on the current CUDA device. engines: the folder that ivc-build wrote, or NULL for
 * the bundle's own for this TensorRT and GPU. plugin: our plugin's library where engines call it, or NULL; no other is
 * ever loaded. */
ivc_error* ivc_tensorrt_open(const ivc_bundle* bundle, const char* engines, const char* plugin, ivc_device** device);
void ivc_device_free(ivc_device* device);

/* A JPEG or PNG file; or pixels of three bytes, rows `stride` bytes apart, RGB, or BGR as cameras give them: copied. */
ivc_error* ivc_picture_read(const char* path, ivc_picture** picture);
ivc_error* ivc_picture_rgb(const uint8_t* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
ivc_error* ivc_picture_bgr(const uint8_t* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
/* The same of a frame in the memory of the current CUDA device, in the library ivc::tensorrt. What writes the frame has to
 * be done: synchronise its stream before the call. */
ivc_error* ivc_picture_rgb_on_device(
    const void* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
ivc_error* ivc_picture_bgr_on_device(
    const void* pixels, int32_t width, int32_t height, size_t stride, ivc_picture** picture);
void ivc_picture_free(ivc_picture* picture);

typedef struct ivc_chat_options {
    double ratio;              /* of visual tokens kept; 0 takes the bundle's default */
    const char* system;        /* what the model is told before all questions; NULL leaves that to the chat template */
    const char* method;        /* ivc-prune, foreground or random; NULL is the bundle's own */
    int64_t method_seed;
    double temperature;        /* 0 is greedy */
    double top_p;              /* 0 is 1: all */
    int64_t top_k;             /* 0 is all */
    double repetition_penalty; /* 0 is 1: none */
    uint64_t seed;
    int32_t max_tokens;        /* of an answer; 0 is 128 */
    const char* follow_up;     /* a later question: again (NULL too) prunes the whole conversation for it; compacted sees
                                * what earlier questions kept, and comes sooner */
} ivc_chat_options;

/* options: NULL is all of it zero. Bundle and device outlive the chat, and a device serves one chat at a time. */
ivc_error* ivc_chat_begin(const ivc_bundle* bundle, ivc_device* device, const ivc_chat_options* options, ivc_chat** chat);

/* Called with each piece of the answer; 0 ends it. */
typedef int (*ivc_listener)(const char* piece, void* user);

/* Pictures stand at the question's `<image>` marks, or in front where it has none. listener: may be NULL. answer: the
 * whole of it, valid until the next question or the chat's end; may be NULL. */
ivc_error* ivc_chat_ask(ivc_chat* chat, const char* question, const ivc_picture* const* pictures, size_t count,
    ivc_listener listener, void* user, const char** answer);
void ivc_chat_free(ivc_chat* chat);

#ifdef __cplusplus
}
#endif

#endif
