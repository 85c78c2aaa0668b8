#include "engines.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>
#include <utility>

#include "ivc/contract.h"
#include "ivc/error.h"
#include "ivc/floats.h"

namespace ivc {

size_t bytes(Type type) { return type == Type::kFloat16 || type == Type::kBfloat16 ? 2 : 4; }

const char* nameOf(Type type) {
    const char* const names[] = {"float32", "float16", "bfloat16", "int32"};
    return names[static_cast<size_t>(type)];
}

int64_t count(const Shape& shape) {
    constexpr int64_t kMost = int64_t{1} << 48;  // more than any memory holds, and its bytes fit 64 bits
    int64_t product = 1;
    for (const int64_t extent : shape) {
        if (extent < 0 || (extent > 0 && product > kMost / extent)) {
            throw Error("a tensor would not fit into memory: build the engines again with ivc-build");
        }
        product *= extent;
    }
    return product;
}

namespace {

const char kBuild[] = "build the engines again with ivc-build";
constexpr size_t kAligned = 256;        // bytes at whose multiples TensorRT wants tensors
constexpr size_t kMostRemembered = 64;  // integers of an input that are not sent again where they are the same

std::string said(const Shape& shape) {
    std::string text;
    for (const int64_t extent : shape) text += (text.empty() ? "" : ", ") + std::to_string(extent);
    return "[" + text + "]";
}

bool startsWith(const std::string& text, const char* beginning) { return text.rfind(beginning, 0) == 0; }

// Device memory by name, zero when it is made or grows, and given back with this object.
class Buffers {
   public:
    explicit Buffers(Gpu& gpu) : gpu_(gpu) {}
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;
    ~Buffers() {
        for (const auto& entry : held_) gpu_.free(entry.second.address);
    }

    void* get(const std::string& name, size_t size) {
        Held& held = held_[name];
        if (held.address == nullptr || held.size < size) {
            gpu_.synchronize();
            gpu_.free(std::exchange(held.address, nullptr));
            held.size = std::max<size_t>(size, 1);  // an empty tensor wants an address, too
            held.address = gpu_.allocate(held.size);
            ++generation_;
        }
        return held.address;
    }

    int64_t generation() const { return generation_; }  // another one whenever a buffer is made or moved

   private:
    struct Held {
        void* address = nullptr;
        size_t size = 0;
    };
    Gpu& gpu_;
    std::map<std::string, Held> held_;
    int64_t generation_ = 0;
};

// Device memory that pictures' rows lie in, taken again once their pictures are gone, so that a camera loop allocates none.
class Pool {
   public:
    explicit Pool(std::shared_ptr<Gpu> gpu) : gpu_(std::move(gpu)) {}
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    ~Pool() {
        for (const auto& piece : free_) gpu_->free(piece.second);
    }

    struct Piece {
        size_t size = 0;
        void* address = nullptr;
    };

    Piece take(size_t size) {
        const auto found = free_.lower_bound(size);
        if (found == free_.end() || found->first > 2 * size) return {size, gpu_->allocate(size)};
        const Piece piece{found->first, found->second};
        free_.erase(found);
        return piece;
    }
    void give(const Piece& piece) noexcept {
        try {
            free_.emplace(piece.size, piece.address);
            if (free_.size() <= kMostPieces) return;
            gpu_->free(free_.begin()->second);
            free_.erase(free_.begin());
        } catch (...) {  // no memory to remember it in
            gpu_->free(piece.address);
        }
    }

   private:
    static constexpr size_t kMostPieces = 16;  // that nothing lies in

    std::shared_ptr<Gpu> gpu_;
    std::multimap<size_t, void*> free_;
};

// What vision made of a picture: of each output that has rows for it, these, [visual, hidden].
struct SeenRows : Seen {
    explicit SeenRows(std::shared_ptr<Pool> pool_) : pool(std::move(pool_)) {}
    SeenRows(const SeenRows&) = delete;
    SeenRows& operator=(const SeenRows&) = delete;
    ~SeenRows() override {
        for (const auto& entry : rows) pool->give(entry.second);
    }

