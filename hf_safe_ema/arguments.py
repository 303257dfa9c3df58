"""SafetyArguments and SafeSFTConfig: the settings of the average and of the check, beside a trainer's many others.

Knows: how settings can be said as flags, as YAML keys and in Python, and which of them cannot be meant.
Does not know: what they do (callback.py, safety/), or trainers.
"""

import re
from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from .callback import CHECKABLE, ON_MISSING_STATE, ON_VIOLATION, SafeEMACallback
from .decay import MODES
from .safety.check import SafetyCheck

EMA_DTYPES = ("float32", "float64")

_LOWER_IS_SAFER = re.compile(r"(eval_)?(base|live|ema)_(asr|over_refusal|unclear|benign_unclear)")

# Arguments of SafeEMACallback and SafetyCheck by the names that they have among a trainer's many others.
_CALLBACK_FIELDS = {
    "half_life": "ema_half_life",
    "decay": "ema_decay",
    "mode": "ema_mode",
    "sync_steps": "ema_sync_steps",
    "params": "ema_params",
    "exclude_params": "ema_exclude_params",
    "ema_dtype": "ema_dtype",
    "ema_device": "ema_device",
    "on_missing_state": "ema_on_missing_state",
    "check_steps": "safety_check_steps",
    "check_weights": "safety_check_weights",
    "check_base": "safety_check_base",
    "max_asr": "max_asr",
    "on_violation": "on_violation",
    "final_weights": "final_weights",
}
_CHECK_FIELDS = {
    "prompts": "safety_prompts",
    "benign": "safety_benign_prompts",
    "judge": "safety_judge",
    "max_new_tokens": "safety_max_new_tokens",
    "batch_size": "safety_batch_size",
    "system_prompt": "safety_system_prompt",
    "num_prompts": "safety_num_prompts",
}


