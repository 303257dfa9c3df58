"""The arithmetic of averaging: an exponential moving average (EMA) of a list of tensors, and swapping it in and back.

Knows: parameters by name, decays, and how to keep the average of a run exact in floating point.
Does not know: Trainers, checkpoint folders, safety, or more than one process.
"""

import contextlib
import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from .decay import check_mode, resolve_decays

# Elements handled at a time: bounds the temporary memory of an update at 64 MiB of float32, whatever the model.
_CHUNK = 1 << 24


def select_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> dict[str, nn.Parameter]:
    """The trainable floating-point parameters that match, each once even if it is tied under several names.

    Args:
        named_parameters (iterable of `(str, nn.Parameter)`):
            As `model.named_parameters()` gives them.
        include (`str` or list of `str`, *optional*):
            Shell-style patterns (`fnmatch`, case-sensitive) of full names to keep. Default: all.
        exclude (`str` or list of `str`, *optional*):
            Patterns of full names to leave out, applied after `include`.

    Returns:
        `dict[str, nn.Parameter]`: by first name, in the order given.

    Raises:
        ValueError: if nothing is left.
    """
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude
    chosen: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    trainable: list[str] = []
    for name, param in named_parameters:
        if not param.requires_grad or not param.is_floating_point() or id(param) in seen:
            continue
        seen.add(id(param))
        trainable.append(name)
        if include is not None and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
            continue
        if exclude is not None and any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            continue
        chosen[name] = param
    if not chosen:
        if not trainable:
            raise ValueError(
                "no trainable parameter to average: every parameter is frozen (requires_grad=False); unfreeze some or "
                "add a PEFT adapter before training"
            )
        raise ValueError(
            f"no trainable parameter matched include={include}, exclude={exclude}; names look like "
            f"{trainable[0]!r}; patterns are shell-style and must match the whole name, for example '*mlp*'"
        )
    return chosen