    std::shared_ptr<Pool> pool;  // of the device that has seen it
    std::map<std::string, Pool::Piece> rows;
};

// Writes floats in the type of a tensor. name: the tensor's.
void convert(const float* values, size_t count, Type type, const std::string& name, void* to) {
    if (type == Type::kFloat32) {
        if (count > 0) std::memcpy(to, values, count * sizeof(float));
        return;
    }
    const float end = type == Type::kFloat16 ? 65520.0f : 3.3961775e38f;  // from there on values round to infinity
    int32_t beyond = 0;
    for (size_t i = 0; i < count; ++i) {
        const float size = std::fabs(values[i]);
        beyond |= static_cast<int32_t>(size >= end) & static_cast<int32_t>(size < HUGE_VALF);
    }
    if (beyond != 0) {
        throw Error(name + " has values beyond the range of " + nameOf(type) + ": build engines with ivc-build --dtype float32");
    }
    auto* halves = static_cast<uint16_t*>(to);
    if (type == Type::kFloat16) {
        for (size_t i = 0; i < count; ++i) halves[i] = toHalf(values[i]);
    } else {
        for (size_t i = 0; i < count; ++i) halves[i] = toBfloat16(values[i]);
    }
}

struct Placed {
    void* address = nullptr;
    Shape shape;
    Type type = Type::kFloat32;
    bool host = false;  // whether `address` is in host memory
};
using Places = std::map<std::string, Placed>;

// What the axes of a graph's tensors are in a run, as far as the host knows it.
using Axes = std::map<std::string, int64_t>;

// "key.3" of "past_key.3" and its like; empty of other tensors.
std::string cacheOf(const std::string& name) {
    for (const char* role : {"past_", "new_", "compact_", "present_"}) {
        const std::string rest = startsWith(name, role) ? name.substr(std::strlen(role)) : "";
        if (startsWith(rest, "key.") || startsWith(rest, "value.")) return rest;
    }
    return "";
}

// A graph's inputs and outputs where decoder layers write to the caller's caches by our plugin's operators; see
// ivc_export.contract.caches.owned_caches_info.
Graph ownedCaches(const Graph& graph) {
    std::set<int64_t> sizes;
    std::set<std::string> compacted;
    bool chosen = false;
    for (const Tensor& t : graph.inputs) {
        chosen = chosen || t.name == kKeepIndex;
        if (startsWith(t.name, "past_") && !cacheOf(t.name).empty() && t.shape.size() == 4) sizes.insert(t.shape[3].size);
    }
    for (const Tensor& t : graph.outputs) {
        if (startsWith(t.name, "compact_")) compacted.insert(cacheOf(t.name));
    }
    const bool taken = sizes.size() == 1 && std::count(std::begin(kAttendedSizes), std::end(kAttendedSizes), *sizes.begin());
    if (!chosen || !taken) return graph;
    const auto cache = [](const Tensor& tensor, const char* role) {
        Tensor found = tensor;
        found.name = role + cacheOf(tensor.name);
        if (found.shape.size() == 4) found.shape[2] = {0, "P"};
        return found;
    };
    Graph found = graph;
    found.inputs.clear();
    found.outputs.clear();
    for (const Tensor& t : graph.inputs) {
        found.inputs.push_back(t);
        if (startsWith(t.name, "new_") && compacted.count(cacheOf(t.name)) != 0) found.inputs.push_back(cache(t, "past_"));
    }
    for (const Tensor& t : graph.outputs) {
        const bool written = startsWith(t.name, "new_") || startsWith(t.name, "compact_");
        found.outputs.push_back(written ? cache(t, "present_") : t);
    }
    return found;
}

const Tensor* find(const std::vector<Tensor>& tensors, const std::string& name) {
    const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& t) { return t.name == name; });
    return found == tensors.end() ? nullptr : &*found;
}

// Compares an engine's tensors with its graph's: what it reads, all that it gives, their kinds and known extents.
void checkEngine(const std::string& name, const Engine& engine, const Graph& graph) {
    const auto refuse = [&](const std::string& tensor) {
        throw Error("the " + name + " engine is not an engine of this bundle's " + name + " graph (its " + tensor +
                    " differs): " + kBuild);
    };
    for (const auto& [tensor, found] : engine.tensors()) {
        const Tensor* wanted = find(found.input ? graph.inputs : graph.outputs, tensor);
        if (wanted == nullptr || found.shape.size() != wanted->shape.size()) {
            refuse(tensor);
            continue;
        }
        bool same = (found.type == Type::kInt32) == (wanted->dtype == "int32");
        for (size_t i = 0; i < found.shape.size(); ++i) {
            const Extent& extent = wanted->shape[i];
            same = same && (!extent.axis.empty() || found.shape[i] == -1 || found.shape[i] == extent.size);
        }
        if (!same) refuse(tensor);
    }
    for (const Tensor& output : graph.outputs) {
        const auto found = engine.tensors().find(output.name);
        if (found == engine.tensors().end() || found->second.input) refuse(output.name);
    }
}

