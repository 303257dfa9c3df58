"""A run as a person describes it: a YAML recipe, flags that override it, and the settings that both come to.

Knows: which settings `hf-safe-ema train` has, how they are typed, and which of them cannot be meant.
Does not know: what is done with them (train.py), or what they will cost (plan.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import yaml
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig

from .arguments import SafeSFTConfig, SafetyArguments
from .flags import RecipeParser
from .testbed import MODEL_FOLDER

TESTBED = "testbed"
"""Name of the small model that ships with the package, wherever a model is asked for."""


@dataclass
class TrainArguments:
    """What `hf-safe-ema train` needs beside the settings of the model and of the training.

    Args:
        dataset (`str`):
            What to fine-tune on: anything [`load_finetuning_data`] takes. `--dataset_name` is the same.
        dataset_config (`str`, *optional*), dataset_split (`str`, *optional*), dataset_revision (`str`, *optional*):
            Which part of it, for data on the hub or in a folder.
        max_rows (`int`, *optional*):
            At most so many rows, the first ones.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed. Then `max_steps` must be given.
        remove_refusals (`bool`, *optional*, defaults to `False`):
            Leave out rows whose answer is itself a refusal or safety talk.
        heldout_share (`float`, *optional*, defaults to 0.1):
            Share of the rows kept from training, to measure the held-out loss on; the same rows in every run. 0: none.
        heldout_rows (`int`, *optional*, defaults to 256):
            At most so many of them are evaluated.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an earlier run's output folder may be deleted.
        dry_run (`bool`, *optional*, defaults to `False`):
            Say what the run would be and cost, and end.

    Raises:
        ValueError: for values that no run could use.
    """

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "What to fine-tune on: dolly, alpaca, orca, slimorca, orca_dpo, a dataset on the hub, or a .jsonl, "
            ".json, .csv or .parquet file or a folder of them.",
            "aliases": ["--dataset_name"],
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Its configuration, for data on the hub or in a folder."}
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Its split; train if not given."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its revision, for data on the hub."})
    max_rows: int | None = field(default=None, metadata={"help": "At most so many rows, the first ones."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read rows as they are needed, for data larger than memory; in its own order, unless "
            "--shuffle_dataset. Needs --max_steps."
        },
    )
    remove_refusals: bool = field(
        default=False, metadata={"help": "Leave out rows whose answer is itself a refusal or safety talk."}
    )
    heldout_share: float = field(
        default=0.1,
        metadata={"help": "Share of the rows kept from training to measure the held-out loss on. 0: none."},
    )
    heldout_rows: int = field(default=256, metadata={"help": "At most so many of them are evaluated."})
    overwrite: bool = field(
        default=False, metadata={"help": "Delete what an earlier run of this command left in output_dir."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print the resolved settings, steps, decay, memory and the time the checks will take; train nothing."
        },
    )

    def __post_init__(self):
        if not self.dataset:
            raise ValueError("no dataset: give --dataset (dolly, alpaca, orca, a hub id or a path), or set it in YAML")
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"heldout_share={self.heldout_share}: must be at least 0 and below 1")
        for name in ("max_rows", "heldout_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")


def _named(start: str) -> list[str]:
    return [f.name for f in fields(SafetyArguments) if f.name.startswith(start)]


# What people set most, in the order in which they think of it. The rest follows in the help.
GROUPS: dict[str, tuple[str, ...]] = {
    "what is trained, and on what": (
        "model_name_or_path", "dataset", "dataset_config", "dataset_split", "dataset_revision", "max_rows",
        "streaming", "remove_refusals", "max_length", "heldout_share", "heldout_rows",
    ),
    "where the results go": (
        "output_dir", "overwrite", "resume_from_checkpoint", "dry_run", "report_to", "push_to_hub", "hub_model_id",
    ),
    "how it is trained": (
        "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size",
        "gradient_accumulation_steps", "max_steps", "num_train_epochs", "optim", "dtype", "bf16",
        "activation_checkpointing", "seed",
    ),
    "when it is evaluated, logged and saved": (
        "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size", "logging_steps",
        "save_strategy", "save_steps", "save_total_limit", "metric_for_best_model", "load_best_model_at_end",
    ),
    "LoRA in place of full fine-tuning": (
        "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save",
        "use_rslora", "use_dora", "load_in_4bit", "load_in_8bit",
    ),
    "the average of the weights": (*_named("ema"), "final_weights"),
    "the safety check": (*_named("safety"), "max_asr", "on_violation"),
}  # fmt: skip

# In place of what transformers and TRL say of theirs.
_WORDS = {
    "model_name_or_path": f"The chat model: a folder, a hub name, or {TESTBED}, the small one in this package.",
    "output_dir": "A folder that is empty or does not exist (default: trainer_output).",
    "resume_from_checkpoint": "Go on from a checkpoint: its folder, or true for the newest whole one in output_dir.",
    "max_length": "Longest training sequence in tokens; what is longer is cut at its end.",
    "lr_scheduler_type": "For example linear, cosine, constant_with_warmup.",
    "optim": "For example adamw_torch_fused, paged_adamw_8bit, adafactor.",
    "dtype": "What the weights are loaded in. Full fine-tuning with small learning rates wants float32.",
    "bf16": "Compute in bfloat16 (mixed precision). Default: where a GPU can.",
    "activation_checkpointing": "Compute activations twice to keep fewer of them. On by default; false turns it off.",
    "max_steps": "Optimizer steps, in place of num_train_epochs.",
    "gradient_accumulation_steps": "Batches that make one optimizer step.",
    "eval_steps": "Optimizer steps between evaluations; below 1, a share of the run.",
    "eval_on_start": "Evaluate before the first step too.",
    "lora_r": "Rank of the adapters.",
    "lora_alpha": "Their scale is lora_alpha / lora_r.",
    "lora_dropout": "Dropout before them.",
    "lora_target_modules": "Names of the modules that get one, or all-linear.",
    "lora_modules_to_save": "Names of modules that are trained whole.",
}

# Of one call of the command, not of the run that it describes.
_OF_THE_CALL = ("overwrite", "dry_run", "resume_from_checkpoint")


@dataclass
class Recipe:
    """The settings of a run, checked.

    Args:
        run ([`TrainArguments`]):
            The data, and what to do.
        training ([`SafeSFTConfig`]):
            Training, average and check.
        model (`trl.ModelConfig`):
            The model, and how adapters are put on it.
        values (`dict`):
            Every setting as it was typed, or its default.
        given (set of `str`):
            Names of those that recipe or flags gave.
    """

    run: TrainArguments
    training: SafeSFTConfig
    model: ModelConfig
    values: dict[str, Any]
    given: set[str]

    @property
    def model_path(self) -> str:
        """What `from_pretrained` is given."""
        name = self.model.model_name_or_path
        return str(MODEL_FOLDER) if name == TESTBED else name

    @property
    def resume_from(self) -> str | bool | None:
        """What `train()` is given as `resume_from_checkpoint`."""
        asked = self.training.resume_from_checkpoint
        return {"true": True, "false": None, "none": None, "": None}.get(str(asked).lower(), asked)

    def as_yaml(self) -> str:
        """The settings that people set most and all that were given, as a recipe that makes the same run."""
        shown = [name for group in GROUPS.values() for name in group]
        shown += [name for name in self.values if name in self.given and name not in shown]
        settings = {
            name: self.values[name]
            for name in shown
            if name not in _OF_THE_CALL
            and not name.endswith("_token")  # a secret has no place in a file that is shared
            and (name != "bf16" or name in self.given)  # by default it is what the machine can do
            and (self.values[name] is not None or name in self.given)
        }
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)


def read_recipe(argv: Sequence[str]) -> Recipe:
    """Flags, and the YAML file that `--config` among them names, as checked settings.

    Args:
        argv (list of `str`):
            For example `["--config", "recipe.yaml", "--max_steps", "50"]`; a flag wins over the file.

    Returns:
        [`Recipe`]

    Raises:
        ValueError, TypeError, OSError: for whatever cannot be meant, with a sentence that says what to change.
        SystemExit: for `--help`.

    Example:

    ```python
    >>> recipe = read_recipe(["--model_name_or_path", "testbed", "--dataset", "dolly", "--max_steps", "50"])
    >>> recipe.training.max_steps, recipe.run.heldout_share
    (50, 0.1)

    ```
    """
    parser = build_parser()
    # First, so that --help needs no file.
    namespace, _ = parser.parse_known_args(argv)
    given = set(parser.named_in(argv))
    if namespace.config is not None:
        given |= set(parser.take_file(namespace.config))
    _take_defaults_of_this_machine(parser, given)
    values = vars(parser.parse_args(argv))
    run, training, model, _ = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    if not model.model_name_or_path:
        raise ValueError(
            f"no model: give --model_name_or_path (a folder, a hub name, or {TESTBED}), or set it in YAML"
        )
    values.pop("config")
    return Recipe(run, training, model, values, given - {"config"})


def build_parser() -> RecipeParser:
    """The parser of all settings of `hf-safe-ema train`."""
    return RecipeParser(
        (TrainArguments, SafeSFTConfig, ModelConfig),
        GROUPS,
        _WORDS,
        prog="hf-safe-ema train",
        usage="hf-safe-ema train --config RECIPE.yaml [--FLAG VALUE ...]",
        description="Fine-tune a chat model with TRL's SFTTrainer, keep an average of its weights, and check how safe "
        "both stay. Every flag is also a key of the recipe; a flag wins over the recipe. Several processes: torchrun "
        "--nproc-per-node 2 -m hf_safe_ema.cli train --config RECIPE.yaml",
    )


def _take_defaults_of_this_machine(parser: RecipeParser, given: set[str]) -> None:
    """Defaults that TRL sets for a recent GPU, as this machine can have them."""
    if not given & {"bf16", "fp16"} and not is_torch_bf16_gpu_available():
        parser.set_defaults_with_config(bf16=False)
    # TRL 1.16 has this default under the old name, which transformers 5.23 warns of.
    if "gradient_checkpointing" not in given:
        parser.set_defaults_with_config(gradient_checkpointing=None)
        if "activation_checkpointing" not in given:
            parser.set_defaults_with_config(activation_checkpointing=True)
