// Reads files that others may have written: regular files of limited size only. Errors are one sentence.
//
// advice, in all functions: the end of that sentence, which says what the user can do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ivc {

constexpr uint64_t kMostBytes = 16u << 20;  // the default limit of a file that is read whole

// The content of a regular file of at most `most` bytes. Throws if it is no regular file, is larger, or cannot be read.
std::string readFile(const std::string& path, const std::string& advice, uint64_t most = kMostBytes);

// The path of a file that the bundle names. The file need not exist. Throws if the name, or a link in its path, leads out of
// the bundle.
std::string confined(const std::string& bundle, const std::string& file);

// A regular file, mapped into memory for reading. An empty file has no data.
class MappedFile {
   public:
    // Throws if it is no regular file, or cannot be mapped.
    MappedFile(const std::string& path, const std::string& advice);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const char* data() const { return data_; }  // valid as long as this object
    size_t size() const { return size_; }       // in bytes

   private:
    const char* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace ivc
