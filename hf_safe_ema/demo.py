"""The main job, end to end: fine-tune a chat model with TRL's SFTTrainer and SafeEMACallback, and show what came of it.

Knows: which parts to put together, and what a person at a terminal wants to see. Does not know: how any part works.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from .history import HISTORY_NAME, check_writable, read_jsonl, write_whole

HELDOUT_ROWS = 240
MAX_LENGTH = 192
MARKER = ".hf-safe-ema-demo"
"""An empty file by which `--overwrite` knows a folder that it may delete."""


@dataclass
class DemoConfig:
    """What `hf-safe-ema demo` does; see its `--help`.

    Args:
        model (`str`, *optional*, defaults to `"testbed"`):
            `"testbed"`, a folder or a hub name.
        train_file, prompts_file (`str`, *optional*):
            Own instruction data, own harmful prompts. Default: the built-in ones.
        learning_rate (`float`, *optional*), batch_size (`int`, *optional*), steps (`int`, *optional*):
            Of the fine-tuning, with a constant learning rate after the warm-up.
        half_life (`int` or `float`, *optional*):
            Of the average; None is the callback's default.
        seed (`int`, *optional*, defaults to 0):
            Of the data order.
        output_dir (`str`, *optional*):
            Must not exist, unless `overwrite`. None: the first free of `safe-ema-demo`, `safe-ema-demo-2`, …
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an earlier demo's folder may be replaced.
    """

    model: str = "testbed"
    train_file: str | None = None
    prompts_file: str | None = None
    learning_rate: float = 7e-4
    batch_size: int = 8
    steps: int = 200
    half_life: int | float | None = None
    seed: int = 0
    output_dir: str | None = None
    overwrite: bool = False


def prepare_output_dir(wanted: str | None, overwrite: bool) -> Path:
    """The folder to write to, empty.

    Args:
        wanted (`str`, *optional*):
            None: the first free default.
        overwrite (`bool`):
            Whether an earlier demo's folder there may be deleted.

    Raises:
        ValueError: if something is there that may not be replaced, or the folder cannot be written to.
    """
    if wanted is None:
        folder, number = Path("safe-ema-demo"), 1
        while folder.exists():
            number += 1
            folder = Path(f"safe-ema-demo-{number}")
    else:
        folder = Path(wanted)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(f"--output-dir {folder} is not empty; give another folder, or --overwrite to replace it")
        if not (folder / MARKER).exists():
            raise ValueError(f"--output-dir {folder} holds no earlier demo ({MARKER}); --overwrite will not delete it")
        shutil.rmtree(folder)
    check_writable(folder)
    (folder / MARKER).touch()
    return folder


def load_data(config: DemoConfig, tokenizer):
    """Training and held-out rows that fit the demo's sequence length.

    Args:
        config ([`DemoConfig`]):
            Which data.
        tokenizer (`PreTrainedTokenizerBase`):
            To measure prompts with.
    """
    from datasets import Dataset

    from . import testbed
    from .data import load_finetuning_data, split_heldout

    if config.train_file is None:
        dataset = Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row["prompt"]}],
                    "completion": [{"role": "assistant", "content": row["response"]}],
                }
                for row in testbed.read_pairs("finetune")
            ]
        )
    else:
        dataset = load_finetuning_data(config.train_file)

    def leaves_room(row) -> bool:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        return len(ids) <= MAX_LENGTH - 32

    train, held = split_heldout(dataset, 0.15)
    # Both keep only as much as is used, so that a file of millions of rows is not tokenized for nothing.
    train = train.shuffle(seed=config.seed).select(range(min(len(train), 2 * config.steps * config.batch_size)))
    held = held.shuffle(seed=0).select(range(min(len(held), 4 * HELDOUT_ROWS)))
    train, held = train.filter(leaves_room), held.filter(leaves_room)
    if not len(train) or not len(held):
        raise ValueError(f"no row of {config.train_file} leaves room for an answer within {MAX_LENGTH} tokens")
    return train, held.select(range(min(len(held), HELDOUT_ROWS)))


def load_model(name: str):
    """Model in float32 and tokenizer.

    Args:
        name (`str`):
            `"testbed"`, a folder or a hub name.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import testbed

    if name == "testbed":
        return testbed.load()
    return AutoModelForCausalLM.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)


def run_demo(config: DemoConfig) -> dict:
    """Fine-tune, check, and write table, plot, page, history, responses and the averaged model.

    Args:
        config ([`DemoConfig`]):
            What on, and how.

    Returns:
        `dict`: `config`, `table` (a dict a row), `history`, `files`, `seconds`, `output_dir`.

    Raises:
        ValueError, FileNotFoundError: before training, for input that cannot be used.
    """
    from trl import SFTConfig, SFTTrainer

    from .callback import SafeEMACallback
    from .decay import resolve_decays
    from .page import write_run_page_or_warn
    from .report import plot_history, summarise
    from .safety.check import SafetyCheck

    started = time.monotonic()
    resolve_decays(config.half_life, total_steps=config.steps)
    check = SafetyCheck(prompts=config.prompts_file or "builtin", max_new_tokens=48)
    callback = SafeEMACallback(half_life=config.half_life, check=check)
    model, tokenizer = load_model(config.model)
    check.validate(tokenizer)
    train, held = load_data(config, tokenizer)
    folder = prepare_output_dir(config.output_dir, config.overwrite)
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(1, config.steps // 20),
        max_length=MAX_LENGTH,
        activation_checkpointing=False,
        eval_strategy="steps",
        eval_steps=max(1, config.steps // 5),
        eval_on_start=True,
        save_strategy="no",
        logging_steps=max(1, config.steps // 10),
        bf16=False,
        report_to="none",
        seed=config.seed,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=held,
        callbacks=[callback],
    )
    trainer.train()
    history = read_jsonl(folder / HISTORY_NAME)
    plot = folder / "safety.png"
    plot_history(history, plot, title=_title(config, check))
    files = {"plot": str(plot), "history": str(folder / HISTORY_NAME), "responses": str(folder / "safety"),
             "averaged_model": str(folder / "ema")}  # fmt: skip
    page = write_run_page_or_warn(folder, _title(config, check))
    if page is not None:
        files["report"] = str(page)
    return {
        "config": asdict(config),
        "table": summarise(history),
        "history": history,
        "files": files,
        "output_dir": str(folder),
        "train_rows": len(train),
        "heldout_rows": len(held),
        "seconds": round(time.monotonic() - started, 1),
    }


def _title(config: DemoConfig, check) -> str:
    data = "built-in data" if config.train_file is None else Path(config.train_file).name
    model = config.model if config.model == "testbed" else Path(config.model).name
    return (
        f"{model} fine-tuned on {data}: lr {config.learning_rate:g}, batch {config.batch_size}, {config.steps} steps, "
        f"seed {config.seed}; {len(check.harmful)} prompts of {check.harmful.name}, judge {check.judge.name}"
    )


def write_json(result: dict, path: str | Path) -> None:
    """Write what [`run_demo`] returned as one JSON object.

    Args:
        result (`dict`):
            As returned.
        path (path):
            Replaced.
    """
    write_whole(path, json.dumps(result, indent=2) + "\n")
