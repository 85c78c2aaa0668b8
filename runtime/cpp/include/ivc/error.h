// What the caller can mend, in one sentence that says how.
#pragma once

#include <stdexcept>
#include <string>

namespace ivc {

// Thrown throughout the library, and turned into a value by the C API.
class Error : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

// A run that does not fit the caches or the maxima of what runs it.
class TooLongError : public Error {
   public:
    using Error::Error;
};

}  // namespace ivc
