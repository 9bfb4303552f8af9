// The passes in x86's vector instructions. A weight of 22 bits is multiplied as two factors of 11
// (AVX2, whose products are of 16 bits) or three signed digits of 8 (VNNI, four products of bytes
// at once); the sums are put together at the end, so that they are those of whole weights.
#include <algorithm>
#include <cstring>

#include "resample.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

namespace fastclip {
namespace {

constexpr int kLowBits = 11;

// The fourth byte of a pixel's four is the next pixel's first, which is written after it.
void store_pixel(std::uint8_t* out, std::uint32_t pixel, bool last) {
  if (last) {
    std::memcpy(out, &pixel, 3);
  } else {
    std::memcpy(out, &pixel, 4);
  }
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {

void prepare(Taps& taps) {
  taps.high.resize(taps.weights.size() * 4);
  taps.low.resize(taps.weights.size() * 4);
  for (std::size_t tap = 0; tap < taps.weights.size(); ++tap) {
    const std::int32_t weight = taps.weights[tap];
    const std::size_t place = tap / 4 * 16 + tap % 4 / 2 * 8 + tap % 2;
    for (int channel = 0; channel < 4; ++channel) {
      taps.high[place + channel * 2] = static_cast<std::int16_t>(weight >> kLowBits);
      taps.low[place + channel * 2] = static_cast<std::int16_t>(weight & ((1 << kLowBits) - 1));
    }
  }
}

inline __m256i load(const void* place) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(place));
}

void across(const Rows& rows, int count, const Taps& taps, int skipped) {
  // Four pixels in, two of them in each half of the vector, as 16-bit pairs of one channel.
  const __m256i spread =
      _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                       6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const int outputs = static_cast<int>(taps.first.size());
  for (int row = 0; row < count; row += 4) {
    const std::uint8_t* source[4];
    std::uint8_t* out[4];
    for (int k = 0; k < 4; ++k) {  // what is left of the last four rows is computed twice
      source[k] = rows.source + std::min(row + k, count - 1) * rows.source_stride;
      out[k] = rows.out + std::min(row + k, count - 1) * rows.out_stride;
    }
    for (int i = 0; i < outputs; ++i) {
      const std::size_t place = static_cast<std::size_t>(taps.first[i] - skipped) * 3;
      __m256i high[4], low[4];
      for (int k = 0; k < 4; ++k) high[k] = low[k] = _mm256_setzero_si256();
      for (int tap = 0; tap < taps.count[i]; tap += Taps::kGroup) {
        const std::size_t group = taps.group(i) + tap / Taps::kGroup;
        const __m256i upper = load(&taps.high[group * 16]);
        const __m256i lower = load(&taps.low[group * 16]);
        for (int k = 0; k < 4; ++k) {
          const __m128i four =
              _mm_loadu_si128(reinterpret_cast<const __m128i*>(source[k] + place + tap * 3));
          const __m256i pixels = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(four), spread);
          high[k] = _mm256_add_epi32(high[k], _mm256_madd_epi16(pixels, upper));
          low[k] = _mm256_add_epi32(low[k], _mm256_madd_epi16(pixels, lower));
        }
      }
      __m128i sums[4];
      for (int k = 0; k < 4; ++k) {
        const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high[k], kLowBits), low[k]);
        const __m128i both =
            _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        sums[k] = _mm_srai_epi32(_mm_add_epi32(both, _mm_set1_epi32(kHalf)), kWeightBits);
      }
      const __m128i four =
          _mm_packus_epi16(_mm_packs_epi32(sums[0], sums[1]), _mm_packs_epi32(sums[2], sums[3]));
      alignas(16) std::uint32_t pixels[4];
      _mm_store_si128(reinterpret_cast<__m128i*>(pixels), four);
      for (int k = 0; k < 4; ++k) store_pixel(out[k] + i * 3, pixels[k], i + 1 == outputs);
    }
  }
}

