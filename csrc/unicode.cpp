#include "unicode.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace fastclip {
namespace {

#include "tables/entities.inc"
#include "tables/unicode_14.inc"
#include "tables/unicode_15.inc"

#define FASTCLIP_TABLES(ns)                                                                       \
  UnicodeTables{                                                                                  \
      CharacterTables{ns::kPages, ns::kProperties, ns::kLowerDistances, ns::kBadnessMoves,        \
                      std::size(ns::kProperties), std::size(ns::kLowerDistances),                 \
                      std::size(ns::kBadnessMoves), ns::kBadnessClasses, ns::kBad,                \
                      ns::kUnremarkable},                                                         \
      ns::kVersion,                                                                               \
      ns::kLongestSign,                                                                           \
      StringTable{ns::kFixedKeys, ns::kFixedStarts, ns::kFixedPoints, std::size(ns::kFixedKeys)}, \
      StringTable{ns::kDecompositionKeys, ns::kDecompositionStarts, ns::kDecompositionPoints,     \
                  std::size(ns::kDecompositionKeys)},                                             \
      ns::kDeleted,                                                                               \
      std::size(ns::kDeleted),                                                                    \
      ns::kCompositions,                                                                          \
      std::size(ns::kCompositions) / 3,                                                           \
      ns::kCombining,                                                                             \
      std::size(ns::kCombining) / 3}

static_assert(std::size(unicode_14::kPages) == CharacterTables::kPages &&
              std::size(unicode_15::kPages) == CharacterTables::kPages);
constexpr UnicodeTables kTables14 = FASTCLIP_TABLES(unicode_14);
constexpr UnicodeTables kTables15 = FASTCLIP_TABLES(unicode_15);

// Index of the last triple whose first two values are not after the given ones; -1 if all are.
std::ptrdiff_t last_not_after(const std::uint32_t* triples, std::size_t count, std::uint32_t first,
                              std::uint32_t second) {
  std::size_t low = 0, high = count;
  while (low < high) {
    const std::size_t middle = (low + high) / 2;
    const std::uint32_t* triple = triples + 3 * middle;
    if (triple[0] < first || (triple[0] == first && triple[1] <= second)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<std::ptrdiff_t>(low) - 1;
}

}  // namespace

const std::size_t kLongestNameWithoutSemicolon = kLongestLegacyName;
const char* const kMadeWithRegex = kRegexVersion;
const char* const kMadeWithFtfy = kFtfyVersion;

const UnicodeTables& unicode_tables(int major) { return major >= 15 ? kTables15 : kTables14; }

const std::uint32_t* StringTable::find(std::uint32_t key, std::size_t* length) const {
  const std::uint32_t* found = std::lower_bound(keys, keys + count, key);
  if (found == keys + count || *found != key) return nullptr;
  const std::size_t place = static_cast<std::size_t>(found - keys);
  *length = static_cast<std::size_t>(starts[place + 1] - starts[place]);
  return points + starts[place];
}

bool UnicodeTables::is_deleted(std::uint32_t c) const {
  return std::binary_search(deleted, deleted + deleted_count, c);
}

std::uint32_t UnicodeTables::combining_class(std::uint32_t c) const {
  const std::ptrdiff_t place = last_not_after(combining, combining_count, c, ~0u);
  if (place < 0) return 0;
  const std::uint32_t* run = combining + 3 * place;
  return c - run[0] < run[1] ? run[2] : 0;
}

std::uint32_t UnicodeTables::compose(std::uint32_t first, std::uint32_t second) const {
  constexpr std::uint32_t kL = 0x1100, kV = 0x1161, kT = 0x11A7, kS = 0xAC00;
  if (first - kL < 19 && second - kV < 21) return kS + ((first - kL) * 21 + second - kV) * 28;
  if (first - kS < 11172 && (first - kS) % 28 == 0 && second - kT - 1 < 27) {
    return first + second - kT;
  }
  const std::ptrdiff_t place = last_not_after(compositions, composition_count, first, second);
  if (place < 0) return 0;
  const std::uint32_t* triple = compositions + 3 * place;
  return triple[0] == first && triple[1] == second ? triple[2] : 0;
}

Entity find_entity(const char* name, std::size_t length, EntityKind kind) {
  const char* const* end = std::end(kEntityNames);
  const char* const* found = std::lower_bound(std::begin(kEntityNames), end, name,
                                              [length](const char* entry, const char* sought) {
                                                return std::strncmp(entry, sought, length) < 0;
                                              });
  // The shortest of the names that begin like this one comes first.
  if (found == end || std::strncmp(*found, name, length) != 0 || (*found)[length] != '\0')
    return {nullptr, 0};
  const std::size_t place = static_cast<std::size_t>(found - std::begin(kEntityNames));
  if ((kEntityFlags[place] & kind) == 0) return {nullptr, 0};
  return {kEntityPoints + kEntityStarts[place],
          static_cast<std::size_t>(kEntityStarts[place + 1] - kEntityStarts[place])};
}

std::int32_t numeric_reference(std::uint32_t number) {
  for (std::size_t i = 0; i < std::size(kReplacedReferences); i += 2) {
    if (kReplacedReferences[i] == number)
      return static_cast<std::int32_t>(kReplacedReferences[i + 1]);
  }
  if ((number >= 0xD800 && number < 0xE000) || number > 0x10FFFF) return kReplacement;
  if (std::binary_search(std::begin(kDroppedReferences), std::end(kDroppedReferences), number))
    return -1;
  return static_cast<std::int32_t>(number);
}

}  // namespace fastclip
