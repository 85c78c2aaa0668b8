#include "record.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <system_error>

#include "ivc/contract.h"
#include "ivc/error.h"
#include "ivc/files.h"
#include "ivc/sha256.h"

namespace ivc {
namespace {

const char kBuild[] = "build the engines again with ivc-build";
constexpr uint64_t kMostPlugin = uint64_t{1} << 30;
constexpr int64_t kMostText = 1 << 20;
constexpr double kSmallestScale = 1.0 / 65536;

std::optional<std::string> optional(const Field& field) {
    if (field.isNull()) return std::nullopt;
    return field.text();
}

std::string sha(const Field& field) {
    const std::string found = field.text();
    if (found.size() != 64 || found.find_first_not_of("0123456789abcdef") != std::string::npos) {
        field.refuse("is not a SHA-256");
    }
    return found;
}

// Text of letters, digits and `more`, such as a version's.
std::string plain(const Field& field, const char* more, size_t longest) {
    const std::string found = field.text();
    const auto known = [&](char c) {
        return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
               std::string(more).find(c) != std::string::npos;
    };
    if (found.empty() || found.size() > longest || !std::all_of(found.begin(), found.end(), known)) {
        field.refuse("is not a version");
    }
    return found;
}

struct Recipe {
    std::optional<std::string> computeCapability, dtype, plugin, softmax;
    std::string target, attention;
    int64_t maxVisual = 0, maxText = 0, maxNew = 0;
};

Recipe readRecipe(const Field& f) {
    f.onlyHas({"target", "compute_capability", "dtype", "max_visual", "max_text", "max_new", "opt_visual", "opt_text",
        "plugin", "softmax", "attention", "memory", "workspace", "optimization_level", "timing_cache",
        "tactic_sources"});
    Recipe r;
    r.target = f["target"].text();
    r.computeCapability = optional(f["compute_capability"]);
    r.dtype = optional(f["dtype"]);
    r.plugin = optional(f["plugin"]);
    r.softmax = optional(f["softmax"]);
    r.attention = f["attention"].choice({"auto", "grouped", "repeated"});
    r.maxVisual = f["max_visual"].integer(1, kMostVisual);
    r.maxText = f["max_text"].integer(1, kMostText);
    r.maxNew = f["max_new"].integer(1, kMostText);
    f["opt_visual"].integer(1, r.maxVisual);
    f["opt_text"].integer(1, r.maxText);
    f["optimization_level"].integer(0, 5);
    if (!f["memory"].isNull()) f["memory"].integer(1, int64_t{1} << 44);
    if (!f["workspace"].isNull()) f["workspace"].integer(1, int64_t{1} << 40);
    optional(f["timing_cache"]);
    if (!f["tactic_sources"].isNull()) {
        for (const Field& source : f["tactic_sources"].items(100)) source.text();
    }
    return r;
}

bool spelled(const std::string& graphs) { return graphs == "native" || graphs == "plugin" || graphs == "opset-21"; }

// What cannot be true of engines that ivc-build made: each field for itself may be right.
void checkAgreement(const EngineRecord& record, const Recipe& recipe, const Field& root) {
    const auto require = [&](bool agrees, const char* field) {
        if (!agrees) root[field].refuse("does not fit the other fields");
    };
    const bool plugin = record.graphs == "plugin", half = record.dtype == "float16";
    require(record.capacity == recipe.maxVisual + recipe.maxText + recipe.maxNew, "capacity");
    require(recipe.target == "tensorrt", "recipe");
    require(!recipe.computeCapability, "recipe");  // TensorRT builds for the GPU that is there
    require(!recipe.dtype || *recipe.dtype == record.dtype, "dtype");
    const std::string softmax = root["softmax"].text(), attention = root["attention"].text();
    require(softmax == "float32" || (softmax == "float16" && half), "softmax");
    require(!recipe.softmax || *recipe.softmax == softmax, "softmax");
    const bool possible = plugin                   ? attention == "grouped" || attention == "operator"
                          : spelled(record.graphs) ? attention == "grouped" || attention == "repeated"
                                                   : attention == "operator";
    require(possible && (recipe.attention == "auto" || (!plugin && recipe.attention == attention)), "attention");
    for (const auto& entry : root["packed_weights"].json().items()) {
        require(entry.value() == "int4" || entry.value() == record.dtype, "packed_weights");
    }
    int exponent = 0;
    const double scale = root["residual_scale"].number(kSmallestScale, 1);
    require(std::frexp(scale, &exponent) == 0.5 && (half || scale == 1), "residual_scale");
    require(recipe.plugin.has_value() == plugin && record.pluginSha256.has_value() == plugin, "plugin_sha256");
}

}  // namespace

EngineRecord parseRecord(const std::string& text, const std::string& what) {
    const Json content = parseJson(text, what, kBuild);
    const Field root(content, what, kBuild);
    root.onlyHas({"ivc_export", "target", "tensorrt", "compute_capability", "dtype", "graphs", "softmax", "attention",
        "packed_weights", "capacity", "residual_scale", "recipe", "inputs_sha256", "weights_sha256", "plugin_sha256",
        "engines"});
    EngineRecord record;
    record.version = root["ivc_export"].text();
    if (root["target"].text() != "tensorrt") root["target"].refuse("is not tensorrt");
    record.tensorrt = plain(root["tensorrt"], "_.+-", 64);
    record.computeCapability = plain(root["compute_capability"], ".", 4);
    record.dtype = root["dtype"].choice({"float32", "float16", "bfloat16"});
    record.graphs = root["graphs"].choice({"native", "plugin", "opset-21", "opset-23-attention", "opset-23"});
    record.capacity = static_cast<int32_t>(root["capacity"].integer(3, kMostVisual + 2 * kMostText));
    record.inputsSha256 = sha(root["inputs_sha256"]);
    const Recipe recipe = readRecipe(root["recipe"]);
    record.maxVisual = static_cast<int32_t>(recipe.maxVisual);
    record.maxText = static_cast<int32_t>(recipe.maxText);
    const Field weights = root["weights_sha256"];
    if (!weights.json().is_object() || !root["packed_weights"].json().is_object()) weights.refuse("is not an object");
    for (const auto& entry : weights.json().items()) {
        record.weightsSha256[entry.key()] = optional(weights[entry.key()]);
    }
    if (!root["plugin_sha256"].isNull()) record.pluginSha256 = sha(root["plugin_sha256"]);
    checkAgreement(record, recipe, root);
    const Field engines = root["engines"];
    engines.onlyHas({"vision", "prefix", "decoder"});
    for (const std::string name : {"vision", "prefix", "decoder"}) {
        const Field engine = engines[name];
        engine.onlyHas({"file", "bytes", "profiles"});
        BuiltEngine built;
        built.file = engine["file"].text();
        built.bytes = static_cast<uint64_t>(engine["bytes"].integer(1, INT64_MAX));
        std::vector<std::string> profiles;
        for (const Field& profile : engine["profiles"].items(2)) profiles.push_back(profile.text());
        const std::vector<std::string> wanted =
            name == "vision" ? std::vector<std::string>{"prefill"} : std::vector<std::string>{"prefill", "decode"};
        if (built.file != name + ".plan" || profiles != wanted) engine.refuse("is not what ivc-build makes");
        record.engines[name] = built;
    }
    return record;
}

std::string versionOf(int32_t number) {
    const int32_t scale = number < 10000 ? 1000 : 10000;  // of 8.6.1 it is 8601, of 10.3.0 it is 100300
    return std::to_string(number / scale) + "." + std::to_string(number % scale / 100) + "." +
           std::to_string(number % 100);
}

namespace {

// Whether a version is `tensorrt`, whatever build of it.
bool sameVersion(const std::string& found, const std::string& tensorrt) {
    return found.compare(0, tensorrt.size(), tensorrt) == 0 &&
           (found.size() == tensorrt.size() || found[tensorrt.size()] == '.');
}

std::string ownFolder(const Bundle& bundle, const std::string& tensorrt, const std::string& capability) {
    namespace fs = std::filesystem;
    std::string suffix = "-sm" + capability, others;
    suffix.erase(std::remove(suffix.begin(), suffix.end(), '.'), suffix.end());
    std::error_code failed;
    const std::string engines = confined(bundle.folder(), "engines");
    std::vector<std::string> names;
    for (fs::directory_iterator entry(engines, failed), end; !failed && entry != end; entry.increment(failed)) {
        names.push_back(entry->path().filename().string());
    }
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) {
        const bool ours = name.size() > suffix.size() &&
                          name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0 &&
                          sameVersion(name.substr(0, name.size() - suffix.size()), tensorrt);
        if (ours) return confined(bundle.folder(), "engines/" + name);
        others += (others.empty() ? "; there are " : ", ") + name;
    }
    throw Error(bundle.folder() + " has no engines for " + tensorrt + suffix + others +
                ": build them here with ivc-build, or name their folder with --engines");
}

// SHA-256 of what engines are built from, as ivc_export.tensorrt.store.fingerprint computes it.
std::string fingerprint(const Bundle& bundle, const std::string& version) {
    Sha256 hash;
    hash.add(version);
    for (const char* name : {"vision", "prefix", "decoder"}) {
        const MappedFile graph(confined(bundle.folder(), bundle.manifest().graphs.at(name).file), kBuild);
        hash.add(graph.data(), graph.size());
    }
    for (const WeightFile& file : bundle.manifest().weights) {
        hash.add(file.file + " " + std::to_string(file.size) + " " + file.headerSha256);
    }
    return hash.digest();
}

}  // namespace

