// The GPU tokenizer's program on the host, as a library: one row after the other,
// the lanes of a warp in a loop.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string_view>
#include <vector>

#include "warp_row.h"

using namespace fastclip;

namespace {

struct Emulation {
  Vocabulary vocabulary;
  WarpTables tables;

  Emulation(std::string_view merges, int unicode_version, bool strict)
      : vocabulary(merges),
        tables{&vocabulary.tables(), unicode_tables(unicode_version),
               kRefusedProperties | (strict ? std::uint32_t{kUnassigned} : 0)} {}
};

template <typename Id>
int encode_once(const WarpTables& tables, const std::vector<std::uint8_t>& text, bool descending,
                Id* row, int context_length, bool truncate) {
  const auto space = std::make_unique<WarpSpace>();
  std::memset(space.get(), 0xA5, sizeof(WarpSpace));  // nothing that a text before has left
  const HostWarp warp(descending);
  return WarpRow<HostWarp>(warp, *space, tables, text.data(), static_cast<int>(text.size()))
      .encode(row, context_length, truncate);
}

// In both orders of the lanes; if they differ, -1 and a row of nonsense.
template <typename Id>
int encode_row(const WarpTables& tables, const std::uint8_t* text, int length, Id* row,
               int context_length, bool truncate) {
  // Memory of its own for each text, so that sanitizers see what is read outside.
  const std::vector<std::uint8_t> own(text, text + length);
  std::vector<Id> other(static_cast<std::size_t>(context_length), Id{7});
  const int count = encode_once(tables, own, false, row, context_length, truncate);
  if (encode_once(tables, own, true, other.data(), context_length, truncate) == count &&
      (count == 0 || std::equal(other.begin(), other.end(), row))) {
    return count;
  }
  std::fill(row, row + context_length, static_cast<Id>(-1));
  return -1;
}

}  // namespace

extern "C" {

void* emulation_new(const char* merges, std::size_t length, int unicode_version, int strict) {
  try {
    return new Emulation({merges, length}, unicode_version, strict != 0);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void emulation_delete(void* emulation) { delete static_cast<Emulation*>(emulation); }

// As CudaEncoder::encode.
void emulation_encode(void* emulation, const std::uint8_t* data, std::size_t size,
                      const std::int32_t* offsets, std::size_t count, void* rows,
                      std::size_t context_length, int id_bytes, std::int32_t* lengths,
                      std::int32_t* refused, int truncate) {
  const WarpTables& tables = static_cast<Emulation*>(emulation)->tables;
  refused[0] = 0;
  for (std::size_t i = 0; i < count; ++i) {
    lengths[i] = 0;
    const std::int32_t begin = offsets[i], end = offsets[i + 1];
    if (begin >= 0 && begin <= end && static_cast<std::size_t>(end) <= size) {
      const auto encode = [&](auto* all) {
        lengths[i] = encode_row(tables, data + begin, end - begin, all + i * context_length,
                                static_cast<int>(context_length), truncate != 0);
      };
      if (id_bytes == 2) encode(static_cast<std::uint16_t*>(rows));
      if (id_bytes == 4) encode(static_cast<std::int32_t*>(rows));
      if (id_bytes == 8) encode(static_cast<std::int64_t*>(rows));
    }
    if (lengths[i] == 0) refused[++refused[0]] = static_cast<std::int32_t>(i);
  }
}

}  // extern "C"
