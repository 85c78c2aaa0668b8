#include "ivc/plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ivc/contract.h"
#include "ivc/error.h"

namespace ivc {
namespace {

constexpr float kIvcPriority0 = 32768.0f;    // of a picture's best IVC token
constexpr float kSeparatorPriority = 1e36f;  // of separators between the rows of views
constexpr size_t kMostRows = INT32_MAX / 4;

// Positions of each axis, one after the other along the rows.
using Positions = std::vector<std::vector<int32_t>>;

// Indices by falling value, equal ones by rising index.
template <class T>
std::vector<int32_t> descending(const std::vector<T>& values) {
    std::vector<int32_t> order(values.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
    });
    return order;
}

// Mean cosines and sines of one position's angles.
struct Means {
    double cosine = 0, sine = 0;
};

// As NumPy sums them: pairwise beyond 128 values, in eight parts within.
double pairwiseSum(const double* values, size_t count) {
    if (count < 8) return std::accumulate(values, values + count, 0.0);
    if (count <= 128) {
        double parts[8];
        std::copy(values, values + 8, parts);
        size_t i = 8;
        for (; i + 8 <= count; i += 8) {
            for (size_t j = 0; j < 8; ++j) parts[j] += values[i + j];
        }
        double sum = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
        for (; i < count; ++i) sum += values[i];
        return sum;
    }
    const size_t half = count / 2 / 8 * 8;
    return pairwiseSum(values, half) + pairwiseSum(values + half, count - half);
}

// Priorities of one block's tokens: the IVC tokens, cosine and sine lists taken alternately, from kIvcPriority0 down;
// else 0. positions: from row `first` on. fraction: of the tokens, that either list has. Source: arXiv 2602.03060,
// section 3.2.
void ivcPriority(const Manifest& m, const Positions& positions, size_t first, size_t tokens, double fraction,
    float* priority) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (const auto& axis : positions) {
        const auto [low, high] = std::minmax_element(axis.begin() + static_cast<ptrdiff_t>(first),
            axis.begin() + static_cast<ptrdiff_t>(first + tokens));
        least = std::min(least, *low);
        most = std::max(most, *high);
    }
    const auto half = static_cast<size_t>(m.turned() / 2);
    std::vector<Means> means(static_cast<size_t>(most - least) + 1);
    std::vector<double> cosines(half), sines(half);
    for (size_t i = 0; i < means.size(); ++i) {
        for (size_t j = 0; j < half; ++j) {
            const double frequency = std::pow(m.theta, -2.0 * static_cast<double>(j) / m.turned());
            const double angle = (least + static_cast<double>(i)) * frequency;
            cosines[j] = std::cos(angle);
            sines[j] = std::sin(angle);
        }
        means[i] = {pairwiseSum(cosines.data(), half) / static_cast<double>(half),
            pairwiseSum(sines.data(), half) / static_cast<double>(half)};
        if (!std::isfinite(means[i].cosine + means[i].sine)) {  // which has no order
            throw Error("rotary.theta of the manifest gives invalid angles: export the model again");
        }
    }
    std::vector<double> cosine(tokens), sine(tokens);
    for (size_t token = 0; token < tokens; ++token) {
        Means sum;
        for (const auto& axis : positions) {
            const Means& one = means[static_cast<size_t>(axis[first + token] - least)];
            sum.cosine += one.cosine;
            sum.sine += one.sine;
        }
        const auto axes = static_cast<double>(positions.size());
        cosine[token] = std::nearbyint(sum.cosine / axes * 1e9) / 1e9;  // (r, c) and (c, r) tie mathematically
        sine[token] = std::nearbyint(sum.sine / axes * 1e9) / 1e9;
    }
    const auto count = static_cast<size_t>(std::nearbyint(fraction * static_cast<double>(tokens)));
    const std::vector<int32_t> byCosine = descending(cosine), bySine = descending(sine);
    float next = kIvcPriority0;
    for (size_t i = 0; i < count; ++i) {
        for (const int32_t token : {byCosine[i], bySine[i]}) {
            if (priority[token] == 0.0f) priority[token] = next--;
        }
    }
}

