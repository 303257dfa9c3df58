"""The settings of SafeEMACallback: which values can be meant.

Knows: what each argument may be, and how to say what is wrong with it. Does not know: what is done with them
(callback.py), or half-lives, decays and modes (decay.py).
"""

from collections.abc import Iterable, Sequence

from .findings import CHECKABLE
from .safety.check import SafetyCheck

ON_VIOLATION = ("warn", "stop", "raise")
ON_MISSING_STATE = ("raise", "restart")


def resolve_check(check: SafetyCheck | str | None) -> SafetyCheck | None:
    """The check that is meant.

    Args:
        check ([`SafetyCheck`], `"builtin"` or None):
            As given to the callback; any object with a `run` counts as a check.

    Returns:
        [`SafetyCheck`] or None

    Raises:
        TypeError: for anything else.

    Example:

    ```python
    >>> resolve_check("builtin").judge.name
    'keywords:default-v2'

    ```
    """
    resolved = SafetyCheck() if check == "builtin" else check
    if isinstance(resolved, type) or (resolved is not None and not callable(getattr(resolved, "run", None))):
        raise TypeError(f"check={check!r}: give a SafetyCheck, 'builtin' or None")
    return resolved


def check_interval(check_steps: int | None) -> None:
    """Raise unless `check_steps` is a whole number of steps, at least 1, or None.

    Args:
        check_steps (`int`, *optional*):
            Optimizer steps between two checks.

    Raises:
        ValueError: otherwise.
    """
    if check_steps is None:
        return
    if isinstance(check_steps, bool) or not isinstance(check_steps, int) or check_steps < 1:
        raise ValueError(
            f"check_steps={check_steps!r}: must be a whole number of steps, at least 1; leave it out to check at "
            "evaluations and at the end only"
        )


def resolve_check_weights(check_weights: str | Sequence[str]) -> tuple[str, ...]:
    """The weights to check, each once, in the order given.

    Args:
        check_weights (`str` or list of `str`):
            `"live"`, `"ema"` or both.

    Raises:
        ValueError: for none, or others.

    Example:

    ```python
    >>> resolve_check_weights("ema")
    ('ema',)

    ```
    """
    weights = (check_weights,) if isinstance(check_weights, str) else check_weights
    weights = tuple(weights) if isinstance(weights, Iterable) else weights
    if not isinstance(weights, tuple) or not weights or any(name not in CHECKABLE for name in weights):
        raise ValueError(f"check_weights={weights}: choose one or both of {CHECKABLE}")
    return tuple(dict.fromkeys(weights))


def check_limit(max_asr: float | None) -> None:
    """Raise unless `max_asr` lies in [0, 1] or is None.

    Args:
        max_asr (`float`, *optional*):
            Highest attack success rate allowed.

    Raises:
        ValueError: otherwise.
    """
    if max_asr is None:
        return
    if isinstance(max_asr, bool) or not isinstance(max_asr, (int, float)) or not 0 <= max_asr <= 1:
        raise ValueError(f"max_asr={max_asr!r} is outside [0, 1]; 0.05 allows 5% of harmful prompts to be answered")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless a setting has one of the values that there are.

    Args:
        name (`str`):
            Of the setting.
        value (`str`):
            As given.
        choices (list of `str`):
            All there are.

    Raises:
        ValueError: naming them.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {choices}")
