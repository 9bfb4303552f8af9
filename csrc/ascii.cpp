#include "ascii.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTCLIP_X86 1
#include <immintrin.h>
#endif

namespace fastclip {

void AsciiText::resize(std::size_t length) {
  blocks = length / kBlock + 1;
  if (begins.size() < blocks) {
    begins.resize(blocks);
    ends.resize(blocks);
    special.resize(blocks);
    lower.resize((blocks + 1) * kBlock);
  }
}

namespace portable {

// Bits: letter, digit, blank, special, unfit; and the byte in lower case.
struct Byte {
  std::uint8_t kind, lower;
};

constexpr std::array<Byte, 256> byte_table() {
  std::array<Byte, 256> table{};
  for (unsigned c = 0; c < 256; ++c) {
    const bool upper = c >= 'A' && c <= 'Z';
    const unsigned low = upper ? c | 32 : c;
    const bool blank = c == ' ' || c == '\t' || c == '\n' || c == '\f' || c == '\r';
    const unsigned kind = (low >= 'a' && low <= 'z' ? 1u : 0u) | (c >= '0' && c <= '9' ? 2u : 0u) |
                          (blank ? 4u : 0u) | (c == '\'' || c == '&' || c == '<' ? 8u : 0u) |
                          (c >= 0x7F || (c < 0x20 && !blank) ? 16u : 0u);
    table[c] = {static_cast<std::uint8_t>(kind), static_cast<std::uint8_t>(low)};
  }
  return table;
}

constexpr std::array<Byte, 256> kBytes = byte_table();

struct Block {
  std::uint64_t letters = 0, digits = 0, blanks = 0, special = 0, unfit = 0;

  static Block load_and_lower(std::uint8_t* bytes) {
    Block block;
    for (unsigned i = 0; i < kBlock; ++i) {
      const Byte byte = kBytes[bytes[i]];
      bytes[i] = byte.lower;
      const std::uint64_t kind = byte.kind;
      block.letters |= (kind & 1) << i;
      block.digits |= (kind >> 1 & 1) << i;
      block.blanks |= (kind >> 2 & 1) << i;
      block.special |= (kind >> 3 & 1) << i;
      block.unfit |= (kind >> 4 & 1) << i;
    }
    return block;
  }
};

#include "ascii_scan.inl"

}  // namespace portable

#ifdef FASTCLIP_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {

struct Block {
  std::uint64_t letters, digits, blanks, special, unfit;

  static std::uint64_t mask(__m256i low, __m256i high) {
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(low)) |
           static_cast<std::uint64_t>(static_cast<std::uint32_t>(_mm256_movemask_epi8(high))) << 32;
  }
  // Bytes in [first, first + count), unsigned.
  static __m256i within(__m256i bytes, char first, char count) {
    const __m256i distance = _mm256_sub_epi8(bytes, _mm256_set1_epi8(first));
    return _mm256_cmpeq_epi8(
        _mm256_min_epu8(distance, _mm256_set1_epi8(static_cast<char>(count - 1))), distance);
  }
  static __m256i is(__m256i bytes, char value) {
    return _mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(value));
  }
  static __m256i either(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }

  struct Half {
    __m256i letters, digits, blanks, special, unfit;
  };
  static Half half(std::uint8_t* bytes) {
    auto* place = reinterpret_cast<__m256i*>(bytes);
    const __m256i text = _mm256_loadu_si256(place);
    const __m256i upper = within(text, 'A', 26);
    const __m256i lower = either(text, _mm256_and_si256(upper, _mm256_set1_epi8(32)));
    _mm256_storeu_si256(place, lower);
    const __m256i line = _mm256_andnot_si256(is(text, '\v'), within(text, '\t', 5));
    const __m256i blanks = either(is(text, ' '), line);
    const __m256i control = _mm256_andnot_si256(line, within(text, 0, 32));
    const __m256i above = _mm256_cmpgt_epi8(_mm256_setzero_si256(), text);
    return {within(lower, 'a', 26), within(text, '0', 10), blanks,
            either(is(text, '\''), either(is(text, '&'), is(text, '<'))),
            either(control, either(above, is(text, 0x7F)))};
  }
  static Block load_and_lower(std::uint8_t* bytes) {
    const Half low = half(bytes), high = half(bytes + 32);
    return {mask(low.letters, high.letters), mask(low.digits, high.digits),
            mask(low.blanks, high.blanks), mask(low.special, high.special),
            mask(low.unfit, high.unfit)};
  }
};

