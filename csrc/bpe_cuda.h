// The tokenizer on a GPU. No CUDA header is needed to include this one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

namespace fastclip {

// Devices that this process may use; 0 where there is none, or no driver.
int cuda_device_count();

// Texts and where their rows go: addresses of the device's memory (or of pinned memory that it can
// reach).
struct CudaBatch {
  const std::uint8_t* data;  // UTF-8, one text behind the other
  std::size_t size;          // of data; a text that is not inside is refused
  const std::int32_t*
      offsets;  // [count + 1]: text i is data[offsets[i]] up to data[offsets[i + 1]]
  std::size_t count;
  void* rows;  // [count][context_length] of id_bytes each: 2, 4 or 8
  std::size_t context_length;
  int id_bytes;
  std::int32_t* lengths;  // [count], ids of a row with both ends; 0 if its text was refused
  std::int32_t* refused;  // [1 + count]: how many were, then which, in any order
  bool truncate;          // cut a text that is too long, or else refuse it
};

// One vocabulary in one device's memory. All methods throw std::runtime_error with CUDA's words.
class CudaEncoder {
 public:
  // `strict` refuses characters that the Unicode tables do not know.
  CudaEncoder(std::string_view merges, int unicode_version, bool strict, int device);
  ~CudaEncoder();
  CudaEncoder(const CudaEncoder&) = delete;
  CudaEncoder& operator=(const CudaEncoder&) = delete;

  // Enqueue the work on a stream (a cudaStream_t); it can be captured in a graph.
  void encode(const CudaBatch& batch, void* stream) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fastclip
