// What the C API's pointers lead to, and how errors become values.
#pragma once

#include <exception>
#include <memory>
#include <new>
#include <string>

#include "ivc/bundle.h"
#include "ivc/chat.h"
#include "ivc/device.h"
#include "ivc/error.h"
#include "ivc/ivc.h"

struct ivc_error {
    std::string message;
};
struct ivc_bundle {
    ivc::Bundle bundle;
};
struct ivc_device {
    std::unique_ptr<ivc::Device> device;
};
struct ivc_picture {
    ivc::Image image;
};
struct ivc_chat {
    ivc::Chat chat;
    std::string answer = "";
};

namespace ivc {

// The error where there is no memory for one. It is nobody's, and never freed.
inline ivc_error* noMemory() noexcept {
    static ivc_error error{"no memory left"};  // short enough to take none
    return &error;
}

inline ivc_error* failure(const char* message) noexcept {
    try {
        return new ivc_error{message};
    } catch (...) {
        return noMemory();
    }
}

// A pointer that an API's function needs. what: names it in the error.
template <class T>
T* given(T* pointer, const char* what) {
    if (pointer == nullptr) throw Error(std::string("there is no ") + what + " (NULL was given): give one");
    return pointer;
}

template <class Call>
ivc_error* guarded(const Call& call) noexcept {
    try {
        call();
        return nullptr;
    } catch (const std::bad_alloc&) {
        return failure("there is no memory left: close other programs, or use smaller pictures");
    } catch (const std::exception& error) {
        return failure(error.what());
    } catch (...) {
        return failure("an unknown error occurred: please report this as a bug of the library");
    }
}

// Gives `place` a new object around what `make` returns. The place is looked at first, so that nothing is lost.
template <class T, class Make>
ivc_error* made(T** place, const Make& make) noexcept {
    return guarded([&] {
        T*& object = *given(place, "pointer for the result");
        object = new T{make()};
    });
}

}  // namespace ivc
