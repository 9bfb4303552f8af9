#include "resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastclip {
namespace {

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

std::uint8_t rounded(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kWeightBits, 0, 255));
}

void across(const Rows& rows, int count, const Taps& taps, int skipped) {
  const int outputs = static_cast<int>(taps.first.size());
  for (int row = 0; row < count; ++row) {
    const std::uint8_t* source = rows.source + row * rows.source_stride;
    std::uint8_t* out = rows.out + row * rows.out_stride;
    for (int i = 0; i < outputs; ++i) {
      const std::uint8_t* pixel = source + static_cast<std::size_t>(taps.first[i] - skipped) * 3;
      const std::int32_t* weight = &taps.weights[static_cast<std::size_t>(i) * taps.stride];
      std::int32_t red = kHalf, green = kHalf, blue = kHalf;
      for (int x = 0; x < taps.count[i]; ++x, pixel += 3) {
        red += pixel[0] * weight[x];
        green += pixel[1] * weight[x];
        blue += pixel[2] * weight[x];
      }
      *out++ = rounded(red);
      *out++ = rounded(green);
      *out++ = rounded(blue);
    }
  }
}

void down(const Rows& rows, int bytes, const Taps& taps, int skipped) {
  const int outputs = static_cast<int>(taps.first.size());
  std::vector<std::int32_t> sums(bytes);
  for (int i = 0; i < outputs; ++i) {
    std::fill(sums.begin(), sums.end(), kHalf);
    const std::int32_t* weight = &taps.weights[static_cast<std::size_t>(i) * taps.stride];
    for (int y = 0; y < taps.count[i]; ++y) {
      const std::uint8_t* row = rows.source + (taps.first[i] - skipped + y) * rows.source_stride;
      for (int x = 0; x < bytes; ++x) sums[x] += row[x] * weight[y];
    }
    std::uint8_t* out = rows.out + i * rows.out_stride;
    for (int x = 0; x < bytes; ++x) out[x] = rounded(sums[x]);
  }
}

constexpr Passes kPortable{"portable", across, down, [](Taps&) {}};

const Passes* choose(const std::string& name) {
  if (name == "portable") return &kPortable;
  const Passes* const vectors[] = {vnni_passes(), avx2_passes()};
  for (const Passes* passes : vectors)
    if (passes != nullptr && (name.empty() || name == passes->name)) return passes;
  if (name.empty()) return &kPortable;
  throw std::invalid_argument("this machine has no instructions of the name " + name);
}

}  // namespace

void Taps::compute(int length, float begin, float end, int outputs) {
  const double scale = static_cast<double>(end - begin) / outputs;
  const double filter_scale = std::max(scale, 1.0);
  const double support = 2.0 * filter_scale;
  const double inverse = 1.0 / filter_scale;
  const int most = static_cast<int>(std::ceil(support)) * 2 + 1;
  stride = (most + kGroup - 1) / kGroup * kGroup;
  first.resize(outputs);
  count.resize(outputs);
  weights.assign(static_cast<std::size_t>(outputs) * stride, 0);
  std::vector<double> exact(stride);
  for (int i = 0; i < outputs; ++i) {
    const double centre = begin + (i + 0.5) * scale;
    const int from = std::max(static_cast<int>(centre - support + 0.5), 0);
    const int to = std::min(static_cast<int>(centre + support + 0.5), length);
    double sum = 0.0;
    for (int x = from; x < to; ++x) {
      exact[x - from] = bicubic((x - centre + 0.5) * inverse);
      sum += exact[x - from];
    }
    std::int32_t* weight = &weights[static_cast<std::size_t>(i) * stride];
    for (int x = 0; x < to - from; ++x) {
      const double share = sum != 0.0 ? exact[x] / sum : exact[x];
      weight[x] = static_cast<std::int32_t>((share < 0 ? -0.5 : 0.5) + share * (1 << kWeightBits));
    }
    first[i] = from;
    count[i] = to - from;
  }
}

Resampler::Resampler(const char* instructions) : passes_(choose(instructions)) {}

void Resampler::resize(const std::uint8_t* source, int width, int height, Box box, int size,
                       std::uint8_t* out) {
  const std::size_t stride = static_cast<std::size_t>(width) * 3;
  const std::size_t out_stride = static_cast<std::size_t>(size) * 3;
  across_.compute(width, box.left, box.right, size);
  down_.compute(height, box.upper, box.lower, size);
  passes_->prepare(across_);
  passes_->prepare(down_);
  // Pillow's rule since its version 13; before, the horizontal pass always came first.
  const bool down_first = height > size && height - size > (width - size) * 2;
  if (down_first) {
    const int first = across_.begin(), bytes = (across_.end() - first) * 3;
    const std::size_t row = bytes + kSlack;
    between_.resize(row * size + kSlack);
    passes_->down({source + static_cast<std::size_t>(first) * 3, stride, between_.data(), row},
                  bytes, down_, 0);
    passes_->across({between_.data(), row, out, out_stride}, size, across_, first);
  } else {
    const int first = down_.begin(), count = down_.end() - first;
    const std::size_t row = out_stride + kSlack;
    between_.resize(row * count + kSlack);
    passes_->across({source + first * stride, stride, between_.data(), row}, count, across_, 0);
    passes_->down({between_.data(), row, out, out_stride}, static_cast<int>(out_stride), down_,
                  first);
  }
}

}  // namespace fastclip
