// A JSON reader, enough for manifest.json, build.json and testdata/index.json.
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

class Json {
   public:
    static constexpr int64_t kMostBytes = 4 << 20;  // many times the largest manifest's; a value takes 200 in memory

    static Json read(const std::string& path) {
        struct stat status {};
        if (stat(path.c_str(), &status) == 0) {
            if (!S_ISREG(status.st_mode)) throw std::runtime_error(path + " is not a regular file: check the path");
            if (status.st_size > kMostBytes) {
                throw std::runtime_error(path + " is larger than " + std::to_string(kMostBytes) + " bytes" + mend());
            }
        }
        std::ifstream file(path, std::ios::binary);
        if (!file) throw std::runtime_error(path + " cannot be read: check the path");
        std::stringstream content;
        content << file.rdbuf();
        return parse(content.str(), path);
    }

    static Json parse(const std::string& content, const std::string& name) {
        Reader reader{content, name};
        Json found = reader.value("");
        reader.blanks();
        if (reader.at != content.size()) reader.fail();
        return found;
    }

    // Each of these throws where the file has something else in this place.
    const Json& operator[](const std::string& key) const {
        const auto found = fields_.find(key);
        if (found == fields_.end()) throw std::runtime_error(name_ + " lacks " + place(where_, key) + mend());
        return found->second;
    }
    const std::vector<Json>& items() const { return as(kind_ == '[', "a list").items_; }
    const std::string& text() const { return as(kind_ == '"', "text").text_; }
    double number() const { return as(kind_ == '0' && std::isfinite(number_), "a number").number_; }
    double fraction() const { return as(number() >= 0 && number() <= 1, "a number from 0 to 1").number_; }
    int32_t integer() const {
        const bool whole = number() >= 0 && number() <= INT32_MAX && number() == std::floor(number());
        return static_cast<int32_t>(as(whole, "a whole number from 0 on").number_);
    }

    std::vector<int32_t> integers() const {
        std::vector<int32_t> found;
        for (const Json& item : items()) found.push_back(item.integer());
        return found;
    }

   private:
    struct Reader {
        const std::string& content;
        const std::string& name;
        size_t at = 0;
        int32_t depth = 0;

        [[noreturn]] void fail() const {
            throw std::runtime_error(name + " is no JSON at byte " + std::to_string(std::min(at, content.size())) + mend());
        }
        void blanks() {
            while (at < content.size() && std::isspace(static_cast<unsigned char>(content[at]))) ++at;
        }
        char peek() {
            blanks();
            if (at >= content.size()) fail();
            return content[at];
        }
        void take(char expected) {
            if (peek() != expected) fail();
            ++at;
        }
        bool word(const char* text) {
            const std::string expected(text);
            if (content.compare(at, expected.size(), expected) != 0) return false;
            at += expected.size();
            return true;
        }
        std::string string() {
            std::string found;
            for (take('"'); at < content.size() && content[at] != '"'; ++at) {
                if (content[at] == '\\' && ++at < content.size() && content[at] == 'u') at += 4;  // text is not used
                if (at < content.size()) found += content[at];
            }
            take('"');
            return found;
        }
        Json value(const std::string& where) {
            Json found;
            const char first = peek();
            found.name_ = name;
            found.where_ = where;
            if (++depth > 64) fail();  // before the stack is used up
            if (first == '{') {
                for (take('{'); peek() != '}';) {
                    const std::string key = string();
                    take(':');
                    found.fields_[key] = value(place(where, key));
                    if (peek() != '}') take(',');
                }
                take('}');
            } else if (first == '[') {
                for (take('['); peek() != ']';) {
                    found.items_.push_back(value(where));
                    if (peek() != ']') take(',');
                }
                take(']');
                found.kind_ = '[';
            } else if (first == '"') {
                found.text_ = string();
                found.kind_ = '"';
            } else if (!word("true") && !word("false") && !word("null")) {
                char* end = nullptr;
                found.number_ = std::strtod(content.c_str() + at, &end);
                if (end == content.c_str() + at) fail();
                at = static_cast<size_t>(end - content.c_str());
                found.kind_ = '0';
            }
            --depth;
            return found;
        }
    };

    static std::string place(const std::string& where, const std::string& key) {
        return where.empty() ? key : where + "." + key;
    }
    static std::string mend() { return ": copy or make it again"; }
    const Json& as(bool is, const char* what) const {
        if (!is) throw std::runtime_error(where_ + " in " + name_ + " is not " + what + mend());
        return *this;
    }

    std::string name_, where_;
    char kind_ = ' ';  // '[', '"', '0' for a number; nobody asks whether it is anything else
    double number_ = 0;
    std::string text_;
    std::vector<Json> items_;
    std::map<std::string, Json> fields_;
};
