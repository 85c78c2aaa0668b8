// What takes a while to find, kept for the keys that were asked for last. Any thread may ask.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace ivc {

// Values of the last kMost keys are always known, and never more than twice as many are held.
template <class Key, class Value, size_t kMost>
class Remembered {
   public:
    // find: gives the value where it is not known; no other call goes on meanwhile
    template <class Find>
    Value get(const Key& key, Find find) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto recent = recent_.find(key);
        if (recent != recent_.end()) return recent->second;
        const auto older = older_.find(key);
        const Value value = older != older_.end() ? older->second : find();
        if (recent_.size() == kMost) older_ = std::exchange(recent_, {});
        recent_.emplace(key, value);
        return value;
    }

   private:
    std::mutex mutex_;
    std::map<Key, Value> recent_, older_;
};

}  // namespace ivc