// Checks that what goes from engine to engine as bytes is of one type on both sides.
void checkHandOver(const Engines& engines) {
    std::map<std::string, std::pair<std::string, Type>> found;
    for (const auto& entry : engines) {
        for (const auto& [name, tensor] : entry.second->tensors()) {
            const std::string stem = name.substr(0, name.find('.'));
            const std::string group = !cacheOf(name).empty() ? "caches" : stem == kImageEmbeds ? kInputsEmbeds : stem;
            const auto& other = found.emplace(group, std::make_pair(name, tensor.type)).first->second;
            if (other.second != tensor.type) {
                throw Error(name + " is " + nameOf(tensor.type) + " in one engine and " + other.first + " " +
                            nameOf(other.second) + " in another: " + kBuild);
            }
        }
    }
}

// Keys or values of one layer, rows of [kv_heads, capacity, size].
struct Cache {
    std::string name;  // such as "key.3"
    int64_t size = 0;  // values of a head's row
    size_t group = 0, place = 0;
};

// Caches that lie behind each other, so that one copy appends to all of them.
struct CacheGroup {
    size_t row = 0;  // bytes of one head's row
    bool whole = false, written = false;  // whether every row is kept; whether the engines write to them
    size_t caches = 0, height = 0;        // rows of `pitch` bytes for each cache
    void* address = nullptr;
};

// What one kind of run uses, over and over.
struct Stage {
    Stage(std::string name_, size_t profile_, Gpu& gpu) : name(std::move(name_)), profile(profile_), buffers(gpu) {}

    std::string name;
    size_t profile;
    Buffers buffers;
    Places feeds, given;
    std::map<std::string, std::pair<void*, std::vector<int32_t>>> sent;
    std::map<std::string, std::vector<int32_t>> onHost;  // inputs that engines read there
};

class EnginesDevice : public Device {
   public:
    EnginesDevice(const Bundle& bundle, const EngineRecord& record, std::unique_ptr<Gpu> gpu, Engines engines, bool graph)
        : bundle_(bundle), m_(bundle.manifest()), record_(record), gpu_(std::move(gpu)), useGraph_(graph),
          pool_(std::make_shared<Pool>(gpu_)), shared_(*gpu_), vision_("vision", 0, *gpu_), prefill_("prefill", 0, *gpu_), decode_("decode", 1, *gpu_),
          engines_(std::move(engines)) {
        size_t scratch = 0;
        for (const char* name : {"vision", "prefix", "decoder"}) {
            graphs_[name] = record.graphs == "plugin" ? ownedCaches(m_.graphs.at(name)) : m_.graphs.at(name);
            checkEngine(name, *engines_.at(name), graphs_[name]);
            scratch = std::max(scratch, engines_.at(name)->scratch());
        }
        checkHandOver(engines_);
        void* address = shared_.get("scratch", scratch);
        for (const auto& entry : engines_) entry.second->useScratch(address);
        makeCaches();
    }

    ~EnginesDevice() override {
        try {
            gpu_->synchronize();  // a run that failed may have left engines at work
        } catch (const Error&) {  // no GPU that anything could still run on
        }
    }
    EnginesDevice(const EnginesDevice&) = delete;
    EnginesDevice& operator=(const EnginesDevice&) = delete;

    void begin(int32_t rows) override {
        if (rows > record_.capacity) {
            throw Error("the engines' caches have " + std::to_string(record_.capacity) + " rows, but " +
                        std::to_string(rows) + " are needed: build engines with larger maxima");
        }
        length_ = wholeLength_ = 0;
    }

    const std::vector<float>& run(const Run& run, const std::vector<const Visual*>& pictures) override {
        check(run);
        const bool decodes = run.rows() == 1 && length_ > 0 && pictures.empty();
        Stage& stage = decodes ? decode_ : prefill_;
        putInputs(stage, run);
        see(stage, run, pictures);
        if (decodes) {
            timed("decode.decoder", [&] { step(stage, run); });
        } else {
            timed("prefill.prefix", [&] {
                runPrefix(stage, run);
                gpu_->synchronize();  // for the times alone
            });
            timed("prefill.decoder", [&] { runDecoder(stage, run); });
        }
        timed(decodes ? "decode.decoder" : "prefill.decoder", [&] { finish(stage, run); }, 0);
        keepIndex_.resize(static_cast<size_t>(run.kept()));
        if (decodes) {
            keepIndex_[0] = 0;
        } else {
            gpu_->download(keepIndex_.data(), stage.given.at(kKeepIndex).address, keepIndex_.size() * sizeof(int32_t));
            int32_t least = 0;
            for (const int32_t row : keepIndex_) {
                if (row < least || row >= run.rows()) throw Error(std::string("the prefix engine keeps rows that do not exist: ") + kBuild);
                least = row + 1;
            }
        }
        return logits_;
    }