#include "ascii_scan.inl"

bool scan(const std::uint8_t* text, std::size_t length, AsciiText& out) {
  return scan_blocks(text, length, out);
}

}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512bw"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw")
#endif
namespace avx512 {

struct Block {
  std::uint64_t letters, digits, blanks, special, unfit;

  static std::uint64_t within(__m512i bytes, char first, char count) {
    return _mm512_cmplt_epu8_mask(_mm512_sub_epi8(bytes, _mm512_set1_epi8(first)),
                                  _mm512_set1_epi8(count));
  }
  static std::uint64_t is(__m512i bytes, char value) {
    return _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(value));
  }
  static Block load_and_lower(std::uint8_t* bytes) {
    const __m512i text = _mm512_loadu_si512(bytes);
    const std::uint64_t upper = within(text, 'A', 26);
    const __m512i lower = _mm512_mask_add_epi8(text, upper, text, _mm512_set1_epi8(32));
    _mm512_storeu_si512(bytes, lower);
    const std::uint64_t line = within(text, '\t', 5) & ~is(text, '\v');
    return {within(lower, 'a', 26), within(text, '0', 10), is(text, ' ') | line,
            is(text, '\'') | is(text, '&') | is(text, '<'),
            (within(text, 0, 32) & ~line) | _mm512_movepi8_mask(text) | is(text, 0x7F)};
  }
};

#include "ascii_scan.inl"

bool scan(const std::uint8_t* text, std::size_t length, AsciiText& out) {
  return scan_blocks(text, length, out);
}

}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // FASTCLIP_X86

bool scan_portable(const std::uint8_t* text, std::size_t length, AsciiText& out) {
  return portable::scan_blocks(text, length, out);
}

AsciiScan best_ascii_scan(const char** name) {
#ifdef FASTCLIP_X86
  if (__builtin_cpu_supports("avx512bw")) return *name = "avx512", avx512::scan;
  if (__builtin_cpu_supports("avx2")) return *name = "avx2", avx2::scan;
#endif
  return *name = "portable", scan_portable;
}

bool split_contractions(AsciiText& text, std::size_t length) {
  const auto set = [](std::vector<std::uint64_t>& bits, std::size_t at) {
    bits[at / 64] |= std::uint64_t{1} << at % 64;
  };
  const auto clear = [](std::vector<std::uint64_t>& bits, std::size_t at) {
    bits[at / 64] &= ~(std::uint64_t{1} << at % 64);
  };
  const auto is_letter = [](std::uint8_t c) { return static_cast<unsigned>(c) - 'a' < 26; };
  for (std::size_t b = 0; b < text.blocks; ++b) {
    for (std::uint64_t special = text.special[b]; special != 0; special &= special - 1) {
      const std::size_t at = b * kBlock + static_cast<std::size_t>(__builtin_ctzll(special));
      const std::uint8_t* c = text.lower.data() + at;
      if (c[0] == '&') {
        if (is_letter(c[1]) || c[1] == '#') return false;
        continue;
      }
      if (c[0] == '<') {
        // <|startoftext|> and <start_of_text>, and how the ends are spelled.
        if (c[1] == '|' || c[1] == 's' || c[1] == 'e') return false;
        continue;
      }
      // An apostrophe begins a contraction only if a match begins there.
      if ((text.begins[b] & special & (~special + 1)) == 0) continue;
      std::size_t letters = 0;
      if (c[1] == 's' || c[1] == 't' || c[1] == 'm' || c[1] == 'd') {
        letters = 1;
      } else if (((c[1] == 'r' || c[1] == 'v') && c[2] == 'e') || (c[1] == 'l' && c[2] == 'l')) {
        letters = 2;
      } else {
        continue;
      }
      const std::size_t end = at + 1 + letters;
      clear(text.ends, at + 1);
      clear(text.begins, at + 1);
      set(text.ends, end);
      if (end < length && is_letter(c[1 + letters])) set(text.begins, end);
    }
  }
  return true;
}

}  // namespace fastclip
