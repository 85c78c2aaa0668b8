// Regular expressions as tokenizers use them: Oniguruma's, on PCRE2.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace ivc {

class Regex {
   public:
    explicit Regex(const std::string& pattern);
    ~Regex();
    Regex(Regex&&) noexcept;
    Regex& operator=(Regex&&) = delete;

    // Calls `part` with each match, and with what lies between matches, in order; empty ones are left out.
    void parts(std::string_view text, const std::function<void(std::string_view, bool match)>& part) const;

   private:
    struct Code;
    std::unique_ptr<Code> code_;
};

}  // namespace ivc
