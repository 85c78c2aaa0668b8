#include "ivc/onnxruntime.h"

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "ivc/contract.h"
#include "ivc/error.h"

namespace ivc {
namespace {

const OrtApi& api() {
    static const OrtApi* const kApi = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (kApi == nullptr) {
        throw Error(std::string("onnxruntime ") + OrtGetApiBase()->GetVersionString() +
                    " is older than the headers that this program was built with: install a newer one");
    }
    return *kApi;
}

void check(OrtStatus* status, const std::string& what) {
    if (status == nullptr) return;
    std::string message = api().GetErrorMessage(status);
    api().ReleaseStatus(status);
    message = message.substr(0, message.find('\n'));
    throw Error(what + " (" + message + "): export the model again, or use another onnxruntime");
}

struct Release {
    void operator()(OrtEnv* x) const { api().ReleaseEnv(x); }
    void operator()(OrtSession* x) const { api().ReleaseSession(x); }
    void operator()(OrtSessionOptions* x) const { api().ReleaseSessionOptions(x); }
    void operator()(OrtMemoryInfo* x) const { api().ReleaseMemoryInfo(x); }
    void operator()(OrtValue* x) const { api().ReleaseValue(x); }
    void operator()(OrtTensorTypeAndShapeInfo* x) const { api().ReleaseTensorTypeAndShapeInfo(x); }
};
template <class T>
using Owned = std::unique_ptr<T, Release>;

using Shape = std::vector<int64_t>;
using Values = std::map<std::string, Owned<OrtValue>>;

int64_t valuesIn(const Shape& shape) {
    int64_t product = 1;
    for (const int64_t extent : shape) product *= extent;
    return product;
}

// A tensor's values, once its type and shape are those that are wanted; -1 is any extent.
template <class T>
const T* valuesOf(const Values& values, const std::string& name, const Shape& wanted, Shape* found = nullptr) {
    const auto refuse = [&](const char* why) -> void {
        throw Error("the graphs' output " + name + " " + why + ": export the model again");
    };
    const auto entry = values.find(name);
    if (entry == values.end()) refuse("is missing");
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    check(api().GetTensorTypeAndShape(entry->second.get(), &raw), "the shape of a tensor cannot be read");
    const Owned<OrtTensorTypeAndShapeInfo> info(raw);
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    size_t rank = 0;
    check(api().GetTensorElementType(info.get(), &type), "the type of a tensor cannot be read");
    check(api().GetDimensionsCount(info.get(), &rank), "the shape of a tensor cannot be read");
    Shape shape(rank);
    check(api().GetDimensions(info.get(), shape.data(), rank), "the shape of a tensor cannot be read");
    const auto expected =
        std::is_same_v<T, float> ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    if (type != expected) refuse("has the wrong type");
    bool fits = rank == wanted.size();
    for (size_t i = 0; i < rank && fits; ++i) fits = wanted[i] < 0 || wanted[i] == shape[i];
    if (!fits) refuse("has the wrong shape");
    void* data = nullptr;
    check(api().GetTensorMutableData(entry->second.get(), &data), "the values of a tensor cannot be read");
    if (found != nullptr) *found = shape;
    return static_cast<const T*>(data);
}

// A device, to those that may outlive it.
struct Owner {};

// What vision made of a picture: of each output that has rows for it, these, [visual, hidden].
struct SeenRows : Seen {
    explicit SeenRows(std::shared_ptr<const Owner> by_) : by(std::move(by_)) {}

    std::shared_ptr<const Owner> by;
    std::map<std::string, std::vector<float>> rows;
};

// Keys or values of one layer, [heads, rows, size].
struct Cache {
    std::vector<float> values;
    int64_t heads = 0, rows = 0, size = 0;

