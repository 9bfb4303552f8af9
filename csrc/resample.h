// A box of an image, resized to a square: bicubic with antialiasing, equal to Pillow to the bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastclip {

// Source pixels; floats of 32 bits, as Pillow keeps them.
struct Box {
  float left, upper, right, lower;
};

// Which pixels of a line, in which proportions, make each pixel of a shorter or longer one.
struct Taps {
  static constexpr int kGroup = 4;   // taps that are worked on together
  static constexpr int kDigits = 3;  // bytes of a weight

  // Of output i: `count[i]` pixels from `first[i]` on, weights at `weights[i * stride]`, zeros to
  // the stride's end. Weights are fixed-point numbers with 22 bits behind the point.
  std::vector<int> first, count;
  std::vector<std::int32_t> weights;
  int stride = 0;

  // The weights once more, of each group of four: as the code at hand multiplies them.
  std::vector<std::int8_t> digits;  // signed, base 256: the four lowest, the middle, the highest
  std::vector<std::int16_t> high, low;  // weight = 2048 * high + low; two pairs, each four times

  void compute(int length, float begin, float end, int outputs);
  int begin() const { return first.front(); }
  int end() const { return first.back() + count.back(); }
  std::size_t group(int output) const { return static_cast<std::size_t>(output) * stride / kGroup; }
};

// Rows of three bytes a pixel.
struct Rows {
  const std::uint8_t* source;
  std::size_t source_stride;
  std::uint8_t* out;
  std::size_t out_stride;
};

// One pass in one kind of instructions; all give the same bytes. Source rows are read up to
// `Resampler::kSlack` bytes beyond their end.
struct Passes {
  const char* name;
  // `rows` rows; source pixels are counted from `skipped` on.
  void (*across)(const Rows& rows, int count, const Taps& taps, int skipped);
  // Rows of `bytes` bytes; source rows are counted from `skipped` on.
  void (*down)(const Rows& rows, int bytes, const Taps& taps, int skipped);
  void (*prepare)(Taps& taps);
};

// Resizes images one after the other, keeping its memory. For one thread at a time.
class Resampler {
 public:
  // Bytes that have to be readable behind an image's last row.
  static constexpr std::size_t kSlack = 64;

  // Args: the instructions to use: "portable", "avx2", "vnni" or "", the best that is there.
  // Throws std::invalid_argument if this machine has not got them.
  explicit Resampler(const char* instructions);

  // source: [height, width, 3] bytes without gaps. box: inside the image. out: [size, size, 3].
  void resize(const std::uint8_t* source, int width, int height, Box box, int size,
              std::uint8_t* out);

  const char* instructions() const { return passes_->name; }

 private:
  const Passes* passes_;
  Taps across_, down_;
  std::vector<std::uint8_t> between_;
};

constexpr int kWeightBits = 22;
constexpr std::int32_t kHalf = 1 << (kWeightBits - 1);

// nullptr where these instructions are not there.
const Passes* avx2_passes();
const Passes* vnni_passes();

}  // namespace fastclip