EngineFolder findEngines(const Bundle& bundle, const std::string& folder, const std::string& tensorrt,
    const std::string& capability) {
    EngineFolder found;
    found.folder = folder.empty() ? ownFolder(bundle, tensorrt, capability) : folder;
    found.record = parseRecord(readFile(confined(found.folder, "build.json"), kBuild), found.folder + "/build.json");
    const EngineRecord& record = found.record;
    if (!sameVersion(record.tensorrt, tensorrt) || record.computeCapability != capability) {
        throw Error("the engines in " + found.folder + " are for TensorRT " + record.tensorrt + " and compute capability " +
                    record.computeCapability + ", but this machine has " + tensorrt + " and " + capability +
                    ": build them here with ivc-build");
    }
    bool same = record.inputsSha256 == fingerprint(bundle, record.version);
    for (const WeightFile& file : bundle.manifest().weights) {
        const auto then = record.weightsSha256.find(file.file);
        const bool known = then != record.weightsSha256.end() && then->second && file.sha256;
        same = same && (!known || *then->second == *file.sha256);
    }
    if (!same) {
        throw Error("the engines in " + found.folder + " were built from other graphs or weights: " + kBuild);
    }
    for (const auto& entry : record.engines) found.path(entry.first);
    return found;
}

std::string EngineFolder::path(const std::string& name) const {
    const BuiltEngine& engine = record.engines.at(name);
    const std::string path = confined(folder, engine.file);
    if (MappedFile(path, kBuild).size() == engine.bytes) return path;
    throw Error(path + " is damaged (its size differs from the size in build.json): " + kBuild);
}

void EngineFolder::checkPlugin(const std::string& plugin) const {
    if (!record.pluginSha256) {
        if (plugin.empty()) return;
        throw Error("the engines in " + folder + " use no plugin: leave out --plugin");
    }
    if (plugin.empty()) {
        throw Error("the engines in " + folder +
                    " use our plugin: give its library, libivc_plugin.so, with --plugin");
    }
    const MappedFile file(plugin, "give the path of the plugin, libivc_plugin.so");
    if (file.size() <= kMostPlugin && sha256(file.data(), file.size()) == *record.pluginSha256) return;
    throw Error(plugin + " is not the plugin that the engines in " + folder +
                " were built with (its SHA-256 differs): give that one with --plugin, or " + kBuild);
}

}  // namespace ivc
