def device_count() -> int: ...

class Encoder:
    def __init__(self, merges: bytes, unicode_version: int, strict: bool, device: int) -> None: ...
    def encode(
        self,
        data: int,
        size: int,
        offsets: int,
        count: int,
        rows: int,
        context_length: int,
        id_bytes: int,
        lengths: int,
        refused: int,
        truncate: bool,
        stream: int,
    ) -> None: ...
