"""What the fine-tuning was for: held-out loss of whatever weights the model holds.

Knows: dataloaders whose batches carry labels. Does not know: averaging, safety, or the Trainer that made the batches.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader

from .safety.generation import preserved_state


@torch.no_grad()
def heldout_loss(model: nn.Module, dataloader: DataLoader) -> float | None:
    """Mean loss over a dataloader, weighted as `Trainer.evaluate` weights `eval_loss`: each batch by its size.

    Leaves the model's mode and all random state as they were. Where several processes share the dataloader out, each
    returns the mean over all.

    Args:
        model (`nn.Module`):
            Returns an output with `loss` when given `labels`.
        dataloader (`DataLoader`):
            Of dict batches, tensors of shape (batch, ...).

    Returns:
        `float`: in nats per token for a causal LM. None if the batches have no labels or the model returns no loss
        (preference data, for example).
    """
    total, count = 0.0, 0
    with preserved_state(model):
        device = next(model.parameters()).device
        extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        for batch in dataloader:
            if "labels" not in batch:
                return None
            batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
            loss = getattr(model(**batch, **extra), "loss", None)
            if loss is None:
                return None
            size = batch["labels"].shape[0]
            total += loss.item() * size
            count += size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sums = torch.tensor([total, float(count)], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        total, count = sums.tolist()
    return total / count if count else None
