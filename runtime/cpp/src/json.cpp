#include "ivc/json.h"

#include "ivc/error.h"

namespace ivc {

Json parseJson(const std::string& text, const std::string& what, const std::string& advice) {
    const auto shallow = [&](int depth, Json::parse_event_t, Json&) {
        if (depth > kMostDepth) throw Error(what + " is damaged (it is nested too deep): " + advice);
        return true;
    };
    try {
        return Json::parse(text, shallow);
    } catch (const Json::parse_error& error) {
        throw Error(what + " is damaged (it is not valid JSON at byte " + std::to_string(error.byte) + "): " + advice);
    } catch (const Json::exception&) {
        throw Error(what + " is damaged (it holds a number that is too large): " + advice);
    }
}

Field Field::at(const Json& value, const std::string& name) const {
    return Field(value, what_, advice_, place_.empty() ? name : place_ + "." + name);
}

Field Field::operator[](const std::string& name) const {
    if (!value_->is_object()) refuse("is not an object");
    const auto found = value_->find(name);
    if (found == value_->end()) {
        throw Error(what_ + " is damaged (it lacks " + (place_.empty() ? name : place_ + "." + name) + "): " + advice_);
    }
    return at(*found, name);
}

std::vector<Field> Field::items(size_t most) const {
    if (!value_->is_array()) refuse("is not a list");
    if (value_->size() > most) refuse("has more than " + std::to_string(most) + " entries");
    std::vector<Field> found;
    found.reserve(value_->size());
    for (const Json& item : *value_) found.push_back(at(item, std::to_string(found.size())));
    return found;
}

void Field::onlyHas(std::initializer_list<const char*> names) const {
    if (!value_->is_object()) refuse("is not an object");
    for (const auto& entry : value_->items()) {
        bool known = false;
        for (const char* name : names) known = known || entry.key() == name;
        if (!known) {
            throw Error(what_ + " was made by a newer ivc-export (" + (place_.empty() ? "" : place_ + ".") + entry.key() +
                        " is unknown): upgrade this library, or " + advice_);
        }
    }
}

std::string Field::text() const {
    if (!value_->is_string()) refuse("is not a text");
    return value_->get<std::string>();
}

std::string Field::choice(std::initializer_list<const char*> names) const {
    const std::string found = text();
    for (const char* name : names) {
        if (found == name) return found;
    }
    refuse("is '" + found.substr(0, 40) + "', which this version does not know");
}

bool Field::boolean() const {
    if (!value_->is_boolean()) refuse("is neither true nor false");
    return value_->get<bool>();
}

int64_t Field::integer(int64_t least, int64_t most, int64_t multipleOf) const {
    const bool unsignedBeyond = value_->is_number_unsigned() && value_->get<uint64_t>() > INT64_MAX;
    if (!value_->is_number_integer() || unsignedBeyond) refuse("is not a whole number");
    const int64_t found = value_->get<int64_t>();
    if (found < least || found > most || found % multipleOf != 0) {
        refuse("is " + std::to_string(found) + ", but must be " + std::to_string(least) + " to " +
               std::to_string(most) + (multipleOf > 1 ? " in steps of " + std::to_string(multipleOf) : ""));
    }
    return found;
}

double Field::number(double least, double most) const {
    if (!value_->is_number()) refuse("is not a number");
    const double found = value_->get<double>();
    if (!(found >= least && found <= most)) refuse("is out of range");
    return found;
}

void Field::refuse(const std::string& why) const {
    throw Error(what_ + " is damaged (" + (place_.empty() ? "it" : place_) + " " + why + "): " + advice_);
}

}  // namespace ivc