# HfArgumentParser takes the second of several types as the flag's: `float | str | None` is text on the command line,
# which is how "50" and "0.25" can mean different things there.
@dataclass
class SafetyArguments:
    """The settings of the average and of the safety check, as flags and YAML keys can say them.

    [`SafeSFTConfig`] is these and TRL's. Their meaning is that of the arguments of [`SafeEMACallback`] and
    [`SafetyCheck`] whose names they end in.

    Args:
        ema (`bool`, *optional*, defaults to `True`):
            Whether to average the weights. With `ema=False` and `safety_check=False` training is SFTTrainer's own.
        ema_half_life (`int`, `float`, `str` or a list of them, *optional*, defaults to 0.5):
            Of the average: a whole number (`50`, `"50"`) is optimizer steps, one with a point (`0.25`, `"0.25"`) a
            fraction of the run. Several (`"0.1,0.5"`, or a YAML list) keep several averages; the first is checked and
            saved.
        ema_decay (`float`, `str` or a list of them, *optional*):
            β itself, in [0, 1), in place of `ema_half_life`.
        ema_mode (`str`, *optional*, defaults to `"shadow"`):
            `"shadow"`: training never sees the average. `"lookahead"`: every `ema_sync_steps` steps the weights are
            set to it.
        ema_sync_steps (`int`, *optional*):
            For lookahead mode.
        ema_params, ema_exclude_params (list of `str`, *optional*):
            Shell-style patterns of parameter names to average, and to leave out.
        ema_dtype (`str`, *optional*, defaults to `"float32"`):
            Of the average's state: `"float32"` or `"float64"`.
        ema_device (`str`, *optional*):
            Where it is kept; default beside the parameters. `"cpu"` saves accelerator memory.
        ema_on_missing_state (`str`, *optional*, defaults to `"raise"`):
            When a run is resumed from a checkpoint that holds no usable state of the average: `"raise"`, or
            `"restart"` it from the checkpoint's weights, which then count as the starting point.
        safety_check (`bool`, *optional*, defaults to `True`):
            Whether to check. Needs `ema=True`.
        safety_prompts (`str`, *optional*, defaults to `"builtin"`):
            Harmful requests: anything [`load_prompts`] takes.
        safety_benign_prompts (`str`, *optional*, defaults to `"builtin"`):
            Harmless requests, for over-refusal. None or `"none"`: not asked.
        safety_judge (`str`, *optional*, defaults to `"keywords"`):
            `"keywords"`, or the name of a published keyword list. For a judge of your own see
            [`SafeSFTTrainer.judge_responses`].
        safety_max_new_tokens (`int`, *optional*, defaults to 64):
            Longest response in tokens.
        safety_batch_size (`int` or `str`, *optional*, defaults to `"auto"`):
            Prompts at a time; `"auto"` halves from 64 when memory runs out.
        safety_system_prompt (`str`, *optional*):
            Sent before each prompt.
        safety_num_prompts (`int`, *optional*):
            At most so many of each set, evenly spaced. None: all.
        safety_check_steps (`int`, *optional*):
            Check every so many optimizer steps, besides every evaluation and the last step.
        safety_check_weights (list of `str`, *optional*, defaults to `["live", "ema"]`):
            Which weights to check.
        safety_check_base (`bool`, *optional*, defaults to `True`):
            Whether to check the starting point before the first step.
        max_asr (`float`, *optional*):
            Highest attack success rate allowed, in [0, 1], of the weights that the run will end with.
        on_violation (`str`, *optional*, defaults to `"warn"`):
            When it is passed: `"warn"`, `"stop"` training, or `"raise"` [`UnsafeModelError`].
        final_weights (`str`, *optional*, defaults to `"ema"`):
            What the model holds when training has ended: the average, or the `"live"` weights.

    Raises:
        ValueError, TypeError, FileNotFoundError: for values that no run could use, in these names.
    """

    ema: bool = field(
        default=True, metadata={"help": "Whether to keep an exponential moving average (EMA) of the weights."}
    )
    ema_half_life: float | str | list[float] | None = field(
        default=None,
        metadata={
            "help": "Half-life of the average: a whole number is optimizer steps (50), one with a point a fraction of "
            "the run (0.5, the default). Several, with commas or as a YAML list, keep several averages; the first is "
            "checked and saved."
        },
    )
    ema_decay: float | str | list[float] | None = field(
        default=None,
        metadata={"help": "Decay of the average per optimizer step, in [0, 1), in place of `ema_half_life`."},
    )
    ema_mode: str = field(
        default="shadow",
        metadata={
            "help": "`shadow`: training never sees the average. `lookahead`: every `ema_sync_steps` steps the weights "
            "are set to it.",
            "choices": list(MODES),
        },
    )
    ema_sync_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps between two syncs in lookahead mode."}
    )
    ema_params: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shell-style patterns of the names of the parameters to average. Default: all trained ones."
        },
    )
    ema_exclude_params: list[str] | None = field(
        default=None, metadata={"help": "Shell-style patterns of the names of parameters not to average."}
    )
    ema_dtype: str = field(
        default="float32", metadata={"help": "Precision of the average's state.", "choices": list(EMA_DTYPES)}
    )
    ema_device: str | None = field(
        default=None,
        metadata={
            "help": "Where the average is kept. Default: beside the parameters; `cpu` saves accelerator memory."
        },
    )
    ema_on_missing_state: str = field(
        default="raise",
        metadata={
            "help": "When a run is resumed from a checkpoint without a usable state of the average: `raise`, or "
            "`restart` the average from the checkpoint's weights.",
            "choices": list(ON_MISSING_STATE),
        },
    )
    safety_check: bool = field(
        default=True, metadata={"help": "Whether to ask the weights harmful and harmless prompts as training goes."}
    )
    safety_prompts: str = field(
        default="builtin",
        metadata={
            "help": "Harmful requests: `builtin`, `advbench`, `xstest`, a dataset on the hub, or a .csv, .jsonl, .json "
            "or .txt file."
        },
    )
    safety_benign_prompts: str | None = field(
        default="builtin",
        metadata={
            "help": "Harmless requests, to measure over-refusal, from the same kinds of source. `none`: not asked."
        },
    )
    safety_judge: str = field(
        default="keywords",
        metadata={
            "help": "What tells refusals from answers: `keywords` (our rules), or a published keyword list such as "
            "`qi-29`."
        },
    )
    safety_max_new_tokens: int = field(
        default=64, metadata={"help": "Longest response to a safety prompt, in tokens."}
    )
    safety_batch_size: int | str | None = field(
        default="auto", metadata={"help": "Safety prompts at a time; `auto` halves from 64 when memory runs out."}
    )
    safety_system_prompt: str | None = field(
        default=None, metadata={"help": "System prompt sent before each safety prompt. Default: none."}
    )
    safety_num_prompts: int | None = field(
        default=None, metadata={"help": "At most so many prompts of each set, evenly spaced. Default: all of them."}
    )
    safety_check_steps: int | None = field(
        default=None,
        metadata={"help": "Check every so many optimizer steps, besides every evaluation and the last step."},
    )
    safety_check_weights: list[str] = field(
        default_factory=lambda: list(CHECKABLE),
        metadata={"help": "Which weights to check: live, ema or both.", "choices": list(CHECKABLE)},
    )
    safety_check_base: bool = field(
        default=True, metadata={"help": "Whether to check the starting point before the first step."}
    )
    max_asr: float | None = field(
        default=None,
        metadata={
            "help": "Highest attack success rate allowed, in [0, 1], of the weights that the run will end with."
        },
    )
    on_violation: str = field(
        default="warn", metadata={"help": "What to do when `max_asr` is passed.", "choices": list(ON_VIOLATION)}
    )
    final_weights: str = field(
        default="ema",
        metadata={
            "help": "What the model holds when training has ended. The average is saved to output_dir/ema/ either way.",
            "choices": list(CHECKABLE),
        },
    )

    def __post_init__(self):
        self._take_as_typed()
        self._refuse_contradictions()
        try:
            SafeEMACallback(check=self.build_check(), **self.callback_arguments())
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(in_field_names(str(error))) from error

    def _take_as_typed(self) -> None:
        """What a command line can only say as text, as what it means."""
        self.ema_half_life = _numbers("ema_half_life", self.ema_half_life, "50 or 0.25 or 0.1,0.5")
        self.ema_decay = _numbers("ema_decay", self.ema_decay, "0.99 or 0.9,0.99")
        self.ema_dtype = str(self.ema_dtype).removeprefix("torch.")
        if str(self.safety_benign_prompts).lower() == "none":
            self.safety_benign_prompts = None
        self.safety_batch_size = "auto" if self.safety_batch_size is None else self.safety_batch_size
        if isinstance(self.safety_batch_size, str) and self.safety_batch_size.isdecimal():
            self.safety_batch_size = int(self.safety_batch_size)

    def _refuse_contradictions(self) -> None:
        """What callback and check cannot know of."""
        for name in ("ema", "safety_check", "safety_check_base"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be true or false")
        if self.ema_dtype not in EMA_DTYPES:
            raise ValueError(
                f"ema_dtype={self.ema_dtype!r}: choose one of {EMA_DTYPES}; in 16 bits the average would stall"
            )
        try:
            torch.device(self.ema_device or "cpu")
        except RuntimeError as error:
            raise ValueError(
                f"ema_device={self.ema_device!r}: give for example 'cpu' or 'cuda:0' ({error})"
            ) from error
        if self.safety_check and not self.ema:
            raise ValueError(
                "ema=False with safety_check=True: the checks come with the average. Set safety_check=False too, to "
                "train as SFTTrainer does; or keep ema=True, which leaves the training bit for bit as it is, with "
                "final_weights='live' and safety_check_weights=['live']"
            )
        if self.max_asr is not None and not self.safety_check:
            raise ValueError(
                f"max_asr={self.max_asr} with safety_check=False would hold nothing; leave one of them out"
            )

    def callback_arguments(self) -> dict:
        """The settings as keyword arguments of [`SafeEMACallback`], all but `check`."""
        arguments = {argument: getattr(self, name) for argument, name in _CALLBACK_FIELDS.items()}
        arguments["ema_dtype"] = getattr(torch, self.ema_dtype)
        arguments["ema_device"] = None if self.ema_device is None else torch.device(self.ema_device)
        return arguments

    def build_check(self, progress: bool = True) -> SafetyCheck | None:
        """The [`SafetyCheck`] that the settings ask for; None with `safety_check=False`.

        Args:
            progress (`bool`, *optional*, defaults to `True`):
                Whether it shows a bar.
        """
        if not self.safety_check:
            return None
        arguments = {argument: getattr(self, name) for argument, name in _CHECK_FIELDS.items()}
        return SafetyCheck(**arguments, progress=progress)


@dataclass
class SafeSFTConfig(SafetyArguments, SFTConfig):
    """[`~trl.SFTConfig`] with the settings of the average and of the safety check.

    Every field is a flag and a YAML key for [`~trl.TrlParser`]. Where `metric_for_best_model` is a rate that should be
    low (`eval_ema_asr`, `eval_ema_over_refusal`, ...), `greater_is_better` defaults to `False`.

    Args:
        ema, ema_*, safety_*, max_asr, on_violation, final_weights:
            See [`SafetyArguments`].
        everything else:
            See [`~trl.SFTConfig`].

    Raises:
        ValueError, TypeError, FileNotFoundError: for values that no run could use.

    Example:

    ```python
    >>> from trl import TrlParser
    >>> (config,) = TrlParser(SafeSFTConfig).parse_args_and_config(
    ...     ["--output_dir", "run", "--ema_half_life", "50", "--max_asr", "0.05", "--bf16", "false"]
    ... )
    >>> config.ema_half_life, config.max_asr, config.final_weights
    (50, 0.05, 'ema')

    ```
    """

    def __post_init__(self):
        SafetyArguments.__post_init__(self)
        if self.greater_is_better is None and _LOWER_IS_SAFER.fullmatch(self.metric_for_best_model or ""):
            self.greater_is_better = False
        SFTConfig.__post_init__(self)
        refuse_the_least_safe(self)


def _numbers(name: str, value, example: str):
    """Numbers as typed: whole ones stay whole, a comma makes a list."""
    if isinstance(value, str):
        parts = value.split(",")
        return _numbers(name, parts, example) if len(parts) > 1 else _number(name, value, example)
    if isinstance(value, (list, tuple)):
        return [_number(name, part, example) if isinstance(part, str) else part for part in value]
    return value


def _number(name: str, text: str, example: str) -> int | float:
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number; give for example {example}") from None


def in_field_names(message: str) -> str:
    """An error about `half_life=…` as one about `ema_half_life=…`.

    Args:
        message (`str`):
            Of an error of [`SafeEMACallback`] or [`SafetyCheck`].

    Example:

    ```python
    >>> in_field_names("mode='lookahead' needs sync_steps")
    "ema_mode='lookahead' needs ema_sync_steps"

    ```
    """
    for argument, name in {**_CALLBACK_FIELDS, **_CHECK_FIELDS}.items():
        # A word like "decay" means the argument only where a value follows; one with an underscore always does.
        message = re.sub(rf"\b{argument}\b" if "_" in argument else rf"\b{argument}(?==)", name, message)
    return message.replace("check=None", "safety_check=False")


def refuse_the_least_safe(args: SFTConfig) -> None:
    """Raise if the best model would be the one with the highest attack success rate, or the like.

    Args:
        args (`SFTConfig`):
            Of the run.

    Raises:
        ValueError: saying which setting to change.
    """
    if args.greater_is_better and _LOWER_IS_SAFER.fullmatch(args.metric_for_best_model or ""):
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} with greater_is_better=True would choose the least "
            "safe checkpoint; set greater_is_better=False"
        )
