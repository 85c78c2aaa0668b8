// Runs a bundle's TensorRT engines: a prompt with one picture, then greedy decode steps, and prints token ids.
//
//   ivc_sample BUNDLE ENGINES --testdata [--max-tokens N] [--plugin LIB] [--no-graph]
//   ivc_sample BUNDLE ENGINES --tokens 1,2,3 --pixels FILE --grid ROWS COLUMNS [--ratio R] ...
//
// FILE holds pixel_values as float32, as testdata/ has them (docs/runtime.md). Caches stay on the device: buffers of the
// engines' capacity, to which rows are appended in place. A decode step is captured into a CUDA graph.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "../../graphs/plugin/kernels/ivc_kernels.h"
#include "embeddings.h"
#include "engine.h"
#include "ivc_tensors.h"
#include "manifest.h"
#include "mapped_file.h"
#include "plan.h"

namespace {

class Generator {
   public:
    Generator(const std::string& bundle, const Json& manifest, const std::string& engines, int32_t capacity,
        bool useGraph)
        : manifest_(manifest), embeddings_(bundle, manifest_), useGraph_(useGraph), capacity_(capacity) {
        check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (!runtime_) throw std::runtime_error("TensorRT does not start: build this program with the one here");
        size_t most = 0;
        for (const char* name : {"vision", "prefix", "decoder"}) {
            engines_[name] = loadEngine(*runtime_, engines + "/" + name + ".plan");
            most = std::max(most, scratchBytes(*engines_[name]));
        }
        void* scratch = memory_.get("scratch", most);
        vision_.emplace(*engines_["vision"], 0, scratch, stream_);
        for (int32_t profile : {0, 1}) {
            prefix_[profile].emplace(*engines_["prefix"], profile, scratch, stream_);
            decoder_[profile].emplace(*engines_["decoder"], profile, scratch, stream_);
        }
        below_ = manifest_["selection_layer"].integer();
        layers_ = manifest_["decoder"]["layers"].integer();
        heads_ = manifest_["decoder"]["kv_heads"].integer();
        size_ = manifest_["decoder"]["head_dim"].integer();
        for (int32_t i = 0; i < layers_; ++i) {
            for (const char* kind : {"key", "value"}) memory_.get(cache(kind, i), cacheBytes());
        }
        check(cudaMallocHost(reinterpret_cast<void**>(&logits_), sizeof(float) * vocabulary()));
    }

    ~Generator() {
        if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
        cudaFreeHost(logits_);
        cudaStreamDestroy(stream_);
    }

    bool full() const { return position_ >= manifest_["decoder"]["max_positions"].integer(); }

    // Runs `tokens` over the caches, with a picture's patches or none, and returns the most probable next token.
    int32_t run(const std::vector<int32_t>& tokens, const Grid* grid, const std::vector<float>& pixels, double ratio) {
        const Plan plan = planRun(manifest_, tokens, grid, position_, ratio);
        const bool decode = tokens.size() == 1 && length_ > 0;
        if (tokens.size() > static_cast<size_t>(capacity_ - length_)) {
            throw std::runtime_error("the caches hold " + std::to_string(capacity_) +
                                     " rows, and more are needed: build with larger --max-text or --max-new");
        }
        upload(plan, tokens);
        if (grid != nullptr) picture(plan, *grid, pixels);
        const auto kept = static_cast<int32_t>(plan.textIndex.size()) + plan.keepCount;
        if (decode) {
            step();
        } else {
            const bool whole = length_ > 0 || decoder_[0]->has(present("key", layers_ - 1));
            bind(0, plan, static_cast<int32_t>(tokens.size()), whole ? capacity_ : 0);
            enqueue(0, kept);
        }
        check(cudaStreamSynchronize(stream_));
        length_ += kept;
        position_ = plan.nextPosition;
        const int32_t best = mostProbable(logits_, vocabulary());
        if (best < 0) {
            throw std::runtime_error(
                "this model's activations leave float16's range: build engines with ivc-build --dtype float32");
        }
        return best;
    }

