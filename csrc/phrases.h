// Which of many phrases occur in a text, word for word.
//
// A phrase p occurs in a text t if " p " is a part of " t " after each of , . ; : ? ! ` in the text
// was put between two blanks, and each tab and line end became a blank. Phrases stay as they are.
// Both are therefore cut at every single blank, and p occurs where its words are consecutive words
// of t. A word may be empty: two blanks in a row have one between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "large.h"
#include "vocabulary.h"

namespace fastclip {

// Of text i: ids[offsets[i]] to ids[offsets[i + 1]], ascending, none twice.
struct PhraseMatches {
  std::vector<std::int64_t> offsets;
  std::vector<std::int32_t> ids;
};

// A trie over words in two hash tables: one from words to nodes, one from (node, next word) to the
// node that follows. Nothing in it changes, so any number of threads may use it.
class PhraseTable {
 public:
  // Phrases are any bytes. std::invalid_argument if two are equal, std::length_error if they have
  // more than two billion beginnings.
  explicit PhraseTable(const std::vector<std::string_view>& phrases);

  std::size_t size() const { return count_; }

  // The ids, places in the list, of the phrases in each text. std::length_error for a text of 4 GiB
  // or more.
  PhraseMatches match(const std::vector<std::string_view>& texts) const;

 private:
  // A node's number, and the bit if longer phrases go on from it. Numbers below count_ are phrases'
  // ids. A word's number is that of the node which it leads to from the root.
  using Node = std::uint32_t;
  static constexpr Node kContinues = Node{1} << 31, kNone = std::numeric_limits<Node>::max();
  static constexpr std::uint32_t number(Node node) { return node & ~kContinues; }

  struct Word {
    Key key;  // its bytes; of more than kKeyBytes, their hash and their place in long_words_
    std::uint32_t length;
    Node node = kNone;  // kNone: a free slot
  };
  struct Edge {
    std::uint32_t from, word;
    Node node = kNone;  // kNone: a free slot
  };
  class Builder;
  class Matcher;

  // Tables have as many slots as they need, rather than a power of two.
  static std::uint32_t slot(std::uint64_t hash, std::size_t slots) {
    return static_cast<std::uint32_t>((hash >> 32) * slots >> 32);
  }
  std::uint32_t word_slot(const Key& key) const { return slot(key.hash(), words_.size()); }
  std::uint32_t edge_slot(std::uint32_t from, std::uint32_t word) const {
    const Key pair{from, word};
    return slot(pair.hash(), edges_.size());
  }

  std::size_t count_;
  LargeVector<Word> words_;
  LargeVector<Edge> edges_;
  std::string long_words_;
};

}  // namespace fastclip
