// Texts as code points, and the few questions that all parts ask about them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastclip {

using Text = std::vector<std::uint32_t>;  // code points

inline bool contains(const Text& text, std::uint32_t c) {
  return std::find(text.begin(), text.end(), c) != text.end();
}

inline bool is_ascii_digit(std::uint32_t c) { return c - '0' < 10; }
inline bool is_ascii_letter(std::uint32_t c) { return (c | 32) - 'a' < 26; }

}  // namespace fastclip