    Shape shape() const { return {1, heads, rows, size}; }
    void add(const float* more, int64_t count) {
        std::vector<float> grown(static_cast<size_t>(heads * (rows + count) * size));
        for (int64_t head = 0; head < heads; ++head) {
            float* to = grown.data() + head * (rows + count) * size;
            std::copy_n(values.data() + head * rows * size, rows * size, to);
            std::copy_n(more + head * count * size, count * size, to + rows * size);
        }
        values = std::move(grown);
        rows += count;
    }
};

class OnnxRuntimeDevice : public Device {
   public:
    OnnxRuntimeDevice(const Bundle& bundle, const OnnxRuntimeOptions& options) : bundle_(bundle), m_(bundle.manifest()) {
        if (m_.dtype != "float32" || m_.residualScale != 1) {
            throw Error("onnxruntime's CPU provider computes in float32, but this bundle is in " + m_.dtype +
                        ": export the model with --dtype float32");
        }
        OrtEnv* environment = nullptr;
        check(api().CreateEnv(ORT_LOGGING_LEVEL_FATAL, "ivc", &environment), "onnxruntime does not start");
        environment_.reset(environment);
        OrtMemoryInfo* memory = nullptr;
        check(api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory), "the CPU's memory cannot be described");
        memory_.reset(memory);
        OrtSessionOptions* raw = nullptr;
        check(api().CreateSessionOptions(&raw), "session options cannot be created");
        const Owned<OrtSessionOptions> settings(raw);
        check(api().SetIntraOpNumThreads(settings.get(), options.threads), "the number of threads cannot be set");
        // threads spin for a short time while a graph runs, and not between runs: each graph has threads of its own
        for (const auto& [key, value] : {std::pair{"session.intra_op.allow_spinning", "1"},
                 std::pair{"session.intra_op.spin_duration_us", "50"}, std::pair{"session.force_spinning_stop", "1"}}) {
            check(api().AddSessionConfigEntry(settings.get(), key, value), std::string(key) + " cannot be set");
        }
        for (const char* name : {"vision", "prefix", "decoder"}) {
            const std::string path = bundle.graphFile(name);
            OrtSession* session = nullptr;
            check(api().CreateSession(environment_.get(), path.c_str(), settings.get(), &session),
                path + " does not open in onnxruntime");
            sessions_[name].reset(session);
        }
        begin(0);
    }

    void begin(int32_t) override {
        caches_.clear();
        for (int32_t i = 0; i < m_.decoder.layers; ++i) {
            caches_["key." + std::to_string(i)] = {{}, m_.decoder.kvHeads, 0, m_.decoder.headDim};
            caches_["value." + std::to_string(i)] = {{}, m_.decoder.kvHeads, 0, m_.decoder.valueDim};
        }
    }

    const std::vector<float>& run(const Run& run, const std::vector<const Visual*>& pictures) override {
        const std::string stage = run.rows() == 1 && length() > 0 && pictures.empty() ? "decode" : "prefill";
        std::vector<float> embeds = bundle_.embed(run.tokens);
        const int64_t hidden = m_.decoder.hiddenSize, visual = static_cast<int64_t>(run.visualIndex.size());
        std::map<std::string, std::vector<float>> added;  // features of the pictures, to their rows
        for (int32_t i = 0; i < m_.decoder.deepstack; ++i) {
            added["deepstack." + std::to_string(i)].assign(static_cast<size_t>(visual * hidden), 0.0f);
        }
        int64_t seen = 0;
        for (const Visual* picture : pictures) {
            const int64_t tokens = picture->grid.visual();
            if (seen + tokens > visual) {
                throw Error("the pictures do not have the visual tokens of the prompt: prepare them with this bundle");
            }
            const SeenRows& found = look(*picture);
            const float* image = found.rows.at(kImageEmbeds).data();
            for (int64_t i = 0; i < tokens; ++i) {
                const int64_t row = run.visualIndex[static_cast<size_t>(seen + i)];
                std::copy_n(image + i * hidden, hidden, embeds.data() + row * hidden);
            }
            for (auto& [name, values] : added) {
                std::copy_n(found.rows.at(name).data(), tokens * hidden, values.data() + seen * hidden);
            }
            seen += tokens;
        }
        Values feeds = planned(run);
        const int64_t rows = run.rows();
        feeds[kInputsEmbeds] = floats(embeds, {1, rows, hidden});
        for (const auto& [name, values] : added) feeds[name] = floats(values, {1, visual, hidden});
        addCaches(feeds);
        Values prefix = call(stage + ".prefix", "prefix", feeds);
        Shape kept;
        const int32_t* index = valuesOf<int32_t>(prefix, kKeepIndex, {-1}, &kept);
        if (kept[0] != run.kept()) throw Error("the prefix graph keeps the wrong number of rows: export the model again");
        for (int64_t i = 0, least = 0; i < kept[0]; least = index[i++] + int64_t{1}) {
            if (index[i] < least || index[i] >= rows) {
                throw Error("the prefix graph keeps rows that do not exist: export the model again");
            }
        }
        keepIndex_.assign(index, index + kept[0]);
        for (auto& [name, value] : prefix) feeds[name] = std::move(value);
        const Values decoder = call(stage + ".decoder", "decoder", feeds);
        for (const auto& [name, value] : decoder) {
            if (feeds.count(name) != 0 && name.compare(0, 4, "new_") == 0) {
                throw Error("two graphs have the output " + name + ": export the model again");
            }
        }
        append(feeds, decoder);
        const int64_t vocabulary = m_.decoder.vocabSize;
        const float* logits = valuesOf<float>(decoder, kLogits, {1, 1, vocabulary});
        logits_.assign(logits, logits + vocabulary);
        return logits_;
    }