    const std::vector<int32_t>& keepIndex() const override { return keepIndex_; }
    int32_t length() const override { return length_; }
    int32_t room() const override {
        return record_.capacity - (m_.selection.wholeLayers.empty() ? length_ : wholeLength_);
    }
    int64_t cacheBytes() const override {
        int64_t sum = 0;
        for (const CacheGroup& group : groups_) {
            sum += static_cast<int64_t>(group.caches * group.row) * m_.decoder.kvHeads * (group.whole ? wholeLength_ : length_);
        }
        return sum;
    }
    std::string name() const override { return "tensorrt"; }
    std::string dtype() const override { return record_.dtype; }

   private:
    template <class Work>
    void timed(const std::string& stage, const Work& work, int64_t runs = 1) {
        const auto start = std::chrono::steady_clock::now();
        work();
        times[stage].seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        times[stage].runs += runs;
    }

    bool isWhole(int32_t layer) const {
        const std::vector<int32_t>& whole = m_.selection.wholeLayers;
        return std::find(whole.begin(), whole.end(), layer) != whole.end();
    }

    const EngineTensor* tensor(const std::string& name) const {
        for (const auto& entry : engines_) {
            const auto found = entry.second->tensors().find(name);
            if (found != entry.second->tensors().end()) return &found->second;
        }
        return nullptr;
    }

    // --- caches

    void makeCaches() {
        const auto& given = engines_.at("decoder")->tensors();
        const auto& below = engines_.at("prefix")->tensors();
        const std::string last = std::to_string(m_.decoder.layers - 1);
        const EngineTensor* sample = tensor("past_key." + last);
        if (sample == nullptr) throw Error("the engines have no input past_key." + last + ": " + kBuild);
        cacheType_ = sample->type;
        for (int32_t layer = 0; layer < m_.decoder.layers; ++layer) {
            for (const std::string kind : {"key", "value"}) {
                Cache cache{kind + "." + std::to_string(layer), kind == "key" ? m_.decoder.headDim : m_.decoder.valueDim, 0, 0};
                const std::string compact = "compact_" + cache.name, fresh = "new_" + cache.name;
                const bool written = given.count("present_" + cache.name) != 0;
                const bool decoders = given.count(compact) != 0;
                const bool above = given.count(fresh) != 0 && !given.at(fresh).input;
                if (!written && !decoders && !above && below.count(fresh) == 0) {
                    throw Error("the engines give no rows for " + cache.name + ": " + kBuild);
                }
                cache.group = groupOf(static_cast<size_t>(cache.size) * bytes(cacheType_), isWhole(layer), written);
                cache.place = groups_[cache.group].caches++;
                if (!written) (decoders || above ? appendedByDecoder_ : appendedByPrefix_)[decoders ? compact : fresh] = caches_.size();
                anyWritten_ = anyWritten_ || written;
                caches_.push_back(cache);
            }
        }
        for (size_t i = 0; i < groups_.size(); ++i) {
            CacheGroup& group = groups_[i];
            const size_t pitch = group.row * static_cast<size_t>(record_.capacity);
            group.height = heightOf(pitch);
            group.address = shared_.get("caches." + std::to_string(i), group.caches * group.height * pitch);
        }
    }

    size_t groupOf(size_t row, bool whole, bool written) {
        for (size_t i = 0; i < groups_.size(); ++i) {
            if (groups_[i].row == row && groups_[i].whole == whole && groups_[i].written == written) return i;
        }
        CacheGroup group;
        group.row = row;
        group.whole = whole;
        group.written = written;
        groups_.push_back(group);
        return groups_.size() - 1;
    }

    // Rows of `pitch` bytes from one cache to the next, so that each begins where tensors may.
    size_t heightOf(size_t pitch) const {
        const size_t step = kAligned / std::gcd(kAligned, std::max<size_t>(pitch, 1));
        return (static_cast<size_t>(m_.decoder.kvHeads) + step - 1) / step * step;
    }

    void* addressOf(const Cache& cache) const {
        const CacheGroup& group = groups_[cache.group];
        const size_t pitch = group.row * static_cast<size_t>(record_.capacity);
        return static_cast<char*>(group.address) + cache.place * group.height * pitch;
    }

    int32_t rowsOf(const CacheGroup& group, const Run& run) const { return group.whole ? run.rows() : run.kept(); }

