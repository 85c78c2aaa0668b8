// manifest.json, checked before anything is computed of it: by the limits of ivc_export/contract, and one field by
// another.
#pragma once

#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>

#include "ivc_tensors.h"
#include "json.h"

// The path of what the bundle calls `file`, which neither its name nor a link may lead out of the bundle.
inline std::string confined(const std::string& bundle, const std::string& file) {
    std::error_code failed;
    const auto folder = std::filesystem::canonical(bundle.empty() ? "." : bundle, failed);
    if (failed) throw std::runtime_error(bundle + " cannot be read: check the path");
    const auto path = std::filesystem::weakly_canonical(folder / file, failed);
    const auto inside = path.lexically_relative(folder);
    if (failed || file.find('\0') != std::string::npos || inside.empty() || *inside.begin() == "..") {
        throw std::runtime_error(bundle + " has '" + file + "', which is outside the bundle or a link that leaves it: " +
                                 "export the model again");
    }
    return bundle + "/" + file;
}

// Refuses a manifest that contradicts itself, or whose numbers are none of a model's.
inline void checkManifest(const Json& manifest) {
    const auto require = [](bool agrees, const std::string& field) {
        if (!agrees) throw std::runtime_error("the manifest's " + field + " does not fit: export the model again");
    };
    for (const ivc::Limit& limit : ivc::kLimits) {
        const std::string record = limit.record;
        const Json& held = record.empty() ? manifest : manifest[record];
        const int32_t value = held[limit.field].integer();
        if (value >= limit.least && value <= limit.most && value % limit.multipleOf == 0) continue;
        throw std::runtime_error("the manifest's " + record + (record.empty() ? "" : ".") + limit.field + " is " +
                                 std::to_string(value) + ", which no model has (" + std::to_string(limit.least) +
                                 " to " + std::to_string(limit.most) + (limit.multipleOf > 1 ? ", even" : "") +
                                 "): export the model again");
    }
    const Json& decoder = manifest["decoder"];
    const int32_t vocabulary = decoder["vocab_size"].integer();
    const auto sections = manifest["rotary"]["sections"].integers();
    if (sections.empty()) {
        throw std::runtime_error("the manifest's rotary.sections names no axis: export the model again");
    }
    int64_t angles = 0;
    for (const int32_t section : sections) angles += section;
    require(sections.size() <= 3 && 2 * angles == decoder["head_dim"].integer(), "rotary.sections");
    const double theta = manifest["rotary"]["theta"].number();
    require(theta > 0 && theta <= 1e12, "rotary.theta");
    manifest["selection"]["ivc_fraction"].fraction();
    require(manifest["selection_layer"].integer() < decoder["layers"].integer(), "selection_layer");
    require(decoder["heads"].integer() % decoder["kv_heads"].integer() == 0, "decoder.kv_heads");
    require(manifest["tokens"]["image"].integer() < vocabulary, "tokens.image");
    for (const int32_t token : manifest["tokens"]["stop"].integers()) require(token < vocabulary, "tokens.stop");
}

inline Json readManifest(const std::string& bundle) {
    Json manifest = Json::read(bundle + "/manifest.json");
    if (manifest["schema_version"].integer() != ivc::kSchemaVersion) {
        throw std::runtime_error("the manifest is of another version: export the model again");
    }
    if (manifest["preprocessing"]["kind"].text() != "patches") {
        throw std::runtime_error("this program takes models that cut pictures into patches, and " +
                                 manifest["family"].text() + " cuts them into tiles: use ivc-run");
    }
    if (manifest["selection"]["method"].text() != "ivc-prune") {
        throw std::runtime_error("this program chooses tokens by ivc-prune, and the bundle by " +
                                 manifest["selection"]["method"].text() + ": use ivc-run");
    }
    checkManifest(manifest);
    const Json& decoder = manifest["decoder"];
    if (decoder["value_dim"].integer() != decoder["head_dim"].integer() || decoder["deepstack"].integer() != 0) {
        throw std::runtime_error("this program takes values of the keys' size, and adds nothing to pictures' rows, as " +
                                 manifest["family"].text() + " wants: use ivc-run");
    }
    if (!manifest["selection"]["whole_layers"].items().empty()) {
        throw std::runtime_error("this program compacts every cache, and " + manifest["family"].text() +
                                 " keeps some whole: use ivc-run");
    }
    return manifest;
}