    const std::vector<int32_t>& keepIndex() const override { return keepIndex_; }
    int32_t length() const override {
        return static_cast<int32_t>(caches_.at("key." + std::to_string(m_.decoder.layers - 1)).rows);
    }
    int32_t room() const override { return INT32_MAX; }
    int64_t cacheBytes() const override {
        int64_t sum = 0;
        for (const auto& [name, cache] : caches_) sum += static_cast<int64_t>(cache.values.size()) * 4;
        return sum;
    }
    std::string name() const override { return "onnxruntime-cpu"; }
    std::string dtype() const override { return "float32"; }

   private:
    // What vision makes of a picture, now or before.
    const SeenRows& look(const Visual& picture) {
        const auto* before = dynamic_cast<const SeenRows*>(picture.seen.get());
        if (before != nullptr && before->by == owner_) return *before;
        Values feeds;
        const auto count = [](const std::vector<int32_t>& values) { return static_cast<int64_t>(values.size()); };
        const std::vector<float> pixels = picture.pixels.normalised();
        feeds[kPixelValues] = floats(pixels, picture.shape);
        feeds[kPatchPosition] = integers(picture.patchPosition, {count(picture.patchPosition) / 2, 2});
        feeds[kTokenSource] = integers(picture.tokenSource, {count(picture.tokenSource)});
        const Values outputs = call("vision", "vision", feeds);
        const int64_t hidden = m_.decoder.hiddenSize, size = picture.grid.visual() * hidden;
        auto found = std::make_shared<SeenRows>(owner_);
        const auto keep = [&](const std::string& name) {
            Shape shape;
            const float* values = valuesOf<float>(outputs, name, {-1, -1, hidden}, &shape);
            if (valuesIn(shape) != size) {
                throw Error("the vision graph gives the wrong number of visual tokens: export the model again");
            }
            found->rows[name].assign(values, values + size);
        };
        keep(kImageEmbeds);
        for (int32_t i = 0; i < m_.decoder.deepstack; ++i) keep("deepstack." + std::to_string(i));
        picture.seen = found;
        return *found;
    }

