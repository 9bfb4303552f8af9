// CLIP's text cleaning on code points: what ftfy.fix_text, html.unescape and str.lower do together,
// except for the repair of mojibake, which is recognised and left to ftfy itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "text.h"
#include "unicode.h"

namespace fastclip {

// One per thread: it keeps its buffers from text to text.
class Cleaner {
 public:
  explicit Cleaner(const UnicodeTables& tables) : tables_(tables) {}

  // Whether repair would leave the text as it is; `seen` is all its code points' properties. False
  // only means that `repair` has to look.
  bool is_clean(const Text& text, const Text& properties, std::uint32_t seen) const;

  // html.unescape(html.unescape(ftfy.fix_text(text))), in place. False if it needs ftfy's repair of
  // mojibake; the text is then spoilt.
  bool repair(Text& text);

  // str.lower(), in place.
  void lower(Text& text);

 private:
  bool fix_segment(Text& segment, bool entities);
  std::uint32_t properties_in(const Text& text) const;
  bool has_mojibake(const Text& text, std::size_t begin, std::size_t end) const;
  bool is_composed(const Text& text, const Text& properties) const;
  void replace_characters(Text& text);
  void join_lines_and_surrogates(Text& text);
  void remove_terminal_escapes(Text& text);
  void compose(Text& text);
  bool is_final_sigma(const Text& text, std::size_t place) const;

  const UnicodeTables& tables_;
  Text segment_, before_, after_, rewritten_;
};

}  // namespace fastclip
