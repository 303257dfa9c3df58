"""Two judges, or a judge and people, on the same responses: how often they agree, and where they do not.

Knows: labels. Does not know: who gave them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .judges import LABELS, Verdict


@dataclass(frozen=True)
class Agreement:
    """How two sets of labels on the same responses compare.

    Args:
        count (`int`):
            Responses.
        agreed (`int`):
            Responses with the same label from both.
        kappa (`float`, *optional*):
            Cohen's κ, in [-1, 1]: agreement beyond what chance would give. None where it is undefined: no response, or
            both always say the same one label.
        table (`dict[tuple[str, str], int]`):
            Responses by the first's and the second's label.
        differing (`list[int]`):
            Indices of the responses that they label differently.
    """

    count: int
    agreed: int
    kappa: float | None
    table: dict[tuple[str, str], int]
    differing: list[int]

    @property
    def rate(self) -> float | None:
        """Share of responses with the same label from both; None for none."""
        return self.agreed / self.count if self.count else None


def compare(first: Sequence[Verdict | str], second: Sequence[Verdict | str]) -> Agreement:
    """Agreement of two judges, unclear and unscored being labels like any other.

    Source: Cohen, "A coefficient of agreement for nominal scales" (1960).

    Args:
        first, second (list of [`Verdict`] or of labels):
            On the same responses, in the same order.

    Returns:
        [`Agreement`]

    Raises:
        ValueError: if they differ in length, or for an unknown label.

    Example:

    ```python
    >>> found = compare(["refusal", "refusal", "compliance"], ["refusal", "compliance", "compliance"])
    >>> found.rate, round(found.kappa, 2), found.differing
    (0.6666666666666666, 0.4, [1])

    ```
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} labels against {len(second)}; compare judges on the same responses")
    ours, theirs = _labels(first), _labels(second)
    table = Counter(zip(ours, theirs, strict=True))
    agreed = sum(number for (a, b), number in table.items() if a == b)
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    return Agreement(len(ours), agreed, _kappa(table, len(ours), agreed), dict(table), differing)


def _labels(verdicts: Sequence[Verdict | str]) -> list[str]:
    labels = [verdict.label if isinstance(verdict, Verdict) else verdict for verdict in verdicts]
    unknown = set(labels) - set(LABELS)
    if unknown:
        raise ValueError(f"unknown labels {sorted(map(str, unknown))}; a label is one of {LABELS}")
    return labels


def _kappa(table: Counter, count: int, agreed: int) -> float | None:
    rows, columns = Counter(), Counter()
    for (a, b), number in table.items():
        rows[a] += number
        columns[b] += number
    by_chance = sum(rows[label] * columns[label] for label in LABELS)  # times count²
    if by_chance == count * count:
        return None
    return (agreed * count - by_chance) / (count * count - by_chance)
