#include "phrases.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <unordered_map>

namespace fastclip {
namespace {

// Three slots of five are taken: a search that fails looks at a few, mostly in one line of the
// cache.
std::size_t slots_for(std::size_t entries) { return entries + entries * 2 / 3 + 1; }

template <typename Table>
typename Table::reference free_slot(Table& table, std::size_t slot) {
  while (table[slot].node != std::numeric_limits<std::uint32_t>::max())
    if (++slot == table.size()) slot = 0;
  return table[slot];
}

enum class Kind : std::uint8_t { kInside, kBlank, kPunctuation };

constexpr std::array<Kind, 256> make_kinds() {
  std::array<Kind, 256> kinds{};
  for (const char c : {' ', '\t', '\n', '\r'}) kinds[static_cast<std::uint8_t>(c)] = Kind::kBlank;
  for (const char c : {',', '.', ';', ':', '?', '!', '`'})
    kinds[static_cast<std::uint8_t>(c)] = Kind::kPunctuation;
  return kinds;
}
constexpr std::array<Kind, 256> kKinds = make_kinds();

// Reads kKeyBytes from a short word: they must be there.
Key key_of(const char* word, std::size_t length) {
  if (length > kKeyBytes) return {hash_bytes(word, length), 0};
  return load_key(reinterpret_cast<const std::uint8_t*>(word), length);
}

// Ascending, none twice. A caption has a dozen, for which std::sort is slow.
void sort_unique(std::vector<std::int32_t>& ids) {
  if (ids.size() > 32) {
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    return;
  }
  std::size_t count = 0;
  for (const std::int32_t id : ids) {
    std::size_t i = count;
    while (i > 0 && ids[i - 1] > id) --i;
    if (i > 0 && ids[i - 1] == id) continue;
    std::copy_backward(ids.begin() + i, ids.begin() + count, ids.begin() + count + 1);
    ids[i] = id;
    ++count;
  }
  ids.resize(count);
}

}  // namespace

// Numbers the nodes in the order in which they occur, then anew: phrases' ids come first.
class PhraseTable::Builder {
 public:
  void add(std::string_view phrase, std::uint32_t id) {
    std::size_t end = std::min(phrase.find(' '), phrase.size());
    std::uint32_t node = node_of(words_, phrase.substr(0, end));
    while (end < phrase.size()) {
      const std::size_t begin = end + 1;
      end = std::min(phrase.find(' ', begin), phrase.size());
      const std::uint64_t word = node_of(words_, phrase.substr(begin, end - begin));
      bits_[node] = kContinues;
      node = node_of(edges_, std::uint64_t{node} << 32 | word);
    }
    if (numbers_[node] != kNone)
      throw std::invalid_argument("phrases " + std::to_string(numbers_[node]) + " and " +
                                  std::to_string(id) + " are equal");
    numbers_[node] = id;
  }

  void write(PhraseTable* table) {
    auto next = static_cast<std::uint32_t>(table->count_);
    for (std::uint32_t& number : numbers_)
      if (number == kNone) number = next++;
    table->words_.resize(slots_for(words_.size()));
    for (const auto& [bytes, node] : words_) {
      char padded[kKeyBytes] = {};
      const bool is_long = bytes.size() > kKeyBytes;
      if (!is_long) std::copy(bytes.begin(), bytes.end(), padded);
      Key key = key_of(is_long ? bytes.data() : padded, bytes.size());
      Word& word = free_slot(table->words_, table->word_slot(key));
      if (is_long) {
        key.high = table->long_words_.size();
        table->long_words_ += bytes;
      }
      word = {key, static_cast<std::uint32_t>(bytes.size()), numbers_[node] | bits_[node]};
    }
    table->edges_.resize(slots_for(edges_.size()));
    for (const auto& [pair, node] : edges_) {
      const std::uint32_t from = numbers_[pair >> 32],
                          word = numbers_[static_cast<std::uint32_t>(pair)];
      free_slot(table->edges_, table->edge_slot(from, word)) = {from, word,
                                                                numbers_[node] | bits_[node]};
    }
  }

 private:
  template <typename Nodes, typename Name>
  std::uint32_t node_of(Nodes& nodes, const Name& name) {
    const auto [place, is_new] =
        nodes.try_emplace(name, static_cast<std::uint32_t>(numbers_.size()));
    if (is_new) {
      if (numbers_.size() == number(kNone))
        throw std::length_error("the phrases have more than two billion beginnings");
      numbers_.push_back(kNone);
      bits_.push_back(0);
    }
    return place->second;
  }

  std::unordered_map<std::string_view, std::uint32_t> words_;
  std::unordered_map<std::uint64_t, std::uint32_t> edges_;  // (node, word's node)
  std::vector<std::uint32_t> numbers_, bits_;               // of each node
};

// Works through blocks of texts in three passes, so that the tables' lines, which each pass asks
// for, arrive while others are in use: words, nodes, longer phrases.
class PhraseTable::Matcher {
 public:
  static constexpr std::size_t kBlockWords = 256;

