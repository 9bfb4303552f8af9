"""Write the tables that text cleaning and splitting read: csrc/tables/.

Everything is asked of the installed Python (unicodedata, str, re, html), regex and ftfy, so that
the C++ code does what they do. Run it once with Python 3.11 and once with 3.12 (Unicode 14 and 15):

    python csrc/generate_tables.py            # write the tables of this Python
    python csrc/generate_tables.py --check    # or say whether the files at hand are what it writes
"""

from __future__ import annotations

import argparse
import hashlib
import html
import html.entities
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import ftfy.fixes
import regex
from badness_automaton import Automaton, compile_search
from ftfy.badness import BADNESS_RE
from ftfy.chardata import CONTROL_CHARS, HTML_ENTITIES

TABLES = Path(__file__).with_name("tables")
CODE_POINTS = 0x110000
PAGE = 128  # code points that share an entry of the first stage

# Bits of a code point's properties; csrc/unicode.h gives the same names and meanings.
SEPARATOR, LETTER, NUMBER, OTHER = range(4)
MAPPED, RECOMPOSED, COMBINING, SUSPICIOUS, AMPERSAND, LESS_THAN, LOWERS_SPECIALLY = (
    1 << place for place in range(2, 9)
)
CASED, CASE_IGNORABLE, DECIMAL, UNASSIGNED, JOINS_LEFT = (1 << place for place in range(9, 14))
BADNESS_SHIFT, LOWER_SHIFT = 16, 24

# What a pre-token's fixed spellings are made of, in either dialect.
FIXED_SPELLINGS = ("strevmld", "<|startoftext|>", "<|endoftext|>", "<start_of_text>")


def every_code_point() -> Iterator[tuple[int, str]]:
    return ((c, chr(c)) for c in range(CODE_POINTS))


def word_classes() -> list[int]:
    """How CLIP's expression splits: `[\\p{L}]+ | [\\p{N}] | [^\\s\\p{L}\\p{N}]+`, ignoring case."""
    letter = regex.compile(r"[\p{L}]+", regex.IGNORECASE).fullmatch
    number = regex.compile(r"[\p{N}]", regex.IGNORECASE).fullmatch
    other = regex.compile(r"[^\s\p{L}\p{N}]+", regex.IGNORECASE).fullmatch
    classes = []
    for _, character in every_code_point():
        found = [bool(match(character)) for match in (letter, number, other)]
        if sum(found) > 1:
            raise AssertionError(f"{character!a} is in two classes")
        classes.append(found.index(True) + 1 if any(found) else SEPARATOR)
    for c, character in every_code_point():
        # What separates for `str.split` must separate for the expression. U+001C-1F do not; no
        # spelling of them survives cleaning.
        if character.isspace() and classes[c] != SEPARATOR and not 0x1C <= c <= 0x1F:
            raise AssertionError(f"{character!a} is whitespace to Python alone")
    return classes


def check_folding() -> None:
    """The letters of fixed spellings match their two cases, and "s" also U+017F, nothing else."""
    for letter in sorted({c for spelling in FIXED_SPELLINGS for c in spelling}):
        match = regex.compile(regex.escape(letter), regex.IGNORECASE).fullmatch
        expected = {letter, letter.upper()} | ({"\u017f"} if letter == "s" else set())
        found = {character for _, character in every_code_point() if match(character)}
        if found != expected:
            raise AssertionError(f"{letter!r} matches {sorted(found)}")


def lower_case(classes: list[int]) -> tuple[list[int], list[int], set[int]]:
    """Distance to the lower case of each code point, by index; the distances; the special ones."""
    distances, index_of = [0], {0: 0}
    indices, special = [], {0x3A3}
    for c, character in every_code_point():
        lowered = character.lower()
        if len(lowered) != 1:
            special.add(c)
            indices.append(0)
            continue
        if classes[ord(lowered)] != classes[c]:
            raise AssertionError(f"lower case moves {character!a} into another class")
        distance = ord(lowered) - c
        if distance not in index_of:
            index_of[distance] = len(distances)
            distances.append(distance)
        indices.append(index_of[distance])
    if special != {0x130, 0x3A3} or "\u0130".lower() != "i\u0307" or len(distances) > 256:
        raise AssertionError("lower case has a rule that the C++ code does not know")
    return indices, distances, special


def sigma_context(character: str) -> int:
    """Whether a capital sigma beside it is at the end of a word, as `str.lower` sees it."""
    if (character + "\u03a3").lower().endswith("\u03c2"):
        return CASED
    return CASE_IGNORABLE if ("A" + character + "\u03a3").lower().endswith("\u03c2") else 0


