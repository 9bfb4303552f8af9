// One text to one row of ids by one warp: the program of the GPU tokenizer.
//
// It does what needs no rewriting: it decodes, recognises texts that cleaning would change, lowers,
// splits and merges. A text that needs more is refused, and is the host's to do. Each byte of the
// text is some lane's, and knows the code point that it is part of, so that whole bytes' masks
// replace a list of code points.
#pragma once

#include <cstddef>
#include <cstdint>

#include "unicode.h"
#include "utf8.h"
#include "vocabulary.h"
#include "warp.h"

namespace fastclip {

// Where a warp works; on a GPU, shared memory.
struct WarpSpace {
  static constexpr int kBytes = 1024;  // of a text; one that is longer is refused
  static constexpr int kWord = 256;    // of a word that is no token; likewise
  static constexpr int kMargin = 24;   // zeros behind the text, which is read in words of 8 bytes

  std::uint64_t text[(kBytes + kMargin) / 8];
  struct Word {
    std::uint16_t symbols[kWord];
    std::uint16_t merged[kWord];  // what each of them and the next make
  };
  union {
    std::uint8_t badness[kBytes];  // while reading: classes of the code points that begin here
    Word word;                     // afterwards: the one that is being merged
  };
  std::uint16_t begins[kLanes], ends[kLanes];

  FASTCLIP_WARP std::uint8_t* lower() { return reinterpret_cast<std::uint8_t*>(text); }
};
static_assert(WarpSpace::kBytes <= kLanes * 32, "one lane for each 32 bytes");

struct WarpTables {
  const VocabularyTables* vocabulary;
  CharacterTables characters;
  std::uint32_t refused;  // properties of code points that the host has to look at
};

// What ftfy replaces, what NFC may compose, and letters whose lower case is no single one.
constexpr std::uint32_t kRefusedProperties = kMapped | kRecomposed | kJoinsLeft | kLowersSpecially;

template <typename Warp>
class WarpRow {
 public:
  FASTCLIP_WARP WarpRow(const Warp& warp, WarpSpace& space, const WarpTables& tables,
                        const std::uint8_t* text, int length)
      : warp_(warp),
        space_(space),
        lower_(space.lower()),
        tables_(tables),
        text_(text),
        length_(length) {}

  // Write the row [context_length] and return its length in ids, both ends included; 0 if the text
  // is refused, what the row holds then being unspecified.
  template <typename Id>
  FASTCLIP_WARP int encode(Id* row, int context_length, bool truncate) {
    if (length_ > WarpSpace::kBytes || !read()) return 0;
    find_words();
    const int room = context_length - 2;
    const int count = write_words(row + 1, room);
    if (count < 0 || (count > room && !truncate)) return 0;
    const int kept = count < room ? count : room;
    warp_.each([&](int lane) {
      if (lane == 0) row[0] = static_cast<Id>(kStartOfText);
      for (int i = kept + 1 + lane; i < context_length; i += kLanes) {
        row[i] = static_cast<Id>(i == kept + 1 ? kEndOfText : 0);
      }
    });
    return kept + 2;
  }

 private:
  using Words = typename Warp::template PerLane<std::uint32_t>;

  struct CodePoint {
    std::uint32_t value;
    int length;  // in bytes; 0 if the byte is no part of UTF-8
    int place;   // of the byte in it
  };

  FASTCLIP_WARP bool continues(int place) const {
    return place < length_ && (text_[place] & 0xC0) == 0x80;
  }

  // The code point that the byte at `place` is part of.
  FASTCLIP_WARP CodePoint decode(int place) const {
    int begin = place;
    while (begin > 0 && place - begin < 3 && (text_[begin] & 0xC0) == 0x80) --begin;
    const std::uint32_t first = text_[begin];
    if (first < 0x80) return {first, place == begin ? 1 : 0, 0};
    const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
    if (first < 0xC2 || first > 0xF4 || place - begin > more) return {0, 0, 0};
    std::uint32_t value = first & (0x3F >> more);
    for (int k = 1; k <= more; ++k) {
      if (!continues(begin + k)) return {0, 0, 0};
      value = value << 6 | (text_[begin + k] & 0x3F);
    }
    const bool overlong = (more == 2 && value < 0x800) || (more == 3 && value < 0x10000);
    if (overlong || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) return {0, 0, 0};
    return {value, more + 1, place - begin};
  }