    Owned<OrtValue> tensor(const void* data, size_t size, const Shape& shape, ONNXTensorElementDataType type) const {
        OrtValue* value = nullptr;
        static char none = 0;  // where an empty tensor lies
        void* place = size > 0 ? const_cast<void*>(data) : &none;
        check(api().CreateTensorWithDataAsOrtValue(memory_.get(), place, size, shape.data(),
                  shape.size(), type, &value),
            "a tensor cannot be created");
        return Owned<OrtValue>(value);
    }
    Owned<OrtValue> floats(const std::vector<float>& values, const Shape& shape) const {
        return tensor(values.data(), values.size() * 4, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    }
    Owned<OrtValue> integers(const std::vector<int32_t>& values, const Shape& shape) const {
        return tensor(values.data(), values.size() * 4, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
    }

    // What the plan alone says of the graphs' inputs.
    Values planned(const Run& run) {
        numbers_ = {{run.keepCount}, {run.kept() - 1}};
        Values feeds;
        const auto list = [&](const char* name, const std::vector<int32_t>& values) {
            feeds[name] = integers(values, {static_cast<int64_t>(values.size())});
        };
        feeds[kPositionIds] = integers(run.positionIds, {static_cast<int64_t>(m_.axes()), 1, run.rows()});
        list(kVisualIndex, run.visualIndex);
        list(kTextIndex, run.textIndex);
        list(kQueryIndex, run.queryIndex);
        list(kThumbnailIndex, run.thumbnailIndex);
        list(kTileMap, run.tileMap);
        list(kCandidateIndex, run.candidateIndex);
        list(kKeepCount, numbers_[0]);
        list(kLogitIndex, numbers_[1]);
        feeds[kIvcPriority] = floats(run.ivcPriority, {static_cast<int64_t>(run.ivcPriority.size())});
        return feeds;
    }

    void addCaches(Values& feeds) {
        lengths_.clear();
        const auto add = [&](const std::string& name, int64_t length) {
            auto& held = lengths_[name];
            held = {static_cast<int32_t>(length)};
            feeds[name] = integers(held, {1});
        };
        add(kPastLength, length());
        for (const int32_t layer : m_.selection.wholeLayers) {
            add("past_length." + std::to_string(layer), caches_.at("key." + std::to_string(layer)).rows);
        }
        for (const auto& [name, cache] : caches_) feeds["past_" + name] = floats(cache.values, cache.shape());
    }

    // Appends `compact_*` of the layers that have it, `new_*` of the others.
    void append(const Values& given, const Values& decoder) {
        for (auto& [name, cache] : caches_) {
            const std::string compact = "compact_" + name, fresh = "new_" + name;
            const bool compacted = decoder.count(compact) != 0;
            const Values& source = compacted || decoder.count(fresh) != 0 ? decoder : given;
            Shape shape;
            const float* more =
                valuesOf<float>(source, compacted ? compact : fresh, {1, cache.heads, -1, cache.size}, &shape);
            cache.add(more, shape[2]);
        }
    }

    Values call(const std::string& stage, const std::string& name, const Values& feeds) {
        const Graph& graph = m_.graphs.at(name);
        std::vector<const char*> inputs, outputs;
        std::vector<const OrtValue*> given;
        for (const Tensor& input : graph.inputs) {
            const auto found = feeds.find(input.name);
            if (found == feeds.end()) {
                throw Error("the graph " + name + " has the input " + input.name +
                            ", which this version does not know: upgrade this library");
            }
            inputs.push_back(input.name.c_str());
            given.push_back(found->second.get());
        }
        for (const Tensor& output : graph.outputs) outputs.push_back(output.name.c_str());
        std::vector<OrtValue*> found(outputs.size(), nullptr);
        const auto start = std::chrono::steady_clock::now();
        OrtStatus* status = api().Run(sessions_.at(name).get(), nullptr, inputs.data(), given.data(), given.size(),
            outputs.data(), outputs.size(), found.data());
        Values values;
        for (size_t i = 0; i < found.size(); ++i) values[graph.outputs[i].name].reset(found[i]);
        check(status, name + " cannot run");
        times[stage].seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        ++times[stage].runs;
        return values;
    }

    const Bundle& bundle_;
    const Manifest& m_;
    std::shared_ptr<const Owner> owner_ = std::make_shared<Owner>();
    Owned<OrtEnv> environment_;
    Owned<OrtMemoryInfo> memory_;
    std::map<std::string, Owned<OrtSession>> sessions_;
    std::map<std::string, Cache> caches_;
    std::map<std::string, std::vector<int32_t>> lengths_;
    std::vector<std::vector<int32_t>> numbers_;
    std::vector<float> logits_;
    std::vector<int32_t> keepIndex_;
};

}  // namespace

std::unique_ptr<Device> openOnnxRuntime(const Bundle& bundle, const OnnxRuntimeOptions& options) {
    return std::make_unique<OnnxRuntimeDevice>(bundle, options);
}

}  // namespace ivc