def fixed(character: str) -> str:
    """What ftfy's fixers for single characters make of one, deletion apart."""
    fixers: list[Callable[[str], str]] = [
        ftfy.fixes.fix_c1_controls,
        ftfy.fixes.fix_latin_ligatures,
        ftfy.fixes.fix_character_width,
        ftfy.fixes.uncurl_quotes,
    ]
    for fixer in fixers:
        character = fixer(character)
    return character


def is_surrogate(c: int) -> bool:
    return 0xD800 <= c < 0xE000


def decompositions() -> dict[int, str]:
    """Canonical decompositions, complete ones; Hangul syllables are computed instead."""
    return {
        c: decomposed
        for c, character in every_code_point()
        if not is_surrogate(c)
        and not 0xAC00 <= c < 0xD7A4
        and (decomposed := unicodedata.normalize("NFD", character)) != character
    }


def compositions() -> dict[tuple[int, int], int]:
    """The pairs that NFC joins, Hangul apart."""
    pairs = {}
    for c, character in every_code_point():
        parts = unicodedata.decomposition(character).split()
        canonical = len(parts) == 2 and not parts[0].startswith("<")
        if canonical and unicodedata.normalize("NFC", character) == character:
            pairs[int(parts[0], 16), int(parts[1], 16)] = c
    return pairs


def properties(automaton: Automaton, pairs: Iterable[tuple[int, int]]) -> tuple[list[int], list]:
    """The 32 bits of every code point, and the distances to lower case that they index."""
    classes = word_classes()
    indices, distances, special = lower_case(classes)
    joins_left = {second for _, second in pairs} | {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}
    unassigned = regex.compile(r"\p{Cn}").fullmatch
    plain = {automaton.class_of(ord(c)) for c in "\u4e00\u2603\u2003"}  # word, sign, space
    values = []
    for c, character in every_code_point():
        bits = classes[c] | indices[c] << LOWER_SHIFT | automaton.class_of(c) << BADNESS_SHIFT
        if fixed(character) != character or c in CONTROL_CHARS or is_surrogate(c):
            bits |= MAPPED
        if c in (0x2028, 0x2029, 0x85):
            bits |= MAPPED
        if not is_surrogate(c) and unicodedata.normalize("NFC", character) != character:
            bits |= RECOMPOSED
        bits |= JOINS_LEFT * (c in joins_left)
        if unicodedata.combining(character):
            bits |= COMBINING
        if c >= 0x80 and automaton.class_of(c) not in plain:
            bits |= SUSPICIOUS
        bits |= AMPERSAND * (character == "&") | LESS_THAN * (character == "<")
        bits |= LOWERS_SPECIALLY * (c in special) | sigma_context(character)
        bits |= DECIMAL * bool(re.fullmatch(r"\d", character))
        if unicodedata.category(character) == "Cn" or unassigned(character):
            bits |= UNASSIGNED
        values.append(bits)
    return values, distances


def array(kind: str, name: str, values: Iterable[int | str]) -> str:
    """A C++ array, in lines of at most 100 characters."""
    lines, line = [], ""
    for value in values:
        item = f"{value},"
        if len(line) + len(item) > 100:
            lines.append(line)
            line = ""
        line += item
    body = "\n".join([*lines, line])
    return f"constexpr {kind} {name}[] = {{\n{body}\n}};\n"


def strings(prefix: str, entries: list[tuple[list[int], str]]) -> str:
    """Keys in order, each with a string of code points: `Keys`, `Starts`, `Points`."""
    starts, points = [0], []
    for _, value in entries:
        points += map(ord, value)
        starts.append(len(points))
    keys = (key for keys, _ in entries for key in keys)
    return (
        array("std::uint32_t", f"k{prefix}Keys", keys)
        + array("std::uint16_t", f"k{prefix}Starts", starts)
        + array("std::uint32_t", f"k{prefix}Points", points)
    )


def combining_ranges() -> list[int]:
    """Start, length and canonical combining class of each run of equal non-zero classes."""
    ranges: list[list[int]] = []
    for c, character in every_code_point():
        combining = unicodedata.combining(character)
        if not combining:
            continue
        if ranges and ranges[-1][0] + ranges[-1][1] == c and ranges[-1][2] == combining:
            ranges[-1][1] += 1
        else:
            ranges.append([c, 1, combining])
    return [value for entry in ranges for value in entry]


