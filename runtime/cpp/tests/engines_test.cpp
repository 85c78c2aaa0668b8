// The device over engines, for tests that compare it with Python: a command a line of standard input, as JSON, and an
// answer a line of standard output: {"error": ...} where it is refused.
//
// Engines are run by who gives the commands, over memory that both have mapped: before an answer come questions, a line
// each, such as {"call": "start", "engine": "prefix", "profile": 0}, and each wants a line in return.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iostream>

#include "../tensorrt/engines.h"
#include "ivc/plan.h"
#include "ivc/error.h"

namespace {

using ivc::Json;

void say(const Json& line) { std::cout << line.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl; }

Json call(const Json& question) {
    say(question);
    std::string line;
    if (!std::getline(std::cin, line)) throw ivc::Error("nobody runs the engines");
    return Json::parse(line);
}

struct Facts {
    int64_t broken = 0, held = 0, captures = 0, replays = 0, downloaded = 0;
    bool running = false, abandoned = false;  // engines that nobody has waited for, and were destroyed like that
};

// A file's memory, given piece by piece, each with a guard behind it.
class MappedGpu : public ivc::Gpu {
   public:
    MappedGpu(const std::string& path, Facts& facts) : facts_(facts) {
        const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
        void* mapped = file < 0 ? MAP_FAILED : mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (file >= 0) close(file);
        if (mapped == MAP_FAILED) throw ivc::Error(path + " cannot be mapped");
        memory_ = static_cast<char*>(mapped);
    }
    ~MappedGpu() override { munmap(memory_, kSize); }
    MappedGpu(const MappedGpu&) = delete;
    MappedGpu& operator=(const MappedGpu&) = delete;

    // Where a tensor lies in the memory; -1 in the program's own.
    int64_t offset(const void* address) const {
        const auto at = reinterpret_cast<uintptr_t>(address), begin = reinterpret_cast<uintptr_t>(memory_);
        return at >= begin && at < begin + kSize ? static_cast<int64_t>(at - begin) : -1;
    }

    void* allocate(size_t size) override {
        const size_t whole = (size + kGuard + 255) / 256 * 256;
        if (whole > kSize - used_) throw std::bad_alloc();
        char* address = memory_ + used_;
        used_ += whole;
        std::memset(address, 0, size);
        std::memset(address + size, kUntouched, kGuard);
        sizes_[address] = size;
        ++facts_.held;
        return address;
    }
    void free(void* address) noexcept override {
        if (address == nullptr) return;
        const auto* guard = static_cast<const unsigned char*>(address) + sizes_.at(address);
        for (size_t i = 0; i < kGuard; ++i) facts_.broken += guard[i] != kUntouched;
        sizes_.erase(address);
        --facts_.held;
    }
    void write(void* to, size_t size, const Fill& fill) override {
        for (size_t at = 0; at < size; at += kPiece) fill(static_cast<char*>(to) + at, at, std::min(size - at, kPiece));
    }
    void download(void* to, const void* from, size_t size) override {
        facts_.downloaded += static_cast<int64_t>(size);
        synchronize();
        copy(to, from, size);
    }
    void copy(void* to, const void* from, size_t size) override {
        if (size > 0) std::memcpy(to, from, size);
    }
    void copyBlocks(const ivc::Pitched& to, const ivc::Pitched& from, size_t size, size_t rows, size_t slices) override {
        for (size_t i = 0; i < slices * rows; ++i) {
            const size_t slice = i / rows, row = i % rows;
            copy(static_cast<char*>(to.address) + (slice * to.height + row) * to.pitch + to.start,
                static_cast<const char*>(from.address) + (slice * from.height + row) * from.pitch + from.start, size);
        }
    }
    void synchronize() override { facts_.running = false; }
    std::function<void()> capture(const std::function<void()>& work) override {
        ++facts_.captures;
        return [this, work] {
            ++facts_.replays;
            work();
        };
    }

   private:
    static constexpr size_t kSize = size_t{1} << 30, kGuard = 256, kPiece = 1000;
    static constexpr unsigned char kUntouched = 0xA5;

