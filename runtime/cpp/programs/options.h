// Options of the programs, checked one by one.
#pragma once

#include <cmath>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "ivc/error.h"

namespace ivc {

// All of `word` as a number, for an option.
inline double numberOf(const std::string& option, const std::string& word) {
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    if (word.empty() || *end != 0) throw Error(option + " takes a number, not '" + word + "'");
    return value;
}

inline int64_t wholeOf(const std::string& option, const std::string& word, int64_t least, int64_t most) {
    const double value = numberOf(option, word);
    if (!(value >= static_cast<double>(least) && value <= static_cast<double>(most) && value == std::floor(value))) {
        throw Error(option + " takes a whole number from " + std::to_string(least) + " to " + std::to_string(most) +
                    ", not " + word);
    }
    return static_cast<int64_t>(value);
}

// Options by name, each with what takes its value; flags take none. Other words are given to `word`.
struct Options {
    std::map<std::string, std::function<void(const std::string& option, const std::string& value)>> valued;
    std::map<std::string, std::function<void()>> flags;
    std::function<void(const std::string& word)> word;

    void read(const std::vector<std::string>& words) const {
        for (size_t i = 0; i < words.size(); ++i) {
            const std::string& name = words[i];
            const auto flag = flags.find(name);
            const auto value = valued.find(name);
            if (flag != flags.end()) {
                flag->second();
            } else if (value != valued.end()) {
                if (i + 1 == words.size()) throw Error(name + " needs a value: give one after it");
                value->second(name, words[++i]);
            } else if (name.size() > 1 && name[0] == '-') {
                throw Error("there is no option " + name + ": --help lists them");
            } else {
                word(name);
            }
        }
    }
};

}  // namespace ivc
