// Files that others may have written: regular ones, of limited size, and a sentence where they are not as they should.
//
// advice, throughout: what the user can do, which ends the sentence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ivc {

constexpr uint64_t kMostBytes = 16u << 20;  // of a file that is read whole, where nothing else is said

// The content of a regular file of at most `most` bytes. Throws where it is none, is larger, or cannot be read.
std::string readFile(const std::string& path, const std::string& advice, uint64_t most = kMostBytes);

// The path of what the bundle calls `file`, whether or not it is there. Throws where its name, or a link
// on its way, leads out of the bundle.
std::string confined(const std::string& bundle, const std::string& file);

// A regular file, mapped to be read. An empty one has no data.
class MappedFile {
   public:
    // Throws where it is no regular file, or cannot be mapped.
    MappedFile(const std::string& path, const std::string& advice);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const char* data() const { return data_; }  // valid as long as this
    size_t size() const { return size_; }       // in bytes

   private:
    const char* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace ivc
