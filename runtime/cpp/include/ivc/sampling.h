// How the next token is drawn from logits, as ivc_export.text.sampling does, random numbers included.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace ivc {

// Drawn is the best at temperature 0, else by chance from the `topK` best (0 is all), of these from `topP`.
struct Sampling {
    double temperature = 0, topP = 1, repetitionPenalty = 1;
    uint64_t seed = 0;
    int64_t topK = 0;
    int32_t maxTokens = 128;

    void check() const;  // throws where one of them is out of range
};

// What generation_config.json of a bundle asks for; throws where it asks for what Sampling does not know.
Sampling storedSampling(const std::string& folder, Sampling chosen);

// The draws of one conversation: its random generator, and the ids that it has read and drawn.
class Sampler {
   public:
    // Throws where a setting is out of range.
    explicit Sampler(const Sampling& sampling);
    const Sampling& sampling() const { return sampling_; }  // what it draws by
    // Counts ids as seen, whose repetition is made less likely.
    void read(const std::vector<int32_t>& tokens) { seen_.insert(tokens.begin(), tokens.end()); }
    // The next id, of logits [vocabulary]. Throws if one of them is NaN or infinity.
    int32_t draw(const std::vector<float>& logits);

   private:
    uint64_t next();
    std::vector<double> scores(const std::vector<float>& logits) const;

    Sampling sampling_;
    std::set<int32_t> seen_;
    unsigned __int128 state_ = 0, increment_ = 0;
};

}  // namespace ivc
