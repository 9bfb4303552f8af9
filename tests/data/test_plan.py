"""The order of samples: each once per epoch, windows, independence of platform and place."""

from __future__ import annotations

import numpy as np
import pytest

from fastclip.data.plan import Mixture, Plan, mix, permutation, uniform


@pytest.mark.parametrize("sizes", [[5], [3, 0, 4], [10, 1, 7, 20]])
@pytest.mark.parametrize("window", [4, 16384])
def test_every_epoch_visits_each_sample_once(sizes: list[int], window: int) -> None:
    count = sum(sizes)
    plan = Plan(sizes, seed=3, window=window)
    orders = []
    for epoch in range(3):
        places = [plan(epoch * count + place) for place in range(count)]
        assert [epoch_ for epoch_, _ in places] == [epoch] * count
        order = [sample for _, sample in places]
        assert sorted(order) == list(range(count))
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]


def test_access_is_random_and_repeatable() -> None:
    plan, other = Plan([40, 60], 1, window=16), Plan([40, 60], 1, window=16)
    forwards = [plan(position) for position in range(300)]
    backwards = [other(position) for position in reversed(range(300))]
    assert forwards == backwards[::-1]
    assert forwards != [Plan([40, 60], 2, window=16)(position) for position in range(300)]


def test_windows_hold_whole_shards_together() -> None:
    plan = Plan([8] * 8, seed=0, window=16)
    shards = [{plan(w * 16 + place)[1] // 8 for place in range(16)} for w in range(4)]
    assert all(len(each) == 2 for each in shards)


def test_numbers_are_the_same_everywhere() -> None:
    assert mix(1, 2, 3) == mix(1, 2, 3) != mix(1, 3, 2)
    assert mix(-1) == mix((1 << 64) - 1)
    assert permutation(6, 0).tolist() == permutation(6, 0).tolist()
    values = [uniform(7, number) for number in range(4000)]
    assert 0 <= min(values) <= max(values) < 1
    assert abs(sum(values) / 4000 - 0.5) < 0.02


def test_permutations_are_even() -> None:
    firsts = [int(permutation(4, seed)[0]) for seed in range(2000)]
    assert all(abs(firsts.count(value) - 500) < 100 for value in range(4))


def test_nothing_cannot_be_ordered() -> None:
    with pytest.raises(ValueError, match="nothing to order"):
        Plan([0, 0], 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_ranks_partition_the_stream(world_size: int) -> None:
    plan, count, batch = Plan([11, 0, 6, 20], seed=9, window=8), 37, 3
    share = world_size * batch
    taken = [
        [step * share + rank * batch + row for step in range(40) for row in range(batch)]
        for rank in range(world_size)
    ]
    stream = [plan(position) for rank in taken for position in rank]
    assert len(set(stream)) == len(stream) == 40 * share  # no (epoch, sample) twice
    whole = 40 * share // count
    for epoch in range(whole):
        assert sorted(s for e, s in stream if e == epoch) == list(range(count))


def test_two_ranks_then_three_take_one_stream() -> None:
    reference = [Plan([50, 13], seed=2, window=16)(position) for position in range(120)]
    stream, position = [], 0
    for world_size, batch, steps in [(2, 5, 4), (3, 4, 5), (1, 20, 1)]:
        plan = Plan([50, 13], seed=2, window=16)
        for _ in range(steps):
            ranks = [range(rank * batch, rank * batch + batch) for rank in range(world_size)]
            stream += [plan(position + row) for rank in ranks for row in rank]
            position += world_size * batch
    assert stream == reference


def test_the_caches_stay_small() -> None:
    plan = Plan([40], seed=0, window=4)
    for position in range(400):
        plan(position)
    assert len(plan._windows) <= 4
    assert len(plan._shards) <= 4
    assert [plan(p) for p in range(40)] == [Plan([40], 0, 4)(p) for p in range(40)]


def test_orders_do_not_change() -> None:
    # Pinned, not derived: a checkpoint's position means these samples on every machine and release.
    order = [Plan([3, 5, 2], seed=7, window=4)(position)[1] for position in range(20)]
    assert order[:10] == [0, 8, 9, 1, 5, 3, 4, 2, 6, 7]
    assert order[10:] == [0, 8, 9, 1, 4, 2, 5, 3, 6, 7]
    assert permutation(8, 1, 2).tolist() == [1, 2, 6, 3, 7, 4, 0, 5]
    assert mix(1, 2, 3) == 5246500226706903259


SOURCES = [[5, 6], [3], [40]]


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 2), (1, 7, 1)])
def test_mixtures_keep_their_proportions_in_every_round(weights: tuple[int, ...]) -> None:
    mixture = Mixture(SOURCES, weights, seed=4)
    firsts = np.cumsum([0, 11, 3, 40])
    turn = sum(weights)
    rounds = 60
    drawn = [mixture(position) for position in range(rounds * turn)]
    owners = [int(np.searchsorted(firsts, number, side="right")) - 1 for _, number in drawn]
    for begin in range(0, len(owners), turn):
        assert [owners[begin : begin + turn].count(n) for n in range(3)] == list(weights)
    orders = {tuple(owners[begin : begin + turn]) for begin in range(0, len(owners), turn)}
    assert len(orders) > 1 or turn == 1
    # A source that runs out begins its next epoch: each sample exactly once in each.
    for source, size in enumerate((11, 3, 40)):
        own = [pair for pair, owner in zip(drawn, owners, strict=True) if owner == source]
        assert len(own) == rounds * weights[source]
        for epoch in range(len(own) // size):
            numbers = [n for e, n in own[epoch * size : (epoch + 1) * size] if e == epoch]
            assert sorted(numbers) == list(range(firsts[source], firsts[source] + size))


def test_mixtures_have_random_access() -> None:
    forward = Mixture(SOURCES, (3, 1, 2), seed=4)
    expected = [forward(position) for position in range(500)]
    other = Mixture(SOURCES, (3, 1, 2), seed=4)
    assert [other(position) for position in range(499, -1, -1)] == expected[::-1]
    assert [Mixture(SOURCES, (3, 1, 2), seed=5)(p) for p in range(500)] != expected
    with pytest.raises(ValueError, match="3 sources need as many"):
        Mixture(SOURCES, (1, 2), seed=0)


@pytest.mark.parametrize("sizes", [[5], [3, 0, 9, 4, 1, 7, 2], [2] * 40])
def test_the_plan_knows_which_shards_come(sizes: list[int]) -> None:
    plan = Plan(sizes, seed=3, window=6)
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    total = len(shard_of)
    for begin in range(0, 2 * total, 5):
        for end in (begin + 1, begin + 6, begin + total):
            places = set()
            for place in range(begin, end):  # the whole windows of these places
                epoch, within = divmod(place, total)
                first = epoch * total + within // 6 * 6
                places |= set(range(first, min(first + 6, (epoch + 1) * total)))
            expected = {shard_of[plan(place)[1]] for place in places}
            assert set(plan.shards(begin, end)) == expected
            assert len(plan.shards(begin, end)) == len(expected)


def test_the_mixture_knows_which_shards_come() -> None:
    sources = [[4, 4, 4], [3, 3], [9]]
    mixture = Mixture(sources, (3, 1, 2), seed=1)
    shard_of = [n for n, size in enumerate([4, 4, 4, 3, 3, 9]) for _ in range(size)]
    for begin in range(0, 60, 7):
        needed = {shard_of[mixture(place)[1]] for place in range(begin, begin + 5)}
        assert needed <= set(mixture.shards(begin, begin + 5)) <= set(range(6))
    assert mixture.shards(0, 6)[:3] != sorted(mixture.shards(0, 6))[:3]  # one of each in turn
