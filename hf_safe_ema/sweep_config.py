"""What a sweep varies, and what stays the same: `sweep.yaml`, read and checked.

Knows: the file's format, and which values of a setting the command `hf-safe-ema train` would take. Does not know: how runs are
made (sweep_run.py), chosen or stored (sweep.py).

    train:                                   # settings of hf-safe-ema train, the same in every run
      config: examples/recipes/testbed_dolly_full.yaml
      max_rows: 4000
    vary:
      learning_rate: [3.0e-4, 1.0e-3]        # these values; or {low: 1.0e-5, high: 1.0e-3, log: true}
      per_device_train_batch_size: [8, 32]
      seed: [0, 1, 2]                        # runs that differ in it alone are averaged in tables and plots
    half_lives: [0.25, 0.5]                  # all measured in each run
    output_dir: outputs/my-sweep
"""

import difflib
import hashlib
import itertools
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

SAMPLERS = ("grid", "tpe", "nsga2", "random")
BASE, LIVE = "base", "live"
"""Names of the starting point and of the weights that training works on; averages are named by their half-lives."""
SEED = "seed"
"""Setting whose values are averaged over in tables and plots."""
ENDS_WITH_SWEEP = "--ends_with_sweep"
"""Flag of sweep_run.py."""

_OWN = ("output_dir", "overwrite", "resume_from_checkpoint", "dry_run", "ema_half_life", "ema_decay", "push_to_hub")
_WITHOUT_NEED = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
"""Of a run of which only the last numbers are kept; what the file says goes before."""