  // Byte `place` of a code point's UTF-8.
  FASTCLIP_WARP static std::uint8_t utf8_byte(std::uint32_t c, int length, int place) {
    if (length == 1) return static_cast<std::uint8_t>(c);
    if (place == 0) return static_cast<std::uint8_t>(0xF00 >> length | c >> (6 * (length - 1)));
    return static_cast<std::uint8_t>(0x80 | (c >> (6 * (length - 1 - place)) & 0x3F));
  }

  // Whether the code point before a place is a combining mark.
  FASTCLIP_WARP bool follows_mark(int place) const {
    return place > 0 && (tables_.characters.properties(decode(place - 1).value) & kCombining);
  }

  // An entity or a special token may begin here.
  FASTCLIP_WARP bool begins_markup(std::uint32_t c, int place) const {
    if (place + 1 >= length_) return false;
    const std::uint32_t next = text_[place + 1], letter = next | 32;
    if (c == '&') return next == '#' || letter - 'a' < 26;
    return c == '<' && (next == '|' || letter == 's' || letter == 'e');
  }

  // Lower the text into `lower_` and find each byte's class. False if the text is refused.
  FASTCLIP_WARP bool read() {
    constexpr std::uint32_t kRefused = kWordClassMask;  // a place that properties leave free
    Words seen;
    for (int base = 0, chunk = 0; base < length_; base += kLanes, ++chunk) {
      Words properties;
      typename Warp::template PerLane<bool> first;
      warp_.each([&](int lane) {
        const int place = base + lane;
        first[lane] = false;
        properties[lane] = kSeparator;
        if (place >= length_) return;
        const CodePoint c = decode(place);
        if (c.length == 0) {
          seen[lane] |= kRefused;
          return;
        }
        const std::uint32_t own = tables_.characters.properties(c.value);
        const std::uint32_t lower = tables_.characters.lower(c.value, own);
        lower_[place] = utf8_byte(lower, c.length, c.place);
        properties[lane] = own;
        first[lane] = c.place == 0;
        space_.badness[place] = static_cast<std::uint8_t>(c.place == 0 ? own >> 16 : kInside);
        std::uint32_t noted = own & (tables_.refused | kSuspicious);
        // U+017F is an s to CLIP's expression. Marks, one after the other, may have to change
        // places.
        if (utf8_length(lower) != c.length || c.value == 0x17F || begins_markup(c.value, place) ||
            ((own & kCombining) && follows_mark(place - c.place))) {
          noted |= kRefused;
        }
        seen[lane] |= noted;
      });
      const auto mask = [&](WordClass wanted, bool firsts) {
        return warp_.ballot([&](int lane) {
          return (properties[lane] & kWordClassMask) == wanted && (!firsts || first[lane]);
        });
      };
      const std::uint32_t letters = mask(kLetter, false), others = mask(kOther, false);
      const std::uint32_t numbers = mask(kNumber, false), begun = mask(kNumber, true);
      const std::uint32_t apostrophes = warp_.ballot(
          [&](int lane) { return base + lane < length_ && text_[base + lane] == '\''; });
      warp_.each([&](int lane) {
        if (lane != chunk) return;
        letters_[lane] = letters;
        others_[lane] = others;
        inside_[lane] = letters | others | numbers;
        starts_[lane] = begun;
        apostrophes_[lane] = apostrophes;
      });
    }
    warp_.each([&](int lane) {
      if (lane < WarpSpace::kMargin) lower_[length_ + lane] = 0;
    });
    const std::uint32_t all = warp_.either([&](int lane) { return seen[lane]; });
    if (all & (kRefused | tables_.refused)) return false;
    return (all & kSuspicious) == 0 || !has_mojibake();
  }

  // As Cleaner::has_mojibake, which skips what this one walks through. All lanes do the same.
  FASTCLIP_WARP bool has_mojibake() const {
    const CharacterTables& characters = tables_.characters;
    std::uint32_t state = 0;
    for (int i = 0; i < length_; ++i) {
      const std::uint32_t badness = space_.badness[i];
      if (badness == kInside) continue;
      state = characters.badness_moves[state * characters.badness_classes + badness];
      if (state == characters.bad) return true;
      if (text_[i] == '\n') state = 0;  // ftfy repairs lines one by one
    }
    return false;
  }

  // All bits `distance` (below 32) places on, across lanes.
  FASTCLIP_WARP Words moved_up(Words& bits, int distance) const {
    Words moved = warp_.from_below(bits);
    warp_.each(
        [&](int lane) { moved[lane] = bits[lane] << distance | moved[lane] >> (32 - distance); });
    return moved;
  }

