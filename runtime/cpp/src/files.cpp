#include "ivc/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "ivc/error.h"

namespace ivc {
namespace {

// An open regular file, and its size.
struct OpenFile {
    OpenFile(const std::string& path, const std::string& advice) {
        if (path.find('\0') != std::string::npos) throw Error("a path holds a zero byte: " + advice);
        descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe would keep it waiting
        if (descriptor < 0) {
            if (errno == ENOENT || errno == ENOTDIR) throw Error(path + " is missing: " + advice);
            throw Error(path + " cannot be read (" + std::strerror(errno) + "): " + advice);
        }
        struct stat status {};
        if (fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
            close(descriptor);
            throw Error(path + " is not a regular file: " + advice);
        }
        size = static_cast<uint64_t>(status.st_size);
    }
    ~OpenFile() { close(descriptor); }
    OpenFile(const OpenFile&) = delete;
    OpenFile& operator=(const OpenFile&) = delete;

    int descriptor = -1;
    uint64_t size = 0;
};

}  // namespace

std::string readFile(const std::string& path, const std::string& advice, uint64_t most) {
    const OpenFile file(path, advice);
    if (file.size > most) {
        throw Error(path + " has " + std::to_string(file.size) + " bytes, but the limit for this file is " +
                    std::to_string(most) + ": " + advice);
    }
    std::string content(static_cast<size_t>(file.size), '\0');
    size_t at = 0;
    while (at < content.size()) {
        const ssize_t got = read(file.descriptor, &content[at], content.size() - at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw Error(path + " cannot be read (" + std::strerror(errno) + "): " + advice);
        if (got == 0) break;
        at += static_cast<size_t>(got);
    }
    content.resize(at);
    return content;
}

std::string confined(const std::string& bundle, const std::string& file) {
    namespace fs = std::filesystem;
    std::error_code failed;
    const fs::path folder = fs::canonical(bundle.empty() ? "." : bundle, failed);
    if (failed) throw Error(bundle + " cannot be read: check the path");
    const fs::path path = fs::weakly_canonical(folder / file, failed);
    const fs::path inside = path.lexically_relative(folder);
    std::error_code absent;
    const bool link = !failed && fs::is_symlink(fs::symlink_status(path, absent));  // in circles
    if (failed || link || file.find('\0') != std::string::npos || inside.empty() || *inside.begin() == "..") {
        throw Error(bundle + " names '" + file + "', which is outside the bundle or a link to a place outside it: " +
                    "copy the whole bundle, or export the model again");
    }
    return path.string();
}

MappedFile::MappedFile(const std::string& path, const std::string& advice) {
    const OpenFile file(path, advice);
    if (file.size == 0) return;
    if (file.size > SIZE_MAX / 2) throw Error(path + " is too large for this machine: " + advice);
    size_ = static_cast<size_t>(file.size);
    void* mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.descriptor, 0);
    if (mapped == MAP_FAILED) throw Error(path + " cannot be mapped (" + std::strerror(errno) + "): " + advice);
    data_ = static_cast<const char*>(mapped);
}

MappedFile::~MappedFile() {
    if (size_ > 0) munmap(const_cast<char*>(data_), size_);
}

}  // namespace ivc
