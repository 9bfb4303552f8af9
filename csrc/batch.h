// Many texts at once: rows of token ids, on several threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "encoder.h"

namespace fastclip {

// A caller's matrix of ids, C-contiguous: [rows, context_length] of 2, 4 or 8 bytes each.
struct Rows {
  void* data;
  std::size_t context_length;
  int id_bytes;
  std::int32_t* lengths;  // [rows], ids of a row with both ends; may be null
};

// A row that was not written, and why.
struct Unwritten {
  enum class Reason : std::uint8_t { kMojibake, kUnassigned, kNotUtf8, kTooLong };
  std::size_t index;
  Reason reason;
  std::size_t detail;  // kNotUtf8: the first bad byte; kTooLong: the text's tokens with both ends
};

class Pool;

// Any number of threads may call it. A child process that was forked from one that had called it
// may go on with it.
class BatchEncoder {
 public:
  // `threads`: how many work on one batch at most, the caller's included.
  BatchEncoder(std::shared_ptr<const Vocabulary> vocabulary, const UnicodeTables& tables,
               Dialect dialect, AsciiScan scan, unsigned threads);
  ~BatchEncoder();
  BatchEncoder(const BatchEncoder&) = delete;
  BatchEncoder& operator=(const BatchEncoder&) = delete;

  // Write every row that needs neither ftfy nor a newer Unicode version; the others are returned,
  // in ascending order. A text that is too long is cut (`truncate`) or returned.
  std::vector<Unwritten> encode(const TextView* texts, std::size_t count, bool truncate,
                                const Rows& rows);
  // Write row `index` from a text that is clean already. False if it is too long, its tokens in
  // `tokens`.
  bool encode_cleaned(const TextView& text, std::size_t index, bool truncate, const Rows& rows,
                      std::size_t* tokens);
  // The same from ids.
  static bool write_ids(const std::uint16_t* ids, std::size_t count, std::size_t index,
                        bool truncate, const Rows& rows, std::size_t* tokens);
  // Lend an encoder of the calling thread's to `use`.
  void with_encoder(const std::function<void(Encoder&)>& use);

 private:
  struct State;
  State& state();
  std::unique_ptr<Encoder> take(State& state);
  void give(State& state, std::unique_ptr<Encoder> encoder);
  void encode_range(Encoder& encoder, const TextView* texts, std::size_t begin, std::size_t end,
                    bool truncate, const Rows& rows, std::vector<Unwritten>& unwritten) const;

  const std::shared_ptr<const Vocabulary> vocabulary_;
  const UnicodeTables& tables_;
  const Dialect dialect_;
  const AsciiScan scan_;
  const unsigned threads_;
  std::atomic<State*> state_;
  std::atomic<int> process_;  // the one whose threads state_ knows
};

}  // namespace fastclip
