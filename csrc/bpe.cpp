#include "bpe.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastclip {

WordEncoder::WordEncoder(const Vocabulary& vocabulary)
    : vocabulary_(vocabulary),
      cache_(std::size_t{2} << kCacheBits, Entry{}),
      long_cache_(std::size_t{1} << kLongCacheBits, LongEntry{}) {}

const Entry* WordEncoder::recall(const Key& key, const std::uint8_t* word, std::size_t length) {
  Entry* set = const_cast<Entry*>(set_of(key));
  if (set[0].count == 0 || !(set[0].key == key)) {
    if (set[1].count != 0 && set[1].key == key) {
      std::swap(set[0], set[1]);
    } else {
      const std::size_t count = encode_short(word, length);
      set[1] = set[0];
      set[0].key = key;
      set[0].count = static_cast<std::uint16_t>(count);
      if (count <= Entry::kIds) std::copy_n(symbols_.begin(), count, set[0].ids);
    }
  }
  return set[0].count <= Entry::kIds ? &set[0] : nullptr;
}

void WordEncoder::encode(const std::uint8_t* word, std::size_t length,
                         std::vector<std::uint16_t>& ids) {
  if (length > LongEntry::kBytes) {
    const std::size_t count =
        length <= kShort ? encode_short(word, length) : encode_long(word, length);
    ids.insert(ids.end(), symbols_.begin(), symbols_.begin() + static_cast<std::ptrdiff_t>(count));
    return;
  }
  const std::uint64_t hash = hash_bytes(reinterpret_cast<const char*>(word), length);
  LongEntry& entry = long_cache_[hash >> (64 - kLongCacheBits)];
  if (entry.length != length || std::memcmp(entry.bytes, word, length) != 0) {
    const std::size_t count = encode_short(word, length);
    if (count > LongEntry::kIds) {
      ids.insert(ids.end(), symbols_.begin(),
                 symbols_.begin() + static_cast<std::ptrdiff_t>(count));
      return;
    }
    entry.length = static_cast<std::uint16_t>(length);
    entry.count = static_cast<std::uint16_t>(count);
    std::memcpy(entry.bytes, word, length);
    std::copy_n(symbols_.begin(), count, entry.ids);
  }
  ids.insert(ids.end(), entry.ids, entry.ids + entry.count);
}

// All leave the ids at the beginning of symbols_ and return how many there are. Of equal pairs the
// leftmost is merged first.
// Ids as signed numbers in the same order; what is no merge is the highest.
inline std::int16_t order(std::uint16_t id) { return static_cast<std::int16_t>(id ^ 0x8000); }
constexpr std::int16_t kHighest = std::numeric_limits<std::int16_t>::max();
static_assert((Vocabulary::kNone ^ 0x8000) == kHighest, "no merge comes last");

// The lowest of some signed numbers and where it first stands, eight lanes at a time.
template <std::size_t kLanes>
inline std::pair<std::int16_t, std::size_t> lowest(const std::int16_t* numbers) {
#if defined(__SSE2__)
  const auto load = [numbers](std::size_t i) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(numbers + i));
  };
  __m128i least = load(0);
  for (std::size_t i = 8; i < kLanes; i += 8) least = _mm_min_epi16(least, load(i));
  least = _mm_min_epi16(least, _mm_shuffle_epi32(least, 0x4E));
  least = _mm_min_epi16(least, _mm_shuffle_epi32(least, 0xB1));
  least = _mm_min_epi16(least, _mm_shufflelo_epi16(least, 0xB1));
  least = _mm_shuffle_epi32(_mm_unpacklo_epi16(least, least), 0);
  for (std::size_t i = 0; i < kLanes; i += 16) {
    const __m128i equal =
        _mm_packs_epi16(_mm_cmpeq_epi16(load(i), least), _mm_cmpeq_epi16(load(i + 8), least));
    const auto bits = static_cast<unsigned>(_mm_movemask_epi8(equal));
    if (bits != 0) {
      return {static_cast<std::int16_t>(_mm_extract_epi16(least, 0)),
              i + static_cast<std::size_t>(__builtin_ctz(bits))};
    }
  }
  return {numbers[0], 0};
#else
  const std::int16_t* least = std::min_element(numbers, numbers + kLanes);
  return {*least, static_cast<std::size_t>(least - numbers)};
#endif
}

// numbers[i] = numbers[i + 1] for kLanes of them.
template <std::size_t kLanes, typename Number>
inline void move_up(Number* numbers) {
#if defined(__SSE2__)
  for (std::size_t i = 0; i < kLanes; i += 8) {
    const __m128i moved = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers + i + 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(numbers + i), moved);
  }