class WeightEMA:
    """An exponential moving average of parameters, kept as the displacement from where they started.

    With θ₀ the parameters at construction and θ those after each optimizer step, `update()` does

        d ← β d + (1−β)(θ − θ₀),        average m = θ₀ + d.

    In exact arithmetic this is m ← β m + (1−β) θ from m₀ = θ₀. In floating point it is far better: displacements are
    orders of magnitude smaller than weights, so float32 keeps bits that an average of the weights themselves rounds
    away (a bf16 average of weights stalls outright). θ₀ is kept in the parameters' own dtype, which is exact.

    Memory: for each averaged parameter, one copy in its own dtype (θ₀) and one in `dtype` for each decay (d).
    `swapped_in()` needs one more copy in the parameter's dtype while it is open.

    Args:
        named_parameters (iterable of `(str, nn.Parameter)`):
            As from `model.named_parameters()`. Frozen ones are left out, tied ones averaged once.
        half_life (`int`, `float` or a list of them, *optional*, defaults to 0.5):
            In steps (int) or as a fraction of `total_steps` (float below 1). A list keeps several averages.
        decay (`float` or a list of them, *optional*):
            β itself, in place of `half_life`.
        total_steps (`int`, *optional*):
            Optimizer steps of the run; needed where a half-life is a fraction.
        mode (`str`, *optional*, defaults to `"shadow"`):
            `"shadow"`: the parameters never see the average. `"lookahead"`: every `sync_steps` updates θ ← m
            (Zhang et al., 2019, arXiv 1907.08610, with an exponential average as the slow weights).
        sync_steps (`int`, *optional*):
            Updates between two θ ← m. Needed by, and only allowed in, lookahead mode.
        include, exclude (`str` or list of `str`, *optional*):
            Shell-style name patterns, see [`select_parameters`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the displacement: float32 or float64.
        device (`str` or `torch.device`, *optional*):
            Where θ₀ and d live. Default: beside each parameter. `"cpu"` saves accelerator memory.

    Raises:
        ValueError: for any argument outside these bounds, saying what is allowed.

    Example:

    ```python
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> ema = WeightEMA(model.named_parameters(), decay=0.5)
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(1.0)
    >>> ema.update()
    >>> with ema.swapped_in():
    ...     print(model.weight.tolist())
    [[0.5, 0.5]]
    >>> model.weight.tolist()
    [[1.0, 1.0]]

    ```
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        half_life: int | float | Sequence[int | float] | None = None,
        decay: float | Sequence[float] | None = None,
        *,
        total_steps: int | None = None,
        mode: str = "shadow",
        sync_steps: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ):
        check_mode(mode, sync_steps)
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype={dtype}: the average is kept in torch.float32 or torch.float64; in 16 bits the small steps of "
                "a high decay are rounded away and it stalls"
            )
        if isinstance(named_parameters, nn.Module):
            named_parameters = named_parameters.named_parameters()
        self.decays = resolve_decays(half_life, decay, total_steps)
        self.mode = mode
        self.sync_steps = sync_steps
        self.num_updates = 0
        self._params = select_parameters(named_parameters, include, exclude)
        self._device = None if device is None else torch.device(device)
        self._swapped = False
        self._base: dict[str, torch.Tensor] = {}
        self._displacements: list[dict[str, torch.Tensor]] = [{} for _ in self.decays]
        for name, param in self._params.items():
            where = self._device or param.device
            self._base[name] = param.detach().to(where, copy=True, memory_format=torch.contiguous_format)
            for displacement in self._displacements:
                displacement[name] = torch.zeros(param.shape, dtype=dtype, device=where)

    @property
    def decay(self) -> float:
        """β of the first average, the one that is reported and saved."""
        return self.decays[0]

    @property
    def base_share(self) -> float:
        """Share of θ₀ left in the first average, β^t after t updates: 1 at the start, towards 0 as the run goes on."""
        return self.decay**self.num_updates

    @property
    def names(self) -> list[str]:
        """Names of the averaged parameters."""
        return list(self._params)

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values into every average. Call once after each optimizer step.

        Raises:
            RuntimeError: while the average is swapped in, when the parameters are the average itself.
        """
        if self._swapped:
            raise RuntimeError("update() while the average is swapped in would average the average; leave the block")
        for name, param in self._params.items():
            base = self._base[name]
            flat = [base.view(-1).split(_CHUNK), param.detach().reshape(-1).split(_CHUNK)]
            flat += [displacement[name].view(-1).split(_CHUNK) for displacement in self._displacements]
            for base_part, live_part, *averages in zip(*flat, strict=True):
                moved = live_part.to(base.device, averages[0].dtype) - base_part
                for average, decay in zip(averages, self.decays, strict=True):
                    average.lerp_(moved, 1.0 - decay)
        self.num_updates += 1
        if self.mode == "lookahead" and self.num_updates % self.sync_steps == 0:
            self.copy_to_parameters()

    def _averaged(self, name: str, index: int) -> torch.Tensor:
        base = self._base[name]
        return (base + self._displacements[index][name]).to(base.dtype)

    def averaged_parameters(self, index: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
        """The averages m = θ₀ + d, made one tensor at a time.

        Args:
            index (`int`, *optional*, defaults to 0):
                Which average, in the order of the half-lives given.

        Yields:
            `(str, torch.Tensor)`: name and average, in the parameter's shape and dtype, on the state's device.
        """
        for name in self._params:
            yield name, self._averaged(name, index)

    def displacement(self, index: int = 0) -> dict[str, torch.Tensor]:
        """m − θ₀ by name, in the precision that it is kept in (the tensors themselves, not copies).

        Args:
            index (`int`, *optional*, defaults to 0):
                Which average, in the order of the half-lives given.
        """
        return dict(self._displacements[index])

    @torch.no_grad()
    def distance_to_base(self, weights: str = "ema", index: int = 0) -> float:
        """Euclidean distance ‖w − θ₀‖ over all averaged parameters together.

        Args:
            weights (`str`, *optional*, defaults to `"ema"`):
                w: `"ema"` for the average, `"live"` for the parameters' present values.
            index (`int`, *optional*, defaults to 0):
                Which average, where `weights="ema"`.

        Returns:
            `float`: in the units of the weights.
        """
        if weights not in ("ema", "live"):
            raise ValueError(f"weights={weights!r}: must be 'ema' or 'live'")
        squares = 0.0
        for name, param in self._params.items():
            if weights == "ema":
                moved = self._displacements[index][name]
            else:
                moved = param.detach().to(self._base[name].device, torch.float32) - self._base[name]
            squares += torch.linalg.vector_norm(moved, dtype=torch.float64).item() ** 2
        return math.sqrt(squares)

    @torch.no_grad()
    def copy_to_parameters(self, index: int = 0) -> None:
        """Overwrite the parameters with the average, for good.

        Args:
            index (`int`, *optional*, defaults to 0):
                Which average.
        """
        for name, param in self._params.items():
            param.copy_(self._averaged(name, index))

    @contextlib.contextmanager
    def swapped_in(self, index: int = 0) -> Iterator[None]:
        """Within the block the parameters hold the average; after it, bit for bit what they held before.

        The parameters stay the same objects at the same addresses, so that optimizers, tied weights and patched
        forwards go on pointing at them. Whatever is raised inside, the values come back before it is passed on.

        Args:
            index (`int`, *optional*, defaults to 0):
                Which average.

        Raises:
            RuntimeError: if the block is entered a second time while open.
        """
        if self._swapped:
            raise RuntimeError(
                "swapped_in() entered twice: the parameters already hold the average; leave the outer block first"
            )
        kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._swapped = True
        try:
            with torch.no_grad():
                for name, param in self._params.items():
                    kept.append((param, param.detach().to(self._base[name].device, copy=True)))
                    param.copy_(self._averaged(name, index))
            yield
        finally:
            try:
                _put_back(kept)
            except BaseException:  # an interrupt (Ctrl-C) in the middle of it: the values come first
                _put_back(kept)
                raise
            finally:
                self._swapped = False

    def state_dict(self) -> dict:
        """Everything that a resumed run needs: `base` and `displacements` by name, `decays`, `num_updates`.

        The tensors are the state's own, not copies: save or clone them before the next update.
        """
        return {
            "num_updates": self.num_updates,
            "decays": list(self.decays),
            "base": dict(self._base),
            "displacements": [dict(displacement) for displacement in self._displacements],
        }

    def rebind(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Go on with the parameters that now have the names of those averaged, where others took their place.

        PEFT 0.21 puts new parameters into the model whenever it loads an adapter whose own are in 16 bits.

        Args:
            named_parameters (iterable of `(str, nn.Parameter)`):
                Of the same model; their values are left as they are.

        Raises:
            KeyError: if an averaged parameter has no successor.
        """
        present = dict(named_parameters)
        self._params = {name: present[name] for name in self._params}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take over a state saved by [`state_dict`]. Nothing is changed unless all of it fits.

        Args:
            state (`dict`):
                As [`state_dict`] made it, of the same parameters, dtypes and decays. θ₀ may be in a narrower dtype
                than the parameters have now: PEFT 0.21 loads 16-bit adapters in float32.

        Raises:
            ValueError: if names, shapes, dtypes or decays differ, naming the first that does.
        """
        if list(state["decays"]) != self.decays:
            raise ValueError(
                f"the saved average has decay {list(state['decays'])}, this one {self.decays}; use the saved run's "
                "half_life and run length"
            )
        pairs = [(self._base, state["base"])]
        pairs += list(zip(self._displacements, state["displacements"], strict=True))
        for mine, theirs in pairs:
            different = set(mine) ^ set(theirs)
            if different:
                raise ValueError(f"the saved average is of other parameters: {sorted(different)[0]!r} is in only one")
            for name, tensor in mine.items():
                fits = tensor.dtype == theirs[name].dtype
                if mine is self._base:  # which a wider dtype holds exactly
                    fits = tensor.dtype == torch.promote_types(tensor.dtype, theirs[name].dtype)
                if tensor.shape != theirs[name].shape or not fits:
                    raise ValueError(
                        f"{name}: saved as {tuple(theirs[name].shape)} {theirs[name].dtype}, "
                        f"expected {tuple(tensor.shape)} {tensor.dtype}"
                    )
        for mine, theirs in pairs:
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self.num_updates = int(state["num_updates"])


@torch.no_grad()
def _put_back(kept: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for param, value in kept:
        param.copy_(value)