  // CLIP's expression, as masks of the bytes that begin and end words.
  FASTCLIP_WARP void find_words() {
    Words letters_before = moved_up(letters_, 1), others_before = moved_up(others_, 1);
    warp_.each([&](int lane) {
      starts_[lane] |= letters_[lane] & ~letters_before[lane];
      starts_[lane] |= others_[lane] & ~others_before[lane];
    });
    if (warp_.either([&](int lane) { return apostrophes_[lane]; }) != 0) find_contractions();

    Words continued;
    warp_.each([&](int lane) { continued[lane] = inside_[lane] & ~starts_[lane]; });
    Words above = warp_.from_above(continued);
    Words begun, ended;
    warp_.each([&](int lane) {
      lasts_[lane] = inside_[lane] & ~(continued[lane] >> 1 | above[lane] << 31);
      begun[lane] = static_cast<std::uint32_t>(count_bits(starts_[lane]));
      ended[lane] = static_cast<std::uint32_t>(count_bits(lasts_[lane]));
    });
    begun_before_ = warp_.sums_below(begun);
    ended_before_ = warp_.sums_below(ended);
    words_ = static_cast<int>(warp_.at(begun_before_, kLanes - 1) + warp_.at(begun, kLanes - 1));
  }

  // How many letters after an apostrophe belong to a contraction.
  FASTCLIP_WARP int contraction(int place) const {
    const std::uint8_t first = lower_[place + 1], second = lower_[place + 2];
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 1;
    return ((first == 'r' || first == 'v') && second == 'e') || (first == 'l' && second == 'l') ? 2
                                                                                                : 0;
  }

  // A contraction is one word: its letters do not begin one, but those behind it do.
  FASTCLIP_WARP void find_contractions() {
    Words one, two;
    for (int chunk = 0; chunk * kLanes < length_; ++chunk) {
      const std::uint32_t candidates = warp_.at(apostrophes_, chunk) & warp_.at(starts_, chunk);
      if (candidates == 0) continue;
      const auto mask = [&](int letters) {
        return warp_.ballot([&](int lane) {
          return (candidates >> lane & 1) != 0 && contraction(chunk * kLanes + lane) == letters;
        });
      };
      const std::uint32_t ones = mask(1), twos = mask(2);
      warp_.each([&](int lane) {
        if (lane != chunk) return;
        one[lane] = ones;
        two[lane] = twos;
      });
    }
    Words behind_one = moved_up(one, 2), behind_two = moved_up(two, 3);
    Words any;
    warp_.each([&](int lane) { any[lane] = one[lane] | two[lane]; });
    Words first_letters = moved_up(any, 1);
    warp_.each([&](int lane) {
      starts_[lane] &= ~first_letters[lane];
      starts_[lane] |= (behind_one[lane] | behind_two[lane]) & letters_[lane];
    });
  }

  // Write the ids of all words, as far as there is room, and return how many they are: more than
  // `room` only says that they are too many, and -1 that a word is too long.
  template <typename Id>
  FASTCLIP_WARP int write_words(Id* ids, int room) {
    int count = 0;
    for (int group = 0; group < words_ && count <= room; group += kLanes) {
      locate(group);
      const int size = words_ - group < kLanes ? words_ - group : kLanes;
      Words token;
      warp_.each([&](int lane) {
        token[lane] = VocabularyTables::kNone;
        if (lane < size) token[lane] = whole(space_.begins[lane], space_.ends[lane]);
      });
      std::uint32_t parts = warp_.ballot(
          [&](int lane) { return lane < size && token[lane] == VocabularyTables::kNone; });
      for (int next = 0; next < size && count <= room;) {
        const int stop = parts == 0 ? size : lowest_bit(parts);
        warp_.each([&](int lane) {
          const int place = count + lane - next;
          if (lane >= next && lane < stop && place < room)
            ids[place] = static_cast<Id>(token[lane]);
        });
        count += stop - next;
        next = stop;
        if (parts == 0) break;
        parts &= parts - 1;
        if (space_.ends[stop] - space_.begins[stop] > WarpSpace::kWord) return -1;
        const int made = merge(space_.begins[stop], space_.ends[stop]);
        warp_.each([&](int lane) {
          for (int i = lane; i < made && count + i < room; i += kLanes) {
            ids[count + i] = static_cast<Id>(space_.word.symbols[i]);
          }
        });
        count += made;
        ++next;
      }
    }
    return count;
  }

