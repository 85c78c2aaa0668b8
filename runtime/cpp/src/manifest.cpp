#include "ivc/manifest.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "ivc/contract.h"
#include "ivc/error.h"
#include "ivc/files.h"
#include "ivc/sha256.h"
#include "ivc/visual.h"

namespace ivc {
namespace {

constexpr uint64_t kMostHeader = 100'000'000;  // bytes of a safetensors file's header, as the format has it

// Bits of a value, by what safetensors files call its type.
constexpr struct StoredBits {
    const char* dtype;
    int32_t bits;
} kStoredBits[] = {{"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"BOOL", 8}, {"U8", 8}, {"I8", 8}, {"F8_E5M2", 8},
    {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"I16", 16}, {"U16", 16}, {"F16", 16}, {"BF16", 16}, {"I32", 32}, {"U32", 32},
    {"F32", 32}, {"F64", 64}, {"I64", 64}, {"U64", 64}, {"C64", 64}};

const char kAgain[] = "export the model again";
const char kCopy[] = "copy the whole bundle, or export the model again";

Field pathOf(const Field& root, const Limit& limit) {
    const std::string record = limit.record;
    return record.empty() ? root[limit.field] : root[record][limit.field];
}

int32_t limited(const Field& root, const char* record, const char* field) {
    for (const Limit& limit : kLimits) {
        if (std::string(record) != limit.record || std::string(field) != limit.field) continue;
        return static_cast<int32_t>(pathOf(root, limit).integer(limit.least, limit.most, limit.multipleOf));
    }
    throw Error(std::string("no limit is known for ") + field + ": please report this as a bug of the library");
}

std::string sha(const Field& field) {
    const std::string found = field.text();
    const bool hexadecimal = found.find_first_not_of("0123456789abcdef") == std::string::npos;
    if (found.size() != 64 || !hexadecimal) field.refuse("is not a SHA-256");
    return found;
}

Decoder readDecoder(const Field& root) {
    const Field f = root["decoder"];
    f.onlyHas({"layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim", "value_dim", "vocab_size",
        "rms_norm_epsilon", "tied_embeddings", "max_positions", "deepstack"});
    Decoder d;
    d.layers = limited(root, "decoder", "layers");
    d.hiddenSize = limited(root, "decoder", "hidden_size");
    limited(root, "decoder", "intermediate_size");
    f["rms_norm_epsilon"].number(DBL_MIN, 1);
    f["tied_embeddings"].boolean();
    d.heads = limited(root, "decoder", "heads");
    d.kvHeads = limited(root, "decoder", "kv_heads");
    d.headDim = limited(root, "decoder", "head_dim");
    d.valueDim = limited(root, "decoder", "value_dim");
    d.vocabSize = limited(root, "decoder", "vocab_size");
    d.maxPositions = limited(root, "decoder", "max_positions");
    if (f.has("deepstack")) d.deepstack = limited(root, "decoder", "deepstack");
    return d;
}

SelectionRule readSelection(const Field& root) {
    const Field f = root["selection"];
    SelectionRule rule;
    if (f.has("method")) rule.method = f["method"].choice({"ivc-prune", "fastv"});
    if (rule.method == "fastv") {
        f.onlyHas({"method", "whole_layers"});
    } else {
        f.onlyHas({"method", "ivc_fraction", "seed_divisor", "query_offset", "softmax", "tiles", "views",
            "row_fraction", "scored", "whole_layers"});
        rule.ivcFraction = f["ivc_fraction"].number(0, 1);
        rule.queryOffset = limited(root, "selection", "query_offset");
        limited(root, "selection", "seed_divisor");
        if (f.has("scored")) f["scored"].choice({"values", "unnormed-values"});  // which the graphs compute
        if (f.has("softmax")) f["softmax"].choice({"visual", "all", "thumbnail"});
        if (f.has("views")) rule.views = f["views"].boolean();
        if (f.has("row_fraction")) rule.rowFraction = f["row_fraction"].number(0, 1);
        if (f.has("tiles")) rule.tiles = f["tiles"].boolean();
    }
    if (f.has("whole_layers")) {
        for (const Field& layer : f["whole_layers"].items()) {
            rule.wholeLayers.push_back(static_cast<int32_t>(layer.integer(0, INT32_MAX)));
        }
    }
    return rule;
}

float asFloat(const Field& field, double least, double most) { return static_cast<float>(field.number(least, most)); }

Preprocessing readPreprocessing(const Field& root) {
    const Field f = root["preprocessing"];
    Preprocessing p;
    const std::string kind = f["kind"].choice({"patches", "tiles", "views"});
    if (kind == "patches") {
        p.kind = Preprocessing::Kind::kPatches;
        f.onlyHas({"kind", "rescale_factor", "mean", "std", "resample", "patch_size", "merge_size",
            "temporal_patch_size", "min_pixels", "max_pixels"});
        p.patchSize = limited(root, "preprocessing", "patch_size");
        p.mergeSize = limited(root, "preprocessing", "merge_size");
        p.temporalPatchSize = limited(root, "preprocessing", "temporal_patch_size");
        p.minPixels = limited(root, "preprocessing", "min_pixels");
        p.maxPixels = limited(root, "preprocessing", "max_pixels");
    } else if (kind == "tiles") {
        p.kind = Preprocessing::Kind::kTiles;
        f.onlyHas({"kind", "rescale_factor", "mean", "std", "resample", "tile_pixels", "tile_side", "min_tiles",
            "max_tiles", "fit"});
        p.minTiles = limited(root, "preprocessing", "min_tiles");
        p.maxTiles = limited(root, "preprocessing", "max_tiles");
        p.crop = f["fit"].choice({"crop", "stretch"}) == "crop";
        if (p.minTiles > p.maxTiles) f["min_tiles"].refuse("is above max_tiles");
        if (p.crop && p.maxTiles > 1) f["max_tiles"].refuse("is above 1 where pictures are cropped");
    } else {
        p.kind = Preprocessing::Kind::kViews;
        f.onlyHas({"kind", "rescale_factor", "mean", "std", "resample", "tile_pixels", "tile_side", "token_side",
            "shapes", "fill"});
        p.tokenSide = limited(root, "preprocessing", "token_side");
        for (const Field& shape : f["shapes"].items(256)) {
            const auto sides = shape.items(2);
            if (sides.size() != 2) shape.refuse("does not have two entries");
            p.shapes.emplace_back(sides[0].integer(1, 256), sides[1].integer(1, 256));
        }
        if (p.shapes.empty()) f["shapes"].refuse("is empty");
        p.filling = static_cast<uint8_t>(limited(root, "preprocessing", "fill"));
    }
    if (kind != "patches") {
        p.tilePixels = limited(root, "preprocessing", "tile_pixels");
        p.tileSide = limited(root, "preprocessing", "tile_side");
    }
    p.rescaleFactor = asFloat(f["rescale_factor"], 1e-9, 1e9);
    const auto means = f["mean"].items(3), deviations = f["std"].items(3);
    if (means.size() != 3) f["mean"].refuse("does not have three entries");
    if (deviations.size() != 3) f["std"].refuse("does not have three entries");
    for (size_t i = 0; i < 3; ++i) {
        p.mean[i] = asFloat(means[i], -1e9, 1e9);
        p.std[i] = asFloat(deviations[i], 1e-9, 1e9);
    }
    p.resample = f.has("resample")
                     ? f["resample"].choice({"nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"})
                     : "bicubic";
    return p;
}

SpecialTokens readTokens(const Field& root, int32_t vocabulary) {
    const Field f = root["tokens"];
    f.onlyHas({"image", "vision_start", "vision_end", "template_marks", "stop"});
    const auto id = [&](const Field& field) { return static_cast<int32_t>(field.integer(0, vocabulary - 1)); };
    SpecialTokens tokens;
    tokens.image = id(f["image"]);
    if (!f["vision_start"].isNull()) tokens.visionStart = id(f["vision_start"]);
    if (!f["vision_end"].isNull()) tokens.visionEnd = id(f["vision_end"]);
    tokens.templateMarks = f["template_marks"].boolean();
    for (const Field& stop : f["stop"].items(1000)) tokens.stop.push_back(id(stop));
    return tokens;
}

Blanks blanks(const Field& record, const char* name) {
    if (!record.has(name)) return Blanks::kNone;
    const std::string found = record[name].choice({"none", "newlines", "blanks"});
    return found == "none" ? Blanks::kNone : found == "newlines" ? Blanks::kNewlines : Blanks::kBlanks;
}

Segment segment(const Field& f) { return {f["before"].text(), f["behind"].text()}; }

Spoken spoken(const Field& f) {
    Spoken found;
    static_cast<Segment&>(found) = segment(f);
    found.left = blanks(f, "left");
    found.right = blanks(f, "right");
    return found;
}

ChatSegments readChat(const Field& f) {
    f.onlyHas({"begin", "begin_without_system", "first_user", "user", "text", "picture", "assistant_open",
        "assistant_past"});
    for (const char* name : {"first_user", "user"}) f[name].onlyHas({"before", "behind"});
    ChatSegments chat;
    if (!f["begin"].isNull()) {
        f["begin"].onlyHas({"before", "behind", "left", "right"});
        chat.begin = spoken(f["begin"]);
    }
    chat.beginWithoutSystem = f["begin_without_system"].text();
    chat.assistantOpen = f["assistant_open"].text();
    chat.firstUser = segment(f["first_user"]);
    chat.user = segment(f["user"]);
    f["text"].onlyHas({"before", "behind", "left", "right"});
    chat.text = spoken(f["text"]);
    const Field past = f["assistant_past"], picture = f["picture"];
    past.onlyHas({"before", "behind", "left", "right", "thinking_end", "thinking_left"});
    chat.past = spoken(past);
    if (past.has("thinking_end") && !past["thinking_end"].isNull()) chat.thinkingEnd = past["thinking_end"].text();
    chat.thinkingLeft = blanks(past, "thinking_left");
    picture.onlyHas({"text", "line", "first"});
    chat.picture = picture["text"].text();
    chat.pictureLine = picture["line"].text();
    chat.picturesFirst = picture["first"].boolean();
    return chat;
}

Tensor readTensor(const Field& f) {
    Tensor tensor{f["name"].text(), f["dtype"].text(), {}};
    for (const Field& extent : f["shape"].items(8)) {
        const bool axis = extent.json().is_string();
        tensor.shape.push_back({axis ? 0 : extent.integer(0, INT32_MAX), axis ? extent.text() : ""});
    }
    return tensor;
}

// The token of a video, whose other settings are for programs that take videos.
std::optional<int32_t> readVideo(const Field& root, const SpecialTokens& tokens, int32_t vocabulary) {
    if (!root.has("video") || root["video"].isNull()) return std::nullopt;
    const Field f = root["video"];
    f.onlyHas({"rescale_factor", "mean", "std", "resample", "token", "fps", "min_frames", "max_frames", "choice",
        "min_pixels", "max_pixels", "pixels_of", "positions_per_second", "timestamps"});
    for (const char* name : {"min_frames", "max_frames", "min_pixels", "max_pixels"}) limited(root, "video", name);
    const int32_t token = limited(root, "video", "token");
    if (token >= vocabulary || token == tokens.image) f["token"].refuse("does not fit the other fields");
    return token;
}

// The dtype of the floats that a table holds, and where they lie.
EmbeddingTable readEmbedding(const Field& root, const Decoder& decoder) {
    const Field f = root["embedding"];
    f.onlyHas({"file", "offset", "dtype", "shape", "packed"});
    EmbeddingTable table;
    table.file = f["file"].text();
    table.dtype = f["dtype"].choice({"float32", "float16", "bfloat16", "uint8"});
    table.offset = static_cast<uint64_t>(f["offset"].integer(0, INT64_MAX / 2));
    const auto shape = f["shape"].items(2);
    if (shape.size() != 2) f["shape"].refuse("does not have two entries");
    shape[0].integer(decoder.vocabSize, decoder.vocabSize);
    shape[1].integer(decoder.hiddenSize, decoder.hiddenSize);
    const bool packed = f.has("packed") && !f["packed"].isNull();
    if (packed != (table.dtype == "uint8")) f["dtype"].refuse("does not fit the other fields");
    if (packed) {
        f["packed"].onlyHas({"block", "scales", "dtype"});
        table.block = static_cast<int32_t>(f["packed"]["block"].integer(16, 128));
        table.scales = static_cast<uint64_t>(f["packed"]["scales"].integer(0, INT64_MAX / 2));
        table.dtype = f["packed"]["dtype"].choice({"float32", "float16", "bfloat16"});
    }
    return table;
}

// Refuses a table that reaches beyond its file.
void checkWithin(const Manifest& m, const std::string& path, uint64_t fileSize) {
    const EmbeddingTable& table = m.embedding;
    const auto rows = static_cast<uint64_t>(m.decoder.vocabSize), hidden = static_cast<uint64_t>(m.decoder.hiddenSize);
    const uint64_t bytes = table.dtype == "float32" ? 4 : 2;  // limits keep products within 64 bits
    const auto within = [&](uint64_t offset, uint64_t size) { return offset <= fileSize && size <= fileSize - offset; };
    bool fits = within(table.offset, rows * hidden * bytes);
    if (table.block > 0) {
        const auto block = static_cast<uint64_t>(table.block), blocks = (hidden + block - 1) / block;
        fits = within(table.offset, rows * blocks * block) && within(table.scales, rows * blocks * bytes);
    }
    if (!fits) throw Error(path + " is damaged (the embedding table is not within its file): " + kAgain);
}

void checkFormats(const Field& root) {
    if (!root.has("weight_formats")) return;
    const Field formats = root["weight_formats"];
    if (!formats.json().is_object()) formats.refuse("is not an object");
    for (const auto& entry : formats.json().items()) {
        const Field layer = formats[entry.key()];
        layer.onlyHas({"format"});
        const std::string found = layer.has("format") ? layer["format"].text() : "float";
        if (std::find(std::begin(kWeightFormats), std::end(kWeightFormats), found) == std::end(kWeightFormats)) {
            layer["format"].refuse("is '" + found.substr(0, 40) + "', which this version does not know");
        }
    }
}

Graph readGraph(const Field& f) {
    f.onlyHas({"file", "inputs", "outputs", "sha256"});
    Graph graph;
    graph.file = f["file"].text();
    graph.sha256 = sha(f["sha256"]);
    for (const Field& tensor : f["inputs"].items(10000)) graph.inputs.push_back(readTensor(tensor));
    for (const Field& tensor : f["outputs"].items(10000)) graph.outputs.push_back(readTensor(tensor));
    return graph;
}

// Visual tokens of the largest picture.
int64_t mostVisual(const Preprocessing& p) {
    const int64_t side = p.tileSide;
    int64_t most = 0;
    if (p.kind == Preprocessing::Kind::kPatches) {
        const int64_t area = int64_t{tokenSide(p)} * tokenSide(p);
        most = (p.maxPixels + area - 1) / area;
    }
    if (p.kind == Preprocessing::Kind::kTiles) most = side * side * (p.maxTiles + (p.maxTiles > 1 ? 1 : 0));
    for (const auto& [columns, rows] : p.shapes) {
        most = std::max(most, side * (side + 1) + 1 + side * rows * (side * columns + 1));
    }
    return most;
}

void checkAgreement(const Manifest& m, const Field& root) {
    const auto require = [&](bool agrees, const char* field) {
        if (!agrees) root[field].refuse("does not fit the other fields");
    };
    int64_t angles = 0;
    for (const int32_t section : m.sections) angles += section;
    const Preprocessing& p = m.preprocessing;
    const bool patches = p.kind == Preprocessing::Kind::kPatches, ivcPrune = m.selection.method == "ivc-prune";
    require(2 * angles <= m.decoder.headDim && m.axes() == (patches ? 3 : 1), "rotary");
    require(m.decoder.heads % m.decoder.kvHeads == 0 && m.decoder.deepstack < m.decoder.layers, "decoder");
    require(m.selectionLayer < m.decoder.layers && m.selectionLayer >= std::max(1, m.decoder.deepstack),
        "selection_layer");
    require(m.selection.tiles == (p.cut() && ivcPrune) && m.selection.views == (p.twice() && ivcPrune), "selection");
    require(mostVisual(p) <= m.maxVisual && p.minPixels <= p.maxPixels, "preprocessing");
    std::vector<int32_t> whole = m.selection.wholeLayers;
    std::sort(whole.begin(), whole.end());
    require(std::adjacent_find(whole.begin(), whole.end()) == whole.end(), "selection");
    require(whole.empty() || whole.back() < m.decoder.layers, "selection");
    require(m.embedding.dtype == m.dtype, "embedding");
}

// Refuses a safetensors file whose header does not say of each byte behind it, and of no other, which tensor has it.
void checkTensors(const std::string& header, const std::string& name, uint64_t bytes) {
    const std::string what = "the header of " + name;
    const Json content = parseJson(header, what, kCopy);
    const Field root(content, what, kCopy);
    if (!content.is_object()) root.refuse("is not an object");
    std::vector<std::pair<int64_t, int64_t>> parts;
    for (const auto& entry : content.items()) {
        if (entry.key() == "__metadata__") continue;
        const Field tensor = root[entry.key()];
        const std::string dtype = tensor["dtype"].text();
        const auto bits = std::find_if(std::begin(kStoredBits), std::end(kStoredBits),
            [&](const StoredBits& known) { return dtype == known.dtype; });
        if (bits == std::end(kStoredBits)) tensor["dtype"].refuse("is a type that is not known");
        const auto most = static_cast<int64_t>(bytes) * 8;
        int64_t size = bits->bits;
        bool empty = false;
        for (const Field& extent : tensor["shape"].items(64)) {
            const int64_t along = extent.integer(0, most);
            empty = empty || along == 0;
            if (along > 0 && size > most / along) size = most + 1;  // more than there is, however far it goes on
            size = along > 0 && size <= most ? size * along : size;
        }
        const auto offsets = tensor["data_offsets"].items(2);
        if (offsets.size() != 2) tensor["data_offsets"].refuse("does not have two entries");
        const int64_t begin = offsets[0].integer(0, most), end = offsets[1].integer(begin, most);
        if ((empty ? 0 : size) != (end - begin) * 8) tensor["shape"].refuse("does not fit the number of bytes");
        parts.emplace_back(begin, end);
    }
    std::sort(parts.begin(), parts.end());
    int64_t at = 0;
    for (const auto& [begin, end] : parts) {
        if (begin != at) root.refuse("has tensors with gaps or overlaps between them");
        at = end;
    }
    if (static_cast<uint64_t>(at) != bytes) root.refuse("has tensors that do not end where the file ends");
}

std::string pythonNumber(double value) {
    char digits[40];
    int precision = 0;
    for (; precision < 17; ++precision) {  // the fewest digits that say which number it is
        std::snprintf(digits, sizeof digits, "%.*e", precision, value);
        if (std::strtod(digits, nullptr) == value) break;
    }
    const std::string text = digits;
    const size_t mark = text.find('e');
    const int exponent = std::atoi(text.c_str() + mark + 1);
    if (exponent < -4 || exponent >= 16) {
        const std::string size = std::to_string(std::abs(exponent));
        return text.substr(0, mark) + (exponent < 0 ? "e-" : "e+") + (size.size() < 2 ? "0" : "") + size;
    }
    std::snprintf(digits, sizeof digits, "%.*f", std::max(1, precision - exponent), value);
    return digits;
}

void writeCanonical(const Json& value, std::string& out) {
    if (value.is_number_float()) {
        out += pythonNumber(value.get<double>());
    } else if (value.is_object()) {
        out += '{';
        bool first = true;
        for (const auto& entry : value.items()) {  // in the order of its keys
            if (!first) out += ',';
            first = false;
            out += Json(entry.key()).dump(-1, ' ', true) + ":";
            writeCanonical(entry.value(), out);
        }
        out += '}';
    } else if (value.is_array()) {
        out += '[';
        for (size_t i = 0; i < value.size(); ++i) {
            if (i > 0) out += ',';
            writeCanonical(value[i], out);
        }
        out += ']';
    } else {
        out += value.dump(-1, ' ', true);
    }
}

}  // namespace

int32_t Manifest::turned() const {
    int32_t sum = 0;
    for (const int32_t section : sections) sum += 2 * section;
    return sum;
}

std::string constantsSha256(const Json& manifest) {
    Json constants = Json::object();
    for (const char* name : kConstants) {
        if (manifest.contains(name)) constants[name] = manifest[name];
    }
    std::string text;
    writeCanonical(constants, text);
    return sha256(text.data(), text.size());
}

Manifest parseManifest(const std::string& text, const std::string& what) {
    const Json content = parseJson(text, what, kAgain);
    const Field root(content, what, kAgain);
    if (!content.is_object()) root.refuse("is not an object");
    const int64_t version = root["schema_version"].integer(0, INT32_MAX);
    if (version != kSchemaVersion) {
        throw Error(what + " has schema version " + std::to_string(version) + ", but this library reads " +
                    std::to_string(kSchemaVersion) + ": " + (version > kSchemaVersion ? "upgrade this library" : kAgain));
    }
    root.onlyHas({"schema_version", "family", "dtype", "lowering", "selection_layer", "calibrated", "default_ratio",
        "max_visual", "decoder", "rotary", "selection", "preprocessing", "tokens", "graphs", "embedding", "weights",
        "weight_formats", "video", "chat", "residual_scale", "versions", "constants_sha256"});
    Manifest m;
    m.family = root["family"].text();
    m.dtype = root["dtype"].choice({"float32", "float16", "bfloat16"});
    m.lowering = root["lowering"].text();
    m.selectionLayer = limited(root, "", "selection_layer");
    m.maxVisual = limited(root, "", "max_visual");
    m.defaultRatio = root["default_ratio"].number(DBL_MIN, 1);
    m.decoder = readDecoder(root);
    root["rotary"].onlyHas({"theta", "sections", "interleaved"});  // the last is the graphs' own matter
    m.theta = root["rotary"]["theta"].number(DBL_MIN, 1e12);
    for (const Field& section : root["rotary"]["sections"].items(3)) {
        m.sections.push_back(static_cast<int32_t>(section.integer(1, 4096)));
    }
    m.selection = readSelection(root);
    m.preprocessing = readPreprocessing(root);
    m.tokens = readTokens(root, m.decoder.vocabSize);
    for (const char* name : {"vision", "prefix", "decoder"}) m.graphs[name] = readGraph(root["graphs"][name]);
    root["graphs"].onlyHas({"vision", "prefix", "decoder"});
    m.tokens.video = readVideo(root, m.tokens, m.decoder.vocabSize);
    m.embedding = readEmbedding(root, m.decoder);
    checkFormats(root);
    for (const Field& file : root["weights"].items(10000)) {
        file.onlyHas({"file", "size", "header_sha256", "sha256"});
        const auto size = static_cast<uint64_t>(file["size"].integer(0, INT64_MAX));
        WeightFile weights{file["file"].text(), sha(file["header_sha256"]), std::nullopt, size};
        if (file.has("sha256") && !file["sha256"].isNull()) weights.sha256 = sha(file["sha256"]);
        m.weights.push_back(weights);
    }
    if (root.has("chat") && !root["chat"].isNull()) m.chat = readChat(root["chat"]);
    if (root.has("residual_scale")) m.residualScale = root["residual_scale"].number(DBL_MIN, 1);
    checkAgreement(m, root);
    if (sha(root["constants_sha256"]) != constantsSha256(content)) {
        throw Error(what + " was edited after the export, and its fields decide the answers: " + kAgain);
    }
    return m;
}

Manifest readManifest(const std::string& folder) {
    const std::string path = folder + "/manifest.json";
    Manifest m = parseManifest(readFile(confined(folder, "manifest.json"), kAgain), path);
    if (m.weights.empty()) throw Error(path + " is damaged (it names no weight files): " + kAgain);
    bool held = false;
    for (const WeightFile& weights : m.weights) {
        const MappedFile file(confined(folder, weights.file), kCopy);
        const std::string name = folder + "/" + weights.file;
        if (file.size() != weights.size) {
            throw Error(name + " has " + std::to_string(file.size()) + " bytes, but the manifest says " +
                        std::to_string(weights.size) + ": " + kCopy);
        }
        uint64_t header = 0;
        for (size_t i = 0; i < 8 && file.size() >= 8; ++i) {
            header |= static_cast<uint64_t>(static_cast<uint8_t>(file.data()[i])) << (8 * i);
        }
        const bool whole = file.size() >= 8 && header <= std::min<uint64_t>(file.size() - 8, kMostHeader);
        if (!whole || sha256(file.data() + 8, static_cast<size_t>(header)) != weights.headerSha256) {
            throw Error(name + " changed after the export (its header differs): " + kAgain);
        }
        checkTensors(std::string(file.data() + 8, static_cast<size_t>(header)), name, file.size() - 8 - header);
        if (weights.file != m.embedding.file) continue;
        held = true;
        checkWithin(m, path, file.size());
    }
    if (!held) {
        throw Error(path + " is damaged (the embedding table is in " + m.embedding.file +
                    ", which is not one of its weight files): " + kAgain);
    }
    return m;
}

}  // namespace ivc
