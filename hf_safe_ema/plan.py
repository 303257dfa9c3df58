"""What a run will be and cost, said before it is started: `hf-safe-ema train --dry-run`.

Knows: the arithmetic of steps, decays and checks. Does not know: how a run is made, what takes how much memory
(memory.py), or how long answers take (timing.py).
"""

import math
from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

from .arguments import SafeSFTConfig
from .decay import resolve_decays, stuck_at_base
from .memory import NOT_COUNTED, Memory, available_memory, estimate_memory
from .recipe import Recipe
from .safety.check import SafetyCheck
from .timing import time_of_check


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The run's tokenizer.

    Args:
        recipe ([`Recipe`]):
            Of the run.

    Raises:
        ValueError: if it cannot be had.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            recipe.model_path,
            revision=recipe.model.model_revision,
            trust_remote_code=recipe.training.trust_remote_code,
        )
        template = recipe.training.chat_template_path
        if template is not None:
            if template.endswith((".jinja", ".j2")):
                with open(template, encoding="utf-8") as file:
                    tokenizer.chat_template = file.read()
            else:
                tokenizer.chat_template = AutoTokenizer.from_pretrained(template).chat_template
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the tokenizer of {recipe.model.model_name_or_path!r} cannot be loaded: {reason}") from error
    return tokenizer


def usable_rows(recipe: Recipe, rows, tokenizer: PreTrainedTokenizerBase) -> int:
    """Training sequences that TRL will make of rows: it drops those whose answer is cut off, and packs if asked to.

    Args:
        recipe ([`Recipe`]):
            Of the run.
        rows (`datasets.Dataset`):
            Conversational prompt-completion.
        tokenizer (`PreTrainedTokenizerBase`):
            With a chat template.
    """
    training = recipe.training

    def measured(row) -> dict:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        pairs = zip(prompt["input_ids"], whole, strict=False)
        start = next((i for i, (one, other) in enumerate(pairs) if one != other), len(prompt["input_ids"]))
        return {"input_ids": whole, "start": start}

    rows = rows.map(measured, remove_columns=rows.column_names, desc="Counting tokens")
    if training.packing:
        from trl import pack_dataset

        return len(pack_dataset(rows.select_columns("input_ids"), training.max_length, training.packing_strategy))
    if training.max_length is None or training.completion_only_loss is False:
        return len(rows)
    return sum(start < min(training.max_length, len(ids)) for start, ids in zip(rows["start"], rows["input_ids"], strict=True))  # fmt: skip


def count_steps(training: SafeSFTConfig, rows: int | None) -> tuple[int, int | None]:
    """Optimizer steps of the run and of an epoch, as the Trainer will count them.

    Args:
        training ([`SafeSFTConfig`]):
            Of the run.
        rows (`int`, *optional*):
            Training sequences; None for a stream.

    Returns:
        `(int, int | None)`: None where an epoch has no known length.

    Raises:
        ValueError: if the run has no end.
    """
    if rows is None:
        if training.max_steps <= 0:
            raise ValueError("streaming=True: the length of a stream is not known; give max_steps")
        return training.max_steps, None
    share = math.floor if training.dataloader_drop_last else math.ceil
    batches = max(share(share(rows / training.train_batch_size) / training.world_size), 1)
    per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
    if training.max_steps > 0:
        return training.max_steps, per_epoch
    return math.ceil(training.num_train_epochs * per_epoch), per_epoch


def checked_steps(training: SafeSFTConfig, steps: int, per_epoch: int | None) -> list[int]:
    """Steps after which the safety check is run, apart from the one before the first.

    Args:
        training ([`SafeSFTConfig`]):
            Of the run.
        steps (`int`):
            Optimizer steps of the run.
        per_epoch (`int`, *optional*):
            Optimizer steps of an epoch.
    """
    if not (training.ema and training.safety_check) or steps == 0:
        return []
    due = {steps}
    if training.safety_check_steps:
        due |= set(range(training.safety_check_steps, steps, training.safety_check_steps))
    if training.eval_strategy == IntervalStrategy.STEPS:
        every = training.eval_steps
        every = math.ceil(every * steps) if every < 1 else int(every)
        due |= {step for step in range(every, steps + 1, every) if step >= training.eval_delay}
    elif training.eval_strategy == IntervalStrategy.EPOCH and per_epoch:
        due |= {step for step in range(per_epoch, steps + 1, per_epoch) if step / per_epoch >= training.eval_delay}
    return sorted(due)


