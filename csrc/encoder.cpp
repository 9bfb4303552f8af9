#include "encoder.h"

#include <algorithm>
#include <cstring>

#include "utf8.h"

namespace fastclip {
namespace {

constexpr std::size_t kBatch = 32;  // words looked up together, so that memory answers in parallel
constexpr std::size_t kShortText = 512;              // bytes
constexpr std::size_t kKept = std::size_t{1} << 20;  // bytes that a buffer may keep between batches

bool is_ascii_punctuation(std::uint32_t c) {
  return (c >= 0x21 && c <= 0x2F) || (c >= 0x3A && c <= 0x40) || (c >= 0x5B && c <= 0x60) ||
         (c >= 0x7B && c <= 0x7E);
}

template <typename Buffer>
void shrink_buffer(Buffer& buffer) {
  if (buffer.capacity() * sizeof(buffer[0]) > kKept) Buffer().swap(buffer);
}

}  // namespace

Encoder::Encoder(const Vocabulary& vocabulary, const UnicodeTables& tables, const Dialect& dialect,
                 AsciiScan scan)
    : vocabulary_(vocabulary),
      tables_(tables),
      dialect_(dialect),
      scan_(scan),
      cleaner_(tables),
      words_(vocabulary) {}

void Encoder::start(std::size_t limit) {
  count_ = 0;
  limit_ = limit;
}

Outcome Encoder::encode(const TextView& text, std::size_t limit) {
  start(limit);
  const bool bytes = text.storage == Storage::kAscii || text.storage == Storage::kUtf8;
  if (bytes && dialect_.clean == CleanMode::kLower &&
      encode_ascii(static_cast<const std::uint8_t*>(text.data), text.length)) {
    return Outcome::kEncoded;
  }
  if (!decode(text)) return Outcome::kNotUtf8;
  if (dialect_.strict && (seen_ & kUnassigned)) return Outcome::kUnassigned;
  bool clean = cleaner_.is_clean(text_, properties_, seen_);
  if (!clean) {
    if (!cleaner_.repair(text_)) return Outcome::kMojibake;
    look_up_properties();
    // An entity may have named what the tables do not know.
    if (dialect_.strict && (seen_ & kUnassigned)) return Outcome::kUnassigned;
  }
  if (dialect_.clean == CleanMode::kCanonicalize) canonicalize();
  bool lower = dialect_.clean != CleanMode::kWhitespace;
  if (lower && (seen_ & kLowersSpecially)) {
    cleaner_.lower(text_);
    look_up_properties();
    lower = false;
  }
  split(lower);
  return Outcome::kEncoded;
}

Outcome Encoder::encode_cleaned(const TextView& text, std::size_t limit) {
  start(limit);
  if (!decode(text)) return Outcome::kNotUtf8;
  split(false);
  return Outcome::kEncoded;
}

bool Encoder::decode(const TextView& text) {
  switch (text.storage) {
    case Storage::kUtf8:
      bad_byte_ = decode_utf8(static_cast<const std::uint8_t*>(text.data), text.length, text_);
      look_up_properties();
      return bad_byte_ == text.length;
    case Storage::kAscii:
    case Storage::kLatin1:
      read(static_cast<const std::uint8_t*>(text.data), text.length);
      return true;
    case Storage::kUcs2:
      read(static_cast<const std::uint16_t*>(text.data), text.length);
      return true;
    case Storage::kUcs4:
      read(static_cast<const std::uint32_t*>(text.data), text.length);
      return true;
  }
  return false;
}

template <typename Unit>
void Encoder::read(const Unit* units, std::size_t length) {
  text_.resize(length);
  properties_.resize(length);
  std::uint32_t seen = 0;
  for (std::size_t i = 0; i < length; ++i) {
    const std::uint32_t c = units[i], properties = tables_.properties(c);
    text_[i] = c;
    properties_[i] = properties;
    seen |= properties;
  }
  seen_ = seen;
}

void Encoder::look_up_properties() {
  properties_.resize(text_.size());
  std::uint32_t seen = 0;
  for (std::size_t i = 0; i < text_.size(); ++i) {
    const std::uint32_t properties = tables_.properties(text_[i]);
    properties_[i] = properties;
    seen |= properties;
  }
  seen_ = seen;
}

void Encoder::canonicalize() {
  std::size_t to = 0;
  for (const std::uint32_t c : text_) {
    if (c == '_') {
      text_[to++] = ' ';
    } else if (!is_ascii_punctuation(c)) {
      text_[to++] = c;
    }
  }
  text_.resize(to);
  look_up_properties();
}

namespace {

// What stands between the scan of a text and its words. False if cleaning has more to do.
bool scan_words(AsciiScan scan, const std::uint8_t* bytes, std::size_t length, AsciiText& text) {
  if (length > UINT32_MAX || !scan(bytes, length, text)) return false;
  std::uint64_t any_special = 0;
  for (std::size_t b = 0; b < text.blocks; ++b) any_special |= text.special[b];
  return any_special == 0 || split_contractions(text, length);
}

// Take the bits of some blocks apart, until there are `enough` words; returns the next block. A
// word that is begun but not ended stays in `begun`, behind those that are.
std::size_t take_words(const AsciiText& text, std::size_t block, std::size_t enough,
                       WordSearch& words, std::size_t* begun) {
  for (; block < text.blocks && words.count < enough; ++block) {
    const auto base = static_cast<std::uint32_t>(block * kBlock);
    for (std::uint64_t bits = text.begins[block]; bits != 0; bits &= bits - 1) {
      words.begins[(*begun)++] = base + static_cast<std::uint32_t>(__builtin_ctzll(bits));
    }
    for (std::uint64_t bits = text.ends[block]; bits != 0; bits &= bits - 1) {
      words.ends[words.count++] = base + static_cast<std::uint32_t>(__builtin_ctzll(bits));
    }
  }
  return block;
}

}  // namespace

bool Encoder::encode_ascii(const std::uint8_t* bytes, std::size_t length) {
  AsciiText& text = ascii_.text;
  WordSearch& words = ascii_.words;
  if (!scan_words(scan_, bytes, length, text)) return false;
  std::size_t begun = 0;
  words.count = 0;
  for (std::size_t block = 0; block < text.blocks && count_ < limit_;) {
    block = take_words(text, block, kBatch, words, &begun);
    const std::size_t taken = words.count;
    encode_words(text.lower.data(), words);
    words.begins[0] = words.begins[taken];
    begun -= taken;
  }
  return true;
}

bool Encoder::begin(const TextView& text, AsciiSearch& search) const {
  const bool bytes = text.storage == Storage::kAscii || text.storage == Storage::kUtf8;
  if (!bytes || dialect_.clean != CleanMode::kLower || text.length > kShortText) return false;
  if (!scan_words(scan_, static_cast<const std::uint8_t*>(text.data), text.length, search.text))
    return false;
  std::size_t begun = 0;
  search.words.count = 0;
  if (take_words(search.text, 0, kBatch, search.words, &begun) != search.text.blocks) return false;
  hash(search.text.lower.data(), search.words);
  return true;
}

void Encoder::finish(AsciiSearch& search, std::size_t limit) {
  start(limit);
  append(search.text.lower.data(), search.words);
}

// CLIP's expression: special tokens, contractions, runs of letters, single numbers, runs of the
// rest.
void Encoder::split(bool lower) {
  const std::size_t size = text_.size();
  utf8_.resize(std::max(utf8_.size(), kBatch * 4 + kKeyBytes));
  WordSearch& words = found_;
  words.count = 0;
  std::uint8_t* to = utf8_.data();
  const auto flush = [&] {
    encode_words(utf8_.data(), words);
    to = utf8_.data();
  };
  std::size_t i = 0;
  while (i < size && count_ < limit_) {
    const std::uint32_t word_class = properties_[i] & kWordClassMask;
    if (word_class == kSeparator) {
      ++i;
      continue;
    }
    std::size_t end = i + 1;
    if (word_class == kOther) {
      std::uint16_t id = 0;
      std::size_t length = 0;
      if (text_[i] == '<' && (length = special(i, lower, &id)) != 0) {
        end = i + length;
        if (id != 0) {
          flush();
          append(id);
          i = end;
          continue;
        }
      } else if (text_[i] == '\'' && (length = contraction(i)) != 0) {
        end = i + 1 + length;
      } else {
        while (end < size && (properties_[end] & kWordClassMask) == kOther) ++end;
      }
    } else if (word_class == kLetter) {
      while (end < size && (properties_[end] & kWordClassMask) == kLetter) ++end;
    }
    const std::size_t used = static_cast<std::size_t>(to - utf8_.data());
    const std::size_t needed = used + (end - i) * 4 + kKeyBytes;
    if (needed > utf8_.size()) {
      utf8_.resize(2 * needed);
      to = utf8_.data() + used;
    }
    words.begins[words.count] = static_cast<std::uint32_t>(used);
    if (lower) {
      for (; i < end; ++i) to = put_utf8(to, tables_.lower(text_[i], properties_[i]));
    } else {
      for (; i < end; ++i) to = put_utf8(to, text_[i]);
    }
    words.ends[words.count++] = static_cast<std::uint32_t>(to - utf8_.data());
    if (words.count == kBatch) flush();
  }
  flush();
}

// The letter at a place as CLIP's expression compares it, ignoring case, with letters of its own.
std::uint32_t Encoder::folded(std::size_t place) const {
  if (place >= text_.size()) return 0;
  const std::uint32_t c = text_[place];
  if (c - 'A' < 26) return c | 32;
  return c == 0x17F ? 's' : c;
}

// How many letters after an apostrophe belong to a contraction.
std::size_t Encoder::contraction(std::size_t place) const {
  const std::uint32_t first = folded(place + 1);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return 1;
  const std::uint32_t second = folded(place + 2);
  return ((first == 'r' || first == 'v') && second == 'e') || (first == 'l' && second == 'l') ? 2
                                                                                              : 0;
}

// The length of a special token's spelling that stands at a place, or 0. It is found ignoring case,
// but has its id only if it is spelled exactly; else it is a word, with id 0.
std::size_t Encoder::special(std::size_t place, bool lower, std::uint16_t* id) const {
  for (const bool end : {false, true}) {
    const std::string& spelling = end ? dialect_.end_of_text : dialect_.start_of_text;
    std::size_t length = 0;
    bool exact = true;
    while (length < spelling.size()) {
      const auto expected = static_cast<std::uint32_t>(spelling[length]);
      if (folded(place + length) != expected) break;
      const std::uint32_t c = text_[place + length];
      exact = exact && (c == expected || (lower && c < 0x80));
      ++length;
    }
    if (length == spelling.size()) {
      *id = exact ? (end ? kEndOfText : kStartOfText) : std::uint16_t{0};
      return length;
    }
  }
  return 0;
}

void Encoder::hash(const std::uint8_t* text, WordSearch& words) const {
  for (std::size_t i = 0; i < words.count; ++i) {
    const std::size_t length = words.ends[i] - words.begins[i];
    if (length > kKeyBytes) continue;
    words.keys[i] = load_key(text + words.begins[i], length);
    words.slots[i] = vocabulary_->slot(words.keys[i]);
  }
}

void Encoder::look_ahead(WordSearch& words) const {
  for (std::size_t i = 0; i < words.count; ++i) {
    if (words.ends[i] - words.begins[i] > kKeyBytes) continue;
    words.tokens[i] = vocabulary_->candidate(words.keys[i], words.slots[i]);
    if (words.tokens[i] == Vocabulary::kNone) words_.prefetch(words.keys[i]);
  }
}

void Encoder::append(const std::uint8_t* text, const WordSearch& words) {
  for (std::size_t i = 0; i < words.count && count_ < limit_; ++i) {
    const std::uint8_t* word = text + words.begins[i];
    const std::size_t length = words.ends[i] - words.begins[i];
    if (length <= kKeyBytes) {
      if (words.tokens[i] != Vocabulary::kNone &&
          vocabulary_->is_token(words.keys[i], words.tokens[i])) {
        append(words.tokens[i]);
        continue;
      }
      if (const Entry* entry = words_.recall(words.keys[i], word, length)) {
        append(*entry);
        continue;
      }
    }
    ids_.resize(count_);
    words_.encode(word, length, ids_);
    count_ = ids_.size();
  }
}

// Leaves `words` empty.
void Encoder::encode_words(const std::uint8_t* text, WordSearch& words) {
  hash(text, words);
  look_ahead(words);
  append(text, words);
  words.count = 0;
}

inline void Encoder::append(const Entry& entry) {
  constexpr std::size_t kCopied = Entry::kIds + 1;  // the count goes along, and is overwritten
  if (ids_.size() < count_ + kCopied) ids_.resize(2 * count_ + 64);
  std::memcpy(ids_.data() + count_, entry.ids, kCopied * sizeof(std::uint16_t));
  count_ += entry.count;
}

inline void Encoder::append(std::uint16_t id) {
  if (ids_.size() < count_ + 1) ids_.resize(2 * count_ + 64);
  ids_[count_++] = id;
}

void Encoder::shrink() {
  shrink_buffer(text_);
  shrink_buffer(properties_);
  shrink_buffer(utf8_);
  shrink_buffer(ids_);
  if (ascii_.text.lower.capacity() > kKept) ascii_.text = AsciiText();
}

}  // namespace fastclip
