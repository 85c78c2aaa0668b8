// What takes a GPU and a bundle's engines to be seen; prints a line for each fact, and fails at the first that is none.
//
//   ivc_device_test BUNDLE PICTURE QUESTION [PLUGIN]
#include <cuda_runtime_api.h>

#include <iostream>

#include "ivc/chat.h"
#include "ivc/error.h"
#include "ivc/ivc.h"
#include "ivc/tensorrt.h"

namespace {

void require(bool fact, const std::string& what) {
    if (!fact) throw ivc::Error("it is not so that " + what);
    std::cout << "ok: " << what << std::endl;
}

// Memory of the device, given back with this object.
struct Frame {
    explicit Frame(const ivc::Image& image, size_t more) : stride(static_cast<size_t>(image.width) * 3 + more) {
        std::vector<uint8_t> bgr(stride * static_cast<size_t>(image.height), 7);
        for (int32_t y = 0; y < image.height; ++y) {
            for (size_t x = 0; x + more < stride; ++x) {
                bgr[static_cast<size_t>(y) * stride + x] = image.row(y)[x / 3 * 3 + 2 - x % 3];
            }
        }
        if (cudaMalloc(&address, bgr.size()) != cudaSuccess) throw ivc::Error("there is no memory for a frame");
        cudaMemcpy(address, bgr.data(), bgr.size(), cudaMemcpyHostToDevice);
    }
    ~Frame() { cudaFree(address); }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

    void* address = nullptr;
    size_t stride;
};

size_t held() {
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    return total - free;
}

// Tokens of two questions over one cache, and of a third with two pictures.
std::vector<int32_t> conversation(const ivc::Bundle& bundle, ivc::Device& device, const ivc::Image& image,
    const std::string& question) {
    ivc::ChatOptions options;
    options.ratio = 0.5;
    options.sampling.maxTokens = 8;
    options.followUp = ivc::FollowUp::kCompacted;
    ivc::Chat chat(bundle, device, options);
    std::vector<int32_t> tokens;
    const auto ask = [&](const std::vector<ivc::Image>& pictures) {
        chat.ask(question, pictures);
        tokens.insert(tokens.end(), chat.tokens().begin(), chat.tokens().end());
    };
    ask({image});
    ask({});
    ask({image, image});
    return tokens;
}

std::string sentence(ivc_error* error) {
    const std::string found = ivc_error_message(error);
    ivc_error_free(error);
    return found;
}

void test(const std::string& folder, const std::string& picture, const std::string& question, const std::string& plugin) {
    const ivc::Bundle bundle(folder);
    const ivc::Image image = ivc::readImage(picture);
    ivc::TensorrtOptions options;
    options.plugin = plugin;
    const size_t before = held();
    auto device = ivc::openTensorrt(bundle, options);
    const std::vector<int32_t> tokens = conversation(bundle, *device, image, question);
    const size_t first = held();
    std::cout << "device memory: " << first - before << " bytes\n";

    const Frame frame(image, 5);
    const ivc::Image copied = ivc::copyDeviceImage(frame.address, image.width, image.height, frame.stride, true);
    require(copied.pixels == image.pixels, "a frame on the device is the picture that it was");

    bool same = true;
    for (int i = 0; i < 20; ++i) same = same && conversation(bundle, *device, image, question) == tokens;
    require(same, "conversations on one device answer alike, with CUDA graph");
    require(held() <= first + (size_t{4} << 20), "conversations take no more memory");
    device.reset();
    options.graph = false;
    require(conversation(bundle, *ivc::openTensorrt(bundle, options), image, question) == tokens,
        "they answer alike without CUDA graph");

    ivc_bundle* opened = nullptr;
    ivc_device* none = nullptr;
    ivc_picture* shown = nullptr;
    require(ivc_bundle_open(folder.c_str(), &opened) == nullptr, "the C API opens the bundle");
    require(sentence(ivc_tensorrt_open(opened, "/nowhere", nullptr, &none)).find("cannot be read") != std::string::npos,
        "a folder that is none is an error");
    const std::string refused = sentence(ivc_tensorrt_open(opened, nullptr, plugin.empty() ? "/bin/sh" : nullptr, &none));
    require(refused.find("plugin") != std::string::npos, "another plugin than the engines' is an error: " + refused);
    require(ivc_picture_bgr_on_device(frame.address, image.width, image.height, frame.stride, &shown) == nullptr,
        "the C API takes a frame on the device");
    ivc_picture_free(shown);
    ivc_bundle_free(opened);
}

}  // namespace

int main(int count, char** words) {
    if (count < 4) {
        std::cerr << "usage: ivc_device_test BUNDLE PICTURE QUESTION [PLUGIN]\n";
        return 2;
    }
    try {
        test(words[1], words[2], words[3], count > 4 ? words[4] : "");
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 1;
    }
}