   private:
    size_t vocabulary() const { return static_cast<size_t>(manifest_["decoder"]["vocab_size"].integer()); }
    size_t elementBytes() const { return bytes(prefix_[0]->type("past_key.0")); }
    size_t cacheBytes() const { return elementBytes() * heads_ * capacity_ * size_; }
    static std::string cache(const std::string& kind, int32_t layer) {
        return "cache_" + kind + "." + std::to_string(layer);
    }

    // The output by which engines with our plugin's attention write to a cache themselves.
    static std::string present(const std::string& kind, int32_t layer) {
        return "present_" + kind + "." + std::to_string(layer);
    }

    void send(const std::string& name, const void* data, size_t size) {
        check(cudaMemcpyAsync(memory_.get(name, size), data, size, cudaMemcpyHostToDevice, stream_));
    }
    template <class T>
    void send(const std::string& name, const std::vector<T>& values) {
        send(name, values.data(), values.size() * sizeof(T));
    }

    void upload(const Plan& plan, const std::vector<int32_t>& tokens) {
        const auto last = static_cast<int32_t>(plan.textIndex.size()) + plan.keepCount - 1;
        keepCount_ = plan.keepCount;
        send(ivc::kInputsEmbeds, converted(embeddings_.rows(tokens), prefix_[0]->type(ivc::kInputsEmbeds)));
        send(ivc::kPositionIds, plan.positionIds);
        send(ivc::kPastLength, &length_, sizeof length_);
        send(ivc::kVisualIndex, plan.visualIndex);
        send(ivc::kTextIndex, plan.textIndex);
        send(ivc::kQueryIndex, plan.queryIndex);
        send(ivc::kIvcPriority, plan.priority);
        send(ivc::kLogitIndex, &last, sizeof last);
        check(cudaStreamSynchronize(stream_));  // what was sent is on the stack
    }

    void picture(const Plan& plan, const Grid& grid, const std::vector<float>& pixels) {
        const auto merge = manifest_["preprocessing"]["merge_size"].integer();
        const int64_t patches = static_cast<int64_t>(grid.visual()) * merge * merge;
        const int64_t patchDim = static_cast<int64_t>(pixels.size()) / patches;
        std::vector<int32_t> places;
        for (int32_t token = 0; token < grid.visual(); ++token) {
            for (int32_t y = 0; y < merge; ++y) {
                for (int32_t x = 0; x < merge; ++x) {
                    places.push_back(token / grid.columns * merge + y);
                    places.push_back(token % grid.columns * merge + x);
                }
            }
        }
        const std::vector<char> values = converted(pixels, vision_->type(ivc::kPixelValues));
        send(ivc::kPixelValues, values);
        send(ivc::kPatchPosition, places);
        vision_->input(ivc::kPixelValues, memory_.at(ivc::kPixelValues), {1, patches, patchDim});
        vision_->input(ivc::kPatchPosition, memory_.at(ivc::kPatchPosition), {patches, 2});
        vision_->outputs(memory_, "");
        vision_->enqueue();
        const size_t size = bytes(prefix_[0]->type(ivc::kInputsEmbeds)), row = size * hidden();
        vision_->expect(ivc::kImageEmbeds, static_cast<size_t>(grid.visual() * hidden()), size);
        char* to = static_cast<char*>(memory_.at(ivc::kInputsEmbeds)) + row * plan.visualIndex.front();
        check(cudaMemcpyAsync(
            to, memory_.at(ivc::kImageEmbeds), row * grid.visual(), cudaMemcpyDeviceToDevice, stream_));
        check(cudaStreamSynchronize(stream_));
    }

