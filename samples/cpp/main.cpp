// Asks a question about a picture, and prints the answer as it comes. A bundle's TensorRT engines run the model.
//
//   ivc_sample BUNDLE PICTURE QUESTION [PLUGIN]
#include <iostream>

#include "ivc/chat.h"
#include "ivc/tensorrt.h"

int main(int count, char** words) {
    if (count < 4 || count > 5) {
        std::cerr << "usage: ivc_sample BUNDLE PICTURE QUESTION [PLUGIN]\n";
        return 2;
    }
    try {
        ivc::TensorrtOptions options;
        if (count == 5) options.plugin = words[4];
        const ivc::Bundle bundle(words[1]);
        const auto device = ivc::openTensorrt(bundle, options);
        ivc::Chat chat(bundle, *device, {});
        chat.ask(words[3], {ivc::readImage(words[2])}, [](const std::string& piece) {
            std::cout << piece << std::flush;
            return true;  // false ends the answer
        });
        std::cout << std::endl;
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 2;
    }
}