#else
  std::memmove(numbers, numbers + 1, kLanes * sizeof *numbers);
#endif
}

#if defined(__SSE2__)
// Words of at most 16 symbols are merged in registers: memory that is written in small pieces and
// read back in large ones makes the processor wait.
struct Lanes {
  __m128i low, high;

  static __m128i select(__m128i where, __m128i yes, __m128i no) {
    return _mm_or_si128(_mm_and_si128(where, yes), _mm_andnot_si128(where, no));
  }
  static __m128i places(int from) {
    return _mm_add_epi16(_mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7),
                         _mm_set1_epi16(static_cast<short>(from)));
  }
  static Lanes load(const void* numbers) {
    const auto* vectors = static_cast<const __m128i*>(numbers);
    return {_mm_loadu_si128(vectors), _mm_loadu_si128(vectors + 1)};
  }
  void set(std::ptrdiff_t at, std::int16_t number) {
    const __m128i place = _mm_set1_epi16(static_cast<short>(at)), value = _mm_set1_epi16(number);
    low = select(_mm_cmpeq_epi16(places(0), place), value, low);
    high = select(_mm_cmpeq_epi16(places(8), place), value, high);
  }
  std::pair<std::int16_t, std::size_t> lowest() const {
    __m128i least = _mm_min_epi16(low, high);
    least = _mm_min_epi16(least, _mm_shuffle_epi32(least, 0x4E));
    least = _mm_min_epi16(least, _mm_shuffle_epi32(least, 0xB1));
    least = _mm_min_epi16(least, _mm_shufflelo_epi16(least, 0xB1));
    const auto best = static_cast<std::int16_t>(_mm_extract_epi16(least, 0));
    const __m128i all = _mm_set1_epi16(best);
    const __m128i equal = _mm_packs_epi16(_mm_cmpeq_epi16(low, all), _mm_cmpeq_epi16(high, all));
    return {best, static_cast<std::size_t>(
                      __builtin_ctz(static_cast<unsigned>(_mm_movemask_epi8(equal)) | 0x10000u))};
  }
};

template <>
std::size_t WordEncoder::encode_lanes<16>(const std::uint8_t* word, std::size_t length) {
  // A symbol stays in the place of its first byte, a bit of `alive`; merged[i] is what symbol i and
  // the next one alive make. One symbol before the first and one behind the last merge with
  // nothing.
  std::uint16_t places[18];
  std::uint16_t* symbols = places + 1;
  symbols[-1] = symbols[16] = Vocabulary::kNone;
  alignas(16) std::int16_t merged[16];
  std::fill(std::begin(merged), std::end(merged), kHighest);
  for (std::size_t i = 0; i < length; ++i) symbols[i] = vocabulary_->byte_id(word[i]);
  symbols[length - 1] = static_cast<std::uint16_t>(symbols[length - 1] + 256);
  for (std::size_t i = 0; i + 1 < length; ++i) {
    merged[i] = order(vocabulary_->merge_bytes(word[i], word[i + 1], i + 2 == length));
  }
  Lanes pairs = Lanes::load(merged);
  std::uint32_t alive = ((1u << length) - 1) | 1u << 16;
  while (true) {
    const auto [best, at] = pairs.lowest();
    if (best == kHighest) break;
    const auto after = [&alive](std::size_t place) {
      return place + 1 + static_cast<std::size_t>(__builtin_ctz(alive >> (place + 1)));
    };
    const std::size_t swallowed = after(at);
    alive &= ~(1u << swallowed);
    const std::size_t right = after(at);
    const std::ptrdiff_t left = 30 - __builtin_clz((alive & ((1u << at) - 1)) << 1 | 1);
    const auto id = static_cast<std::uint16_t>(best ^ 0x8000);
    symbols[at] = id;
    pairs.set(static_cast<std::ptrdiff_t>(swallowed), kHighest);
    pairs.set(static_cast<std::ptrdiff_t>(at), order(vocabulary_->merge(id, symbols[right])));
    pairs.set(left, order(vocabulary_->merge(symbols[left], id)));
  }
  symbols_.resize(std::max(symbols_.size(), std::size_t{16}));
  std::size_t count = 0;
  for (std::uint32_t bits = alive & 0xFFFF; bits != 0; bits &= bits - 1) {
    symbols_[count++] = symbols[__builtin_ctz(bits)];
  }
  return count;
}
#endif

