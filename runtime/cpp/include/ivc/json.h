// Reads JSON that others may have written. Its depth is limited, and each value is checked when it is read.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace ivc {

using Json = nlohmann::json;

constexpr int kMostDepth = 64;

// what: names the text in errors. advice: the end of the error's sentence. Throws if the text is no JSON, or nested deeper
// than kMostDepth.
Json parseJson(const std::string& text, const std::string& what, const std::string& advice);

// A value in a JSON file, with its place for errors. Functions throw if the value is not what they return.
class Field {
   public:
    // Keep the value as long as the field.
    Field(const Json& value, std::string what, std::string advice, std::string place = "")
        : value_(&value), what_(std::move(what)), advice_(std::move(advice)), place_(std::move(place)) {}

    const Json& json() const { return *value_; }        // the value itself
    bool isNull() const { return value_->is_null(); }  // whether it is null
    // Whether it is an object with this entry.
    bool has(const std::string& name) const { return value_->is_object() && value_->contains(name); }

    Field operator[](const std::string& name) const;         // an object's entry
    std::vector<Field> items(size_t most = 1u << 20) const;  // the items of a list, at most `most`
    void onlyHas(std::initializer_list<const char*> names) const;  // throws if it has others: a newer version wrote them

    std::string text() const;                                            // the value of a string
    std::string choice(std::initializer_list<const char*> names) const;  // the value of a string that is one of these
    bool boolean() const;                                                // the value of true or false
    // The value of a whole number within these bounds, a multiple of `multipleOf`.
    int64_t integer(int64_t least, int64_t most, int64_t multipleOf = 1) const;
    // The value of a number within these bounds.
    double number(double least, double most) const;

    // Throws an error: the file is damaged. why: what is wrong with this value.
    [[noreturn]] void refuse(const std::string& why) const;

   private:
    Field at(const Json& value, const std::string& name) const;

    const Json* value_;
    std::string what_, advice_, place_;
};

}  // namespace ivc
