// Byte-pair encoding: words (UTF-8) to token ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vocabulary.h"

namespace fastclip {

// A word that is several tokens, as it is remembered.
struct Entry {
  static constexpr std::size_t kIds = 7;
  Key key;
  std::uint16_t ids[kIds];
  std::uint16_t count;  // 0: an empty slot; above kIds: the ids are not here
};
static_assert(sizeof(Entry) == 32, "two entries share a cache line");

// Encodes words, and remembers those that are several tokens. One per thread.
class WordEncoder {
 public:
  explicit WordEncoder(const Vocabulary& vocabulary);

  // To be called some time before `recall`, so that the answer is there.
  void prefetch(const Key& key) const { fastclip::prefetch(set_of(key)); }
  // The ids of a word of at most kKeyBytes that is not one token. The entry is valid until the next
  // call; nullptr if there are too many of them for one.
  const Entry* recall(const Key& key, const std::uint8_t* word, std::size_t length);
  // Append the ids of any word.
  void encode(const std::uint8_t* word, std::size_t length, std::vector<std::uint16_t>& ids);

 private:
  // A word that does not fit an Entry.
  struct LongEntry {
    static constexpr std::size_t kBytes = 48, kIds = 38;
    std::uint16_t length, count;
    std::uint8_t bytes[kBytes];
    std::uint16_t ids[kIds];
  };
  static_assert(sizeof(LongEntry) == 128, "two cache lines");

  std::size_t encode_short(const std::uint8_t* word, std::size_t length);
  template <std::size_t kLanes>
  std::size_t encode_lanes(const std::uint8_t* word, std::size_t length);
  std::size_t encode_long(const std::uint8_t* word, std::size_t length);

  // By the lower bits of the hash: the upper ones choose the slot in the vocabulary.
  const Entry* set_of(const Key& key) const {
    return &cache_[2 * (key.hash() & ((std::size_t{1} << kCacheBits) - 1))];
  }

  static constexpr int kCacheBits = 15;  // sets of two
  static constexpr int kLongCacheBits = 12;
  static constexpr std::size_t kShort = 96;  // bytes; beyond, a heap is faster than a scan
  const Vocabulary& vocabulary_;
  LargeVector<Entry> cache_;  // fills one large page
  std::vector<LongEntry> long_cache_;
  std::vector<std::uint16_t> symbols_;
  std::vector<std::uint32_t> previous_, next_;
  std::vector<std::uint64_t> heap_;
};

}  // namespace fastclip
