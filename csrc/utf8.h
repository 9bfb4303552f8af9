// UTF-8, read and written.
#pragma once

#include <cstddef>
#include <cstdint>

#include "portable.h"
#include "text.h"

namespace fastclip {

// Decode strict UTF-8, as Python does: no surrogates, nothing overlong. The place of the first byte
// that is none, or `length`.
inline std::size_t decode_utf8(const std::uint8_t* bytes, std::size_t length, Text& out) {
  out.resize(length);
  std::uint32_t* to = out.data();
  std::size_t i = 0;
  while (i < length) {
    const std::uint32_t first = bytes[i];
    if (first < 0x80) {
      *to++ = first;
      ++i;
      continue;
    }
    const std::size_t more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
    if (first < 0xC2 || first > 0xF4 || i + more >= length) break;
    std::uint32_t c = first & (0x3F >> more);
    bool well_formed = true;
    for (std::size_t k = 1; k <= more; ++k) {
      well_formed = well_formed && (bytes[i + k] & 0xC0) == 0x80;
      c = c << 6 | (bytes[i + k] & 0x3F);
    }
    const bool overlong = (more == 2 && c < 0x800) || (more == 3 && c < 0x10000);
    if (!well_formed || overlong || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) break;
    *to++ = c;
    i += more + 1;
  }
  out.resize(static_cast<std::size_t>(to - out.data()));
  return i;
}

// Surrogates too, as three bytes that no decoder takes for UTF-8.
inline std::uint8_t* put_utf8(std::uint8_t* to, std::uint32_t c) {
  if (c < 0x80) {
    *to++ = static_cast<std::uint8_t>(c);
  } else if (c < 0x800) {
    *to++ = static_cast<std::uint8_t>(0xC0 | c >> 6);
    *to++ = static_cast<std::uint8_t>(0x80 | (c & 63));
  } else if (c < 0x10000) {
    *to++ = static_cast<std::uint8_t>(0xE0 | c >> 12);
    *to++ = static_cast<std::uint8_t>(0x80 | (c >> 6 & 63));
    *to++ = static_cast<std::uint8_t>(0x80 | (c & 63));
  } else {
    *to++ = static_cast<std::uint8_t>(0xF0 | c >> 18);
    *to++ = static_cast<std::uint8_t>(0x80 | (c >> 12 & 63));
    *to++ = static_cast<std::uint8_t>(0x80 | (c >> 6 & 63));
    *to++ = static_cast<std::uint8_t>(0x80 | (c & 63));
  }
  return to;
}

FASTCLIP_BOTH inline int utf8_length(std::uint32_t c) {
  return c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
}

}  // namespace fastclip
