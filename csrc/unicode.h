// What cleaning and splitting ask about a code point, from the tables of one Unicode version.
// The tables are written by generate_tables.py from Python's unicodedata, regex and ftfy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "portable.h"

namespace fastclip {

// The two low bits: which part of CLIP's expression a code point belongs to. U+0345, which belongs
// to none, separates words like whitespace.
enum WordClass : std::uint32_t { kSeparator, kLetter, kNumber, kOther, kWordClassMask = 3 };

enum Property : std::uint32_t {
  kMapped = 1u << 2,      // ftfy replaces or deletes it, or joins it with its neighbour
  kRecomposed = 1u << 3,  // NFC replaces it
  kCombining = 1u << 4,   // has a canonical combining class, so that NFC may move it
  kSuspicious = 1u << 5,  // not ASCII, and part of what ftfy calls a sign of mojibake
  kAmpersand = 1u << 6,
  kLessThan = 1u << 7,
  kLowersSpecially = 1u << 8,  // U+0130 (becomes two) and capital sigma (depends on neighbours)
  kCased = 1u << 9,            // as capital sigma sees it, and not case-ignorable
  kCaseIgnorable = 1u << 10,
  kDecimal = 1u << 11,     // \d
  kUnassigned = 1u << 12,  // a later Unicode version may know it
  kJoinsLeft = 1u << 13,   // NFC joins it with some of the code points that may precede it
};

// Values of few code points: keys in ascending order, and a string of code points for each.
struct StringTable {
  const std::uint32_t* keys;
  const std::uint16_t* starts;  // [count + 1]
  const std::uint32_t* points;
  std::size_t count;

  // The string of a key, its length in `length`; nullptr for a code point that is none.
  const std::uint32_t* find(std::uint32_t key, std::size_t* length) const;
};

// What is asked about every character: arrays of numbers, the same on the host and on a GPU.
struct CharacterTables {
  static constexpr std::size_t kPages = 0x110000 >> 7;

  const std::uint16_t* pages;          // by code point / 128
  const std::uint32_t* property_bits;  // by page, then code point % 128
  const std::int32_t* lower_distances;
  const std::uint8_t* badness_moves;  // [states][badness_classes]
  std::size_t property_count, lower_count, badness_count;
  std::uint32_t badness_classes;
  std::uint8_t bad;           // the state that means mojibake
  std::uint8_t unremarkable;  // the state after a text that is no part of a sign of it

  FASTCLIP_BOTH std::uint32_t properties(std::uint32_t c) const {
    return property_bits[static_cast<std::uint32_t>(pages[c >> 7]) << 7 | (c & 127)];
  }
  FASTCLIP_BOTH std::uint32_t lower(std::uint32_t c, std::uint32_t properties_of_c) const {
    return c + static_cast<std::uint32_t>(lower_distances[properties_of_c >> 24]);
  }
};

struct UnicodeTables : CharacterTables {
  const char* version;
  std::size_t longest_sign;      // of mojibake, in code points
  StringTable fixed;             // ftfy's replacements of single characters
  StringTable decompositions;    // canonical and complete, without Hangul
  const std::uint32_t* deleted;  // what ftfy deletes, ascending
  std::size_t deleted_count;
  const std::uint32_t* compositions;  // triples (first, second, composite), ascending
  std::size_t composition_count;
  const std::uint32_t* combining;  // triples (start, length, combining class), ascending
  std::size_t combining_count;

  bool is_deleted(std::uint32_t c) const;
  std::uint32_t combining_class(std::uint32_t c) const;
  // The composite of two code points, Hangul included; 0 if there is none.
  std::uint32_t compose(std::uint32_t first, std::uint32_t second) const;
};

constexpr std::uint32_t kReplacement = 0xFFFD;

// The tables of Unicode `major`, else of the newest version before it, else of the oldest.
const UnicodeTables& unicode_tables(int major);

struct Entity {
  const std::uint32_t* points;
  std::size_t count;
};
enum EntityKind : std::uint8_t { kHtml5 = 1, kFtfy = 2 };

// The entity of that name (without "&", with its ";" if it has one); no points if there is none.
Entity find_entity(const char* name, std::size_t length, EntityKind kind);
extern const std::size_t kLongestNameWithoutSemicolon;

// Of the packages that the tables were made with.
extern const char* const kMadeWithRegex;
extern const char* const kMadeWithFtfy;

// What HTML 5 makes of a numeric character reference: a code point, or -1 for nothing.
std::int32_t numeric_reference(std::uint32_t number);

}  // namespace fastclip
