// A JSON reader, enough for manifest.json, build.json and testdata/index.json.
#pragma once

#include <cctype>
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
    static Json read(const std::string& path) {
        std::ifstream file(path, std::ios::binary);
        if (!file) throw std::runtime_error(path + " cannot be read: check the path");
        std::stringstream content;
        content << file.rdbuf();
        return parse(content.str(), path);
    }

    static Json parse(const std::string& content, const std::string& name) {
        Reader reader{content, name};
        Json found = reader.value();
        reader.blanks();
        if (reader.at != content.size()) reader.fail();
        return found;
    }

    const Json& operator[](const std::string& key) const {
        const auto found = fields_.find(key);
        if (found == fields_.end()) throw std::runtime_error("a JSON file lacks " + key);
        return found->second;
    }
    const std::vector<Json>& items() const { return items_; }
    double number() const { return number_; }
    int32_t integer() const { return static_cast<int32_t>(number_); }
    const std::string& text() const { return text_; }

    std::vector<int32_t> integers() const {
        std::vector<int32_t> found;
        for (const Json& item : items_) found.push_back(item.integer());
        return found;
    }

   private:
    struct Reader {
        const std::string& content;
        const std::string& name;
        size_t at = 0;

        [[noreturn]] void fail() const {
            throw std::runtime_error(name + " is no JSON at byte " + std::to_string(at) + ": copy the bundle again");
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
        Json value() {
            Json found;
            const char first = peek();
            if (first == '{') {
                for (take('{'); peek() != '}';) {
                    const std::string key = string();
                    take(':');
                    found.fields_[key] = value();
                    if (peek() != '}') take(',');
                }
                take('}');
            } else if (first == '[') {
                for (take('['); peek() != ']';) {
                    found.items_.push_back(value());
                    if (peek() != ']') take(',');
                }
                take(']');
            } else if (first == '"') {
                found.text_ = string();
            } else if (word("true")) {
                found.number_ = 1;
            } else if (!word("false") && !word("null")) {
                char* end = nullptr;
                found.number_ = std::strtod(content.c_str() + at, &end);
                if (end == content.c_str() + at) fail();
                at = static_cast<size_t>(end - content.c_str());
            }
            return found;
        }
    };

    double number_ = 0;
    std::string text_;
    std::vector<Json> items_;
    std::map<std::string, Json> fields_;
};
