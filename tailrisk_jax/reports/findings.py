"""The sentences of many verdicts as a few."""

import re
from collections import defaultdict
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<![\w.-])(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|nan|inf)(?!\w)")


_WORST_FIRST = ("unusable", "doubtful", "ok")


def summarise_verdicts(
    words: Sequence[str], sentences: Sequence[str]
) -> list[tuple[str, str, int]]:
    """Verdict, sentence and number of queries; the worst verdicts first, then the commonest.

    Sentences that differ in their figures alone become one, with the figures' range.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for word, sentence in zip(words, sentences, strict=True):
        parts = _NUMBER.split(sentence)
        groups[(word, *parts[::2])].append(parts[1::2])
    found = []
    for (word, first, *others), figures in groups.items():
        ranges = (_range(column) for column in zip(*figures, strict=True))
        sentence = first + "".join(a + b for a, b in zip(ranges, others, strict=True))
        found.append((word, sentence, len(figures)))
    rank = {word: k for k, word in enumerate(_WORST_FIRST)}
    return sorted(found, key=lambda one: (rank.get(one[0], -1), -one[2]))


def _range(figures: Sequence[str]) -> str:
    ordered = sorted(set(figures), key=lambda figure: (figure != "nan", float(figure)))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
