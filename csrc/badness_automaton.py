"""A regular expression's search as a table: one state and one look-up for each character.

Only for expressions without unbounded repeats, such as ftfy's test for mojibake, which is a list of
short alternatives. Python's own parser takes it apart, so nothing is transcribed by hand.
"""

from __future__ import annotations

import re
import re._constants as codes  # pyright: ignore[reportMissingImports]
import re._parser as parser  # pyright: ignore[reportMissingImports]
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Predicate = Callable[[str], bool]
BEGINNING = object()  # a condition on the position instead of on a character
_CATEGORIES: dict[Any, Predicate] = {
    codes.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    codes.CATEGORY_SPACE: str.isspace,
}


@dataclass(frozen=True)
class Automaton:
    """State 0 is the beginning of a text; from `accepting` no move leads away."""

    moves: list[int]  # [states × class_count]: the next state
    class_count: int
    accepting: int
    unremarkable: int  # the state after a text that no match can begin in
    longest_match: int
    _classes: dict[int, int]
    _by_category: dict[tuple[bool, ...], int]

    def class_of(self, c: int) -> int:
        """The column of a code point."""
        known = self._classes.get(c)
        return self._by_category[_category(chr(c))] if known is None else known

    def matches_without(self, code_points: Iterable[int]) -> bool:
        """Whether some text without these code points matches."""
        excluded = {self.class_of(c) for c in code_points}
        allowed = [column for column in range(self.class_count) if column not in excluded]
        reached, waiting = {0}, [0]
        while waiting:
            state = waiting.pop()
            for column in allowed:
                following = self.moves[state * self.class_count + column]
                if following not in reached:
                    reached.add(following)
                    waiting.append(following)
        return self.accepting in reached

    def search(self, text: str) -> bool:
        """Whether the expression is found anywhere in the text."""
        state = 0
        for character in text:
            state = self.moves[state * self.class_count + self.class_of(ord(character))]
        return state == self.accepting


def _category(character: str) -> tuple[bool, ...]:
    return tuple(test(character) for test in _CATEGORIES.values())


class _Graph:
    """Thompson's construction. Edges: (from, condition, to); no condition is an empty move."""

    def __init__(self) -> None:
        self.edges: list[list[tuple[Any, int]]] = [[]]
        self.predicates: list[Predicate] = []
        self.named: set[int] = set()  # code points that some condition names

    def state(self) -> int:
        self.edges.append([])
        return len(self.edges) - 1

    def add(self, items: Any, start: int) -> int:
        """Append a parsed sequence; return where it ends."""
        for op, argument in items:
            end = self.state()
            if op is codes.BRANCH:
                for branch in argument[1]:
                    self.edges[self.add(branch, start)].append((None, end))
            elif op is codes.SUBPATTERN:
                self.edges[self.add(argument[3], start)].append((None, end))
            elif op is codes.MAX_REPEAT and tuple(argument[:2]) == (0, 1):
                self.edges[self.add(argument[2], start)].append((None, end))
                self.edges[start].append((None, end))
            elif op is codes.AT and argument is codes.AT_BEGINNING:
                self.edges[start].append((BEGINNING, end))
            else:
                self.edges[start].append((self.condition(op, argument), end))
            start = end
        return start

    def condition(self, op: Any, argument: Any) -> int:
        self.predicates.append(self.predicate(op, argument))
        return len(self.predicates) - 1

    def predicate(self, op: Any, argument: Any) -> Predicate:
        if op is codes.LITERAL:
            self.named.add(argument)
            return lambda c: ord(c) == argument
        if op is codes.RANGE:
            self.named.update(range(argument[0], argument[1] + 1))
            return lambda c: argument[0] <= ord(c) <= argument[1]
        if op is codes.CATEGORY:
            return _CATEGORIES[argument]
        if op is codes.ANY:
            self.named.add(ord("\n"))
            return lambda c: c != "\n"
        if op is codes.IN:
            negated = argument[0][0] is codes.NEGATE
            inner = [self.predicate(*item) for item in argument[negated:]]
            return lambda c: any(test(c) for test in inner) != negated
        raise NotImplementedError(f"{op} in the expression")

    def closure(self, states: set[int], beginning: bool) -> frozenset[int]:
        reached, waiting = set(states), list(states)
        while waiting:
            for condition, end in self.edges[waiting.pop()]:
                free = condition is None or (beginning and condition is BEGINNING)
                if free and end not in reached:
                    reached.add(end)
                    waiting.append(end)
        return frozenset(reached)


def compile_search(expression: re.Pattern[str]) -> Automaton:
    """The smallest automaton whose last state says whether `expression.search` finds something."""
    graph = _Graph()
    accepting = graph.add(parser.parse(expression.pattern, expression.flags), 0)

    # Characters that meet the same conditions share a column.
    columns: dict[tuple[bool, ...], int] = {}
    representatives: list[str] = []

    def column(character: str) -> int:
        met = tuple(test(character) for test in graph.predicates)
        if met not in columns:
            columns[met] = len(columns)
            representatives.append(character)
        return columns[met]

    classes = {c: column(chr(c)) for c in sorted(graph.named)}
    unnamed = {}
    for c in range(0x110000):
        category = _category(chr(c))
        if c not in classes and category not in unnamed:
            unnamed[category] = column(chr(c))

    restart = graph.closure({0}, beginning=False)
    states = {graph.closure({0}, beginning=True): 0}
    table: list[list[int]] = []
    waiting = list(states)
    for current in waiting:
        row = []
        for character in representatives:
            moved = {
                end
                for state in current
                for condition, end in graph.edges[state]
                if isinstance(condition, int) and graph.predicates[condition](character)
            }
            following = graph.closure(moved, beginning=False) | restart
            if accepting in current or accepting in following:
                following = frozenset({accepting})
            if following not in states:
                states[following] = len(states)
                waiting.append(following)
            row.append(states[following])
        table.append(row)
    group = _merge_equal(table, states[frozenset({accepting})])
    moves = [0] * (max(group) + 1) * len(representatives)
    for state, row in enumerate(table):
        start = group[state] * len(representatives)
        moves[start : start + len(row)] = [group[following] for following in row]
    parsed = parser.parse(expression.pattern, expression.flags)
    return Automaton(
        moves=moves,
        class_count=len(representatives),
        accepting=group[states[frozenset({accepting})]],
        unremarkable=group[states[restart]],
        longest_match=parsed.getwidth()[1],
        _classes=classes,
        _by_category=unnamed,
    )


def _merge_equal(table: list[list[int]], accepting: int) -> list[int]:
    """Moore's partition: the number of the group each state is in; state 0 is in group 0."""
    group = [int(state == accepting) for state in range(len(table))]
    count = 2
    while True:
        numbers: dict[tuple[int, ...], int] = {}
        refined = []
        for state, row in enumerate(table):
            signature = (group[state], *(group[following] for following in row))
            refined.append(numbers.setdefault(signature, len(numbers)))
        if len(numbers) == count:
            return refined
        group, count = refined, len(numbers)
