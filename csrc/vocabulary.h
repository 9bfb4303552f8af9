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
#include "portable.h"

namespace fastclip {

constexpr std::uint16_t kStartOfText = 49406, kEndOfText = 49407;
constexpr std::size_t kVocabularySize = 49408;

FASTCLIP_BOTH inline void prefetch(const void* address) {
#if (defined(__GNUC__) || defined(__clang__)) && !defined(__CUDA_ARCH__)
  __builtin_prefetch(address);
#else
  static_cast<void>(address);
#endif
}

// A word of at most 16 bytes, zero-padded.
struct Key {
  std::uint64_t low, high;

  FASTCLIP_BOTH bool operator==(const Key& other) const {
    return low == other.low && high == other.high;
  }
  FASTCLIP_BOTH std::uint64_t hash() const {
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

// What is looked up while words are encoded: plain memory, the same on the host and on a GPU. On
// the host it fills most of one large page.
struct VocabularyTables {
  static constexpr int kWordBits = 16, kPairBits = 16, kShiftBits = 14;
  static constexpr std::uint16_t kNone = 0xFFFF;
  static constexpr std::uint32_t kFree = ~0u;

  std::uint32_t words[std::size_t{1} << kWordBits];  // tag << 16 | id, no tag twice in one search
  std::uint32_t pairs[std::size_t{1} << kPairBits];  // tag << 16 | id
  std::uint8_t shifts[std::size_t{1} << kShiftBits];
  std::uint16_t byte_pairs[2][256][256];  // inside a word, at its end
  Key keys[kVocabularySize];  // by id; early merges are frequent words, and lie together
  std::uint16_t byte_ids[256];

  // Perfect hashing: the lower half of a pair's hash chooses a shift, and that moves the upper half
  // to a slot that no other pair has. The hash is one-to-one, so that slot and lower half name the
  // pair, and four bytes hold it and its result.
  struct PairHash {
    std::uint32_t upper, lower;

    FASTCLIP_BOTH PairHash(std::uint16_t left, std::uint16_t right) {
      std::uint32_t hash = static_cast<std::uint32_t>(left) << 16 | right;
      hash =
          (hash ^ hash >> 15) * 0x9E37B78Fu;  // with this factor, there is a shift for each group
      hash ^= hash >> 16;
      upper = hash >> 16;
      lower = hash & 0xFFFF;
    }
    // Pairs of one group share a shift.
    FASTCLIP_BOTH std::uint32_t group() const { return lower >> (16 - kShiftBits); }
    FASTCLIP_BOTH std::uint32_t slot(std::uint32_t shift) const {
      return (upper + shift * 0x9E37u) & ((1u << kPairBits) - 1);
    }
  };

  // The token that two adjacent ones make; kNone if they do not merge.
  FASTCLIP_BOTH std::uint16_t merge(std::uint16_t left, std::uint16_t right) const {
    const PairHash hash(left, right);
    const std::uint32_t found = pairs[hash.slot(shifts[hash.group()])];
    return static_cast<std::uint16_t>(found >> 16 == hash.lower ? found : kNone);
  }
  // The same for two bytes of a word, the second of which may end it: where encoding begins.
  FASTCLIP_BOTH std::uint16_t merge_bytes(std::uint8_t left, std::uint8_t right, bool last) const {
    return byte_pairs[last][left][right];
  }

  // 15 bits of the hash that choose no slot.
  FASTCLIP_BOTH static std::uint32_t word_tag(const Key& key) {
    return static_cast<std::uint32_t>(key.hash() >> 16 & 0x7FFF);
  }
  // Looking a word up takes three steps, so that those of several words can overlap: `slot`, then
  // `candidate`, then `is_token`. Each reads what the one before has prefetched.
  FASTCLIP_BOTH const std::uint32_t* slot(const Key& key) const {
    const std::uint32_t* slot = &words[key.hash() >> (64 - kWordBits)];
    prefetch(slot);
    return slot;
  }
  // The token that the word may be; kNone if it is none, or if a key cannot hold it.
  FASTCLIP_BOTH std::uint16_t candidate(const Key& key, const std::uint32_t* slot) const {
    const std::uint32_t tag = word_tag(key);
    while (*slot != kFree) {
      if (*slot >> 16 == tag) {
        const auto id = static_cast<std::uint16_t>(*slot);
        prefetch(&keys[id]);
        return id;
      }
      if (++slot == words + (std::size_t{1} << kWordBits)) slot = words;
    }
    return kNone;
  }
  FASTCLIP_BOTH bool is_token(const Key& key, std::uint16_t id) const { return keys[id] == key; }
  FASTCLIP_BOTH std::uint16_t byte_id(std::uint8_t byte) const { return byte_ids[byte]; }
};

// The tables of one merge list. Built once, then only read, by any number of threads.
class Vocabulary {
 public:
  // `merges` is the text of the merge table: a line "left right" for each, in order of rank,
  // spelled in OpenAI's byte alphabet. Throws std::invalid_argument for anything but the 48,894 of
  // CLIP.
  explicit Vocabulary(std::string_view merges);

  static constexpr std::uint16_t kNone = VocabularyTables::kNone;

  const VocabularyTables& tables() const { return *tables_; }
  const VocabularyTables* operator->() const { return tables_; }

 private:
  void add_pairs(const std::vector<std::uint32_t>& pairs);
  void add_word(const Key& key, std::uint16_t id);

  LargeVector<VocabularyTables> memory_;
  VocabularyTables* const tables_;
};

}  // namespace fastclip
