"""Muon (Jordan et al., 2024) in float32: steps along orthogonalised momentum, for the matrices of a model.

`torch.optim.Muon` orthogonalises in bfloat16, which takes a CPU without bfloat16 instructions 25 times as long as float32: on
such a machine that is three quarters of a step of a small model. This one gives the same steps to bfloat16's precision.

Knows: matrices and their gradients. Does not know: models.
"""

import torch

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
"""Coefficients a, b, c of X ← aX + (bA + cA²)X with A = XXᵀ, those of torch.optim.Muon."""


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrix with singular values of about 1, by a Newton-Schulz iteration.

    Args:
        matrix (`torch.Tensor`):
            Of shape (rows, columns), float32.
        steps (`int`, *optional*, defaults to 5):
            Of the iteration.

    Returns:
        `torch.Tensor`: of the same shape.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix  # (short side, long side)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T  # (short side, short side)
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """As `torch.optim.Muon`, in float32.

    Args:
        params (iterable of `torch.Tensor`):
            Matrices.
        lr (`float`):
            Learning rate.
        weight_decay (`float`, *optional*, defaults to 0.1):
            Decoupled, times the learning rate.
        momentum (`float`, *optional*, defaults to 0.95):
            Nesterov's.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """One step along the orthogonalised momentum of each matrix."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                average = state.setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)