// One number for each visual token, no two of them equal. Source: splitmix64.
uint64_t draw(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

std::vector<float> randomPriority(size_t tokens, int64_t seed) {
    std::vector<uint64_t> draws(tokens);
    for (size_t i = 0; i < tokens; ++i) draws[i] = draw(static_cast<uint64_t>(seed), i);
    const std::vector<int32_t> order = descending(draws);
    std::vector<float> priority(tokens);
    for (size_t i = 0; i < tokens; ++i) {
        priority[static_cast<size_t>(order[i])] = static_cast<float>(tokens + 1 - i);
    }
    return priority;
}

std::vector<float> priorities(const Manifest& m, const Positions& visual, const std::vector<Grid>& grids,
    const Method& method) {
    const size_t tokens = visual[0].size();
    if (method.name == "random") return randomPriority(tokens, method.seed);
    std::vector<float> priority(tokens, 0.0f);
    if (method.name == "foreground" || m.selection.method != "ivc-prune") return priority;
    size_t first = 0;
    for (const Grid& grid : grids) {
        double fraction = m.selection.ivcFraction;
        for (const int32_t block : grid.blocks()) {
            ivcPriority(m, visual, first, static_cast<size_t>(block), fraction, priority.data() + first);
            first += static_cast<size_t>(block);
            if (grid.content) fraction = m.selection.rowFraction;  // of what comes behind the first view
        }
    }
    return priority;
}

// Separators come before all others.
void favourSeparators(const std::vector<Grid>& grids, std::vector<float>& priority) {
    size_t start = 0;
    for (const Grid& grid : grids) {
        size_t row = 0, end = start;
        for (const int32_t block : grid.blocks()) {
            const auto tokens = static_cast<size_t>(block), side = static_cast<size_t>(grid.tile);
            if (row++ == 0) {
                for (size_t i = 1; i <= side; ++i) priority[end + i * (side + 1) - 1] = kSeparatorPriority;
            } else {
                priority[end + tokens - 1] = kSeparatorPriority;
            }
            end += tokens;
        }
        start = end;
    }
}

// The thumbnails' tokens, and for every visual token which of them shows the same place.
void tileInputs(Run& run) {
    if (run.grids.empty()) {  // one row stands in for a visual token
        run.thumbnailIndex = run.tileMap = {0};
        return;
    }
    int32_t start = 0, before = 0;
    for (const Grid& grid : run.grids) {
        const int32_t tile = grid.tile, size = tile * tile;
        const auto blocks = static_cast<int32_t>(grid.blocks().size());
        if (blocks > 1) {
            const int32_t across = grid.columns / tile;
            for (int32_t i = 0; i < (blocks - 1) * size; ++i) {
                const int32_t row = i / size / across * tile + i % size / tile;
                const int32_t column = i / size % across * tile + i % size % tile;
                run.tileMap.push_back(before + row * tile / grid.rows * tile + column * tile / grid.columns);
            }
        }
        for (int32_t i = 0; i < size; ++i) {
            run.tileMap.push_back(before + i);
            run.thumbnailIndex.push_back(start + grid.visual() - size + i);
        }
        start += grid.visual();
        before += size;
    }
}

// The same of pictures in two views, whose separators belong to their rows, and the candidates for seeds.
void viewInputs(Run& run) {
    if (run.grids.empty()) {
        run.thumbnailIndex = run.tileMap = run.candidateIndex = {0};
        return;
    }
    int32_t start = 0, before = 0;
    for (const Grid& grid : run.grids) {
        const int32_t tile = grid.tile, side = tile + 1, whole = tile * side;
        for (int32_t i = 0; i < whole; ++i) {
            run.thumbnailIndex.push_back(start + i);
            run.tileMap.push_back(before + i);
        }
        run.tileMap.push_back(before);
        for (int32_t row = 0; row < grid.rows; ++row) {
            for (int32_t column = 0; column <= grid.columns; ++column) {
                run.tileMap.push_back(before + row * tile / grid.rows * side + column * tile / grid.columns);
            }
        }
        for (int32_t row = grid.content->top; row < grid.content->bottom; ++row) {
            for (int32_t column = grid.content->left; column < grid.content->right; ++column) {
                run.candidateIndex.push_back(before + row * side + column);
            }
        }
        start += grid.visual();
        before += whole;
    }
}

// Whether a bundle's own settings make such a grid.
bool fits(const Grid& grid, const Preprocessing& p) {
    const int32_t tile = p.cut() || p.twice() ? p.tileSide : 0;
    if (grid.rows < 1 || grid.columns < 1 || int64_t{grid.rows} * grid.columns > kMostVisual) return false;
    if (grid.tile != tile || (tile > 0 && (grid.rows % tile != 0 || grid.columns % tile != 0))) return false;
    if (grid.content.has_value() != p.twice()) return false;
    const Box box = grid.content.value_or(Box{});
    const auto inside = [&](int32_t from, int32_t to) { return from >= 0 && from <= to && to <= tile; };
    return inside(box.left, box.right) && inside(box.top, box.bottom);
}

// Positions of every row, and the next free one; rows of pictures go into visualIndex, others into textIndex.
Positions positionsOf(const Manifest& m, Run& run, int64_t& next) {
    Positions positions(m.axes(), std::vector<int32_t>(run.tokens.size()));
    size_t picture = 0;
    int32_t seen = 0;
    const bool counted = m.axes() == 1;
    for (int32_t row = 0; row < run.rows(); ++row) {
        const auto at = static_cast<size_t>(row);
        if (run.grids.empty() || !m.tokens.isVisual(run.tokens[at])) {
            if (seen > 0) throw Error("a picture's image tokens are not next to each other: write no image tokens into the text");
            for (auto& axis : positions) axis[at] = static_cast<int32_t>(next);  // checked below
            run.textIndex.push_back(row);
            ++next;
        } else {
            const Grid& grid = run.grids[picture];
            const int32_t place[] = {0, seen / grid.columns, seen % grid.columns};
            for (size_t axis = 0; axis < positions.size(); ++axis) {
                positions[axis][at] = static_cast<int32_t>(next + (counted ? seen : place[axis]));
            }
            run.visualIndex.push_back(row);
            if (++seen < grid.visual()) continue;
            next += counted ? seen : std::max(grid.rows, grid.columns);
            seen = 0;
            ++picture;
        }
    }
    return positions;
}

}  // namespace

