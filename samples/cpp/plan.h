// What the host computes for a run: positions, who votes, IVC priorities, how many tokens to keep.
//
// For models with one picture a prompt, whose tokens stand together; positions as Qwen2-VL's M-RoPE, or counted where
// the model has one axis.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <stdexcept>
#include <vector>

#include "ivc_tensors.h"
#include "json.h"

struct Grid {
    int32_t rows = 0, columns = 0;
    int32_t visual() const { return rows * columns; }  // of a grid that checkGrid lets through
};

struct Plan {
    std::vector<int32_t> positionIds;  // [axes, S]
    std::vector<int32_t> visualIndex, textIndex, queryIndex;
    std::vector<float> priority;
    int32_t keepCount = 1, nextPosition = 0;
};

// Refuses a grid that no picture has, or of more visual tokens than engines take.
inline void checkGrid(const Grid& grid) {
    if (std::min(grid.rows, grid.columns) < 1 || int64_t{grid.rows} * grid.columns > ivc::kMostVisual) {
        throw std::runtime_error("a picture has no " + std::to_string(grid.rows) + " rows of " +
                                 std::to_string(grid.columns) + " visual tokens: give --grid as it was cut");
    }
}

// Indices by falling value, equal ones by rising index.
inline std::vector<int32_t> descending(const std::vector<double>& values) {
    std::vector<int32_t> order(values.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return values[a] > values[b]; });
    return order;
}

// Priorities of one picture's tokens: the IVC tokens, cosine and sine lists taken alternately, from 32768 down; else 0.
// positions[axis][token]. Source: arXiv 2602.03060, section 3.2.
inline std::vector<float> ivcPriority(const std::vector<std::vector<int32_t>>& positions, const Json& manifest) {
    const double theta = manifest["rotary"]["theta"].number();
    const int32_t size = manifest["decoder"]["head_dim"].integer();
    const size_t tokens = positions[0].size(), axes = positions.size();
    std::vector<double> cosine(tokens), sine(tokens);
    for (size_t token = 0; token < tokens; ++token) {
        double cosSum = 0, sinSum = 0;
        for (const auto& axis : positions) {
            for (int32_t j = 0; j < size / 2; ++j) {
                const double angle = axis[token] * std::pow(theta, -2.0 * j / size);
                cosSum += std::cos(angle);
                sinSum += std::sin(angle);
            }
        }
        const double count = static_cast<double>(axes) * (size / 2);
        if (!std::isfinite(cosSum + sinSum)) {  // which has no order
            throw std::runtime_error("the manifest's rotary.theta does not fit: export the model again");
        }
        cosine[token] = std::nearbyint(cosSum / count * 1e9) / 1e9;  // (r, c) and (c, r) tie mathematically
        sine[token] = std::nearbyint(sinSum / count * 1e9) / 1e9;
    }
    const auto best = std::nearbyint(manifest["selection"]["ivc_fraction"].fraction() * static_cast<double>(tokens));
    const std::vector<int32_t> byCosine = descending(cosine), bySine = descending(sine);
    std::vector<float> priority(tokens, 0.0f);
    float next = 32768.0f;
    for (size_t i = 0; i < static_cast<size_t>(best); ++i) {
        for (const int32_t token : {byCosine[i], bySine[i]}) {
            if (priority[token] == 0.0f) priority[token] = next--;
        }
    }
    return priority;
}

