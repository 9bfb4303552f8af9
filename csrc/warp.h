// A warp of 32 lanes that work in step: on a GPU the real one, on the host a loop over the lanes,
// so that the host can run the same program.
//
// A program is written as steps. Inside a step a lane knows its number and its own element of each
// `PerLane`; between steps all lanes see what all have written.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTCLIP_WARP __device__
#else
#define FASTCLIP_WARP
#endif

namespace fastclip {

constexpr int kLanes = 32;

#if defined(__CUDACC__)

class DeviceWarp {
 public:
  template <typename T>
  class PerLane {
   public:
    __device__ T& operator[](int) { return value_; }

   private:
    friend class DeviceWarp;
    T value_{};
  };
  using Words = PerLane<std::uint32_t>;

  template <typename Step>
  __device__ void each(Step step) const {
    step(lane_);
    __syncwarp();
  }
  // Votes and shuffles order no memory: what a step has read, the next one may overwrite only after
  // __syncwarp.
  // Bit i: what the step says in lane i.
  template <typename Step>
  __device__ std::uint32_t ballot(Step step) const {
    const bool vote = step(lane_);
    __syncwarp();
    return __ballot_sync(kAll, vote);
  }
  template <typename Step>
  __device__ std::uint32_t least(Step step) const {
    const std::uint32_t own = step(lane_);
    __syncwarp();
    return __reduce_min_sync(kAll, own);
  }
  template <typename Step>
  __device__ std::uint32_t either(Step step) const {
    const std::uint32_t own = step(lane_);
    __syncwarp();
    return __reduce_or_sync(kAll, own);
  }
  // A lane's element, for all.
  __device__ std::uint32_t at(const Words& words, int lane) const {
    return __shfl_sync(kAll, words.value_, lane);
  }
  // To each lane the element of the lane below it, or above it; 0 where there is none.
  __device__ Words from_below(const Words& words) const {
    Words moved;
    moved.value_ = __shfl_up_sync(kAll, words.value_, 1);
    if (lane_ == 0) moved.value_ = 0;
    return moved;
  }
  __device__ Words from_above(const Words& words) const {
    Words moved;
    moved.value_ = __shfl_down_sync(kAll, words.value_, 1);
    if (lane_ == kLanes - 1) moved.value_ = 0;
    return moved;
  }
  // To each lane the sum of all below it.
  __device__ Words sums_below(const Words& words) const {
    std::uint32_t sum = words.value_;
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const std::uint32_t other = __shfl_up_sync(kAll, sum, distance);
      if (lane_ >= distance) sum += other;
    }
    Words sums;
    sums.value_ = sum - words.value_;
    return sums;
  }

 private:
  static constexpr std::uint32_t kAll = ~0u;
  const int lane_ = static_cast<int>(threadIdx.x % kLanes);
};

#endif

// Lanes take their turns in ascending or in descending order: a program whose lanes do not wait for
// each other where they should gives different results.
class HostWarp {
 public:
  explicit HostWarp(bool descending = false) : descending_(descending) {}

  template <typename T>
  class PerLane {
   public:
    T& operator[](int lane) { return values_[lane]; }
    const T& operator[](int lane) const { return values_[lane]; }

   private:
    T values_[kLanes] = {};
  };
  using Words = PerLane<std::uint32_t>;

  template <typename Step>
  void each(Step step) const {
    for (int turn = 0; turn < kLanes; ++turn) step(descending_ ? kLanes - 1 - turn : turn);
  }
  template <typename Step>
  std::uint32_t ballot(Step step) const {
    std::uint32_t votes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (step(lane)) votes |= 1u << lane;
    }
    return votes;
  }
  template <typename Step>
  std::uint32_t least(Step step) const {
    std::uint32_t least = ~0u;
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::uint32_t own = step(lane);
      if (own < least) least = own;
    }
    return least;
  }
  template <typename Step>
  std::uint32_t either(Step step) const {
    std::uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= step(lane);
    return bits;
  }
  std::uint32_t at(const Words& words, int lane) const { return words[lane]; }
  Words from_below(const Words& words) const {
    Words moved;
    for (int lane = 1; lane < kLanes; ++lane) moved[lane] = words[lane - 1];
    return moved;
  }
  Words from_above(const Words& words) const {
    Words moved;
    for (int lane = 0; lane + 1 < kLanes; ++lane) moved[lane] = words[lane + 1];
    return moved;
  }
  Words sums_below(const Words& words) const {
    Words sums;
    for (int lane = 1; lane < kLanes; ++lane) sums[lane] = sums[lane - 1] + words[lane - 1];
    return sums;
  }

 private:
  const bool descending_;
};

// Bits are looked at the same way on both.
FASTCLIP_WARP inline int count_bits(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}
FASTCLIP_WARP inline int lowest_bit(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

}  // namespace fastclip
