// Texts to token ids: chooses the cheapest sufficient way of cleaning for each text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "ascii.h"
#include "bpe.h"
#include "clean.h"
#include "unicode.h"

namespace fastclip {

// How the code points of a text are stored. kAscii and kUtf8 are bytes; the other three are those
// of Python's str.
enum class Storage : std::uint8_t { kAscii, kUtf8, kLatin1, kUcs2, kUcs4 };

struct TextView {
  const void* data;
  std::size_t length;  // in units of the storage
  Storage storage;
};

enum class CleanMode : std::uint8_t {
  kLower,         // repair, collapse whitespace, lower case: OpenAI's
  kWhitespace,    // without the lower case
  kCanonicalize,  // "_" to blanks, ASCII punctuation deleted, lower case: big_vision's
};

// The spellings of the two special tokens, ASCII, and what may be done to the text around them.
struct Dialect {
  std::string start_of_text, end_of_text;
  CleanMode clean = CleanMode::kLower;
  bool strict = false;  // hand over every text with a code point that these tables do not know
};

enum class Outcome : std::uint8_t {
  kEncoded,
  kMojibake,    // ftfy has to repair it
  kUnassigned,  // only in strict mode: a code point of a newer Unicode version
  kNotUtf8,
};

// Words of one text whose search is under way: where they are, and what has been found so far.
struct WordSearch {
  static constexpr std::size_t kMost = 32 + kBlock;
  std::uint32_t begins[kMost], ends[kMost];
  Key keys[kMost];
  const std::uint32_t* slots[kMost];
  std::uint16_t tokens[kMost];
  std::size_t count = 0;
};

// A short text of plain ASCII in the middle of its encoding. Several at once share the time that
// memory takes to answer.
struct AsciiSearch {
  AsciiText text;
  WordSearch words;
};

// One per thread; keeps its buffers and a cache of words from text to text.
class Encoder {
 public:
  Encoder(const Vocabulary& vocabulary, const UnicodeTables& tables, const Dialect& dialect,
          AsciiScan scan);

  // The ids of a text, without its ends. Stops soon after `limit` ids; there may be more of them.
  Outcome encode(const TextView& text, std::size_t limit);
  // The same for a text that is clean already.
  Outcome encode_cleaned(const TextView& text, std::size_t limit);

  // The same in three steps, for a text that is short and plain: false if this one is not. Then
  // `look_ahead`, then `finish`, each for several texts in turn.
  bool begin(const TextView& text, AsciiSearch& search) const;
  void look_ahead(WordSearch& words) const;
  void finish(AsciiSearch& search, std::size_t limit);

  const std::uint16_t* ids() const { return ids_.data(); }
  std::size_t count() const { return count_; }
  std::size_t bad_byte() const { return bad_byte_; }  // where UTF-8 ends, after kNotUtf8

  // Room for the steps of several texts; at most 32.
  std::vector<AsciiSearch>& group() { return group_; }

  // Free what an extraordinarily long text has left behind.
  void shrink();

 private:
  void start(std::size_t limit);
  // Fills text_ and its properties. False if it is not UTF-8.
  bool decode(const TextView& text);
  template <typename Unit>
  void read(const Unit* units, std::size_t length);
  bool encode_ascii(const std::uint8_t* text, std::size_t length);
  void look_up_properties();
  void canonicalize();
  void split(bool lower);
  std::size_t contraction(std::size_t place) const;
  std::size_t special(std::size_t place, bool lower, std::uint16_t* id) const;
  std::uint32_t folded(std::size_t place) const;
  void hash(const std::uint8_t* text, WordSearch& words) const;
  void append(const std::uint8_t* text, const WordSearch& words);
  void encode_words(const std::uint8_t* text, WordSearch& words);
  void append(const Entry& entry);
  void append(std::uint16_t id);

  const Vocabulary& vocabulary_;
  const UnicodeTables& tables_;
  const Dialect& dialect_;
  const AsciiScan scan_;
  Cleaner cleaner_;
  WordEncoder words_;

  AsciiSearch ascii_;
  WordSearch found_;
  std::vector<AsciiSearch> group_{8};
  Text text_, properties_;
  std::uint32_t seen_ = 0;  // all properties of text_
  std::vector<std::uint8_t> utf8_;
  std::vector<std::uint16_t> ids_;
  std::size_t count_ = 0, limit_ = 0, bad_byte_ = 0;
};

}  // namespace fastclip