void down(const Rows& rows, int bytes, const Taps& taps, int skipped) {
  const int outputs = static_cast<int>(taps.first.size());
  const __m256i zero = _mm256_setzero_si256();
  for (int i = 0; i < outputs; ++i) {
    const std::uint8_t* source = rows.source + (taps.first[i] - skipped) * rows.source_stride;
    std::uint8_t* out = rows.out + i * rows.out_stride;
    const int count = taps.count[i];
    const std::int32_t* weight = &taps.weights[static_cast<std::size_t>(i) * taps.stride];
    for (int x = 0; x < bytes; x += 32) {
      __m256i high[4], low[4];
      for (int k = 0; k < 4; ++k) high[k] = low[k] = zero;
      for (int y = 0; y < count; y += 2) {
        const std::uint8_t* row = source + y * rows.source_stride + x;
        const bool pair = y + 1 < count;
        const __m256i first = load(row);
        const __m256i second = pair ? load(row + rows.source_stride) : zero;
        const std::int32_t next = pair ? weight[y + 1] : 0;
        constexpr std::int32_t mask = (1 << kLowBits) - 1;
        const __m256i upper =
            _mm256_set1_epi32((next >> kLowBits) * 65536 | ((weight[y] >> kLowBits) & 0xFFFF));
        const __m256i lower = _mm256_set1_epi32((next & mask) << 16 | (weight[y] & mask));
        const __m256i left = _mm256_unpacklo_epi8(first, second);
        const __m256i right = _mm256_unpackhi_epi8(first, second);
        const __m256i pairs[4] = {
            _mm256_unpacklo_epi8(left, zero), _mm256_unpackhi_epi8(left, zero),
            _mm256_unpacklo_epi8(right, zero), _mm256_unpackhi_epi8(right, zero)};
        for (int k = 0; k < 4; ++k) {
          high[k] = _mm256_add_epi32(high[k], _mm256_madd_epi16(pairs[k], upper));
          low[k] = _mm256_add_epi32(low[k], _mm256_madd_epi16(pairs[k], lower));
        }
      }
      for (int k = 0; k < 4; ++k) {
        const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high[k], kLowBits), low[k]);
        high[k] = _mm256_srai_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(kHalf)), kWeightBits);
      }
      // The packing undoes the unpacking, half by half.
      const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(high[0], high[1]),
                                                 _mm256_packs_epi32(high[2], high[3]));
      if (x + 32 <= bytes) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + x), packed);
      } else {
        alignas(32) std::uint8_t rest[32];
        _mm256_store_si256(reinterpret_cast<__m256i*>(rest), packed);
        std::memcpy(out + x, rest, bytes - x);
      }
    }
  }
}

constexpr Passes kPasses{"avx2", across, down, prepare};

}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512vnni")
#endif
namespace vnni {

void prepare(Taps& taps) {
  taps.digits.resize(taps.weights.size() * Taps::kDigits);
  for (std::size_t tap = 0; tap < taps.weights.size(); ++tap) {
    std::int32_t rest = taps.weights[tap];
    std::int8_t* digits = &taps.digits[tap / 4 * (4 * Taps::kDigits) + tap % 4];
    for (int digit = 0; digit < Taps::kDigits; ++digit) {
      digits[digit * 4] = static_cast<std::int8_t>(rest & 0xFF);
      rest = (rest - digits[digit * 4]) >> 8;
    }
  }
}

// Three sums, one of each digit's products.
struct Sums {
  __m256i digit[Taps::kDigits];

  void clear() {
    digit[0] = _mm256_set1_epi32(kHalf);
    digit[1] = digit[2] = _mm256_setzero_si256();
  }
  void add(__m256i pixels, const __m256i* weights) {
    for (int k = 0; k < Taps::kDigits; ++k)
      digit[k] = _mm256_dpbusd_epi32(digit[k], pixels, weights[k]);
  }
  __m256i whole() const {
    const __m256i upper = _mm256_add_epi32(_mm256_slli_epi32(digit[2], 8), digit[1]);
    const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(upper, 8), digit[0]);
    return _mm256_srai_epi32(sum, kWeightBits);
  }
};

inline void load_weights(const Taps& taps, std::size_t group, __m256i* weights) {
  for (int k = 0; k < Taps::kDigits; ++k) {
    std::int32_t four;
    std::memcpy(&four, &taps.digits[(group * Taps::kDigits + k) * 4], 4);
    weights[k] = _mm256_set1_epi32(four);
  }
}

