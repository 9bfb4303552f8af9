#include "entities.h"

#include <algorithm>
#include <cstddef>

#include "unicode.h"

namespace fastclip {
namespace {

constexpr std::size_t kLongestStrictName = 24;  // of an entity that ftfy resolves
constexpr std::size_t kLongestName = 32;        // of an entity that html.unescape looks up
constexpr std::uint32_t kAboveUnicode = 0x110000;

int hex_value(std::uint32_t c) {
  if (is_ascii_digit(c)) return static_cast<int>(c - '0');
  return (c | 32) - 'a' < 6 ? static_cast<int>((c | 32) - 'a' + 10) : -1;
}

// A numeric reference that starts at "#": where it ends, ";" not included, and its number, at most
// kAboveUnicode. `end` stays at `begin` if it has no digits.
struct Number {
  std::size_t end;
  std::uint32_t value;
};

Number parse_number(const Text& text, std::size_t begin) {
  std::size_t at = begin + 1;
  const bool hexadecimal = at < text.size() && (text[at] | 32) == 'x';
  at += hexadecimal;
  const std::size_t first = at;
  std::uint32_t value = 0;
  for (; at < text.size(); ++at) {
    const int digit = hex_value(text[at]);
    if (digit < 0 || (!hexadecimal && digit > 9)) break;
    value = std::min(value * (hexadecimal ? 16u : 10u) + static_cast<std::uint32_t>(digit),
                     kAboveUnicode);
  }
  return {at == first ? begin : at, value};
}

void append_reference(Text& out, std::uint32_t number) {
  const std::int32_t c = numeric_reference(number);
  if (c >= 0) out.push_back(static_cast<std::uint32_t>(c));
}

void append_entity(Text& out, Entity entity) {
  out.insert(out.end(), entity.points, entity.points + entity.count);
}

}  // namespace

void unescape_strictly(Text& text, Text& scratch) {
  if (!contains(text, '&')) return;
  Text& out = scratch;
  out.clear();
  for (std::size_t i = 0; i < text.size();) {
    if (text[i] != '&') {
      out.push_back(text[i++]);
      continue;
    }
    const bool numeric = i + 1 < text.size() && text[i + 1] == '#';
    const std::size_t first = i + 1 + numeric;
    std::size_t end = first;
    while (end < text.size() && end - first < kLongestStrictName &&
           (is_ascii_digit(text[end]) || is_ascii_letter(text[end]))) {
      ++end;
    }
    if (end == first || end == text.size() || text[end] != ';') {
      out.push_back(text[i++]);
      continue;
    }
    if (numeric) {
      const Number number = parse_number(text, i + 1);
      if (number.end == end && number.value != ';') {
        append_reference(out, number.value);
      } else {
        out.insert(out.end(), text.begin() + static_cast<std::ptrdiff_t>(i),
                   text.begin() + static_cast<std::ptrdiff_t>(end) + 1);
      }
    } else {
      char name[kLongestStrictName + 1];
      for (std::size_t k = first; k <= end; ++k) name[k - first] = static_cast<char>(text[k]);
      const Entity entity = find_entity(name, end - first + 1, kFtfy);
      if (entity.points != nullptr) {
        append_entity(out, entity);
      } else {
        out.insert(out.end(), text.begin() + static_cast<std::ptrdiff_t>(i),
                   text.begin() + static_cast<std::ptrdiff_t>(end) + 1);
      }
    }
    i = end + 1;
  }
  text.swap(out);
}

void unescape(Text& text, Text& scratch) {
  if (!contains(text, '&')) return;
  Text& out = scratch;
  out.clear();
  for (std::size_t i = 0; i < text.size();) {
    if (text[i] != '&' || i + 1 == text.size()) {
      out.push_back(text[i++]);
      continue;
    }
    if (text[i + 1] == '#') {
      const Number number = parse_number(text, i + 1);
      if (number.end == i + 1) {
        out.push_back(text[i++]);
        continue;
      }
      append_reference(out, number.value);
      i = number.end + (number.end < text.size() && text[number.end] == ';');
      continue;
    }
    // Names are ASCII; what else the expression takes in cannot be one, but belongs to the match.
    const std::size_t first = i + 1;
    std::size_t end = first;
    const auto belongs = [](std::uint32_t c) {
      return c != '\t' && c != '\n' && c != '\f' && c != ' ' && c != '<' && c != '&' && c != '#' &&
             c != ';';
    };
    while (end < text.size() && end - first < kLongestName && belongs(text[end])) ++end;
    const std::size_t after = end + (end > first && end < text.size() && text[end] == ';');
    char name[kLongestName + 1];
    std::size_t length = 0;
    while (length < after - first && text[first + length] < 0x80) {
      name[length] = static_cast<char>(text[first + length]);
      ++length;
    }
    Entity entity{nullptr, 0};
    std::size_t used = 0;
    if (length > 0 && is_ascii_letter(text[first])) {
      if (length == after - first) {
        entity = find_entity(name, length, kHtml5);
        used = length;
      }
      // Else the longest beginning that is a name; names without ";" are short.
      std::size_t shorter = std::min({length, kLongestNameWithoutSemicolon, after - first - 1});
      for (; entity.points == nullptr && shorter > 1; --shorter) {
        entity = find_entity(name, shorter, kHtml5);
        used = shorter;
      }
    }
    if (entity.points != nullptr) {
      append_entity(out, entity);
    } else {
      out.push_back('&');
      used = 0;
    }
    out.insert(out.end(), text.begin() + static_cast<std::ptrdiff_t>(first + used),
               text.begin() + static_cast<std::ptrdiff_t>(after));
    i = after;
  }
  text.swap(out);
}

}  // namespace fastclip