@dataclass
class SweepConfig:
    """The settings of a sweep.

    Args:
        train (`dict`):
            Settings of `hf-safe-ema train`, the same in every run; `config` names a recipe that they are added to.
        vary (`dict`):
            Values by setting: a list of them, or `{low:, high:, log:, step:}` for a sampler to choose from.
        output_dir (`str`):
            For the study, the runs' folders, tables and plots. Holds an earlier part of the same sweep, or nothing.
        half_lives (list of `int` or `float`, *optional*, defaults to `[0.5]`):
            Averages that each run keeps: steps (int) or fractions of the run (float).
        usefulness (`str`, *optional*, defaults to `"loss"`):
            The second objective beside ASR: a metric of the Trainer's evaluation, without `eval_`.
        direction (`str`, *optional*):
            `"minimize"` or `"maximize"` it. Default: minimize if its name ends in "loss".
        sampler (`str`, *optional*, defaults to `"grid"`):
            `"grid"` (all combinations), or one of Optuna's: `"tpe"`, `"nsga2"`, `"random"`.
        trials (`int`, *optional*):
            How many runs a sampler makes, of all processes together; for a grid all.
        storage (`str`, *optional*):
            URL of a database that Optuna can use, for several machines to share. Default: `study.db` (SQLite) in
            `output_dir`.
        study (`str`, *optional*, defaults to `"sweep"`):
            Name of the study in it.
        launch (list of `str`, *optional*):
            Command that starts a run, such as `["torchrun", "--nproc-per-node", "8", "-m"]`. Default: this Python.
        keep_models (`bool`, *optional*, defaults to `False`):
            Whether each run's averaged model stays on disk.

    Raises:
        ValueError, TypeError, OSError: for what cannot be meant, with a sentence that says what to change.
    """

    train: dict[str, Any]
    vary: dict[str, Any]
    output_dir: str
    half_lives: list[int | float] = field(default_factory=lambda: [0.5])
    usefulness: str = "loss"
    direction: str | None = None
    sampler: str = "grid"
    trials: int | None = None
    storage: str | None = None
    study: str = "sweep"
    launch: list[str] | None = None
    keep_models: bool = False

    def __post_init__(self):
        for name, kind, said in (("train", dict, "settings by name"), ("vary", dict, "values by setting"),
                                 ("half_lives", list, "a list such as [0.25, 0.5]")):  # fmt: skip
            if not isinstance(getattr(self, name), kind) or not getattr(self, name):
                raise TypeError(f"{name}: {getattr(self, name)!r}; give {said}")
        if not isinstance(self.output_dir, str) or not self.output_dir:
            raise ValueError(f"output_dir: {self.output_dir!r}; name a folder")
        self.usefulness = str(self.usefulness).removeprefix("eval_")
        if self.direction is None:
            self.direction = "minimize" if self.usefulness.endswith("loss") else "maximize"
        self._check_choices()
        self._check_names()
        for name, values in self.vary.items():
            _check_values(name, values, self.sampler)
        self._check_half_lives()
        self._check_trials()

    def _check_choices(self) -> None:
        for name, choices in (("sampler", SAMPLERS), ("direction", ("minimize", "maximize"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.launch is not None and not (isinstance(self.launch, list) and all(map(str, self.launch))):
            raise TypeError(
                f"launch: {self.launch!r}; give a list of words, such as [torchrun, --nproc-per-node, 8, -m]"
            )

    def _check_names(self) -> None:
        for place, names in (("train", self.train), ("vary", self.vary)):
            for name in names:
                if name in _OWN:
                    instead = "half_lives" if name.startswith("ema_") else "the sweep's own settings"
                    raise ValueError(f"{place}: {name} is not for a single run to say here; see {instead}")
        both = [name for name in self.vary if name in self.train]
        if both:
            raise ValueError(f"vary: {', '.join(both)} also under train; leave it out of one of them")

    def _check_half_lives(self) -> None:
        from .decay import check_half_life

        for value in self.half_lives:
            check_half_life(value)
        if len({str(value) for value in self.half_lives}) < len(self.half_lives):
            raise ValueError(f"half_lives: {self.half_lives}: each once")

    def _check_trials(self) -> None:
        if self.sampler == "grid":
            if self.trials is not None:
                raise ValueError(
                    f"trials: {self.trials}; a grid makes all its runs: leave it out, or choose a sampler"
                )
        elif isinstance(self.trials, bool) or not isinstance(self.trials, int) or self.trials < 1:
            raise ValueError(f"trials: {self.trials!r}; say how many runs the sampler {self.sampler!r} may make")

    @property
    def weights(self) -> list[str]:
        """Names of what each run measures: `"live"`, and each half-life as text."""
        return [LIVE, *(str(value) for value in self.half_lives)]

    @property
    def storage_url(self) -> str:
        """Where Optuna keeps the study."""
        return self.storage or f"sqlite:///{Path(self.output_dir) / 'study.db'}"

    def grid(self) -> list[dict[str, Any]]:
        """All combinations of the values under `vary`; for a sampler none."""
        if self.sampler != "grid":
            return []
        return [dict(zip(self.vary, values, strict=True)) for values in itertools.product(*self.vary.values())]

    def settings(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """All settings of one run, to be given to `hf-safe-ema train`, but for its folder.

        Args:
            chosen (`dict`):
                A value for each setting under `vary`.
        """
        said = dict(self.train)
        base = _read_yaml(said.pop("config")) if "config" in said else {}
        for name in _OWN:
            base.pop(name, None)
        return {**_WITHOUT_NEED, **base, **said, **chosen, "ema_half_life": list(self.half_lives)}

    def same_study(self) -> dict[str, Any]:
        """What two processes, or two calls, must agree on to work on one study."""
        return {
            name: getattr(self, name) for name in ("train", "vary", "half_lives", "usefulness", "direction", "sampler")
        }


def _check_values(name: str, values: Any, sampler: str) -> None:
    if isinstance(values, list):
        if not values:
            raise ValueError(f"vary: {name}: no value; give at least one")
        if len({json.dumps(value) for value in values}) < len(values):
            raise ValueError(f"vary: {name}: {values}: each value once")
        if any(isinstance(value, (list, dict)) for value in values):
            raise TypeError(f"vary: {name}: {values}: give plain values")
        return
    if not isinstance(values, dict):
        raise TypeError(f"vary: {name}: {values!r}; give a list of values, or {{low: ..., high: ...}}")
    if sampler == "grid":
        raise ValueError(
            f"vary: {name}: a grid needs a list of values; for a range choose a sampler: tpe, nsga2, random"
        )
    unknown = set(values) - {"low", "high", "log", "step"}
    if unknown or not {"low", "high"} <= set(values):
        raise ValueError(f"vary: {name}: {values}; give low and high, and log or step if you wish")
    numbers = [values[key] for key in ("low", "high", "step") if values.get(key) is not None]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in numbers):
        raise TypeError(f"vary: {name}: {values}; low, high and step are numbers (write 1.0e-4 with the point)")
    if not values["low"] < values["high"]:
        raise ValueError(f"vary: {name}: low={values['low']} must be below high={values['high']}")
    if values.get("log") and (values["low"] <= 0 or values.get("step") is not None):
        raise ValueError(f"vary: {name}: log wants low above 0, and no step")


def read_sweep(path: str, **instead) -> SweepConfig:
    """A sweep's file, checked: each value of each setting as `hf-safe-ema train` would check it.

    Args:
        path (`str`):
            YAML file.
        instead:
            Settings of [`SweepConfig`] in place of the file's; None is none.

    Raises:
        ValueError, TypeError, OSError: for what cannot be meant.
    """
    said = {**_read_yaml(path), **{name: value for name, value in instead.items() if value is not None}}
    known = [f.name for f in fields(SweepConfig)]
    for name in said:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{path}: unknown key {name}" + (f" (did you mean {near[0]}?)" if near else "")
                             + f"; known: {', '.join(known)}")  # fmt: skip
    missing = [name for name in ("train", "vary", "output_dir") if name not in said]
    if missing:
        raise ValueError(f"{path}: {' and '.join(missing)} missing")
    try:
        config = SweepConfig(**said)
        check_runs(config)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error
    return config


def check_runs(config: SweepConfig) -> None:
    """Raise unless `hf-safe-ema train` takes every value that is to be tried, each with the first ones of the others.

    Args:
        config ([`SweepConfig`]):
            Of the sweep.

    Raises:
        ValueError, TypeError, OSError: as for a single run.
    """
    from .recipe import read_recipe

    ends = {n: v if isinstance(v, list) else [v["low"], v["high"]] for n, v in config.vary.items()}
    first = {name: values[0] for name, values in ends.items()}
    tried = [first] + [{**first, name: value} for name, values in ends.items() for value in values[1:]]
    for chosen in tried:
        try:
            read_recipe(as_flags(config.settings(chosen)))
        except (ValueError, TypeError) as error:
            raise type(error)(f"a run with {chosen} could not be made: {error}") from error


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as the flags of `hf-safe-ema train`.

    Args:
        settings (`dict`):
            By name.

    Example:

    ```python
    >>> as_flags({"max_steps": 5, "bf16": False, "ema_half_life": [0.25, 10], "lora_target_modules": ["q_proj", "v_proj"]})
    ['--max_steps', '5', '--bf16', 'false', '--ema_half_life', '0.25,10', '--lora_target_modules', 'q_proj', 'v_proj']

    ```
    """
    flags = []
    for name, value in settings.items():
        if value is None:
            continue
        if name == "ema_half_life":
            words = [",".join(map(str, value))]
        elif isinstance(value, (list, tuple)):
            words = list(map(str, value))
        elif isinstance(value, (bool, dict)):
            words = [json.dumps(value)]
        else:
            words = [str(value)]
        flags += [f"--{name}", *words]
    return flags


def run_name(chosen: dict[str, Any], settings: dict[str, Any]) -> str:
    """A folder's name for a run, the same for the same settings, another one for others.

    Args:
        chosen (`dict`):
            Values under `vary`, to be read in the name.
        settings (`dict`):
            All settings.

    Example:

    ```python
    >>> run_name({"learning_rate": 0.001, "seed": 0}, {"learning_rate": 0.001, "seed": 0, "max_steps": 100})
    'learning_rate=0.001,seed=0-16da26b2'

    ```
    """
    words = ",".join(f"{name}={value}" for name, value in chosen.items())
    plain = "".join(c if c.isalnum() or c in "=,.-_" else "_" for c in words)[:120]
    return f"{plain}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"


def _read_yaml(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a YAML file")
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not valid YAML in UTF-8 ({' '.join(str(error).split())})") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path}: must be a YAML mapping (name: value), is {said!r:.60}")
    return said
