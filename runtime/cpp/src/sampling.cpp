#include "ivc/sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "ivc/error.h"
#include "ivc/files.h"
#include "ivc/json.h"

namespace ivc {
namespace {

using Wide = unsigned __int128;

constexpr double kNever = -std::numeric_limits<double>::infinity();
const Wide kMultiplier = static_cast<Wide>(2549297995355413924u) << 64 | 4865540595714422341u;

// What NumPy's SeedSequence makes of a seed: the eight words that seed a PCG64.
std::vector<uint32_t> seedWords(uint64_t seed) {
    uint32_t constant = 0x43b0d7e5u;
    const auto hashed = [&](uint32_t value) {
        value ^= constant;
        constant *= 0x931e8875u;
        value *= constant;
        return value ^ value >> 16;
    };
    const uint32_t entropy[4] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0};
    uint32_t pool[4];
    for (int i = 0; i < 4; ++i) pool[i] = hashed(entropy[i]);
    for (int from = 0; from < 4; ++from) {
        for (int to = 0; to < 4; ++to) {
            if (from == to) continue;
            const uint32_t mixed = 0xca01f9ddu * pool[to] - 0x4973f715u * hashed(pool[from]);
            pool[to] = mixed ^ mixed >> 16;
        }
    }
    std::vector<uint32_t> words;
    constant = 0x8b51f9ddu;
    for (size_t i = 0; i < 8; ++i) {
        uint32_t value = pool[i % 4] ^ constant;
        constant *= 0x58f38dedu;
        value *= constant;
        words.push_back(value ^ value >> 16);
    }
    return words;
}

// An integer of the same order as a float's value. Beyond those of the infinities are NaN.
int32_t ordered(float value) {
    value += 0.0f;  // of both zeros one
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

// The first of the largest logits. Throws if there is none, or if one of them is NaN or infinity.
size_t mostLikely(const std::vector<float>& logits) {
    constexpr size_t kBlock = 1024;  // whose largest and smallest are found without a branch
    int32_t most = INT32_MIN, least = INT32_MAX;
    size_t place = 0;
    for (size_t start = 0; start < logits.size(); start += kBlock) {
        int32_t high = INT32_MIN, low = INT32_MAX;
        for (size_t i = start; i < std::min(start + kBlock, logits.size()); ++i) {
            const int32_t one = ordered(logits[i]);
            high = std::max(high, one);
            low = std::min(low, one);
        }
        least = std::min(least, low);
        if (high <= most) continue;
        most = high;
        place = start;
    }
    const int32_t infinity = ordered(INFINITY), never = ordered(-INFINITY);
    if (least < never || most >= infinity || most <= never) {
        throw Error("the model gives NaN logits: compute in float32, or verify the bundle with ivc-check");
    }
    while (ordered(logits[place]) != most) ++place;
    return place;
}

std::vector<double> softmax(const std::vector<double>& scores) {
    const double most = *std::max_element(scores.begin(), scores.end());
    std::vector<double> found(scores.size());
    double sum = 0;
    for (size_t i = 0; i < scores.size(); ++i) sum += found[i] = std::exp(scores[i] - most);
    for (double& value : found) value /= sum;
    return found;
}

}  // namespace

void Sampling::check() const {
    if (!(temperature >= 0 && std::isfinite(temperature))) {
        throw Error("temperature " + std::to_string(temperature) + " is out of range: give 0 (greedy) or more");
    }
    if (!(topP > 0 && topP <= 1)) {
        throw Error("top-p " + std::to_string(topP) + " is out of range: give a probability mass above 0 and up to 1");
    }
    if (maxTokens < 1) throw Error("max tokens " + std::to_string(maxTokens) + " is out of range: give at least 1");
    if (topK < 0) throw Error("top-k " + std::to_string(topK) + " is out of range: give 0 (all tokens) or more");
    if (!(repetitionPenalty >= 1e-3 && repetitionPenalty <= 1e3)) {
        throw Error("repetition penalty " + std::to_string(repetitionPenalty) +
                    " is out of range: give 0.001 to 1000, such as 1.05; 1 means none");
    }
}

Sampling storedSampling(const std::string& folder, Sampling chosen) {
    const std::string path = folder + "/generation_config.json", advice = "give --sampling greedy";
    const Json content = parseJson(readFile(confined(folder, "generation_config.json"), advice), path, advice);
    const Field root(content, path, advice);
    for (const char* name : {"num_beams", "num_beam_groups", "typical_p", "encoder_repetition_penalty",
             "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens", "epsilon_cutoff",
             "eta_cutoff", "min_p", "penalty_alpha", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
             "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "top_h",
             "dola_layers", "watermarking_config", "force_words_ids", "constraints", "guidance_scale"}) {
        if (!root.has(name) || root[name].isNull()) continue;
        const Json& value = root[name].json();
        const std::string key = name;
        const bool one = key == "num_beams" || key == "num_beam_groups" || key == "typical_p" ||
                         key == "encoder_repetition_penalty" || key == "guidance_scale";
        const bool none = value.empty() || (value.is_number() && value.get<double>() == (one ? 1 : 0));
        if (!none) root[name].refuse("is set, which this version does not support");
    }
    const auto number = [&](const char* name, double fallback) {
        return root.has(name) && !root[name].isNull() ? root[name].number(-1e18, 1e18) : fallback;
    };
    if (root.has("do_sample") && root["do_sample"].json() == true) {
        chosen.temperature = number("temperature", 1);
        chosen.topP = number("top_p", 1);
        chosen.topK = static_cast<int64_t>(number("top_k", 50));
    }
    chosen.repetitionPenalty = number("repetition_penalty", 1);
    return chosen;
}

Sampler::Sampler(const Sampling& sampling) : sampling_(sampling) {
    sampling.check();
    const std::vector<uint32_t> words = seedWords(sampling.seed);
    const auto wide = [&](size_t i) {
        const auto half = [&](size_t j) { return static_cast<uint64_t>(words[j + 1]) << 32 | words[j]; };
        return static_cast<Wide>(half(i)) << 64 | half(i + 2);
    };
    increment_ = wide(4) << 1 | 1;
    state_ = increment_ + wide(0);
    state_ = state_ * kMultiplier + increment_;
}

uint64_t Sampler::next() {
    state_ = state_ * kMultiplier + increment_;
    const auto folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
    const auto by = static_cast<unsigned>(state_ >> 122);
    return folded >> by | folded << ((64 - by) & 63);
}

std::vector<double> Sampler::scores(const std::vector<float>& logits) const {
    std::vector<double> found(logits.begin(), logits.end());
    if (sampling_.repetitionPenalty != 1) {
        for (const int32_t token : seen_) {
            if (token < 0 || static_cast<size_t>(token) >= found.size()) continue;
            double& score = found[static_cast<size_t>(token)];
            score = score < 0 ? score * sampling_.repetitionPenalty : score / sampling_.repetitionPenalty;
        }
    }
    if (sampling_.temperature == 0) return found;
    const double most = *std::max_element(found.begin(), found.end());
    for (double& score : found) score = (score - most) / sampling_.temperature;
    const auto best = static_cast<size_t>(sampling_.topK);
    if (best > 0 && best < found.size()) {
        std::vector<double> sorted = found;
        std::nth_element(sorted.begin(), sorted.begin() + static_cast<ptrdiff_t>(best - 1), sorted.end(), std::greater<>());
        const double least = sorted[best - 1];
        for (double& score : found) {
            if (score < least) score = kNever;
        }
    }
    if (sampling_.topP < 1) {
        std::vector<size_t> order(found.size());
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return found[a] < found[b]; });
        std::vector<double> sorted(found.size());
        for (size_t i = 0; i < order.size(); ++i) sorted[i] = found[order[i]];
        const std::vector<double> chances = softmax(sorted);
        double sum = 0;
        for (size_t i = 0; i + 1 < order.size(); ++i) {
            sum += chances[i];
            if (sum <= 1 - sampling_.topP) found[order[i]] = kNever;
        }
    }
    return found;
}

int32_t Sampler::draw(const std::vector<float>& logits) {
    size_t token = mostLikely(logits);
    const bool greedy = sampling_.temperature == 0;
    if (greedy && sampling_.repetitionPenalty != 1) {
        const std::vector<double> found = scores(logits);
        token = static_cast<size_t>(std::max_element(found.begin(), found.end()) - found.begin());
    } else if (!greedy) {
        token = 0;
        std::vector<double> sums = softmax(scores(logits));
        std::partial_sum(sums.begin(), sums.end(), sums.begin());
        const double chance = static_cast<double>(next() >> 11) / 9007199254740992.0, all = sums.back();
        while (token + 1 < sums.size() && sums[token] / all <= chance) ++token;
    }
    seen_.insert(static_cast<int32_t>(token));
    return static_cast<int32_t>(token);
}

}  // namespace ivc
