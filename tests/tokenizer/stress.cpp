// Random bytes and code points through the whole of csrc/, to be built with sanitizers:
//
//     stress MERGES SEED TEXTS THREADS
//
// Checks what can be checked without an oracle: the scans agree, rows are framed, results do not
// depend on the batch a text is in. Exits with 1 on the first difference.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "batch.h"
#include "warp_row.h"

using namespace fastclip;

namespace {

using Random = std::mt19937_64;

// Text in all storages, made of what the tables tell apart.
struct Sample {
  Storage storage;
  std::vector<std::uint8_t> bytes;
  std::vector<std::uint16_t> halves;
  std::vector<std::uint32_t> words;

  TextView view() const {
    // Copies without slack, so that a read past the end is noticed.
    switch (storage) {
      case Storage::kUcs2:
        return {halves.data(), halves.size(), storage};
      case Storage::kUcs4:
        return {words.data(), words.size(), storage};
      default:
        return {bytes.data(), bytes.size(), storage};
    }
  }
};

const char* const kPieces[] = {"a",
                               "photo",
                               "'s",
                               "'ll",
                               "'",
                               "&amp;",
                               "&#x41;",
                               "&#",
                               "&",
                               " ",
                               "\n",
                               "<",
                               "</b>",
                               "0",
                               "12",
                               "!",
                               "\x1b[1m",
                               "&copy",
                               "\t",
                               "&notit;",
                               "&lt;",
                               "\x7f",
                               "ABC",
                               "_",
                               "zxqvwk",
                               "'Re",
                               "<|",
                               "<|endoftext|>",
                               "&#59;",
                               "<end_of_text>",
                               "&#1114112;",
                               "&#99999999999999999999;",
                               "antidisestablishmentarianism"};

std::uint32_t any_code_point(Random& random) {
  switch (random() % 6) {
    case 0:
      return static_cast<std::uint32_t>(random() % 0x100);
    case 1:
      return static_cast<std::uint32_t>(random() % 0x3000);
    case 2:
      return 0x300 + static_cast<std::uint32_t>(random() % 0x70);
    case 3:
      return 0xAC00 + static_cast<std::uint32_t>(random() % 11172);
    case 4:
      return 0xD800 + static_cast<std::uint32_t>(random() % 0x800);
    default:
      return static_cast<std::uint32_t>(random() % 0x110000);
  }
}

Sample make_sample(Random& random) {
  Sample sample;
  sample.storage = static_cast<Storage>(random() % 5);
  const std::size_t longest = random() % 50 == 0 ? 3000 : random() % 4 == 0 ? 200 : 20;
  const std::size_t count = random() % (longest + 1);
  const std::uint32_t highest = sample.storage == Storage::kAscii    ? 0x7F
                                : sample.storage == Storage::kLatin1 ? 0xFF
                                : sample.storage == Storage::kUcs2   ? 0xFFFF
                                                                     : 0x10FFFF;
  for (std::size_t i = 0; i < count; ++i) {
    if (random() % 2) {
      for (const char* c = kPieces[random() % std::size(kPieces)]; *c != '\0'; ++c) {
        sample.words.push_back(static_cast<unsigned char>(*c));
      }
    } else {
      sample.words.push_back(any_code_point(random) & highest);
    }
  }
  for (std::uint32_t& c : sample.words) {
    if (c > 0x10FFFF) c = 'x';
    sample.halves.push_back(static_cast<std::uint16_t>(c));
    // As UTF-8 these are often ill-formed, which has to be survived as well.
    sample.bytes.push_back(
        static_cast<std::uint8_t>(c & (sample.storage == Storage::kAscii ? 0x7F : 0xFF)));
  }
  sample.bytes.shrink_to_fit();
  sample.halves.shrink_to_fit();
  sample.words.shrink_to_fit();
  return sample;
}

// The GPU's program, a text at a time: what it does not refuse has the host's ids.
int emulate_warps(const Vocabulary& vocabulary, const std::vector<TextView>& views,
                  const std::vector<std::int32_t>& expected,
                  const std::vector<std::int32_t>& lengths, std::size_t context_length) {
  const HostWarp warp;
  const WarpTables tables{&vocabulary.tables(), unicode_tables(15), kRefusedProperties};
  std::vector<std::int32_t> row(context_length);
  for (std::size_t i = 0; i < views.size(); ++i) {
    if (views[i].storage != Storage::kAscii && views[i].storage != Storage::kUtf8) continue;
    const auto space = std::make_unique<WarpSpace>();
    WarpRow<HostWarp> program(warp, *space, tables, static_cast<const std::uint8_t*>(views[i].data),
                              static_cast<int>(views[i].length));
    const int length = program.encode(row.data(), static_cast<int>(context_length), true);
    if (length == 0) continue;
    if (length != lengths[i]) return 1;
    if (!std::equal(row.begin(), row.end(), expected.data() + i * context_length)) return 1;
  }
  return 0;
}

int fail(const char* what, std::size_t index) {
  std::fprintf(stderr, "%s at text %zu\n", what, index);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return fail("usage: stress MERGES SEED TEXTS THREADS", 0);
  std::ifstream file(argv[1], std::ios::binary);
  const std::string merges{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const auto vocabulary = std::make_shared<const Vocabulary>(merges);
  Random random(std::strtoull(argv[2], nullptr, 10));
  const std::size_t count = std::strtoull(argv[3], nullptr, 10);
  const auto threads = static_cast<unsigned>(std::strtoul(argv[4], nullptr, 10));

  std::vector<Sample> samples;
  for (std::size_t i = 0; i < count; ++i) samples.push_back(make_sample(random));
  std::vector<TextView> views;
  for (const Sample& sample : samples) views.push_back(sample.view());

  const char* name = nullptr;
  const AsciiScan best = best_ascii_scan(&name);
  const CleanMode modes[] = {CleanMode::kLower, CleanMode::kWhitespace, CleanMode::kCanonicalize};
  for (const CleanMode mode : modes) {
    const Dialect dialect{"<|startoftext|>", "<|endoftext|>", mode};
    BatchEncoder many(vocabulary, unicode_tables(15), dialect, best, threads);
    BatchEncoder one(vocabulary, unicode_tables(15), dialect, scan_portable, 1);
    constexpr std::size_t kLength = 13;
    std::vector<std::int32_t> expected(count * kLength), lengths(count);
    const Rows rows{expected.data(), kLength, 4, lengths.data()};
    const auto unwritten = one.encode(views.data(), count, true, rows);
    for (std::size_t i = 0; i < count; ++i) {
      const std::int32_t* row = expected.data() + i * kLength;
      if (lengths[i] == 0) continue;  // not written
      if (row[0] != kStartOfText || row[lengths[i] - 1] != kEndOfText) return fail("no frame", i);
    }
    if (mode == CleanMode::kLower &&
        emulate_warps(*vocabulary, views, expected, lengths, kLength) != 0) {
      return fail("a warp gives other ids", 0);
    }
    // Several callers at once, each with its own rows; the pool serves one of them.
    std::vector<int> results(3);
    std::vector<std::thread> callers;
    for (std::size_t caller = 0; caller < results.size(); ++caller) {
      callers.emplace_back([&, caller] {
        std::vector<std::int32_t> ids(count * kLength), own_lengths(count);
        const Rows own{ids.data(), kLength, 4, own_lengths.data()};
        const auto missing = many.encode(views.data(), count, true, own);
        const bool equal =
            ids == expected && own_lengths == lengths && missing.size() == unwritten.size();
        results[caller] = equal ? 0 : 1;
      });
    }
    for (std::thread& caller : callers) caller.join();
    for (const int result : results) {
      if (result != 0) return fail("rows depend on the scan or the threads", 0);
    }
    // Whole texts, which are not cut.
    for (std::size_t i = 0; i < count; i += 7) {
      one.with_encoder([&](Encoder& encoder) { encoder.encode(views[i], SIZE_MAX); });
    }
  }
  std::printf("%zu texts, %u threads, %s\n", count, threads, name);
  return 0;
}