    Facts& facts_;
    char* memory_ = nullptr;
    size_t used_ = 0;
    std::map<void*, size_t> sizes_;
};

class AskedEngine : public ivc::Engine {
   public:
    AskedEngine(std::string name, const Json& tensors, const MappedGpu& gpu, Facts& facts)
        : name_(std::move(name)), gpu_(gpu), facts_(facts) {
        const std::map<std::string, ivc::Type> types{{"FLOAT", ivc::Type::kFloat32}, {"HALF", ivc::Type::kFloat16},
            {"BF16", ivc::Type::kBfloat16}, {"INT32", ivc::Type::kInt32}};
        for (const auto& entry : tensors.items()) {
            const Json& one = entry.value();
            tensors_[entry.key()] = {one["input"], types.at(one["type"]), one["shape"].get<ivc::Shape>(), one.value("host", false)};
        }
    }
    ~AskedEngine() override { facts_.abandoned = facts_.abandoned || facts_.running; }
    AskedEngine(const AskedEngine&) = delete;
    AskedEngine& operator=(const AskedEngine&) = delete;
    const std::map<std::string, ivc::EngineTensor>& tensors() const override { return tensors_; }
    size_t scratch() const override { return 1024; }
    void useScratch(void* address) override { scratch_ = address; }
    bool setInput(size_t profile, const std::string& name, const ivc::Shape& shape, void* address) override {
        Json question = asked("input", profile, name);
        question["shape"] = shape;
        question["offset"] = gpu_.offset(address);
        if (gpu_.offset(address) < 0) question["value"] = *static_cast<const int32_t*>(address);
        return call(question);
    }
    bool setOutput(size_t profile, const std::string& name, void* address) override {
        Json question = asked("output", profile, name);
        question["offset"] = gpu_.offset(address);
        return gpu_.offset(address) % 256 == 0 && call(question);
    }
    ivc::Shape shape(size_t profile, const std::string& name) const override {
        return call(asked("shape", profile, name)).get<ivc::Shape>();
    }
    bool start(size_t profile) override {
        facts_.running = true;
        return scratch_ != nullptr && call(asked("start", profile, ""));
    }

   private:
    Json asked(const char* what, size_t profile, const std::string& name) const {
        return {{"call", what}, {"engine", name_}, {"profile", profile}, {"name", name}};
    }

    std::string name_;
    const MappedGpu& gpu_;
    Facts& facts_;
    std::map<std::string, ivc::EngineTensor> tensors_;
    void* scratch_ = nullptr;
};

ivc::EngineFolder findEngines(const ivc::Bundle& bundle, const Json& command) {
    const ivc::EngineFolder found =
        ivc::findEngines(bundle, command.value("engines", ""), command["tensorrt"], command["capability"]);
    found.checkPlugin(command.value("plugin", ""));
    return found;
}

// Holds conversations on one device: what each run gave, and what the caches were behind it.
Json converse(const Json& command, Facts& facts) {
    const ivc::Bundle bundle(command["bundle"].get<std::string>());
    const ivc::EngineRecord record = findEngines(bundle, command).record;
    auto gpu = std::make_unique<MappedGpu>(command["memory"], facts);
    ivc::Engines engines;
    for (const auto& entry : command["tensors"].items()) {
        engines[entry.key()] = std::make_unique<AskedEngine>(entry.key(), entry.value(), *gpu, facts);
    }
    const auto device =
        ivc::makeEnginesDevice(bundle, record, std::move(gpu), std::move(engines), command.value("graph", true));
    Json given = Json::array(), stages = Json::object();
    std::map<std::string, ivc::Visual> kept;  // pictures by their files, where they are shown again
    for (int32_t round = 0; round < command.value("rounds", 1); ++round) {
        device->begin(command.value("rows", 0));
        int32_t position = 0;
        for (const Json& one : command["runs"]) {
            if (!command.value("again", false)) kept.clear();
            std::vector<const ivc::Visual*> pictures;
            std::vector<ivc::Grid> grids;
            for (const std::string path : one["pictures"]) {
                const auto found = kept.find(path);
                ivc::Visual& visual = found == kept.end() ? kept[path] : found->second;
                if (found == kept.end()) visual = prepare(ivc::readImage(path), bundle.manifest());
                if (visual.seen) visual.pixels = {};
                pictures.push_back(&visual);
                grids.push_back(visual.grid);
            }
            const ivc::Run run =
                ivc::planRun(bundle.manifest(), one["tokens"], grids, position, command["ratio"], ivc::Method{});
            const std::vector<float> logits = device->run(run, pictures);
            position = run.nextPosition;
            given.push_back({{"logits", logits}, {"keep_index", device->keepIndex()}, {"length", device->length()},
                {"room", device->room()}, {"cache_bytes", device->cacheBytes()}});
        }
    }
    for (const auto& [name, time] : device->times) stages[name] = time.runs;
    return {{"runs", given}, {"stages", stages}, {"dtype", device->dtype()}};
}

Json answer(const Json& command) {
    const std::string what = command["do"];
    if (what == "version") return ivc::versionOf(command["number"]);
    if (what == "find") {
        const ivc::Bundle bundle(command["bundle"].get<std::string>());
        const ivc::EngineFolder found = findEngines(bundle, command);
        return {{"folder", found.folder}, {"capacity", found.record.capacity}, {"dtype", found.record.dtype}};
    }
    if (what == "converse") {
        Facts facts;
        Json found;
        try {
            found = converse(command, facts);
        } catch (const ivc::Error& error) {
            throw ivc::Error((facts.abandoned ? "engines at work were destroyed: " : "") + std::string(error.what()));
        }
        found["broken"] = facts.broken;
        found["held"] = facts.held;
        found["captures"] = facts.captures;
        found["replays"] = facts.replays;
        found["downloaded"] = facts.downloaded;
        return found;
    }
    throw ivc::Error("there is no command " + what);
}

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        Json found;
        try {
            found = {{"answer", answer(Json::parse(line))}};
        } catch (const ivc::Error& error) {
            found = {{"error", error.what()}};
        }
        say(found);
    }
}
