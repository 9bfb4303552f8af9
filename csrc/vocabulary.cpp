#include "vocabulary.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastclip {
namespace {

constexpr std::size_t kMerges = kVocabularySize - 2 - 512;
constexpr std::string_view kWordEnd = "</w>";

bool is_printable(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

// OpenAI's byte alphabet: printable bytes spell themselves, the others U+0100 and up, in order.
struct ByteAlphabet {
  std::uint16_t id_of_byte[256];
  std::uint8_t byte_of_character[256 + 68];

  ByteAlphabet() {
    std::uint16_t id = 0, other = 256;
    for (int byte = 0; byte < 256; ++byte) {
      if (!is_printable(byte)) continue;
      id_of_byte[byte] = id++;
      byte_of_character[byte] = static_cast<std::uint8_t>(byte);
    }
    for (int byte = 0; byte < 256; ++byte) {
      if (is_printable(byte)) continue;
      id_of_byte[byte] = id++;
      byte_of_character[other++] = static_cast<std::uint8_t>(byte);
    }
  }

  // The bytes that a spelling (UTF-8 of characters below U+0144) stands for.
  void decode(std::string_view spelling, std::string& bytes) const {
    for (std::size_t i = 0; i < spelling.size(); ++i) {
      unsigned c = static_cast<unsigned char>(spelling[i]);
      if (c >= 0x80 && i + 1 < spelling.size()) {
        c = (c & 31) << 6 | (static_cast<unsigned char>(spelling[++i]) & 63);
      }
      if (c >= sizeof byte_of_character) throw std::invalid_argument("not a merge table of CLIP");
      bytes.push_back(static_cast<char>(byte_of_character[c]));
    }
  }
};

// Tokens by spelling, while the table is read. Spellings lie one behind the other.
class Spellings {
 public:
  Spellings() : slots_(std::size_t{1} << 17, kFree) { starts_.push_back(0); }

  void add(std::string_view bytes) {
    text_.append(bytes);
    const std::size_t id = starts_.size() - 1;
    starts_.push_back(static_cast<std::uint32_t>(text_.size()));
    std::size_t slot = first_slot(bytes);
    while (slots_[slot] != kFree) slot = (slot + 1) & (slots_.size() - 1);
    slots_[slot] = static_cast<std::uint16_t>(id);
  }
  std::uint16_t find(std::string_view bytes) const {
    for (std::size_t slot = first_slot(bytes);; slot = (slot + 1) & (slots_.size() - 1)) {
      if (slots_[slot] == kFree) throw std::invalid_argument("a merge of unknown tokens");
      if (spelling(slots_[slot]) == bytes) return slots_[slot];
    }
  }
  std::string_view spelling(std::size_t id) const {
    return std::string_view(text_).substr(starts_[id], starts_[id + 1] - starts_[id]);
  }

 private:
  static constexpr std::uint16_t kFree = 0xFFFF;
  std::size_t first_slot(std::string_view bytes) const {
    return hash_bytes(bytes.data(), bytes.size()) >> 47;
  }
  std::string text_;
  std::vector<std::uint32_t> starts_;
  std::vector<std::uint16_t> slots_;
};

}  // namespace

Vocabulary::Vocabulary(std::string_view merges) : memory_(1), tables_(memory_.data()) {
  std::fill(std::begin(tables_->words), std::end(tables_->words), VocabularyTables::kFree);
  std::fill(std::begin(tables_->pairs), std::end(tables_->pairs), VocabularyTables::kFree);

  const ByteAlphabet alphabet;
  std::copy(std::begin(alphabet.id_of_byte), std::end(alphabet.id_of_byte), tables_->byte_ids);

  // Spellings are kept as the file has them, in the byte alphabet and with "</w>".
  Spellings tokens;
  std::string symbols[256];
  for (unsigned c = 0; c < std::size(alphabet.byte_of_character); ++c) {
    if (c < 256 && !is_printable(static_cast<int>(c))) continue;
    std::string& symbol = symbols[alphabet.id_of_byte[alphabet.byte_of_character[c]]];
    if (c < 0x80) {
      symbol = {static_cast<char>(c)};
    } else {
      symbol = {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 63))};
    }
  }
  for (const std::string& symbol : symbols) tokens.add(symbol);
  for (const std::string& symbol : symbols) tokens.add(symbol + std::string(kWordEnd));

  std::string joined;
  std::vector<std::uint32_t> pairs;
  pairs.reserve(kMerges);
  std::size_t id = 512;
  while (!merges.empty()) {
    const std::size_t newline = std::min(merges.find('\n'), merges.size());
    const std::string_view line = merges.substr(0, newline);
    merges.remove_prefix(std::min(newline + 1, merges.size()));
    const std::size_t blank = line.find(' ');
    if (blank == std::string_view::npos || id == kStartOfText) {
      throw std::invalid_argument("the merge table is not the one of CLIP");
    }
    const std::string_view left = line.substr(0, blank), right = line.substr(blank + 1);
    pairs.push_back(static_cast<std::uint32_t>(tokens.find(left)) << 16 | tokens.find(right));
    joined.assign(left).append(right);
    tokens.add(joined);
    ++id;
  }
  if (id != 512 + kMerges) throw std::invalid_argument("the merge table is not the one of CLIP");
  add_pairs(pairs);

  for (std::size_t left = 0; left < 256; ++left) {
    for (std::size_t right = 0; right < 256; ++right) {
      for (const int last : {0, 1}) {
        const auto end = static_cast<std::uint16_t>(tables_->byte_ids[right] + 256 * last);
        tables_->byte_pairs[last][left][right] = tables_->merge(tables_->byte_ids[left], end);
      }
    }
  }

  // Early merges are frequent words: entered first, they stand where their search starts.
  std::string bytes;
  for (id = 256; id < kStartOfText; ++id) {
    std::string_view spelling = tokens.spelling(id);
    if (spelling.size() <= kWordEnd.size() ||
        spelling.substr(spelling.size() - kWordEnd.size()) != kWordEnd)
      continue;
    spelling.remove_suffix(kWordEnd.size());
    bytes.clear();
    alphabet.decode(spelling, bytes);
    const std::size_t length = bytes.size();
    if (length > kKeyBytes) continue;
    bytes.resize(kKeyBytes, '\0');
    add_word(load_key(reinterpret_cast<const std::uint8_t*>(bytes.data()), length),
             static_cast<std::uint16_t>(id));
  }
}