    // Where a cache's new rows lie until they are appended.
    Placed slotOf(Stage& stage, const Cache& cache, const Run& run) const {
        const CacheGroup& group = groups_[cache.group];
        const int64_t rows = rowsOf(group, run);
        const size_t pitch = group.row * static_cast<size_t>(rows), height = heightOf(pitch);
        void* base = stage.buffers.get("rows." + std::to_string(cache.group), group.caches * height * pitch);
        return {static_cast<char*>(base) + cache.place * height * pitch, {1, m_.decoder.kvHeads, rows, cache.size}, cacheType_};
    }

    // Appends what the engines have not written themselves.
    void append(Stage& stage, const Run& run) {
        for (size_t i = 0; i < groups_.size(); ++i) {
            const CacheGroup& group = groups_[i];
            if (group.written) continue;
            const size_t pitch = group.row * static_cast<size_t>(rowsOf(group, run)), height = heightOf(pitch);
            Pitched from{stage.buffers.get("rows." + std::to_string(i), group.caches * height * pitch), pitch, height, 0};
            Pitched to{group.address, group.row * static_cast<size_t>(record_.capacity), group.height, 0};
            to.start = group.row * static_cast<size_t>(group.whole ? wholeLength_ : length_);
            gpu_->copyBlocks(to, from, pitch, static_cast<size_t>(m_.decoder.kvHeads), group.caches);
        }
        length_ += run.kept();
        wholeLength_ += run.rows();
    }

    // --- inputs

    void check(const Run& run) const {
        const auto most = [](const char* what, size_t count, int32_t limit, const char* option, const char* more) {
            if (count <= static_cast<size_t>(limit)) return;
            throw TooLongError("the prompt has " + std::to_string(count) + " " + what + ", but these engines take " +
                        std::to_string(limit) + " at most: build them with --" + option + " " + std::to_string(count) + more);
        };
        most("visual tokens", run.visualIndex.size(), record_.maxVisual, "max-visual", ", or use a smaller picture");
        most("other tokens", run.textIndex.size(), record_.maxText, "max-text", "");
        int64_t rows = int64_t{length_} + run.kept();
        if (!m_.selection.wholeLayers.empty()) rows = std::max(rows, int64_t{wholeLength_} + run.rows());
        if (rows > record_.capacity) {
            throw TooLongError("the engines' caches have " + std::to_string(record_.capacity) + " rows, but " +
                               std::to_string(rows) + " are needed: build engines with a larger --max-new");
        }
    }

    static void checkSize(const std::string& name, size_t values, const Shape& shape) {
        if (count(shape) == static_cast<int64_t>(values)) return;
        throw Error(name + " has " + std::to_string(values) + " values, but its shape is " + said(shape) +
                    ": prepare the picture with this bundle");
    }

    void put(Stage& stage, const std::string& name, const std::vector<int32_t>& values, Shape shape) {
        const EngineTensor* found = tensor(name);
        if (found == nullptr) return;
        checkSize(name, values.size(), shape);
        if (found->host) {
            std::vector<int32_t>& held = stage.onHost[name];
            held = values;
            stage.feeds[name] = {held.data(), std::move(shape), Type::kInt32, true};
            return;
        }
        const size_t size = values.size() * sizeof(int32_t);
        void* address = stage.buffers.get(name, size);
        auto& [place, sent] = stage.sent[name];
        if (place != address || sent != values || values.size() > kMostRemembered) {
            gpu_->upload(address, values.data(), size);
            place = address;
            sent.assign(values.begin(), values.size() > kMostRemembered ? values.begin() : values.end());
        }
        stage.feeds[name] = {address, std::move(shape), Type::kInt32};
    }

    void put(Stage& stage, const std::string& name, const std::vector<int32_t>& values) {
        put(stage, name, values, {static_cast<int64_t>(values.size())});
    }

    void put(Stage& stage, const std::string& name, const std::vector<float>& values, Shape shape) {
        write(stage, name, values.size(), std::move(shape), [&](Type type, void* to, size_t first, size_t some) {
            convert(values.data() + first, some, type, name, to);
        });
    }

    void put(Stage& stage, const std::string& name, const Pixels& pixels, Shape shape) {
        const EngineTensor* found = tensor(name);
        LevelTable<uint16_t> halves{};
        if (found != nullptr && found->type != Type::kFloat32) {
            for (size_t i = 0; i < halves.size(); ++i) {
                convert(pixels.values[i].data(), halves[i].size(), found->type, name, halves[i].data());
            }
        }
        write(stage, name, pixels.size(), std::move(shape), [&](Type type, void* to, size_t first, size_t some) {
            if (type == Type::kFloat32) {
                pixels.write(pixels.values, first, some, static_cast<float*>(to));
            } else {
                pixels.write(halves, first, some, static_cast<uint16_t*>(to));
            }
        });
    }