void checkRatio(double ratio) {
    if (ratio > 0 && ratio <= 1) return;
    throw Error("ratio " + std::to_string(ratio) +
                " is out of range: it is the fraction of visual tokens kept, above 0 and up to 1");
}

void checkMethod(const Manifest& manifest, const Method& method) {
    const std::string& own = manifest.selection.method;
    const bool chosenNow = method.name == "ivc-prune" || method.name == "foreground" || method.name == "random";
    if (!chosenNow && method.name != "fastv" && !method.name.empty()) {
        throw Error("there is no method '" + method.name + "': choose one of ivc-prune, foreground, random, fastv");
    }
    const std::string wanted = chosenNow ? "ivc-prune" : method.name.empty() ? own : method.name;
    if (wanted != own) {
        throw Error("this bundle's graphs cannot select by " + method.name + ": export the model with ivc-export --method " +
                    wanted);
    }
    if (method.seed < 0 || method.seed > INT32_MAX) {
        throw Error("method seed " + std::to_string(method.seed) + " is out of range: give 0 to " +
                    std::to_string(INT32_MAX));
    }
}

Run planRun(const Manifest& m, const std::vector<int32_t>& tokens, const std::vector<Grid>& grids, int32_t start,
    double ratio, const Method& method, int32_t question) {
    if (tokens.empty()) throw Error("the prompt is empty: give some text");
    if (tokens.size() > kMostRows) throw Error("the prompt is too long: shorten it");
    checkRatio(ratio);
    checkMethod(m, method);
    int64_t images = 0, wanted = 0;
    for (const int32_t token : tokens) {
        if (token < 0 || token >= m.decoder.vocabSize) {
            throw Error("token id " + std::to_string(token) + " is beyond the vocabulary of " +
                        std::to_string(m.decoder.vocabSize) + " tokens: use the tokenizer of this bundle");
        }
        images += m.tokens.isVisual(token) ? 1 : 0;
    }
    for (const Grid& grid : grids) {
        if (!fits(grid, m.preprocessing)) {
            throw Error("a picture cannot have " + std::to_string(grid.rows) + " rows of " + std::to_string(grid.columns) +
                        " visual tokens: prepare it with this bundle's own settings");
        }
        wanted += grid.visual();
    }
    if (!grids.empty() && images != wanted) {
        throw Error("the prompt has " + std::to_string(images) + " image tokens, but its pictures give " +
                    std::to_string(wanted) + ": write no image tokens into the text, and name each picture once");
    }
    Run run;
    run.tokens = tokens;
    run.grids = grids;
    int64_t next = start;
    const Positions positions = positionsOf(m, run, next);
    if (start < 0 || next > m.decoder.maxPositions) {
        throw Error("the conversation reaches position " + std::to_string(next) + ", but this model has " +
                    std::to_string(m.decoder.maxPositions) + " positions: shorten it, or use smaller pictures");
    }
    run.nextPosition = static_cast<int32_t>(next);
    for (const auto& axis : positions) run.positionIds.insert(run.positionIds.end(), axis.begin(), axis.end());
    if (grids.empty()) {
        run.visualIndex = {0};
        run.textIndex.erase(run.textIndex.begin());
        run.ivcPriority = {0.0f};
    } else {
        Positions visual(positions.size());
        for (size_t axis = 0; axis < positions.size(); ++axis) {
            for (const int32_t row : run.visualIndex) visual[axis].push_back(positions[axis][static_cast<size_t>(row)]);
        }
        run.ivcPriority = priorities(m, visual, grids, method);
        if (m.selection.views) favourSeparators(grids, run.ivcPriority);
        run.keepCount = 0;
        for (const Grid& grid : grids) {
            run.keepCount += std::max(1, static_cast<int32_t>(std::nearbyint(ratio * grid.visual())));
        }
        const int64_t behind = int64_t{run.visualIndex.back()} + 1 + m.selection.queryOffset;
        for (int64_t row = std::max(behind, int64_t{question}); row < run.rows(); ++row) {
            run.queryIndex.push_back(static_cast<int32_t>(row));
        }
    }
    if (run.queryIndex.empty()) run.queryIndex = {run.rows() - 1};
    if (m.selection.tiles) tileInputs(run);
    if (m.selection.views) viewInputs(run);
    return run;
}

}  // namespace ivc
