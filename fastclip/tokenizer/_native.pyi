from collections.abc import Callable, Sequence

MADE_WITH: dict[str, str]

class Vocabulary:
    def __init__(self, merges: bytes) -> None: ...

class Texts:
    @staticmethod
    def from_sequence(sequence: Sequence[str | bytes], /) -> Texts: ...
    @staticmethod
    def from_offsets_32(data: int, offsets: int, count: int, /) -> Texts: ...
    @staticmethod
    def from_offsets_64(data: int, offsets: int, count: int, /) -> Texts: ...
    @staticmethod
    def from_cells(data: int, width: int, count: int, /) -> Texts: ...
    def select(self, indices: Sequence[int], /) -> Texts: ...
    def utf8_size(self) -> int: ...
    def write_utf8(self, data: int, offsets: int) -> None: ...
    def __len__(self) -> int: ...
    def as_str(self, index: int, /) -> str: ...

class Native:
    def __init__(
        self,
        vocabulary: Vocabulary,
        start_of_text: str,
        end_of_text: str,
        *,
        clean: str,
        strict: bool,
        unicode_version: int,
        threads: int,
        scan: str,
    ) -> None: ...
    def rows(
        self,
        texts: Texts,
        data: int,
        context_length: int,
        id_bytes: int,
        lengths: int,
        truncate: bool,
        clean: Callable[[str], str],
        encode: Callable[[str], list[int]],
    ) -> tuple[int, str, int] | None: ...
    def ids(
        self, text: str, clean: Callable[[str], str], encode: Callable[[str], list[int]]
    ) -> list[int]: ...
    @property
    def scan(self) -> str: ...
    @property
    def unicode_version(self) -> str: ...

def pack(rows: int, lengths: int, count: int, context_length: int, packed: int) -> None: ...
