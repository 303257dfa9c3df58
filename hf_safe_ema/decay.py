"""How fast an average forgets: half-lives and decays, and which of them can be meant.

Knows: the arithmetic of β = 2^(−1/h) and what each argument may be. Does not know: tensors.
"""

import math
from collections.abc import Sequence

DEFAULT_HALF_LIFE = 0.5
"""Half-life used when neither `half_life` nor `decay` is given, as a fraction of the run. Of .25, .5 and .75 on the
testbed at three learning rates (docs/testbed.md), .5 had a clearly lower attack success rate than .25 at the same
held-out loss; .75 gains little more, and leaves 40% of the starting point in the average."""

MODES = ("shadow", "lookahead")


def check_half_life(half_life: int | float) -> None:
    """Raise unless `half_life` is a whole number of steps (int, at least 1) or a fraction of the run (0 < float < 1).

    Args:
        half_life (`int` or `float`):
            The value to check.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is out of range.
    """
    if isinstance(half_life, bool) or not isinstance(half_life, (int, float)):
        raise TypeError(
            f"half_life={half_life!r} is not a number; give steps as an int (half_life=50) or a fraction of the run "
            "as a float between 0 and 1 (half_life=0.25)"
        )
    if isinstance(half_life, int) and half_life < 1:
        raise ValueError(
            f"half_life={half_life} steps: must be at least 1; a larger half-life averages over more steps"
        )
    if isinstance(half_life, float) and not 0.0 < half_life < 1.0:
        raise ValueError(
            f"half_life={half_life}: a float is a fraction of the run and must lie strictly between 0 and 1; "
            "give a number of steps as an int, for example half_life=50"
        )


def check_decay(decay: float) -> None:
    """Raise unless `decay` lies in [0, 1).

    Args:
        decay (`float`):
            The value to check.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is out of range.
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(f"decay={decay!r} is not a number; give a float in [0, 1), for example decay=0.99")
    if not 0.0 <= decay < 1.0:
        raise ValueError(
            f"decay={decay} is outside [0, 1): at 1 the average would never move, below 0 it would diverge; "
            "try half_life=0.25 instead"
        )


def resolve_decays(
    half_life: int | float | Sequence[int | float] | None = None,
    decay: float | Sequence[float] | None = None,
    total_steps: int | None = None,
) -> list[float]:
    """The decay(s) β meant by a half-life h in steps, β = 2^(−1/h), or by plain `decay`.

    Args:
        half_life (`int`, `float` or a list of them, *optional*):
            Steps after which a past value counts half (int), or that number as a fraction of the run (float below 1).
        decay (`float` or a list of them, *optional*):
            β itself, in [0, 1). Exclusive with `half_life`.
        total_steps (`int`, *optional*):
            Optimizer steps of the run. Needed for a fraction; where given, a half-life longer than the run is an
            error, since the average would then still be mostly the starting point when the run ends. 0, for a run
            that only evaluates, is as good as any: the average is never updated.

    Returns:
        `list[float]`: one β per value given (one for [`DEFAULT_HALF_LIFE`] if neither is given).

    Raises:
        ValueError: if both are given, a value is out of range, or a half-life is longer than the run.

    Example:

    ```python
    >>> resolve_decays(half_life=1)
    [0.5]
    >>> [round(b, 4) for b in resolve_decays(half_life=0.25, total_steps=400)]
    [0.9931]
    >>> resolve_decays(decay=0.99)
    [0.99]

    ```
    """
    if decay is not None and half_life is not None:
        raise ValueError(f"both half_life={half_life} and decay={decay} given; give one of them")
    if decay is not None:
        decays = list(decay) if isinstance(decay, (list, tuple)) else [decay]
        if not decays:
            raise ValueError("decay=[] is empty; give at least one value in [0, 1)")
        for value in decays:
            check_decay(value)
        return [float(value) for value in decays]
    half_life = DEFAULT_HALF_LIFE if half_life is None else half_life
    half_lives = list(half_life) if isinstance(half_life, (list, tuple)) else [half_life]
    if not half_lives:
        raise ValueError("half_life=[] is empty; give at least one value")
    decays = []
    for value in half_lives:
        check_half_life(value)
        if isinstance(value, float):
            if total_steps is None:
                raise ValueError(
                    f"half_life={value} is a fraction of the run, whose length is not known here; pass total_steps, "
                    "or give the half-life in steps as an int"
                )
            value = value * total_steps
        elif total_steps and value > total_steps:
            raise ValueError(
                f"half_life={value} steps is longer than the run of {total_steps} steps: more than half of the "
                "average would still be the starting weights at the end. Give at most the number of steps, or a "
                "fraction of the run such as half_life=0.25"
            )
        decays.append(2.0 ** (-1.0 / value) if value else 0.0)
    return decays


def stuck_at_base(decay: float, steps: int) -> str | None:
    """What to warn about where more than half of the average will still be the starting point when the run ends.

    Args:
        decay (`float`):
            β of the average.
        steps (`int`):
            Optimizer steps of the run.

    Returns:
        `str`: None where there is nothing to warn about.

    Example:

    ```python
    >>> stuck_at_base(0.99, steps=1000)
    >>> stuck_at_base(0.999, steps=100)[:62]
    'with decay=0.999 and 100 steps, 90% of the average will still '

    ```
    """
    share = decay**steps
    if share <= 0.5 or steps == 0:
        return None
    return (
        f"with decay={decay:g} and {steps} steps, {share:.0%} of the average will still be the starting weights at the "
        f"end; use a smaller decay (half-life {math.log(0.5) / math.log(decay):.0f} steps now), or half_life=0.25"
    )


def check_mode(mode: str, sync_steps: int | None) -> None:
    """Raise unless `mode` is known and `sync_steps` fits it.

    Args:
        mode (`str`):
            `"shadow"` or `"lookahead"`.
        sync_steps (`int`, *optional*):
            Whole number of steps, at least 1, in lookahead mode; None in shadow mode.

    Raises:
        ValueError: otherwise.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {MODES}")
    if mode == "lookahead":
        if sync_steps is None:
            raise ValueError("mode='lookahead' needs sync_steps, the number of steps between two syncs; try 10")
        if isinstance(sync_steps, bool) or not isinstance(sync_steps, int) or sync_steps < 1:
            raise ValueError(f"sync_steps={sync_steps!r}: must be a whole number of steps, at least 1")
    elif sync_steps is not None:
        raise ValueError(
            f"sync_steps={sync_steps} has no meaning in mode='shadow', where the weights never see the average; "
            "leave it out or set mode='lookahead'"
        )