    // The embeddings of a run's tokens. Where they are stored in the engines' type, they are copied as they are.
    void putEmbeds(Stage& stage, const std::vector<int32_t>& tokens) {
        const EngineTensor* found = tensor(kInputsEmbeds);
        const Shape shape{1, static_cast<int64_t>(tokens.size()), m_.decoder.hiddenSize};
        if (found == nullptr || tokens.empty() || bundle_.storedEmbedding(tokens[0], nameOf(found->type)) == nullptr) {
            put(stage, kInputsEmbeds, bundle_.embed(tokens), shape);
            return;
        }
        const auto hidden = static_cast<size_t>(m_.decoder.hiddenSize);
        write(stage, kInputsEmbeds, tokens.size() * hidden, shape, [&](Type type, void* to, size_t first, size_t some) {
            auto* next = static_cast<char*>(to);
            for (size_t i = first; i < first + some;) {
                const size_t place = i % hidden, count = std::min(hidden - place, first + some - i), size = bytes(type);
                std::memcpy(next, bundle_.storedEmbedding(tokens[i / hidden], nameOf(type)) + place * size, count * size);
                next += count * size;
                i += count;
            }
        });
    }

    // Sends what `fill` writes: `some` of the values in the engines' type, from the value `first` on.
    void write(Stage& stage, const std::string& name, size_t values, Shape shape,
        const std::function<void(Type type, void* to, size_t first, size_t some)>& fill) {
        const EngineTensor* found = tensor(name);
        if (found == nullptr) return;
        checkSize(name, values, shape);
        const Type type = found->type;
        const size_t one = bytes(type), size = values * one;
        void* address = stage.buffers.get(name, size);
        gpu_->write(address, size, [&](void* to, size_t first, size_t some) { fill(type, to, first / one, some / one); });
        stage.feeds[name] = {address, std::move(shape), type};
    }

    void putInputs(Stage& stage, const Run& run) {
        const int64_t rows = run.rows(), hidden = m_.decoder.hiddenSize, visual = static_cast<int64_t>(run.visualIndex.size());
        putEmbeds(stage, run.tokens);
        for (int32_t i = 0; i < m_.decoder.deepstack; ++i) {
            write(stage, "deepstack." + std::to_string(i), static_cast<size_t>(visual * hidden), {1, visual, hidden},
                [](Type type, void* to, size_t, size_t some) { std::memset(to, 0, some * bytes(type)); });
        }
        put(stage, kPositionIds, run.positionIds, {static_cast<int64_t>(m_.axes()), 1, rows});
        put(stage, kVisualIndex, run.visualIndex);
        put(stage, kTextIndex, run.textIndex);
        put(stage, kQueryIndex, run.queryIndex);
        put(stage, kThumbnailIndex, run.thumbnailIndex);
        put(stage, kTileMap, run.tileMap);
        put(stage, kCandidateIndex, run.candidateIndex);
        put(stage, kIvcPriority, run.ivcPriority, {visual});
        put(stage, kLogitIndex, std::vector<int32_t>{run.kept() - 1});
        put(stage, kPastLength, std::vector<int32_t>{length_});
        for (const int32_t layer : m_.selection.wholeLayers) {
            put(stage, "past_length." + std::to_string(layer), std::vector<int32_t>{wholeLength_});
        }
        put(stage, kKeepCount, std::vector<int32_t>{run.keepCount});
        const int64_t held = length_ > 0 || anyWritten_ ? record_.capacity : 0;
        for (const Cache& cache : caches_) {
            stage.feeds["past_" + cache.name] = {addressOf(cache), {1, m_.decoder.kvHeads, held, cache.size}, cacheType_};
        }
    }

    // Copies what vision makes of the pictures to their rows.
    void see(Stage& stage, const Run& run, const std::vector<const Visual*>& pictures) {
        int64_t first = 0;
        for (const Visual* picture : pictures) {
            const auto visual = static_cast<int64_t>(picture->grid.visual());
            if (first + visual > static_cast<int64_t>(run.visualIndex.size())) {
                throw Error("the pictures do not have the visual tokens of the prompt: prepare them with this bundle");
            }
            const SeenRows& seen = look(*picture);
            for (const auto& [name, rows] : seen.rows) {
                const bool embeds = name == kImageEmbeds;
                const Placed& target = stage.feeds.at(embeds ? kInputsEmbeds : name);
                const int64_t row = embeds ? run.visualIndex[static_cast<size_t>(first)] : first;
                if (row < 0 || row + visual > target.shape[1]) {
                    throw Error("the rows of the pictures are not in the prompt: prepare them with this bundle");
                }
                const size_t size = static_cast<size_t>(m_.decoder.hiddenSize) * bytes(target.type);
                gpu_->copy(static_cast<char*>(target.address) + static_cast<size_t>(row) * size, rows.address,
                    static_cast<size_t>(visual) * size);
            }
            first += visual;
        }
    }

