// Errors that the caller can fix: one sentence that says how.
#pragma once

#include <stdexcept>
#include <string>

namespace ivc {

// The exception of the whole library. The C API returns it as a value.
class Error : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

// A run is too long for the caches or for the maxima of the engines.
class TooLongError : public Error {
   public:
    using Error::Error;
};

}  // namespace ivc
