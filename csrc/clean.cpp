#include "clean.h"

#include <algorithm>

#include "entities.h"

namespace fastclip {
namespace {

constexpr std::size_t kLongestSegment = 1000000;  // ftfy's max_decode_length

// The end of the segment that ftfy repairs by itself: a line, or a million code points.
std::size_t segment_end(const Text& text, std::size_t begin) {
  const auto newline =
      std::find(text.begin() + static_cast<std::ptrdiff_t>(begin), text.end(), '\n');
  const std::size_t end =
      static_cast<std::size_t>(newline - text.begin()) + (newline != text.end());
  return std::min(end, begin + kLongestSegment);
}

}  // namespace

bool Cleaner::is_clean(const Text& text, const Text& properties, std::uint32_t seen) const {
  if (seen & (kMapped | kRecomposed)) return false;
  if ((seen & (kCombining | kJoinsLeft)) && !is_composed(text, properties)) return false;
  if (seen & kAmpersand) {
    for (std::size_t i = 0; i + 1 < text.size(); ++i) {
      if (text[i] == '&' && (is_ascii_letter(text[i + 1]) || text[i + 1] == '#')) return false;
    }
  }
  if (seen & kSuspicious) {
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = segment_end(text, begin);
      if (has_mojibake(text, begin, end)) return false;
      begin = end;
    }
  }
  return true;
}

// Whether NFC is sure to leave a text alone in which it replaces nothing: marks are in order, and
// none joins the starter before it.
bool Cleaner::is_composed(const Text& text, const Text& properties) const {
  std::uint32_t previous = 0, starter = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const std::uint32_t own = properties[i] & kCombining ? tables_.combining_class(text[i]) : 0;
    if (own != 0 && own < previous) return false;
    if ((properties[i] & kJoinsLeft) && starter != 0) {
      // A starter that comes apart may take the mark into its middle.
      std::size_t length;
      const bool whole =
          starter - 0xAC00 >= 11172 && tables_.decompositions.find(starter, &length) == nullptr;
      if (!whole || tables_.compose(starter, text[i]) != 0) return false;
    }
    if (own == 0) starter = text[i];
    previous = own;
  }
  return true;
}

// ftfy.badness.is_bad of a segment. A sign of mojibake is a few code points long and has a
// suspicious one among them, so only their surroundings are looked at.
bool Cleaner::has_mojibake(const Text& text, std::size_t begin, std::size_t end) const {
  const std::size_t reach = tables_.longest_sign;
  const auto move = [this](std::uint32_t state, std::uint32_t properties) {
    return tables_.badness_moves[state * tables_.badness_classes + (properties >> 16 & 255)];
  };
  std::uint32_t state = 0;
  std::size_t seen = begin;  // all before it has gone through the automaton, or cannot matter
  for (std::size_t i = begin; i < end; ++i) {
    if ((tables_.properties(text[i]) & kSuspicious) == 0) continue;
    if (i > seen + reach) {
      seen = i - reach;
      state = tables_.unremarkable;
    }
    for (; seen < std::min(i + reach, end); ++seen) {
      state = move(state, tables_.properties(text[seen]));
    }
    if (state == tables_.bad) return true;
  }
  return false;
}

bool Cleaner::repair(Text& text) {
  bool entities = true;
  if (segment_end(text, 0) == text.size()) {
    if (!fix_segment(text, !contains(text, '<'))) return false;
  } else {
    after_.clear();
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = segment_end(text, begin);
      const auto first = text.begin() + static_cast<std::ptrdiff_t>(begin);
      segment_.assign(first, text.begin() + static_cast<std::ptrdiff_t>(end));
      // Entities are left alone from the first "<" on: the text may be HTML that means them.
      entities = entities && !contains(segment_, '<');
      if (!fix_segment(segment_, entities)) return false;
      after_.insert(after_.end(), segment_.begin(), segment_.end());
      begin = end;
    }
    text.swap(after_);
  }
  unescape(text, rewritten_);
  unescape(text, rewritten_);
  return true;
}

std::uint32_t Cleaner::properties_in(const Text& text) const {
  std::uint32_t seen = 0;
  for (const std::uint32_t c : text) seen |= tables_.properties(c);
  return seen;
}

bool Cleaner::fix_segment(Text& segment, bool entities) {
  // One fix may make another possible, so it goes on until nothing changes.
  while (true) {
    std::uint32_t seen = properties_in(segment);
    constexpr std::uint32_t kNormalised = kRecomposed | kCombining | kJoinsLeft;
    if (!entities) seen &= ~std::uint32_t{kAmpersand};
    if ((seen & (kMapped | kNormalised | kSuspicious | kAmpersand)) == 0) return true;
    before_ = segment;
    if (seen & kAmpersand) {
      unescape_strictly(segment, rewritten_);
      seen = properties_in(segment);
    }
    if ((seen & kSuspicious) && has_mojibake(segment, 0, segment.size())) return false;
    if (seen & kMapped) {
      replace_characters(segment);
      join_lines_and_surrogates(segment);
      remove_terminal_escapes(segment);
      const auto deleted = [this](std::uint32_t c) {
        return (tables_.properties(c) & kMapped) && tables_.is_deleted(c);
      };
      segment.erase(std::remove_if(segment.begin(), segment.end(), deleted), segment.end());
      seen = properties_in(segment);
    }
    if (seen & kNormalised) compose(segment);
    if (segment == before_) return true;
  }
}