template <std::size_t kLanes>
std::size_t WordEncoder::encode_lanes(const std::uint8_t* word, std::size_t length) {
  static_assert(kLanes % 16 == 0 && kLanes <= kShort, "pairs of eight lanes");
  // What symbols i and i + 1 make.
  // Both arrays are moved up by copying as many lanes as there are, whatever lies behind.
  alignas(16) std::int16_t merged[2 * kLanes + 8];
  std::uint16_t symbols[2 * kLanes + 8];
  std::fill(std::begin(merged), std::end(merged), kHighest);
  std::memset(symbols, 0, sizeof symbols);

  for (std::size_t i = 0; i < length; ++i) symbols[i] = vocabulary_->byte_id(word[i]);
  symbols[length - 1] = static_cast<std::uint16_t>(symbols[length - 1] + 256);
  for (std::size_t i = 0; i + 1 < length; ++i) {
    merged[i] = order(vocabulary_->merge_bytes(word[i], word[i + 1], i + 2 == length));
  }
  while (true) {
    const auto [best, at] = lowest<kLanes>(merged);
    if (best == kHighest) break;
    move_up<kLanes>(symbols + at + 1);
    symbols[at] = static_cast<std::uint16_t>(best ^ 0x8000);
    move_up<kLanes>(merged + at);
    --length;
    if (at + 1 < length) merged[at] = order(vocabulary_->merge(symbols[at], symbols[at + 1]));
    if (at > 0) merged[at - 1] = order(vocabulary_->merge(symbols[at - 1], symbols[at]));
  }
  if (symbols_.size() < kLanes) symbols_.resize(kLanes);
  std::memcpy(symbols_.data(), symbols, kLanes * sizeof *symbols);
  return length;
}

std::size_t WordEncoder::encode_short(const std::uint8_t* word, std::size_t length) {
  if (length <= 16) return encode_lanes<16>(word, length);
  return length <= 32 ? encode_lanes<32>(word, length) : encode_lanes<kShort>(word, length);
}

std::size_t WordEncoder::encode_long(const std::uint8_t* word, std::size_t length) {
  constexpr std::uint32_t kEnd = ~0u;
  const std::uint16_t kGone = Vocabulary::kNone;
  symbols_.resize(std::max(symbols_.size(), length));
  previous_.resize(length);
  next_.resize(length);
  for (std::size_t i = 0; i < length; ++i) {
    symbols_[i] = vocabulary_->byte_id(word[i]);
    previous_[i] = i == 0 ? kEnd : static_cast<std::uint32_t>(i - 1);
    next_[i] = i + 1 == length ? kEnd : static_cast<std::uint32_t>(i + 1);
  }
  symbols_[length - 1] = static_cast<std::uint16_t>(symbols_[length - 1] + 256);

  // Entries: what a pair makes, and where its left symbol stands. A stale one names another result
  // than the pair that stands there now.
  heap_.clear();
  const auto result = [&](std::uint32_t left) {
    return next_[left] == kEnd ? Vocabulary::kNone
                               : vocabulary_->merge(symbols_[left], symbols_[next_[left]]);
  };
  const auto entry = [](std::uint16_t id, std::uint32_t left) {
    return static_cast<std::uint64_t>(id) << 32 | left;
  };
  for (std::uint32_t i = 0; i + 1 < length; ++i) {
    if (const std::uint16_t id = result(i); id != Vocabulary::kNone) heap_.push_back(entry(id, i));
  }
  std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
  while (!heap_.empty()) {
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
    const auto id = static_cast<std::uint16_t>(heap_.back() >> 32);
    const auto left = static_cast<std::uint32_t>(heap_.back());
    heap_.pop_back();
    if (symbols_[left] == kGone || result(left) != id) continue;
    const std::uint32_t right = next_[left];
    symbols_[left] = id;
    symbols_[right] = kGone;
    next_[left] = next_[right];
    if (next_[left] != kEnd) previous_[next_[left]] = left;
    for (const std::uint32_t changed : {previous_[left], left}) {
      if (changed == kEnd) continue;
      if (const std::uint16_t made = result(changed); made != Vocabulary::kNone) {
        heap_.push_back(entry(made, changed));
        std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
      }
    }
  }
  const auto end =
      std::remove(symbols_.begin(), symbols_.begin() + static_cast<std::ptrdiff_t>(length), kGone);
  return static_cast<std::size_t>(end - symbols_.begin());
}

}  // namespace fastclip
