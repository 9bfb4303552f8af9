// One scan, compiled once for each instruction set that ascii.cpp includes it for. Before it stand
// `struct Block`, whose members are the masks of 64 bytes, and `Block::load_and_lower`.

inline bool scan_blocks(const std::uint8_t* text, std::size_t length, AsciiText& out) {
  out.resize(length);
  std::uint8_t* lower = out.lower.data();
  // Blanks where the text will not reach; one block always ends in blanks, so that words end.
  std::memset(lower + (out.blocks - 1) * kBlock, ' ', 2 * kBlock);
  if (length != 0) std::memcpy(lower, text, length);
  std::uint64_t last_letter = 0, last_digit = 0, last_other = 0, unfit = 0;
  for (std::size_t b = 0; b < out.blocks; ++b) {
    const Block block = Block::load_and_lower(lower + b * kBlock);
    const std::uint64_t letters = block.letters, digits = block.digits;
    const std::uint64_t others = ~(letters | digits | block.blanks);
    const std::uint64_t after_letter = letters << 1 | last_letter;
    const std::uint64_t after_other = others << 1 | last_other;
    out.begins[b] = (letters & ~after_letter) | digits | (others & ~after_other);
    out.ends[b] = (~letters & after_letter) | (digits << 1 | last_digit) | (~others & after_other);
    out.special[b] = block.special;
    last_letter = letters >> 63;
    last_digit = digits >> 63;
    last_other = others >> 63;
    unfit |= block.unfit;
  }
  return unfit == 0;
}
