// The first look at a text that may be plain ASCII: lower case, and where CLIP's words begin and
// end, 64 bytes at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastclip {

constexpr std::size_t kBlock = 64;

struct AsciiText {
  // The text in lower case, blanks behind it: at least kBlock readable bytes after its end.
  std::vector<std::uint8_t> lower;
  // Bit i of block b: a word begins at byte 64 b + i; a word ends before it.
  std::vector<std::uint64_t> begins, ends;
  // Apostrophes, "&" and "<".
  std::vector<std::uint64_t> special;
  std::size_t blocks = 0;

  void resize(std::size_t length);
};

// Fill `out` from a text. False, with `out` unspecified, if the text has a byte above 0x7F or a
// control character that cleaning would delete.
using AsciiScan = bool (*)(const std::uint8_t* text, std::size_t length, AsciiText& out);

bool scan_portable(const std::uint8_t* text, std::size_t length, AsciiText& out);
// The fastest one for this processor; `name` says which: "avx512", "avx2" or "portable".
AsciiScan best_ascii_scan(const char** name);

// Move the ends of contractions ('s 't 're 've 'm 'll 'd) to where CLIP's expression has them.
// False if the text has an entity or something that may be the spelling of a special token.
bool split_contractions(AsciiText& text, std::size_t length);

}  // namespace fastclip
