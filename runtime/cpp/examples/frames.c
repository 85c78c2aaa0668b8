/* A question about each frame of a folder, as a camera loop would ask it.
 *
 *   frames BUNDLE QUESTION FILE...
 *
 * With OpenCV's capture the loop is `while (capture.read(frame))`, and a frame becomes a picture without a file:
 * ivc_picture_bgr(frame.data, frame.cols, frame.rows, frame.step, &picture).
 */
#include <stdio.h>

#include "ivc/ivc.h"

static int print(const char* piece, void* user) {
    (void)user;
    fputs(piece, stdout);
    fflush(stdout);
    return 1;
}

static int failed(ivc_error* error) {
    if (error == NULL) return 0;
    fprintf(stderr, "error: %s\n", ivc_error_message(error));
    ivc_error_free(error);
    return 1;
}

/* One frame, one chat: what an earlier frame left in the caches is forgotten. */
static int ask(const ivc_bundle* bundle, ivc_device* device, const char* question, const char* file) {
    ivc_chat_options options = {0};
    ivc_picture* picture = NULL;
    ivc_chat* chat = NULL;
    int bad;
    options.max_tokens = 32;
    bad = failed(ivc_picture_read(file, &picture)) || failed(ivc_chat_begin(bundle, device, &options, &chat)) ||
          failed(ivc_chat_ask(chat, question, (const ivc_picture* const*)&picture, 1, print, NULL, NULL));
    puts("");
    ivc_chat_free(chat);
    ivc_picture_free(picture);
    return bad;
}

/* On the bundle's engines, where this is built with TensorRT. */
static ivc_error* open_device(const ivc_bundle* bundle, ivc_device** device) {
#ifdef IVC_TENSORRT
    return ivc_tensorrt_open(bundle, NULL, NULL, device);
#else
    return ivc_onnxruntime_open(bundle, 0, device);
#endif
}

int main(int count, char** words) {
    ivc_bundle* bundle = NULL;
    ivc_device* device = NULL;
    int i, bad;
    if (count < 4) {
        fputs("usage: frames BUNDLE QUESTION FILE...\n", stderr);
        return 2;
    }
    bad = failed(ivc_bundle_open(words[1], &bundle)) || failed(open_device(bundle, &device));
    for (i = 3; i < count && !bad; ++i) bad = ask(bundle, device, words[2], words[i]);
    ivc_device_free(device);
    ivc_bundle_free(bundle);
    return bad ? 2 : 0;
}