// A run of `tokens` from position `start` on; without a picture (a decode step, say) everything is kept.
inline Plan planRun(
    const Json& manifest, const std::vector<int32_t>& tokens, const Grid* grid, int32_t start, double ratio) {
    const auto axes = manifest["rotary"]["sections"].items().size();
    if (tokens.empty()) throw std::runtime_error("there is no prompt: give some tokens");
    if (tokens.size() > INT32_MAX / 4) throw std::runtime_error("the prompt is too long: shorten it");
    const auto rows = static_cast<int32_t>(tokens.size());
    const int32_t image = manifest["tokens"]["image"].integer();
    if (axes == 0) throw std::runtime_error("the manifest's rotary.sections names no axis: export the model again");
    const int32_t vocabulary = manifest["decoder"]["vocab_size"].integer();
    for (const int32_t token : tokens) {
        if (token >= 0 && token < vocabulary) continue;
        throw std::runtime_error("token id " + std::to_string(token) + " is beyond the vocabulary of " +
                                 std::to_string(vocabulary) + ": the tokenizer belongs to another model");
    }
    if (grid != nullptr) {
        checkGrid(*grid);
        if (!(ratio > 0 && ratio <= 1)) {
            throw std::runtime_error("ratio " + std::to_string(ratio) + " is out of range: it is the fraction of " +
                                     "visual tokens kept, above 0 and up to 1");
        }
    }
    Plan plan;
    std::vector<std::vector<int32_t>> positions(axes, std::vector<int32_t>(tokens.size()));
    int64_t next = start;
    int32_t seen = 0;
    for (int32_t row = 0; row < rows; ++row) {
        if (grid != nullptr && tokens[row] == image) {
            const int32_t r = seen / grid->columns, c = seen % grid->columns;
            if (seen > 0 && plan.visualIndex.back() != row - 1) {
                throw std::runtime_error("the picture's image tokens do not stand together: give one picture a prompt");
            }
            for (size_t axis = 0; axis < axes; ++axis) {
                const int32_t within = axes == 1 ? seen : axis == 0 ? 0 : axis == 1 ? r : c;
                positions[axis][row] = static_cast<int32_t>(next + within);
            }
            plan.visualIndex.push_back(row);
            if (++seen == grid->visual()) next += axes == 1 ? seen : std::max(grid->rows, grid->columns);
        } else {
            for (auto& axis : positions) axis[row] = static_cast<int32_t>(next);  // checked below
            plan.textIndex.push_back(row);
            ++next;
        }
    }
    if (grid != nullptr && seen != grid->visual()) {
        throw std::runtime_error("the prompt holds " + std::to_string(seen) + " image tokens and the picture gives " +
                                 std::to_string(grid->visual()) + ": repeat the image token so many times");
    }
    const int32_t known = manifest["decoder"]["max_positions"].integer();
    if (next > known) {
        throw std::runtime_error("the conversation reaches position " + std::to_string(next) + ", and this model " +
                                 "knows " + std::to_string(known) + ": shorten it, or use a smaller picture");
    }
    for (const auto& axis : positions) plan.positionIds.insert(plan.positionIds.end(), axis.begin(), axis.end());
    plan.nextPosition = static_cast<int32_t>(next);
    if (grid == nullptr) {
        plan.visualIndex = {0};
        plan.textIndex.erase(plan.textIndex.begin());
        plan.priority = {0.0f};
    } else {
        const int32_t first = plan.visualIndex.front(), end = plan.visualIndex.back() + 1;
        for (auto& axis : positions) axis = std::vector<int32_t>(axis.begin() + first, axis.begin() + end);
        plan.priority = ivcPriority(positions, manifest);
        const auto kept = static_cast<int32_t>(std::nearbyint(ratio * grid->visual()));
        plan.keepCount = std::max(1, kept);
        for (int64_t row = int64_t{end} + manifest["selection"]["query_offset"].integer(); row < rows; ++row) {
            plan.queryIndex.push_back(static_cast<int32_t>(row));
        }
    }
    if (plan.queryIndex.empty()) plan.queryIndex = {rows - 1};
    return plan;
}

// The most probable token by its logit, the first of equal ones; -1 if a logit is NaN or infinite, but for low ones
// beside finite ones.
inline int32_t mostProbable(const float* logits, size_t count) {
    const float* best = std::max_element(logits, logits + count);
    const bool sound = std::all_of(logits, logits + count, [](float logit) { return logit < INFINITY; });
    return sound && count > 0 && *best > -INFINITY ? static_cast<int32_t>(best - logits) : -1;
}

// Values of a picture's pixel_values.
inline int64_t pixelCount(const Json& manifest, const Grid& grid) {
    checkGrid(grid);
    const Json& sizes = manifest["preprocessing"];
    const int64_t side = int64_t{sizes["merge_size"].integer()} * sizes["patch_size"].integer();
    return 3 * side * side * sizes["temporal_patch_size"].integer() * grid.visual();  // limits keep it within 64 bits
}