def unicode_tables() -> str:
    """The file of the installed Python's Unicode version."""
    check_folding()
    automaton = compile_search(BADNESS_RE)
    pairs = compositions()
    values, distances = properties(automaton, pairs)
    suspicious = [c for c, bits in enumerate(values) if bits & SUSPICIOUS]
    if automaton.matches_without(suspicious):
        raise AssertionError("there is a sign of mojibake that nothing suspicious is part of")
    pages: dict[tuple[int, ...], int] = {}
    first = [
        pages.setdefault(tuple(values[start : start + PAGE]), len(pages))
        for start in range(0, CODE_POINTS, PAGE)
    ]
    mapped = [
        ([c], fixed(character))
        for c, character in every_code_point()
        if fixed(character) != character
    ]
    body = "".join(
        [
            array("std::uint16_t", "kPages", first),
            array("std::uint32_t", "kProperties", (bits for page in pages for bits in page)),
            array("std::int32_t", "kLowerDistances", distances),
            array("std::uint8_t", "kBadnessMoves", automaton.moves),
            array("std::uint32_t", "kDeleted", sorted(CONTROL_CHARS)),
            strings("Fixed", mapped),
            strings("Decomposition", [([c], text) for c, text in sorted(decompositions().items())]),
            array(
                "std::uint32_t",
                "kCompositions",
                (value for pair, c in sorted(pairs.items()) for value in (*pair, c)),
            ),
            array("std::uint32_t", "kCombining", combining_ranges()),
        ]
    )
    major = unicodedata.unidata_version.split(".")[0]
    return (
        header(body)
        + f"namespace unicode_{major} {{\n{body}"
        + f"constexpr std::uint32_t kBadnessClasses = {automaton.class_count};\n"
        + f"constexpr std::uint8_t kBad = {automaton.accepting};\n"
        + f"constexpr std::uint8_t kUnremarkable = {automaton.unremarkable};\n"
        + f"constexpr std::size_t kLongestSign = {automaton.longest_match};\n"
        + f'constexpr char kVersion[] = "{unicodedata.unidata_version}";\n'
        + f"}}  // namespace unicode_{major}\n"
    )


def entity_tables() -> str:
    """Names of entities: those of HTML 5, and those that ftfy resolves."""
    names: dict[str, str] = dict(html.entities.html5)
    for name, value in HTML_ENTITIES.items():
        if names.setdefault(name[1:], value) != value:
            raise AssertionError(f"{name} has two meanings")
    ordered = sorted(names)
    flags = [(name in html.entities.html5) + 2 * (f"&{name}" in HTML_ENTITIES) for name in ordered]
    starts, points = [0], []
    for name in ordered:
        points += map(ord, names[name])
        starts.append(len(points))
    charrefs = html._invalid_charrefs  # pyright: ignore[reportAttributeAccessIssue]
    dropped = sorted(html._invalid_codepoints)  # pyright: ignore[reportAttributeAccessIssue]
    if any(len(value) != 1 for value in charrefs.values()):
        raise AssertionError("a numeric character reference stands for several characters")
    body = "".join(
        [
            array("char*", "kEntityNames", (f'"{name}"' for name in ordered)).replace(
                "constexpr char*", "constexpr const char*"
            ),
            array("std::uint8_t", "kEntityFlags", flags),
            array("std::uint16_t", "kEntityStarts", starts),
            array("std::uint32_t", "kEntityPoints", points),
            array(
                "std::uint32_t",
                "kReplacedReferences",
                (v for number in sorted(charrefs) for v in (number, ord(charrefs[number]))),
            ),
            array("std::uint32_t", "kDroppedReferences", dropped),
        ]
    )
    legacy = max(len(name) for name in html.entities.html5 if not name.endswith(";"))
    return (
        header(body)
        + body
        + f"constexpr std::size_t kLongestLegacyName = {legacy};\n"
        + f'constexpr char kRegexVersion[] = "{version("regex")}";\n'
        + f'constexpr char kFtfyVersion[] = "{version("ftfy")}";\n'
    )


def header(body: str) -> str:
    digest = hashlib.sha256(body.encode()).hexdigest()
    return (
        "// Written by csrc/generate_tables.py. clang-format off\n"
        f"// regex {version('regex')}, ftfy {version('ftfy')}\n"
        f"// sha256 {digest}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write csrc/tables/ for this Python's Unicode.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    major = unicodedata.unidata_version.split(".")[0]
    different = []
    for name, text in (
        (f"unicode_{major}.inc", unicode_tables()),
        ("entities.inc", entity_tables()),
    ):
        path = TABLES / name
        if not check:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            different.append(name)
    if different:
        sys.exit(f"{', '.join(different)} is not what this Python, regex and ftfy give")


if __name__ == "__main__":
    main()