    // Sets the inputs of both engines. pastRows: the caches' extent; 0 leaves them out of a first prefill.
    void bind(int32_t profile, const Plan& plan, int32_t rows, int32_t pastRows) {
        Context &prefix = *prefix_[profile], &decoder = *decoder_[profile];
        const auto extent = [](const auto& values) { return Shape{static_cast<int64_t>(values.size())}; };
        const Shape past{1, heads_, pastRows, size_}, positions{positionAxes(), 1, rows};
        prefix.input(ivc::kInputsEmbeds, memory_.at(ivc::kInputsEmbeds), {1, rows, hidden()});
        prefix.input(ivc::kVisualIndex, memory_.at(ivc::kVisualIndex), extent(plan.visualIndex));
        prefix.input(ivc::kTextIndex, memory_.at(ivc::kTextIndex), extent(plan.textIndex));
        prefix.input(ivc::kQueryIndex, memory_.at(ivc::kQueryIndex), extent(plan.queryIndex));
        prefix.input(ivc::kIvcPriority, memory_.at(ivc::kIvcPriority), extent(plan.priority));
        prefix.input(ivc::kKeepCount, &keepCount_, {1});  // a shape input: in host memory
        for (Context* context : {&prefix, &decoder}) {
            context->input(ivc::kPositionIds, memory_.at(ivc::kPositionIds), positions);
            context->input(ivc::kPastLength, memory_.at(ivc::kPastLength), {1});
            for (int32_t i = 0; i < layers_; ++i) {
                for (const std::string kind : {"key", "value"}) {
                    context->input("past_" + kind + "." + std::to_string(i), memory_.at(cache(kind, i)), past);
                }
            }
        }
        prefix.outputs(memory_, "prefix/");
        decoder.input(ivc::kHiddenStates, memory_.at("prefix/hidden_states"), prefix.shape(ivc::kHiddenStates));
        decoder.input(ivc::kKeepIndex, memory_.at("prefix/keep_index"), prefix.shape(ivc::kKeepIndex));
        decoder.input(ivc::kLogitIndex, memory_.at(ivc::kLogitIndex), {1});
        for (int32_t i = 0; i < below_; ++i) {
            for (const std::string kind : {"key", "value"}) {
                const std::string name = "new_" + kind + "." + std::to_string(i);
                decoder.input(name, memory_.at("prefix/" + name), prefix.shape(name));
            }
        }
        decoder.outputs(memory_, "decoder/", "present_");
        for (int32_t i = 0; i < layers_; ++i) {
            for (const std::string kind : {"key", "value"}) decoder.output(present(kind, i), memory_.at(cache(kind, i)));
        }
    }

    // Both engines, the rows appended to the caches, the logits copied to the host: nothing here waits.
    void enqueue(int32_t profile, int32_t kept) {
        prefix_[profile]->enqueue();
        decoder_[profile]->enqueue();
        std::vector<IvcRows> rows;
        for (int32_t i = 0; i < layers_; ++i) {
            for (const std::string kind : {"key", "value"}) {
                if (decoder_[profile]->has(present(kind, i))) continue;  // the engine has written them
                const std::string name = (i < below_ ? "compact_" : "new_") + kind + "." + std::to_string(i);
                decoder_[profile]->expect(name, count({heads_, kept, size_}), elementBytes());
                rows.push_back({memory_.at("decoder/" + name), memory_.at(cache(kind, i)), heads_,
                    static_cast<int32_t>(elementBytes() * size_)});
            }
        }
        if (!rows.empty()) check(ivcAppendRows(rows.data(), static_cast<int32_t>(rows.size()), kept,
            static_cast<const int32_t*>(memory_.at(ivc::kPastLength)), capacity_, stream_));
        decoder_[profile]->expect(ivc::kLogits, vocabulary(), sizeof(float));
        check(cudaMemcpyAsync(
            logits_, memory_.at("decoder/logits"), sizeof(float) * vocabulary(), cudaMemcpyDeviceToHost, stream_));
    }