    // What vision makes of a picture, now or before.
    const SeenRows& look(const Visual& picture) {
        const auto* before = dynamic_cast<const SeenRows*>(picture.seen.get());
        if (before != nullptr && before->pool == pool_) return *before;
        auto found = std::make_shared<SeenRows>(pool_);
        timed("vision", [&] {
            const auto number = [](const std::vector<int32_t>& values) { return static_cast<int64_t>(values.size()); };
            const bool views = !picture.tokenSource.empty();
            const int64_t visual = picture.grid.visual(), frames = picture.shape.empty() ? 0 : picture.shape[0];
            put(vision_, kPixelValues, picture.pixels, picture.shape);
            put(vision_, kPatchPosition, picture.patchPosition, {number(picture.patchPosition) / 2, 2});
            put(vision_, kTokenSource, picture.tokenSource);
            runEngine(vision_, "vision", {{"B", frames}, {"visual", views ? visual : visual / std::max<int64_t>(frames, 1)}}, {});
            keep(*found, kImageEmbeds, visual);
            for (int32_t i = 0; i < m_.decoder.deepstack; ++i) keep(*found, "deepstack." + std::to_string(i), visual);
            gpu_->synchronize();
        });
        picture.seen = found;
        return *found;
    }

    void keep(SeenRows& seen, const std::string& name, int64_t visual) {
        const Placed& source = vision_.given.at(name);
        if (count(source.shape) != visual * m_.decoder.hiddenSize) {
            throw Error("the vision engine gives " + name + " of " + said(source.shape) + " for " + std::to_string(visual) +
                        " visual tokens: " + kBuild);
        }
        const size_t size = static_cast<size_t>(count(source.shape)) * bytes(source.type);
        const Pool::Piece piece = pool_->take(size);
        seen.rows[name] = piece;
        gpu_->copy(piece.address, source.address, size);
    }

    // --- runs

    // Sets an engine's inputs, finds places for its outputs, and starts it. placed: outputs that lie there.
    void runEngine(Stage& stage, const std::string& name, const Axes& axes, const Places& placed) {
        Engine& engine = *engines_.at(name);
        for (const auto& entry : engine.tensors()) {
            if (!entry.second.input) continue;
            const auto fed = stage.feeds.find(entry.first), handed = stage.given.find(entry.first);
            if (fed == stage.feeds.end() && handed == stage.given.end()) {
                throw Error("the " + name + " engine has the input " + entry.first +
                            ", which this version does not know: upgrade this library");
            }
            const Placed& input = fed != stage.feeds.end() ? fed->second : handed->second;
            checkPlace(name, entry.first, entry.second, input.host);
            if (input.type != entry.second.type || !engine.setInput(stage.profile, entry.first, input.shape, input.address)) {
                throw Error(entry.first + " of " + said(input.shape) + " does not fit the " + name +
                            " engine: build engines with larger maxima");
            }
        }
        for (const auto& entry : engine.tensors()) {
            if (entry.second.input) continue;
            checkPlace(name, entry.first, entry.second, false);
            const Shape shape = engine.shape(stage.profile, entry.first);
            checkShape(name, entry.first, shape, axes);
            const auto place = placed.find(entry.first);
            Placed output{nullptr, shape, entry.second.type};
            if (place == placed.end()) {
                const size_t size = static_cast<size_t>(count(shape)) * bytes(output.type);
                output.address = stage.buffers.get(name + "/" + entry.first, size);
            } else if (place->second.shape != shape || place->second.type != output.type) {
                throw Error("the " + name + " engine gives " + entry.first + " of " + said(shape) + " instead of " +
                            said(place->second.shape) + ": " + kBuild);
            } else {
                output.address = place->second.address;
            }
            if (!engine.setOutput(stage.profile, entry.first, output.address)) {
                throw Error("TensorRT refuses the memory for " + entry.first + " of the " + name + " engine: " + kBuild);
            }
            stage.given[entry.first] = std::move(output);
        }
        start(stage, name);
    }

    static void checkPlace(const std::string& engine, const std::string& name, const EngineTensor& tensor, bool host) {
        if (tensor.host == host) return;
        throw Error("the " + engine + " engine needs " + name + " in " + (tensor.host ? "host" : "GPU") +
                    " memory, but this library puts it elsewhere: " + kBuild);
    }

    void start(const Stage& stage, const std::string& name) {
        if (engines_.at(name)->start(stage.profile)) return;
        throw Error("TensorRT cannot run the " + name + " engine: check that the GPU has memory left");
    }

