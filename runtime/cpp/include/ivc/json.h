// JSON that somebody else may have written: of limited depth, and every value checked where it is taken.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace ivc {

using Json = nlohmann::json;

constexpr int kMostDepth = 64;

// what: names the text in errors. advice: ends the sentence.
Json parseJson(const std::string& text, const std::string& what, const std::string& advice);

// A value within a JSON file, and its place, which errors name. Throws where the value is another than asked for.
class Field {
   public:
    // The value outlives it.
    Field(const Json& value, std::string what, std::string advice, std::string place = "")
        : value_(&value), what_(std::move(what)), advice_(std::move(advice)), place_(std::move(place)) {}

    const Json& json() const { return *value_; }        // the value itself
    bool isNull() const { return value_->is_null(); }  // whether it is null
    // Whether it is an object that has such an entry.
    bool has(const std::string& name) const { return value_->is_object() && value_->contains(name); }

    Field operator[](const std::string& name) const;         // an object's entry
    std::vector<Field> items(size_t most = 1u << 20) const;  // of a list of at most so many
    void onlyHas(std::initializer_list<const char*> names) const;  // others were written by a newer version

    std::string text() const;                                            // of a string
    std::string choice(std::initializer_list<const char*> names) const;  // of a string that is one of these
    bool boolean() const;                                                // true or false
    // Of a whole number within these bounds, and a multiple.
    int64_t integer(int64_t least, int64_t most, int64_t multipleOf = 1) const;
    // Of a number within these bounds.
    double number(double least, double most) const;

    // Throws: the file is damaged, since this value is what `why` says.
    [[noreturn]] void refuse(const std::string& why) const;

   private:
    Field at(const Json& value, const std::string& name) const;

    const Json* value_;
    std::string what_, advice_, place_;
};

}  // namespace ivc