    // A decode step: bound and run as it is once, captured the second time, replayed from then on. A longer prefill in
    // between may move buffers; the next step then begins anew.
    void step() {
        if (boundAt_ != memory_.generation()) {
            Plan one;
            one.visualIndex = one.queryIndex = {0};
            one.priority = {0.0f};
            bind(1, one, 1, capacity_);
            boundAt_ = memory_.generation();
            if (graph_ != nullptr) check(cudaGraphExecDestroy(graph_));
            graph_ = nullptr;
            enqueue(1, 1);
        } else if (!useGraph_) {
            enqueue(1, 1);
        } else {
            if (graph_ == nullptr) capture();
            check(cudaGraphLaunch(graph_, stream_));
        }
    }

    void capture() {
        cudaGraph_t captured = nullptr;
        check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
        enqueue(1, 1);
        check(cudaStreamEndCapture(stream_, &captured));
#if CUDART_VERSION >= 12000
        check(cudaGraphInstantiate(&graph_, captured, 0));
#else
        check(cudaGraphInstantiate(&graph_, captured, nullptr, nullptr, 0));
#endif
        check(cudaGraphDestroy(captured));
    }

    int64_t hidden() const { return manifest_["decoder"]["hidden_size"].integer(); }
    int64_t positionAxes() const { return static_cast<int64_t>(manifest_["rotary"]["sections"].items().size()); }

