"""Work that the processes of one run do together, such that none is left waiting when another fails.

Knows: torch.distributed, and that a process that fails must still come to where the others wait.
Does not know: what the work is. What is pickled here goes from memory to memory between the processes of one run, as
torch's own object collectives do it; nothing pickled is ever written to a file or read from one.
"""

import pickle
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class ProcessFailedError(RuntimeError):
    """Raised on every process of a run alike when at least one of them failed in work that they share."""


def rank_and_size() -> tuple[int, int]:
    """This process's number among those of the run, and how many they are: (0, 1) for a process by itself.

    Example:

    ```python
    >>> rank_and_size()
    (0, 1)

    ```
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Do a piece of work on every process, and give all of them what it came to on each.

    Every process of the run has to call this, at the same point. `work` itself must not wait for another process: where
    one fails, the others would wait for ever. Here they meet only after it, whether it failed or not.

    Args:
        work (`Callable[[], T]`):
            This process's part. What it returns must be picklable.

    Returns:
        `list[T]`: the results, in the order of the ranks, equal on every process.

    Raises:
        ProcessFailedError: on every process if an `Exception` was raised on one; it names all that failed. A process by
            itself raises its own exception, as it is.

    Example:

    ```python
    >>> on_every_rank(lambda: "done")
    ['done']

    ```
    """
    size = rank_and_size()[1]
    if size == 1:
        return [work()]
    own_error, packed, failure = None, None, None
    try:
        packed = pickle.dumps(work())  # here, so that what cannot be packed is a failure like any other
    except Exception as error:
        own_error, failure = error, f"{type(error).__name__}: {error}"
    outcomes: list = [None] * size
    torch.distributed.all_gather_object(outcomes, (packed, failure))
    failures = [f"process {i} of {size}: {text}" for i, (_, text) in enumerate(outcomes) if text is not None]
    if failures:
        raise ProcessFailedError("; ".join(failures)) from own_error
    return [pickle.loads(packed) for packed, _ in outcomes]
