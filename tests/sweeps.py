"""What the tests of sweeps share: a sweep of runs that take seconds."""

import json
from pathlib import Path

import yaml

TRAIN = {
    "model_name_or_path": "testbed",
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "max_length": 64,
    "heldout_rows": 4,
    "safety_num_prompts": 4,
    "safety_max_new_tokens": 4,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
    "bf16": False,
}


def write_sweep_file(folder: Path, train: dict | None = None, **changed) -> Path:
    """A sweep's YAML file and its data in a folder; a setting of None is left out."""
    rows = [{"instruction": f"Name thing {i}.", "context": "", "response": f"Try lamp {i}."} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "train": {"dataset": str(folder / "rows.jsonl"), **TRAIN, **(train or {})},
        "vary": {"learning_rate": [1e-3, 3e-3]},
        "half_lives": [0.5, 1],
        "output_dir": str(folder / "sweep"),
        **changed,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    return path