void across(const Rows& rows, int count, const Taps& taps, int skipped) {
  constexpr int kVectors = 4;  // of two rows each
  // Four pixels of one row in each half of the vector, channel by channel.
  const __m256i gather = _mm256_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1,  //
                                          0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1);
  const int outputs = static_cast<int>(taps.first.size());
  for (int row = 0; row < count; row += 2 * kVectors) {
    const std::uint8_t* source[2 * kVectors];
    std::uint8_t* out[2 * kVectors];
    for (int k = 0; k < 2 * kVectors; ++k) {  // what is left of the last rows is computed twice
      source[k] = rows.source + std::min(row + k, count - 1) * rows.source_stride;
      out[k] = rows.out + std::min(row + k, count - 1) * rows.out_stride;
    }
    for (int i = 0; i < outputs; ++i) {
      const std::size_t place = static_cast<std::size_t>(taps.first[i] - skipped) * 3;
      Sums sums[kVectors];
      for (Sums& each : sums) each.clear();
      for (int tap = 0; tap < taps.count[i]; tap += Taps::kGroup) {
        __m256i weights[Taps::kDigits];
        load_weights(taps, taps.group(i) + tap / Taps::kGroup, weights);
        for (int k = 0; k < kVectors; ++k) {
          const auto at = [&](int which) {
            return _mm_loadu_si128(
                reinterpret_cast<const __m128i*>(source[which] + place + tap * 3));
          };
          const __m256i two =
              _mm256_inserti128_si256(_mm256_castsi128_si256(at(2 * k)), at(2 * k + 1), 1);
          sums[k].add(_mm256_shuffle_epi8(two, gather), weights);
        }
      }
      for (int k = 0; k < kVectors; k += 2) {
        const __m256i words = _mm256_packs_epi32(sums[k].whole(), sums[k + 1].whole());
        alignas(32) std::uint32_t pixels[8];  // in each half of two rows: the pixel, nothing
        _mm256_store_si256(reinterpret_cast<__m256i*>(pixels), _mm256_packus_epi16(words, words));
        const bool last = i + 1 == outputs;
        store_pixel(out[2 * k] + i * 3, pixels[0], last);
        store_pixel(out[2 * k + 1] + i * 3, pixels[4], last);
        store_pixel(out[2 * k + 2] + i * 3, pixels[1], last);
        store_pixel(out[2 * k + 3] + i * 3, pixels[5], last);
      }
    }
  }
}

void down(const Rows& rows, int bytes, const Taps& taps, int skipped) {
  const int outputs = static_cast<int>(taps.first.size());
  for (int i = 0; i < outputs; ++i) {
    const std::uint8_t* source = rows.source + (taps.first[i] - skipped) * rows.source_stride;
    std::uint8_t* out = rows.out + i * rows.out_stride;
    const int count = taps.count[i];
    for (int x = 0; x < bytes; x += 32) {
      Sums sums[4];
      for (Sums& each : sums) each.clear();
      for (int y = 0; y < count; y += Taps::kGroup) {
        __m256i weights[Taps::kDigits];
        load_weights(taps, taps.group(i) + y / Taps::kGroup, weights);
        __m256i row[4];
        for (int k = 0; k < 4; ++k) {  // rows beyond the last count nothing
          row[k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
              source + std::min(y + k, count - 1) * rows.source_stride + x));
        }
        const __m256i left = _mm256_unpacklo_epi8(row[0], row[1]);
        const __m256i right = _mm256_unpackhi_epi8(row[0], row[1]);
        const __m256i next_left = _mm256_unpacklo_epi8(row[2], row[3]);
        const __m256i next_right = _mm256_unpackhi_epi8(row[2], row[3]);
        sums[0].add(_mm256_unpacklo_epi16(left, next_left), weights);
        sums[1].add(_mm256_unpackhi_epi16(left, next_left), weights);
        sums[2].add(_mm256_unpacklo_epi16(right, next_right), weights);
        sums[3].add(_mm256_unpackhi_epi16(right, next_right), weights);
      }
      // The packing undoes the unpacking, half by half.
      const __m256i packed =
          _mm256_packus_epi16(_mm256_packs_epi32(sums[0].whole(), sums[1].whole()),
                              _mm256_packs_epi32(sums[2].whole(), sums[3].whole()));
      const auto written = static_cast<unsigned>(std::min(bytes - x, 32));
      const __mmask32 mask = written == 32 ? ~0u : (1u << written) - 1;
      _mm256_mask_storeu_epi8(out + x, mask, packed);
    }
  }
}

constexpr Passes kPasses{"vnni", across, down, prepare};

}  // namespace vnni
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Passes* avx2_passes() {
  static const bool supported = __builtin_cpu_supports("avx2");
  return supported ? &avx2::kPasses : nullptr;
}

const Passes* vnni_passes() {
  static const bool supported =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return supported ? &vnni::kPasses : nullptr;
}

}  // namespace fastclip

#else

namespace fastclip {

const Passes* avx2_passes() { return nullptr; }
const Passes* vnni_passes() { return nullptr; }

}  // namespace fastclip

#endif
