// Draws the next token from logits. It draws what ivc_export.text.sampling draws in Python, with the same random numbers.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace ivc {

// How tokens are drawn. At temperature 0 the most likely token is taken. Otherwise one is drawn from the topK most likely
// (0 is all), and of these from the most likely with a probability of topP together.
struct Sampling {
    double temperature = 0, topP = 1, repetitionPenalty = 1;
    uint64_t seed = 0;
    int64_t topK = 0;
    int32_t maxTokens = 128;

    void check() const;  // throws if a value is out of range
};

// `chosen`, with the settings of a bundle's generation_config.json. Throws if the file has a setting that Sampling does
// not know.
Sampling storedSampling(const std::string& folder, Sampling chosen);

// Draws the tokens of one conversation. It holds the random generator, and the ids that were read and drawn.
class Sampler {
   public:
    // Throws if a setting is out of range.
    explicit Sampler(const Sampling& sampling);
    const Sampling& sampling() const { return sampling_; }  // its settings
    // Marks ids as seen. The repetition penalty makes them less likely.
    void read(const std::vector<int32_t>& tokens) { seen_.insert(tokens.begin(), tokens.end()); }
    // The next id. logits: [vocabulary]. Throws if one of them is NaN or infinity.
    int32_t draw(const std::vector<float>& logits);

   private:
    uint64_t next();
    std::vector<double> scores(const std::vector<float>& logits) const;

    Sampling sampling_;
    std::set<int32_t> seen_;
    unsigned __int128 state_ = 0, increment_ = 0;
};

}  // namespace ivc
