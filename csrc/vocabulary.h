// CLIP's 49,408 tokens and 48,894 merges, as tables to look words and pairs up in.
//
// Ids 0-255 are the bytes in the order of OpenAI's byte alphabet, 256-511 the same at the end of a
// word, 512 + r is the result of merge r. A lower id therefore is an earlier merge, and no id of a
// merge needs its rank beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string_view>
#include <vector>

#include "large.h"

namespace fastclip {

constexpr std::uint16_t kStartOfText = 49406, kEndOfText = 49407;
constexpr std::size_t kVocabularySize = 49408;

inline void prefetch(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#else
  static_cast<void>(address);
#endif
}

// A word of at most 16 bytes, zero-padded.
struct Key {
  std::uint64_t low, high;

  bool operator==(const Key& other) const { return low == other.low && high == other.high; }
  std::uint64_t hash() const {
    const auto product =
        static_cast<unsigned __int128>(low ^ 0x9E3779B97F4A7C15u) * (high ^ 0xD1B54A32D192ED03u);
    const std::uint64_t folded =
        static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
    return folded * 0xFF51AFD7ED558CCDu;
  }
};
constexpr std::size_t kKeyBytes = 16;

// Reads 16 bytes from `word` whatever its length: they must be there.
inline Key load_key(const std::uint8_t* word, std::size_t length) {
  // A window over 16 bytes of ones, then 16 of zeros: the mask of any length.
  alignas(64) static constexpr std::uint64_t kOnesThenZeros[4] = {~0ull, ~0ull, 0, 0};
  Key key, mask;
  std::memcpy(&key, word, sizeof key);
  std::memcpy(&mask, reinterpret_cast<const char*>(kOnesThenZeros) + (kKeyBytes - length),
              sizeof mask);
  return {key.low & mask.low, key.high & mask.high};
}

inline std::uint64_t hash_bytes(const char* bytes, std::size_t length) {
  std::uint64_t hash = length;
  for (; length >= 8; bytes += 8, length -= 8) {
    std::uint64_t part;
    std::memcpy(&part, bytes, 8);
    hash = (hash ^ part) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  std::uint64_t part = 0;
  std::memcpy(&part, bytes, length);
  hash = (hash ^ part) * 0x9E3779B97F4A7C15u;
  return (hash ^ hash >> 29) * 0xFF51AFD7ED558CCDu;
}

// The tables of one merge list. Built once, then only read, by any number of threads.
class Vocabulary {
 public:
  // `merges` is the text of the merge table: a line "left right" for each, in order of rank,
  // spelled in OpenAI's byte alphabet. Throws std::invalid_argument for anything but the 48,894 of
  // CLIP.
  explicit Vocabulary(std::string_view merges);

  static constexpr std::uint16_t kNone = 0xFFFF;

  // The token that two adjacent ones make; kNone if they do not merge.
  std::uint16_t merge(std::uint16_t left, std::uint16_t right) const {
    const PairPlaces places(left, right);
    const std::uint32_t first = tables_->pairs[places.first],
                        second = tables_->pairs[places.second];
    const std::uint32_t found = first >> 16 == places.first_tag     ? first
                                : second >> 16 == places.second_tag ? second
                                                                    : kNone;
    return static_cast<std::uint16_t>(found);
  }

  // The same for two bytes of a word, the second of which may end it: where encoding begins.
  std::uint16_t merge_bytes(std::uint8_t left, std::uint8_t right, bool last) const {
    return tables_->byte_pairs[last][left][right];
  }

  // Looking a word up takes three steps, so that those of several words can overlap: `slot`, then
  // `candidate`, then `is_token`. Each reads what the one before has prefetched.
  const std::uint32_t* slot(const Key& key) const {
    const std::uint32_t* slot = &tables_->words[key.hash() >> (64 - kWordBits)];
    prefetch(slot);
    return slot;
  }
  // The token that the word may be; kNone if it is none, or if a key cannot hold it.
  std::uint16_t candidate(const Key& key, const std::uint32_t* slot) const {
    const std::uint32_t tag = word_tag(key);
    while (*slot != kFree) {
      if (*slot >> 16 == tag) {
        const auto id = static_cast<std::uint16_t>(*slot);
        prefetch(&tables_->keys[id]);
        return id;
      }
      if (++slot == std::end(tables_->words)) slot = tables_->words;
    }
    return kNone;
  }
  bool is_token(const Key& key, std::uint16_t id) const { return tables_->keys[id] == key; }

  std::uint16_t byte_id(std::uint8_t byte) const { return byte_ids_[byte]; }

 private:
  static constexpr int kPairBits = 17, kWordBits = 16;

  // Cuckoo hashing: a pair stands in one of two places. Both hashes are one-to-one, so that a place
  // and the remaining 15 bits name the pair, and four bytes hold it and its result; the lowest bit
  // of the tag says which of the two hashes put it there.
  struct PairPlaces {
    std::uint32_t first, second, first_tag, second_tag;

    PairPlaces(std::uint16_t left, std::uint16_t right) {
      const std::uint32_t pair = static_cast<std::uint32_t>(left) << 16 | right;
      const std::uint32_t a = pair * 0x9E3779B1u, b = (pair ^ pair >> 15) * 0x85EBCA77u;
      constexpr int kRest = 32 - kPairBits;
      first = a >> kRest;
      second = b >> kRest;
      first_tag = (a & ((1u << kRest) - 1)) << 1;
      second_tag = (b & ((1u << kRest) - 1)) << 1 | 1;
    }
  };
  void add_pairs(const std::vector<std::uint32_t>& pairs);
  static constexpr std::uint32_t kFree = ~0u;
  // 15 bits of the hash that choose no slot.
  static std::uint32_t word_tag(const Key& key) {
    return static_cast<std::uint32_t>(key.hash() >> 16 & 0x7FFF);
  }
  void add_word(const Key& key, std::uint16_t id);

  // Together they fill most of one large page.
  struct Tables {
    std::uint32_t words[std::size_t{1} << kWordBits];  // tag << 16 | id, no tag twice in one search
    std::uint32_t pairs[std::size_t{1} << kPairBits];  // tag << 16 | id
    std::uint16_t byte_pairs[2][256][256];             // inside a word, at its end
    Key keys[kVocabularySize];  // by id; early merges are frequent words, and lie together
  };
  LargeVector<Tables> memory_;
  Tables* const tables_;
  std::uint16_t byte_ids_[256];
};

}  // namespace fastclip