def describe(recipe: Recipe, train, heldout) -> str:
    """The resolved settings as YAML, and as comments beside them what the run will be.

    Args:
        recipe ([`Recipe`]):
            Of the run.
        train (`datasets.Dataset` or `datasets.IterableDataset`), heldout (same or None):
            Its rows.

    Raises:
        ValueError: for what would stop the run too.
    """
    training = recipe.training
    tokenizer = load_tokenizer(recipe)
    check = training.build_check(progress=False) if training.ema else None
    if check is not None:
        check.validate(tokenizer)
    rows = None
    if hasattr(train, "__len__"):
        needed = training.max_steps <= 0 or training.eval_strategy == IntervalStrategy.EPOCH
        rows = usable_rows(recipe, train, tokenizer) if needed else len(train)
    steps, per_epoch = count_steps(training, rows)
    memory = estimate_memory(recipe, 0 if check is None else max(len(check.harmful), len(check.benign or [])))
    lines = [
        _data_line(train, heldout, rows),
        _steps_line(training, steps, per_epoch),
        *_average_lines(training, steps),
        *_memory_lines(training, memory),
        *_check_lines(recipe, check, checked_steps(training, steps, per_epoch), memory, tokenizer),
        "Nothing was trained, nothing was written.",
    ]
    header = "# What `hf-safe-ema train` was given, and the defaults of what is set most often.\n"
    return header + recipe.as_yaml() + "\n" + "\n".join(f"# {line}".rstrip() for line in lines)


def _data_line(train, heldout, rows: int | None) -> str:
    if rows is None:
        return "data: a stream" + (", of which a share is held out" if heldout is not None else "")
    text = f"data: {len(train):,} rows to train on, {0 if heldout is None else len(heldout):,} held out to evaluate on"
    return text if rows == len(train) else f"{text}; {rows:,} sequences after TRL's cutting and packing"


def _steps_line(training: SafeSFTConfig, steps: int, per_epoch: int | None) -> str:
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    processes = "1 process" if training.world_size == 1 else f"{training.world_size} processes"
    epochs = f", {steps / per_epoch:.2f} epochs" if per_epoch else ""
    precision = "bfloat16" if training.bf16 else "float16" if training.fp16 else "no"
    return f"steps: {steps:,} of {batch} rows each ({processes} on {training.device.type}, {precision} mixed precision){epochs}"


def _average_lines(training: SafeSFTConfig, steps: int) -> list[str]:
    if not training.ema:
        return ["average: none (ema: false)"]
    lines = []
    for number, decay in enumerate(resolve_decays(training.ema_half_life, training.ema_decay, steps)):
        half_life = f"half-life {math.log(0.5) / math.log(decay):.4g} steps, " if decay else ""
        share = decay**steps
        which = "average" if number == 0 else f"average {number + 1} (kept, not checked)"
        stuck = stuck_at_base(decay, steps) is not None
        warning = "; that is more than half: choose a shorter half-life" if stuck else ""
        lines.append(
            f"{which}: {half_life}decay {decay:.6g} per step; share of the base left at the end {share:.2%}{warning}"
        )
    if training.ema_mode == "lookahead":
        lines.append(f"the weights are set to the average every {training.ema_sync_steps} steps (lookahead)")
    return lines


def _memory_lines(training: SafeSFTConfig, memory: Memory) -> list[str]:
    share = memory.trained_params / memory.total_params
    free = available_memory(training.device)
    elsewhere = sorted({item.where for item in memory.items} - {"device"})
    lines = [
        f"parameters: {memory.total_params:,}, {memory.trained_params:,} of them trained ({share:.2%})",
        f"memory of each process: about {_size(memory.peak())} on {training.device.type}"
        + "".join(f" and {_size(memory.peak(where))} on {where}" for where in elsewhere)
        + ("" if free is None else f"; free there now: {_size(free)}"),
    ]
    for item in memory.items:
        when = "" if item.when == "always" else f" [only while {item.when}]"
        where = "" if item.where == "device" else f" [on {item.where}]"
        lines.append(f"  {_size(item.size):>10}  {item.name}{when}{where}")
    missing = "" if memory.complete else "activations (not known for this kind of model), "
    lines.append(f"  estimated, not measured; not counted: {missing}{NOT_COUNTED}")
    if training.save_strategy.value != "no":
        kept = [item.size for item in memory.items if item.name.startswith(("optimizer", "EMA"))]
        size = memory.trained_bytes + (0 if training.save_only_model else sum(kept))
        lines.append(f"disk: about {_size(size)} for each checkpoint that is kept, and once more while one is written")
    if free is not None and memory.peak() > free:
        lines.append(
            "  THIS IS MORE THAN IS FREE: smaller batches, use_peft, dtype bfloat16 or ema_device cpu need less"
        )
    return lines


def _check_lines(
    recipe: Recipe, check: SafetyCheck | None, steps: Sequence[int], memory: Memory, tokenizer
) -> list[str]:
    training = recipe.training
    if check is None:
        return ["checks: none (safety_check: false)"]
    asked = f"{len(check.harmful)} harmful" + ("" if check.benign is None else f" and {len(check.benign)} harmless")
    shown = ", ".join(map(str, steps)) if len(steps) <= 8 else f"{steps[0]}, {steps[1]}, ..., {steps[-1]}"
    times = training.safety_check_base + len(training.safety_check_weights) * len(steps)
    one = time_of_check(recipe, memory, tokenizer)
    moments = ["the base once"] if training.safety_check_base else []
    moments += [f"{' and '.join(training.safety_check_weights)} after step {shown}"] if steps else []
    return [
        f"checks: {', '.join(moments) or 'none'}; each asks {asked} prompts for at most "
        f"{training.safety_max_new_tokens} tokens",
        f"  {times} x {_duration(one.seconds)} = {_duration(times * one.seconds)} ({one.how}); the held-out loss is not "
        "counted",
    ]


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