void Cleaner::replace_characters(Text& text) {
  const auto replaced = [this](std::uint32_t c) {
    std::size_t length;
    return (tables_.properties(c) & kMapped) && tables_.fixed.find(c, &length) != nullptr;
  };
  if (std::none_of(text.begin(), text.end(), replaced)) return;
  Text& out = rewritten_;
  out.clear();
  for (const std::uint32_t c : text) {
    std::size_t length;
    const std::uint32_t* points =
        tables_.properties(c) & kMapped ? tables_.fixed.find(c, &length) : nullptr;
    if (points != nullptr) {
      out.insert(out.end(), points, points + length);
    } else {
      out.push_back(c);
    }
  }
  text.swap(out);
}

void Cleaner::join_lines_and_surrogates(Text& text) {
  std::size_t to = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    std::uint32_t c = text[i];
    if (c == '\r' || c == 0x2028 || c == 0x2029 || c == 0x85) {
      if (c == '\r' && i + 1 < text.size() && text[i + 1] == '\n') ++i;
      c = '\n';
    } else if (c >= 0xD800 && c < 0xE000) {
      const std::uint32_t next = i + 1 < text.size() ? text[i + 1] : 0;
      if (c < 0xDC00 && next >= 0xDC00 && next < 0xE000) {
        c = 0x10000 + ((c - 0xD800) << 10) + (next - 0xDC00);
        ++i;
      } else {
        c = kReplacement;
      }
    }
    text[to++] = c;
  }
  text.resize(to);
}

// `\x1b\[((?:\d|;)*)([a-zA-Z])`
void Cleaner::remove_terminal_escapes(Text& text) {
  if (!contains(text, 0x1B)) return;
  std::size_t to = 0;
  for (std::size_t i = 0; i < text.size();) {
    if (text[i] == 0x1B && i + 1 < text.size() && text[i + 1] == '[') {
      std::size_t end = i + 2;
      while (end < text.size() && (text[end] == ';' || (tables_.properties(text[end]) & kDecimal)))
        ++end;
      if (end < text.size() && is_ascii_letter(text[end])) {
        i = end + 1;
        continue;
      }
    }
    text[to++] = text[i++];
  }
  text.resize(to);
}

// Normalisation form C: decompose, order the marks, compose.
void Cleaner::compose(Text& text) {
  struct Mark {
    std::uint32_t c, combining;
  };
  std::vector<Mark> marks;
  marks.reserve(text.size() + 16);
  const auto add = [&](std::uint32_t c) {
    marks.push_back({c, tables_.properties(c) & kCombining ? tables_.combining_class(c) : 0});
  };
  for (const std::uint32_t c : text) {
    std::size_t length;
    const std::uint32_t* points = nullptr;
    if (c - 0xAC00 < 11172) {
      const std::uint32_t syllable = c - 0xAC00;
      add(0x1100 + syllable / 588);
      add(0x1161 + syllable % 588 / 28);
      if (syllable % 28) add(0x11A7 + syllable % 28);
    } else if (c >= 0xC0 && (points = tables_.decompositions.find(c, &length)) != nullptr) {
      for (std::size_t k = 0; k < length; ++k) add(points[k]);
    } else {
      add(c);
    }
  }
  for (std::size_t i = 0; i < marks.size();) {
    if (marks[i].combining == 0) {
      ++i;
      continue;
    }
    std::size_t end = i;
    while (end < marks.size() && marks[end].combining != 0) ++end;
    std::stable_sort(marks.begin() + static_cast<std::ptrdiff_t>(i),
                     marks.begin() + static_cast<std::ptrdiff_t>(end),
                     [](const Mark& a, const Mark& b) { return a.combining < b.combining; });
    i = end;
  }
  // A mark joins the last starter unless something of its own class or higher stands between.
  text.clear();
  std::size_t starter = SIZE_MAX;
  std::uint32_t last_class = 0;
  for (const Mark& mark : marks) {
    if (starter != SIZE_MAX) {
      const bool adjacent = starter + 1 == text.size();
      const bool blocked = !adjacent && (last_class == 0 || last_class >= mark.combining);
      const std::uint32_t composite = blocked ? 0 : tables_.compose(text[starter], mark.c);
      if (composite != 0) {
        text[starter] = composite;
        continue;
      }
    }
    if (mark.combining == 0) starter = text.size();
    last_class = mark.combining;
    text.push_back(mark.c);
  }
}

void Cleaner::lower(Text& text) {
  before_ = text;
  text.clear();
  for (std::size_t i = 0; i < before_.size(); ++i) {
    const std::uint32_t c = before_[i], properties = tables_.properties(c);
    if ((properties & kLowersSpecially) == 0) {
      text.push_back(tables_.lower(c, properties));
    } else if (c == 0x130) {
      text.push_back('i');
      text.push_back(0x307);
    } else {
      text.push_back(is_final_sigma(before_, i) ? 0x3C2 : 0x3C3);
    }
  }
}

// A cased letter before it and none after it, case-ignorable ones skipped.
bool Cleaner::is_final_sigma(const Text& text, std::size_t place) const {
  std::size_t before = place;
  std::uint32_t properties = 0;
  while (before > 0 && ((properties = tables_.properties(text[before - 1])) & kCaseIgnorable))
    --before;
  if (before == 0 || (properties & kCased) == 0) return false;
  std::size_t after = place + 1;
  while (after < text.size() && ((properties = tables_.properties(text[after])) & kCaseIgnorable))
    ++after;
  return after == text.size() || (properties & kCased) == 0;
}

}  // namespace fastclip
