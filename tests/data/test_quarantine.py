"""Bad samples by name, in a file that survives its process; and an epoch's balance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastclip.data.decode import BadSampleError
from fastclip.data.index import index_shards
from fastclip.data.quarantine import Balance, Quarantine
from shards import sample, write_tar

ERROR = BadSampleError("broken image", "cut")


def _entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_names_each_sample_once(tmp_path: Path) -> None:
    index = index_shards(str(write_tar(tmp_path / "a.tar", [sample(n) for n in range(3)])))
    path = tmp_path / "run" / "quarantine.jsonl"
    first = Quarantine(path)
    for number in (1, 1, 2, 1):
        first.bad(index[number], ERROR)
    assert _entries(path) == [
        {
            "shard": str(tmp_path / "a.tar"),
            "offset": index[number].image[0],
            "key": f"{number:06d}",
            "kind": "broken image",
            "reason": "cut",
        }
        for number in (1, 2)
    ]
    again = Quarantine(path)  # the run is launched again
    again.bad(index[2], ERROR)
    again.bad(index[0], ERROR)
    assert [entry["key"] for entry in _entries(path)] == ["000001", "000002", "000000"]
    assert again.counts == {"broken image": 2}  # of this launch


def test_a_line_cut_by_a_kill_spoils_no_other(tmp_path: Path) -> None:
    index = index_shards(str(write_tar(tmp_path / "a.tar", [sample(n) for n in range(3)])))
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).bad(index[0], ERROR)
    path.write_text(path.read_text() + '{"shard": "a.t')
    Quarantine(path).bad(index[1], ERROR)
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[2])["key"] == "000001"


@pytest.mark.parametrize(("batch", "rank", "world"), [(4, 0, 1), (3, 1, 2), (5, 2, 3), (7, 0, 3)])
def test_what_is_planned_is_delivered_or_replaced(batch: int, rank: int, world: int) -> None:
    balance = Balance(29, batch, rank, world)
    lines, own = [], 0
    for step in range(40):
        first = step * batch * world + rank * batch
        positions = range(first, first + batch)
        own += batch
        balance.add(positions, [position % 10 == 3 for position in positions])
        lines += balance.close_epochs((step + 1) * batch * world)
    assert len(lines) == 40 * batch * world // 29
    total = sum(int(line.split(" samples planned")[0].rpartition(" ")[2]) for line in lines)
    assert abs(total * world - 29 * len(lines)) <= world * batch
    assert lines[0].startswith("epoch 0: ")


def test_a_lost_batch_is_noticed() -> None:
    balance = Balance(20, 4, 0, 1)
    for first in (0, 4, 12, 16):
        balance.add(range(first, first + 4), [False] * 4)
    with pytest.raises(RuntimeError, match=r"epoch 0: 20 samples were planned, 16 delivered"):
        balance.close_epochs(20)


def test_a_resumed_epoch_is_counted_from_there() -> None:
    balance = Balance(20, 4, 0, 1)
    balance.restart(8)
    for first in (8, 12, 16):
        balance.add(range(first, first + 4), [False, True, False, False])
    assert balance.close_epochs(20) == [
        "epoch 0 since place 8: 12 samples planned for this rank = 9 delivered + 3 replaced"
    ]
