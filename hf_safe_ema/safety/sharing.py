"""One safety check by all processes of a run: each asks its share of the prompts, all get the same report.

Knows: how prompts are dealt out and answers put in order again. Does not know: training or averaging; it is handed a
context in which the model holds the weights to ask.
"""

import contextlib
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..processes import on_every_rank, rank_and_size
from .check import SafetyCheck
from .reports import SafetyReport


def run_on_every_rank(
    check: SafetyCheck,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: str = "model",
    step: int | None = None,
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> SafetyReport:
    """Run a check with all processes of the run; every one of them has to call this. Alone it is `check.run`.

    Each process asks its share of the prompts, the first judges all answers, and every process gets its report: the
    same as one process would give, as far as a response does not depend on which prompts stand beside it in a batch.
    When one process fails, all do, with the same error and none left waiting.

    A check with a `run` of its own is run in full by each process, since nothing is known of how to divide it; the
    first process's report counts.

    Args:
        check ([`SafetyCheck`]):
            Or any object with its `run`. It must not wait for other processes by itself.
        model, tokenizer, weights, step:
            As for [`SafetyCheck.run`]; the model whole on each process, with equal weights.
        within (`Callable[[], ContextManager]`, *optional*, defaults to `contextlib.nullcontext`):
            Makes a context in which the model is asked, for example one that swaps weights. It is left before any
            process waits for another.

    Returns:
        [`SafetyReport`]: equal on every process.

    Raises:
        ProcessFailedError: on every process if one failed, naming it. A process by itself raises its own exception.

    Example:

    ```python
    >>> from hf_safe_ema import SafetyCheck, testbed
    >>> check = SafetyCheck(num_prompts=8, progress=False)
    >>> run_on_every_rank(check, *testbed.load()) == check.run(*testbed.load())
    True

    ```
    """
    rank, size = rank_and_size()
    divided = size > 1 and getattr(check.run, "__func__", None) is SafetyCheck.run

    def ask():
        with within():
            if divided:
                return check.ask(model, tokenizer, weights, share=(rank, size))
            return check.run(model, tokenizer, weights=weights, step=step)

    found = on_every_rank(ask)
    if not divided:
        return found[0]
    answers = {kind: _in_order([part[kind] for part in found]) for kind in found[0]}
    # By one process only: asked of a paid endpoint, each verdict is paid for once.
    reports = on_every_rank(lambda: check.report(tokenizer, answers, weights, step) if rank == 0 else None)
    return reports[0]


def _in_order(parts: Sequence[Sequence[str]]) -> list[str]:
    """What was dealt out as `all[rank::size]`, together again."""
    answers = [""] * sum(len(part) for part in parts)
    for rank, part in enumerate(parts):
        answers[rank :: len(parts)] = part
    return answers