  // Find the begins and ends of the words from number `group` on.
  FASTCLIP_WARP void locate(int group) {
    const auto put = [&](std::uint32_t bits, std::uint32_t before, int chunk, std::uint16_t* places,
                         int distance) {
      warp_.each([&](int lane) {
        if ((bits >> lane & 1) == 0) return;
        const int rank = static_cast<int>(before) + count_bits(bits & ((1u << lane) - 1)) - group;
        if (rank < 0 || rank >= kLanes) return;
        places[rank] = static_cast<std::uint16_t>(chunk * kLanes + lane + distance);
      });
    };
    for (int chunk = 0; chunk * kLanes < length_; ++chunk) {
      put(warp_.at(starts_, chunk), warp_.at(begun_before_, chunk), chunk, space_.begins, 0);
      put(warp_.at(lasts_, chunk), warp_.at(ended_before_, chunk), chunk, space_.ends, 1);
    }
  }

  // The token that a word is, or kNone.
  FASTCLIP_WARP std::uint16_t whole(int begin, int end) const {
    const int length = end - begin;
    if (length > static_cast<int>(kKeyBytes)) return VocabularyTables::kNone;
    // Sixteen bytes from three aligned words.
    const std::uint64_t* words = space_.text + begin / 8;
    const int shift = (begin & 7) * 8;
    Key key{words[0], words[1]};
    if (shift != 0) {
      key.low = key.low >> shift | words[1] << (64 - shift);
      key.high = key.high >> shift | words[2] << (64 - shift);
    }
    if (length < 8) {
      key.low &= (std::uint64_t{1} << 8 * length) - 1;
      key.high = 0;
    } else if (length < 16) {
      key.high &= (std::uint64_t{1} << 8 * (length - 8)) - 1;
    }
    const VocabularyTables& vocabulary = *tables_.vocabulary;
    const std::uint16_t id = vocabulary.candidate(key, vocabulary.slot(key));
    return id != VocabularyTables::kNone && vocabulary.is_token(key, id) ? id
                                                                         : VocabularyTables::kNone;
  }

  // Merge a word in `space_.word.symbols`; the leftmost of equal pairs first. Returns how many ids
  // are left.
  FASTCLIP_WARP int merge(int begin, int end) {
    const VocabularyTables& vocabulary = *tables_.vocabulary;
    const std::uint8_t* word = lower_ + begin;
    std::uint16_t* const symbols = space_.word.symbols;
    std::uint16_t* const merged = space_.word.merged;
    int length = end - begin;
    warp_.each([&](int lane) {
      for (int i = lane; i < length; i += kLanes) {
        const bool last = i + 1 == length;
        symbols[i] = static_cast<std::uint16_t>(vocabulary.byte_id(word[i]) + (last ? 256 : 0));
        merged[i] = last ? VocabularyTables::kNone
                         : vocabulary.merge_bytes(word[i], word[i + 1], i + 2 == length);
      }
    });
    while (true) {
      const std::uint32_t best = warp_.least([&](int lane) {
        std::uint32_t least = ~0u;
        for (int i = lane; i < length; i += kLanes) {
          const std::uint32_t own = static_cast<std::uint32_t>(merged[i]) << 16 | i;
          if (own < least) least = own;
        }
        return least;
      });
      const auto id = static_cast<std::uint16_t>(best >> 16);
      if (id == VocabularyTables::kNone) return length;
      const int at = static_cast<int>(best & 0xFFFF);
      --length;
      for (int base = at + 1; base < length; base += kLanes) {
        Words above;
        warp_.each([&](int lane) {
          const int i = base + lane;
          if (i < length) above[lane] = symbols[i + 1] | std::uint32_t{merged[i + 1]} << 16;
        });
        warp_.each([&](int lane) {
          const int i = base + lane;
          if (i >= length) return;
          symbols[i] = static_cast<std::uint16_t>(above[lane]);
          merged[i] = static_cast<std::uint16_t>(above[lane] >> 16);
        });
      }
      warp_.each([&](int lane) {
        if (lane == 0) {
          symbols[at] = id;
          merged[at] =
              at + 1 < length ? vocabulary.merge(id, symbols[at + 1]) : VocabularyTables::kNone;
        } else if (lane == 1 && at > 0) {
          merged[at - 1] = vocabulary.merge(symbols[at - 1], id);
        }
      });
    }
  }

  static constexpr std::uint8_t kInside = 255;  // no class of the automaton

  const Warp& warp_;
  WarpSpace& space_;
  std::uint8_t* const lower_;  // the text in lower case
  const WarpTables& tables_;
  const std::uint8_t* const text_;
  const int length_;
  int words_ = 0;
  // Bit b of lane c stands for byte 32 c + b.
  Words letters_, others_, inside_, apostrophes_, starts_, lasts_;
  Words begun_before_, ended_before_;
};

}  // namespace fastclip