  explicit Matcher(const PhraseTable& table) : table_(table) {}

  std::size_t pending() const { return words_.size(); }

  void add(std::string_view text) {
    if (text.size() > std::numeric_limits<std::uint32_t>::max())
      throw std::length_error("a text has 4 GiB or more");
    // The last bytes again, with as many behind them as reading a key may take.
    const std::size_t copied = std::min(text.size(), kKeyBytes), copy = text.size() - copied;
    std::copy_n(text.data() + copy, copied, tail_.data());
    tail_begin_ = copy;

    std::size_t begin = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const Kind kind = kKinds[static_cast<std::uint8_t>(text[i])];
      if (kind == Kind::kInside) continue;
      add_word(text, begin, i);
      if (kind == Kind::kPunctuation) add_word(text, i, i + 1);
      begin = i + 1;
    }
    add_word(text, begin, text.size());
    ends_.push_back(words_.size());
  }

  void flush(PhraseMatches* matches) {
    nodes_.resize(words_.size());
    for (std::size_t i = 0; i < words_.size(); ++i) {
      nodes_[i] = find(words_[i]);
      if (i > 0 && goes_on(i - 1, nodes_[i]))
        prefetch(&table_.edges_[table_.edge_slot(number(nodes_[i - 1]), number(nodes_[i]))]);
    }
    std::size_t begin = 0;
    for (const std::size_t end : ends_) {
      found_.clear();
      for (; begin < end; ++begin) follow(begin, end);
      sort_unique(found_);
      matches->ids.insert(matches->ids.end(), found_.begin(), found_.end());
      matches->offsets.push_back(static_cast<std::int64_t>(matches->ids.size()));
    }
    words_.clear();
    ends_.clear();
  }

 private:
  struct TextWord {
    Key key;
    const char* bytes;
    std::uint32_t length, slot;
  };

  void add_word(std::string_view text, std::size_t begin, std::size_t end) {
    const std::size_t length = end - begin;
    const char* bytes = text.data() + begin;
    const char* readable = begin < tail_begin_ ? bytes : tail_.data() + begin - tail_begin_;
    const Key key = key_of(length > kKeyBytes ? bytes : readable, length);
    const std::uint32_t slot = table_.word_slot(key);
    prefetch(&table_.words_[slot]);
    words_.push_back({key, bytes, static_cast<std::uint32_t>(length), slot});
  }

  bool goes_on(std::size_t i, Node next) const {
    return nodes_[i] != kNone && (nodes_[i] & kContinues) != 0 && next != kNone;
  }

  Node find(const TextWord& word) const {
    for (std::size_t slot = word.slot;;) {
      const Word& entry = table_.words_[slot];
      if (entry.node == kNone) return kNone;
      if (entry.length == word.length && entry.key.low == word.key.low) {
        const bool same = word.length <= kKeyBytes
                              ? entry.key.high == word.key.high
                              : std::memcmp(table_.long_words_.data() + entry.key.high, word.bytes,
                                            word.length) == 0;
        if (same) return entry.node;
      }
      if (++slot == table_.words_.size()) slot = 0;
    }
  }

  Node find(std::uint32_t from, std::uint32_t word) const {
    for (std::size_t slot = table_.edge_slot(from, word);;) {
      const Edge& edge = table_.edges_[slot];
      if (edge.node == kNone || (edge.from == from && edge.word == word)) return edge.node;
      if (++slot == table_.edges_.size()) slot = 0;
    }
  }

  // All phrases that begin at word i.
  void follow(std::size_t i, std::size_t end) {
    for (Node node = nodes_[i]; node != kNone;) {
      if (number(node) < table_.count_) found_.push_back(static_cast<std::int32_t>(number(node)));
      if ((node & kContinues) == 0 || ++i == end || nodes_[i] == kNone) return;
      node = find(number(node), number(nodes_[i]));
    }
  }

  const PhraseTable& table_;
  std::vector<TextWord> words_;
  std::vector<Node> nodes_;
  std::vector<std::size_t> ends_;  // of the texts, in words
  std::array<char, 2 * kKeyBytes> tail_{};
  std::size_t tail_begin_ = 0;  // where in the text at hand tail_ begins
  std::vector<std::int32_t> found_;
};

PhraseTable::PhraseTable(const std::vector<std::string_view>& phrases) : count_(phrases.size()) {
  Builder builder;
  for (std::size_t id = 0; id < phrases.size(); ++id)
    builder.add(phrases[id], static_cast<std::uint32_t>(id));
  builder.write(this);
}

PhraseMatches PhraseTable::match(const std::vector<std::string_view>& texts) const {
  PhraseMatches matches;
  matches.offsets.reserve(texts.size() + 1);
  matches.offsets.push_back(0);
  Matcher matcher(*this);
  for (const std::string_view text : texts) {
    matcher.add(text);
    if (matcher.pending() >= Matcher::kBlockWords) matcher.flush(&matches);
  }
  matcher.flush(&matches);
  return matches;
}

}  // namespace fastclip