void Vocabulary::add_pairs(const std::vector<std::uint32_t>& pairs) {
  using PairHash = VocabularyTables::PairHash;
  constexpr std::size_t kGroups = std::size_t{1} << VocabularyTables::kShiftBits;
  std::vector<PairHash> hashes;
  hashes.reserve(pairs.size());
  std::vector<std::uint32_t> ends(kGroups + 1);
  for (const std::uint32_t pair : pairs) {
    hashes.emplace_back(static_cast<std::uint16_t>(pair >> 16), static_cast<std::uint16_t>(pair));
    ++ends[hashes.back().group() + 1];
  }
  // Members of group g: indices[ends[g]] up to indices[ends[g + 1]].
  std::uint32_t largest = 0;
  for (std::size_t group = 0; group < kGroups; ++group) {
    largest = std::max(largest, ends[group + 1]);
    ends[group + 1] += ends[group];
  }
  std::vector<std::uint32_t> next(ends.begin(), ends.end() - 1), indices(pairs.size());
  for (std::uint32_t i = 0; i < pairs.size(); ++i) indices[next[hashes[i].group()]++] = i;

  // The largest groups are the hardest to place, and come first. True if all of one found room.
  const auto place = [&](const std::uint32_t* begin, const std::uint32_t* end,
                         std::uint32_t shift) {
    for (const std::uint32_t* member = begin; member != end; ++member) {
      std::uint32_t& entry = tables_->pairs[hashes[*member].slot(shift)];
      if (entry != VocabularyTables::kFree) {
        while (member != begin) {
          tables_->pairs[hashes[*--member].slot(shift)] = VocabularyTables::kFree;
        }
        return false;
      }
      entry = hashes[*member].lower << 16 | (512 + *member);
    }
    return true;
  };
  for (std::uint32_t size = largest; size > 0; --size) {
    for (std::size_t group = 0; group < kGroups; ++group) {
      if (ends[group + 1] - ends[group] != size) continue;
      std::uint32_t shift = 0;
      while (!place(&indices[ends[group]], indices.data() + ends[group + 1], shift)) {
        if (++shift > 255) throw std::invalid_argument("the merge table is not the one of CLIP");
      }
      tables_->shifts[group] = static_cast<std::uint8_t>(shift);
    }
  }
}

void Vocabulary::add_word(const Key& key, std::uint16_t id) {
  tables_->keys[id] = key;
  const std::uint32_t tag = VocabularyTables::word_tag(key);
  std::size_t slot = static_cast<std::size_t>(key.hash() >> (64 - VocabularyTables::kWordBits));
  for (; tables_->words[slot] != VocabularyTables::kFree;
       slot = (slot + 1) & (std::size(tables_->words) - 1)) {
    // The search stops at the first equal tag, so a second word of that tag cannot be found. It is
    // left to the merges, which give the same id.
    if (tables_->words[slot] >> 16 == tag) return;
  }
  tables_->words[slot] = tag << 16 | id;
}

}  // namespace fastclip