    // An output's shape, once all inputs are set: known, and the graph's.
    void checkShape(const std::string& engine, const std::string& name, const Shape& shape, const Axes& axes) const {
        if (std::any_of(shape.begin(), shape.end(), [](int64_t extent) { return extent < 0; })) {
            throw Error("the " + engine + " engine does not give the size of " + name + ": " + kBuild);
        }
        const Tensor& wanted = *find(graphs_.at(engine).outputs, name);
        bool fits = shape.size() == wanted.shape.size();
        for (size_t i = 0; i < shape.size() && fits; ++i) {
            const Extent& extent = wanted.shape[i];
            const auto known = axes.find(extent.axis);
            if (extent.axis.empty()) {
                fits = shape[i] == extent.size;
            } else if (known != axes.end()) {
                fits = shape[i] == known->second;
            }
        }
        if (fits) return;
        throw Error("the " + engine + " engine gives " + name + " of " + said(shape) + ", which differs from the graph: " + kBuild);
    }

    Places appended(Stage& stage, const std::map<std::string, size_t>& outputs, const Run& run) {
        Places places;
        for (const auto& [name, cache] : outputs) places[name] = slotOf(stage, caches_[cache], run);
        return places;
    }

    void runPrefix(Stage& stage, const Run& run) {
        const auto visual = static_cast<int64_t>(run.visualIndex.size());
        runEngine(stage, "prefix", {{"S", run.rows()}, {"L", visual}, {"M", run.kept()}},
            appended(stage, appendedByPrefix_, run));
    }

    void runDecoder(Stage& stage, const Run& run) {
        Places places = appended(stage, appendedByDecoder_, run);
        for (const Cache& cache : caches_) {
            if (!groups_[cache.group].written) continue;
            places["present_" + cache.name] = {addressOf(cache), {1, m_.decoder.kvHeads, record_.capacity, cache.size}, cacheType_};
        }
        Axes axes{{"M", run.kept()}, {"R", 1}};
        if (anyWritten_) axes["P"] = record_.capacity;
        runEngine(stage, "decoder", axes, places);
    }

    // A decode step: bound and run as it is, then captured, and from then on replayed, as long as all lies where it did.
    void step(Stage& stage, const Run& run) {
        if (boundAt_ != stage.buffers.generation()) {
            graph_ = nullptr;
            tried_ = false;
            runPrefix(stage, run);
            runDecoder(stage, run);
            boundAt_ = stage.buffers.generation();
            return;
        }
        const auto work = [&] {
            start(stage, "prefix");
            start(stage, "decoder");
        };
        if (useGraph_ && !tried_) {
            graph_ = gpu_->capture(work);
            tried_ = true;
        }
        graph_ ? graph_() : work();
    }

    void finish(Stage& stage, const Run& run) {
        append(stage, run);
        const Placed& logits = stage.given.at(kLogits);
        if (logits.type != Type::kFloat32 || count(logits.shape) != m_.decoder.vocabSize) {
            throw Error("the decoder engine gives logits of " + said(logits.shape) + ", which are not one float32 row of the vocabulary: " +
                        kBuild);
        }
        logits_.resize(static_cast<size_t>(m_.decoder.vocabSize));
        gpu_->download(logits_.data(), logits.address, logits_.size() * sizeof(float));
    }

    const Bundle& bundle_;
    const Manifest& m_;
    EngineRecord record_;
    std::shared_ptr<Gpu> gpu_;
    bool useGraph_;
    std::shared_ptr<Pool> pool_;
    Buffers shared_;
    Stage vision_, prefill_, decode_;
    Engines engines_;  // work in the buffers' memory
    std::function<void()> graph_;
    bool tried_ = false, anyWritten_ = false;
    int64_t boundAt_ = -1;
    std::map<std::string, Graph> graphs_;  // as the engines have them
    Type cacheType_ = Type::kFloat32;
    std::vector<Cache> caches_;
    std::vector<CacheGroup> groups_;
    std::map<std::string, size_t> appendedByPrefix_, appendedByDecoder_;  // outputs that go to caches
    int32_t length_ = 0, wholeLength_ = 0;
    std::vector<float> logits_;
    std::vector<int32_t> keepIndex_;
};

}  // namespace

std::unique_ptr<Device> makeEnginesDevice(const Bundle& bundle, const EngineRecord& record, std::unique_ptr<Gpu> gpu,
    Engines engines, bool graph) {
    return std::make_unique<EnginesDevice>(bundle, record, std::move(gpu), std::move(engines), graph);
}

}  // namespace ivc