    Logger logger_;
    const Json& manifest_;
    Embeddings embeddings_;
    bool useGraph_;
    int32_t capacity_;
    cudaStream_t stream_ = nullptr;
    Memory memory_;  // outlives the contexts that work in it
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::map<std::string, std::unique_ptr<nvinfer1::ICudaEngine>> engines_;
    std::optional<Context> vision_;
    std::array<std::optional<Context>, 2> prefix_, decoder_;  // prefill, decode
    cudaGraphExec_t graph_ = nullptr;
    int64_t boundAt_ = -1;
    float* logits_ = nullptr;
    int32_t below_ = 0, layers_ = 0, heads_ = 0, size_ = 0;
    int32_t length_ = 0, position_ = 0, keepCount_ = 1;
};

// A picture's pixel_values, for each visual token merge_size^2 patches.
std::vector<float> readPixels(const std::string& path, const Json& manifest, const Grid& grid) {
    const int64_t wanted = pixelCount(manifest, grid);
    const MappedFile file(path);
    if (file.size() != static_cast<size_t>(wanted) * sizeof(float)) {
        throw std::runtime_error(path + " has " + std::to_string(file.size()) + " bytes, and a grid of " +
                                 std::to_string(grid.rows) + " x " + std::to_string(grid.columns) + " takes " +
                                 std::to_string(wanted * 4) + ": give the grid that the picture was cut into");
    }
    std::vector<float> values(static_cast<size_t>(wanted));
    std::memcpy(values.data(), file.data(), file.size());
    return values;
}

struct Options {
    std::string bundle, engines, pixels, plugin;
    std::vector<int32_t> tokens, wanted;
    Grid grid;
    std::optional<double> ratio;
    int32_t maxTokens = 32;
    bool useGraph = true;
};

// All of `word` as a number, for an option.
double numberOf(const std::string& option, const std::string& word) {
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    if (word.empty() || *end != 0) throw std::runtime_error(option + " takes numbers, not '" + word + "'");
    return value;
}

int32_t integerOf(const std::string& option, const std::string& word, int32_t least) {
    const double value = numberOf(option, word);
    if (!(value >= least && value <= INT32_MAX && value == std::floor(value))) {
        throw std::runtime_error(option + " takes whole numbers from " + std::to_string(least) + " on, not " + word);
    }
    return static_cast<int32_t>(value);
}

Options readOptions(const std::vector<std::string>& words) {
    if (words.size() < 3) {
        throw std::runtime_error("usage: ivc_sample BUNDLE ENGINES --testdata | --tokens 1,2,3 [--pixels FILE --grid R C]");
    }
    Options o;
    o.bundle = words[0];
    o.engines = words[1];
    size_t at = 2;
    const auto next = [&]() -> const std::string& {
        if (at >= words.size()) throw std::runtime_error("a value is missing behind " + words.back());
        return words[at++];
    };
    while (at < words.size()) {
        const std::string option = next();
        if (option == "--testdata") {
            const Json index = Json::read(o.bundle + "/testdata/index.json");
            o.tokens = index["prompt_tokens"].integers();
            o.wanted = index["drawn_tokens"].integers();
            o.grid = {index["grid"]["rows"].integer(), index["grid"]["columns"].integer()};
            o.ratio = index["ratio"].number();
            o.pixels = o.bundle + "/testdata/prefill/vision/inputs/pixel_values.bin";
            o.maxTokens = static_cast<int32_t>(o.wanted.size());
        } else if (option == "--tokens") {
            std::stringstream ids(next());
            for (std::string id; std::getline(ids, id, ',');) o.tokens.push_back(integerOf(option, id, 0));
        } else if (option == "--pixels") {
            o.pixels = next();
        } else if (option == "--grid") {
            o.grid.rows = integerOf(option, next(), 1);
            o.grid.columns = integerOf(option, next(), 1);
        } else if (option == "--ratio") {
            o.ratio = numberOf(option, next());
        } else if (option == "--max-tokens") {
            o.maxTokens = integerOf(option, next(), 1);
        } else if (option == "--plugin") {
            o.plugin = next();
        } else if (option == "--no-graph") {
            o.useGraph = false;
        } else {
            throw std::runtime_error("there is no option " + option);
        }
    }
    if (o.tokens.empty()) throw std::runtime_error("there is no prompt: give --testdata or --tokens");
    if (o.pixels.empty() != (o.grid.rows == 0)) throw std::runtime_error("a picture takes both --pixels and --grid");
    return o;
}

int run(const Options& o) {
    if (!o.plugin.empty() && dlopen(o.plugin.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
        throw std::runtime_error(std::string("the plugin does not load: ") + dlerror());
    }
    const Json manifest = readManifest(o.bundle);
    const double ratio = o.ratio ? *o.ratio : manifest["default_ratio"].fraction();
    const std::vector<int32_t> stop = manifest["tokens"]["stop"].integers();
    const bool picture = !o.pixels.empty();
    std::vector<float> pixels;
    if (picture) pixels = readPixels(o.pixels, manifest, o.grid);
    const Json record = Json::read(o.engines + "/build.json");
    if (record["graphs"].text() == "plugin" && o.plugin.empty()) {
        throw std::runtime_error("the engines call the plugin: give --plugin " + record["recipe"]["plugin"].text() +
                                 ", or where it lies now");
    }
    const int32_t capacity = record["capacity"].integer();
    if (capacity < 1) throw std::runtime_error(o.engines + "/build.json has caches of no row: build with ivc-build");
    Generator generator(o.bundle, manifest, o.engines, capacity, o.useGraph);
    std::vector<int32_t> drawn;
    int32_t token = generator.run(o.tokens, picture ? &o.grid : nullptr, pixels, ratio);
    while (true) {
        drawn.push_back(token);
        std::cout << token << (static_cast<int32_t>(drawn.size()) < o.maxTokens ? " " : "") << std::flush;
        const bool stopped = o.wanted.empty() && std::find(stop.begin(), stop.end(), token) != stop.end();
        if (stopped || static_cast<int32_t>(drawn.size()) >= o.maxTokens || generator.full()) break;
        token = generator.run({token}, nullptr, {}, ratio);
    }
    std::cout << "\n";
    const auto compared = static_cast<ptrdiff_t>(std::min(drawn.size(), o.wanted.size()));  // --max-tokens may differ
    if (!std::equal(drawn.begin(), drawn.begin() + compared, o.wanted.begin())) {
        std::cerr << "testdata has other tokens\n";
        return 1;
    }
    return 0;
}

}  // namespace

int main(int count, char** words) {
    try {
        return run(readOptions({words + 1, words + count}));
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 2;
    }
}
