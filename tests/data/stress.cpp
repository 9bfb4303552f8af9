// Random resizes and random phrases for the sanitizers: stress SEED CASES THREADS.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "phrases.h"
#include "resample.h"

namespace {

using Random = std::mt19937;

int between(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

// Every kind of instructions, from and into memory of exactly the size that is asked for.
void resize(Random& random, std::vector<fastclip::Resampler>& resamplers) {
  const int width = between(random, 1, 200), height = between(random, 1, 400);
  const int size = between(random, 1, 70);
  const auto part = [&](int side, float& low, float& high) {
    std::uniform_real_distribution<float> place(0, static_cast<float>(side));
    low = place(random), high = place(random);
    if (low > high) std::swap(low, high);
    if (high - low < 0.1f) low = 0, high = static_cast<float>(side);
  };
  fastclip::Box box;
  part(width, box.left, box.right);
  part(height, box.upper, box.lower);
  const std::size_t bytes = static_cast<std::size_t>(width) * height * 3;
  const std::unique_ptr<std::uint8_t[]> image(
      new std::uint8_t[bytes + fastclip::Resampler::kSlack]);
  for (std::size_t i = 0; i < bytes; ++i) image[i] = static_cast<std::uint8_t>(random());
  std::vector<std::uint8_t> first;
  for (fastclip::Resampler& resampler : resamplers) {
    std::vector<std::uint8_t> out(static_cast<std::size_t>(size) * size * 3);
    resampler.resize(image.get(), width, height, box, size, out.data());
    if (first.empty()) first = out;
    if (first != out) {
      std::fprintf(stderr, "%s differs\n", resampler.instructions());
      std::exit(1);
    }
  }
}

std::string text(Random& random, int most) {
  static const char* const kWords[] = {
      "a", "b", "ab", "", ",", "x.", "ein langes Wort, zu lang", "\xc3\xa4", "\t", "a"};
  std::string joined;
  for (int words = between(random, 0, most); words > 0; --words) {
    joined += kWords[between(random, 0, 9)];
    if (words > 1) joined += ' ';
  }
  return joined;
}

// The definition, phrase by phrase.
bool occurs(const std::string& phrase, const std::string& text) {
  std::string spaced = " ";
  for (const char c : text) {
    if (std::strchr(",.;:?!`", c) != nullptr && c != '\0') {
      (spaced += ' ') += c;
      spaced += ' ';
    } else {
      spaced += c == '\t' || c == '\n' || c == '\r' ? ' ' : c;
    }
  }
  return (spaced + " ").find(" " + phrase + " ") != std::string::npos;
}

void match(Random& random, int threads) {
  std::vector<std::string> phrases;
  for (int i = 0; i < 40; ++i) phrases.push_back(text(random, 4));
  std::sort(phrases.begin(), phrases.end());
  phrases.erase(std::unique(phrases.begin(), phrases.end()), phrases.end());
  const fastclip::PhraseTable table({phrases.begin(), phrases.end()});
  std::vector<std::string> texts;
  for (int i = 0; i < 20; ++i) texts.push_back(text(random, 12));
  const auto work = [&] {
    const fastclip::PhraseMatches found = table.match({texts.begin(), texts.end()});
    for (std::size_t i = 0; i < texts.size(); ++i) {
      std::vector<std::int32_t> expected;
      for (std::size_t p = 0; p < phrases.size(); ++p)
        if (occurs(phrases[p], texts[i])) expected.push_back(static_cast<std::int32_t>(p));
      const auto begin = found.ids.begin();
      if (!std::equal(expected.begin(), expected.end(), begin + found.offsets[i],
                      begin + found.offsets[i + 1])) {
        std::fprintf(stderr, "wrong phrases in '%s'\n", texts[i].c_str());
        std::exit(1);
      }
    }
  };
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(work);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace

int main(int, char** arguments) {
  Random random(static_cast<unsigned>(std::atoi(arguments[1])));
  const int cases = std::atoi(arguments[2]), threads = std::atoi(arguments[3]);
  std::vector<fastclip::Resampler> resamplers;
  for (const char* name : {"portable", "avx2", "vnni"}) {
    try {
      resamplers.emplace_back(name);
    } catch (const std::invalid_argument&) {  // not on this machine
    }
  }
  for (int i = 0; i < cases; ++i) {
    resize(random, resamplers);
    match(random, threads);
  }
  std::printf("%d cases, %zu kinds of instructions\n", cases, resamplers.size());
  return 0;
}
