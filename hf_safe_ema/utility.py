"""What the fine-tuning was for: held-out loss of whatever weights the model holds.

Knows: dataloaders whose batches carry labels. Does not know: averaging, safety, or the Trainer that made the batches.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate.state import GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader

from .processes import on_every_rank, rank_and_size
from .safety.generation import preserved_state


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    dataloader: DataLoader,
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> float | None:
    """Mean loss over a dataloader, weighted as `Trainer.evaluate` weights `eval_loss`: each batch by its size.

    Leaves the model's mode and all random state as they were. Where several processes share the dataloader out, every
    one of them has to call this, and each returns the mean over all.

    Args:
        model (`nn.Module`):
            Returns an output with `loss` when given `labels`.
        dataloader (`DataLoader`):
            Of dict batches, tensors of shape (batch, ...).
        within (`Callable[[], ContextManager]`, *optional*, defaults to `contextlib.nullcontext`):
            Makes a context in which the model is asked, for example one that swaps weights.

    Returns:
        `float`: in nats per token for a causal LM. None if the batches have no labels or the model returns no loss
        (preference data, for example).

    Raises:
        ProcessFailedError: on every process if one of several failed, naming it; none is left waiting. A process by
            itself raises its own exception.
    """
    batches = _batches(dataloader)

    def own_part() -> tuple[float, int] | None:
        try:
            with within(), preserved_state(model):
                sums = _sums(model, batches, dataloader)
        except Exception:
            read_to_the_end()
            raise
        read_to_the_end()
        return sums

    def read_to_the_end() -> None:
        # Loaders of accelerate meet at every batch (an iterable dataset is read by one process for all): one that
        # stopped in the middle would leave the others waiting there.
        if rank_and_size()[1] > 1:
            with preserved_state(model):
                for _ in batches:
                    pass

    parts = on_every_rank(own_part)
    if any(part is None for part in parts):
        return None
    total, count = (sum(column) for column in zip(*parts, strict=True))
    return total / count if count else None


def _batches(dataloader: Iterable) -> Iterator:
    """Nothing is read, and no random number drawn, before the first batch is asked for."""
    yield from dataloader


def _sums(model: nn.Module, batches: Iterator[dict], dataloader: DataLoader) -> tuple[float, int] | None:
    """Loss times rows, and rows, over all batches. None where there is no loss."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    for batch in batches:
        if "labels" not in batch:
            return None
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        loss = getattr(model(**batch, **extra), "loss", None)
        if loss is None:
            return None
        size = _counted_rows(dataloader, batch["labels"].shape[0])
        total += loss.item() * size
        count += size
    return total, count


def _counted_rows(dataloader: DataLoader, rows: int) -> int:
    """How often `Trainer.evaluation_loop` (transformers 5.23) counts the batch at hand: as a full one, whatever is in it
    (a padding-free batch is one row), but for the rest at the end where accelerate knows it."""
    full = getattr(dataloader, "total_batch_size", None)
    if full is None:
        return rows
    state = GradientState()
    processes = PartialState().num_processes
    full //= processes
    if not state.end_of_dataloader or state.remainder <= 0:
        return full
    return min(max(state.remainder - full * PartialState().process_index, 0), full)
