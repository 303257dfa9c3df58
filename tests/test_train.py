"""`hf-safe-ema train`: runs of a few steps on the testbed, what they refuse, and what a dry run says of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_safe_ema import testbed
from hf_safe_ema.memory import estimate_memory
from hf_safe_ema.plan import checked_steps, count_steps, usable_rows
from hf_safe_ema.recipe import GROUPS, build_parser, read_recipe
from hf_safe_ema.train import build_trainer, load_rows, main, train

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"
NO_NETWORK = {**os.environ, "HF_HUB_OFFLINE": "1"}
QUICK = {
    "model_name_or_path": "testbed",
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "max_length": 64,
    "heldout_rows": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "save_steps": 2,
    "logging_steps": 1,
    "safety_num_prompts": 2,
    "safety_max_new_tokens": 4,
    "activation_checkpointing": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    """40 rows in Dolly's columns."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": f"Name thing {i}.", "context": "", "response": f"It is lamp {i}."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(rows_file, tmp_path, monkeypatch):
    """A function that makes flags of quick settings and of those given; a setting of None is left out."""
    monkeypatch.chdir(tmp_path)

    def flags(**changed) -> list[str]:
        values = {"dataset": rows_file, "output_dir": "run", **QUICK, **changed}
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    return flags


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Runs.


def test_a_run_leaves_table_plot_history_recipe_and_the_averaged_model(settings):
    result = train(read_recipe(settings()))
    assert [row["weights"] for row in result["table"]] == ["base", "live", "ema"]
    assert all(row["num_prompts"] == 2 and row["heldout_loss"] > 0 for row in result["table"])
    assert result["steps"] == 4 and result["heldout_rows"] <= 4 and 30 <= result["train_rows"] <= 39
    for path in result["files"].values():
        assert Path(path).exists(), path
    assert {"plot", "report", "history", "responses", "model", "averaged model"} == result["files"].keys()
    assert Path("run/safety.png").stat().st_size > 10_000
    assert same(weights("run"), weights("run/ema")), "the model that is saved is the average"
    assert not same(weights("run"), weights(testbed.MODEL_FOLDER))
    # The recipe that it leaves is that of the same run.
    again, first = read_recipe(["--config", "run/recipe.yaml"]), read_recipe(settings())
    assert again.training.to_dict().items() >= {"max_steps": 4, "eval_steps": 2.0}.items()
    assert (again.run, again.model, again.values) == (first.run, first.model, first.values)


def test_live_weights_can_be_what_is_saved(settings):
    train(read_recipe(settings(final_weights="live")))
    assert not same(weights("run"), weights("run/ema"))


def test_lora_saves_an_adapter(settings):
    result = train(
        read_recipe(settings(use_peft=True, lora_r=2, lora_target_modules="all-linear", save_strategy="no"))
    )
    assert result["table"][-1]["weights"] == "ema"
    for folder in ("run", "run/ema"):
        assert not Path(folder, "model.safetensors").exists()
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert model.peft_config["default"].r == 2 and "down_proj" in model.peft_config["default"].target_modules


def test_a_stream_without_a_check(settings):
    result = train(read_recipe(settings(streaming=True, max_rows=20, safety_check=False, save_strategy="no")))
    assert result["table"] == [] and result["train_rows"] is None and result["steps"] == 4
    assert same(weights("run"), weights("run/ema"))


def test_plain_sft_without_average(settings):
    result = train(read_recipe(settings(ema=False, safety_check=False, heldout_share=0, eval_strategy="no", eval_on_start=False)))  # fmt: skip
    assert result["files"] == {"model": "run"} and not Path("run/ema").exists()
    assert result["heldout_rows"] is None


def test_resuming_ends_where_the_run_without_a_stop_does(settings):
    train(read_recipe(settings()))
    shutil.copytree("run", "killed")
    for name in ("model.safetensors", "ema", "checkpoint-4"):
        path = Path("killed", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(read_recipe(settings(output_dir="killed", resume_from_checkpoint="true")))
    assert same(weights("run"), weights("killed"))
    assert Path("run/safety_history.jsonl").read_text() == Path("killed/safety_history.jsonl").read_text()


def test_a_run_that_is_too_unsafe_can_end_with_an_error(settings, capsys):
    # Whatever four tokens hold, this list of refusals is not among them but for a refusal of an innocent question.
    Path("prompts.txt").write_text("Name a colour.\nName a fruit.\n")
    flags = settings(max_asr=0, on_violation="raise", safety_prompts="prompts.txt", safety_judge="gcg-7")
    assert main(flags) == 1
    assert "above max_asr=0.0%" in capsys.readouterr().err.splitlines()[-1]


# The command.


def test_the_command_and_what_it_prints(settings, rows_file):
    recipe = {**QUICK, "dataset_name": str(rows_file), "output-dir": "run", "max_steps": 2, "report_to": "none"}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--config", "mine.yaml", "--eval_steps", "1", "--save_strategy", "no"]
    command = [sys.executable, "-m", "hf_safe_ema.cli", "train", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=NO_NETWORK)
    assert done.returncode == 0, done.stderr
    assert "| base" in done.stdout and "| EMA" in done.stdout and "plot: run/safety.png" in done.stdout
    history = [json.loads(line) for line in Path("run/safety_history.jsonl").read_text().splitlines()]
    assert {row["step"] for row in history} == {0, 1, 2}, "the flag wins over the recipe"
    # At the same place once more only on request, said in one line.
    again = subprocess.run(command, capture_output=True, text=True, env=NO_NETWORK)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.startswith("hf-safe-ema: error: output_dir run is not empty") and again.stderr.count("\n") == 1


def test_overwriting_an_earlier_run(settings):
    quick = {"max_steps": 1, "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no"}
    assert main(settings(**quick)) == 0
    Path("run/notes.txt").write_text("old")
    assert main(settings(**quick)) == 2
    assert main([*settings(**quick, dataset="nowhere.jsonl"), "--overwrite"]) == 2
    assert Path("run/notes.txt").exists(), "nothing is deleted for a run that cannot start"
    assert main([*settings(**quick), "--overwrite"]) == 0
    assert not Path("run/notes.txt").exists() and Path("run/model.safetensors").exists()


def test_overwriting_deletes_nothing_but_an_earlier_run(settings, capsys):
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("years of work")
    Path("run/recipe.yaml").write_text("pancakes: 4 eggs\n")
    assert main([*settings(), "--overwrite"]) == 2
    assert "holds no earlier run" in capsys.readouterr().err
    assert Path("run/thesis.txt").read_text() == "years of work"


def test_two_processes_print_once(settings):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = settings(max_steps=-1, num_train_epochs=0.5, eval_steps=50, save_strategy="no", use_cpu=True)
    command = [*torchrun, "-m", "hf_safe_ema.cli", "train", *flags]
    environment = {**NO_NETWORK, "OMP_NUM_THREADS": "1"}
    plan = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, env=environment)
    assert plan.returncode == 0, plan.stderr
    (line,) = (line for line in plan.stdout.splitlines() if line.startswith("# steps: "))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| EMA") == 1 and done.stdout.count("plot: run/safety.png") == 1
    steps = json.loads(Path("run/safety_history.jsonl").read_text().splitlines()[-1])["step"]
    assert line.startswith(f"# steps: {steps} of 4 rows each (2 processes on cpu")
    history = [json.loads(line) for line in Path("run/safety_history.jsonl").read_text().splitlines()]
    assert [row["weights"] for row in history if row["type"] == "report"] == ["base", "live", "ema"]
    refused = subprocess.run(command, capture_output=True, text=True, env=NO_NETWORK)
    assert refused.returncode != 0 and refused.stderr.count("hf-safe-ema: error: output_dir run is not empty") == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"dataset": None}, "no dataset: give --dataset"),
        ({"model_name_or_path": None}, "no model: give --model_name_or_path"),
        ({"model_name_or_path": "no/such/folder/anywhere"}, "model_name_or_path='no/such/folder/anywhere'"),
        ({"model_name_or_path": "."}, "model_name_or_path='.' cannot be loaded"),
        ({"learing_rate": 1}, "unknown argument --learing_rate=1 (did you mean --learning_rate?)"),
        ({"max_step": 1}, "did you mean --max_steps?"),
        ({"max_steps": "many"}, "invalid int value: 'many'"),
        ({"dtype": "float8"}, "invalid choice: 'float8'"),
        ({"heldout_share": 1}, "heldout_share=1.0: must be"),
        ({"heldout_share": 0}, "leaves nothing to evaluate on"),
        ({"heldout_rows": 0}, "heldout_rows=0: must be at least 1"),
        ({"max_rows": 1}, "too few to hold"),
        ({"streaming": True, "max_steps": -1}, "give max_steps"),
        ({"ema_half_life": 9}, "longer than the run of 4 steps"),
        ({"ema_half_life": "x"}, "ema_half_life='x' is not a number"),
        ({"max_asr": 5}, "max_asr=5.0 is outside [0, 1]"),
        ({"safety_prompts": "nowhere.csv"}, "prompts='nowhere.csv': no such file"),
        ({"use_peft": True, "lora_target_modules": "elbow"}, "elbow"),
        ({"output_dir": __file__}, "is a file"),
        ({"resume_from_checkpoint": "true"}, "holds no whole checkpoint"),
        ({"config": "nowhere.yaml"}, "--config nowhere.yaml: no such file"),
    ],
)
def test_flags_that_cannot_be_meant(settings, capsys, monkeypatch, changed, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(settings(**changed)) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert line.startswith("hf-safe-ema: error: ") and message in line
    assert "Traceback" not in err and "| EMA" not in out
    assert not Path("run/model.safetensors").exists() and not Path("run/safety_history.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learing_rate: 1", "unknown key learing_rate (did you mean learning_rate?)"),
        ("no_ema: true", "unknown key no_ema"),
        ("max_steps: many", "max_steps: 'many' cannot be used: it is not a whole number"),
        ("max_steps: 1.5", "it is not a whole number"),
        ("max_steps: true", "where a number is wanted"),
        ("max_steps:", "max_steps: None cannot be used: it is empty"),
        ("max_steps: [1, 2]", "a list has no meaning here"),
        ("learning_rate: {peak: 1}", "a mapping has no meaning here"),
        ("lora_target_modules: [[q_proj]]", "a list here holds plain values"),
        ("dtype: float8", "choose one of auto, bfloat16, float16, float32"),
        ("streaming: perhaps", "Truthy value expected"),
        ("env: yes", "env: must be a mapping"),
        ("- max_steps", "must be a YAML mapping"),
        ("a: [", "not valid YAML"),
        ("", "must be a YAML mapping"),
    ],
)
def test_recipes_that_cannot_be_meant(settings, capsys, text, message):
    Path("bad.yaml").write_text(text)
    assert main([*settings(), "--config", "bad.yaml"]) == 2
    assert "bad.yaml" in (err := capsys.readouterr().err) and message in err.splitlines()[-1]


# Settings.


def test_a_flag_wins_over_the_recipe_and_yaml_means_what_a_flag_means(settings, rows_file, monkeypatch):
    monkeypatch.setenv("A_SETTING_OF_MINE", "before")
    Path("r.yaml").write_text(
        f"model_name_or_path: testbed\ndataset_name: {rows_file}\nlearning-rate: 1e-5\nmax_steps: 7\nseed: 3\n"
        "use_peft: true\nlora_target_modules: all-linear\nsafety_check_weights: ema\nema_half_life: [0.5, 20]\n"
        "safety_benign_prompts: null\nresume_from_checkpoint: true\nenv:\n  A_SETTING_OF_MINE: 1\n"
    )
    recipe = read_recipe(["--config=r.yaml", "--max_steps", "9", "--no_safety_check_base", "--bf16=false"])
    training = recipe.training
    assert (training.max_steps, training.learning_rate, training.seed) == (9, 1e-5, 3)
    assert recipe.run.dataset == str(rows_file) and recipe.model.lora_target_modules == "all-linear"
    assert training.safety_check_weights == ["ema"] and training.ema_half_life == [0.5, 20]
    assert training.safety_benign_prompts is None and training.safety_check_base is False
    assert recipe.resume_from is True and os.environ["A_SETTING_OF_MINE"] == "1"
    assert (
        recipe.given >= {"dataset", "max_steps", "safety_check_base", "bf16"}
        and "num_train_epochs" not in recipe.given
    )
    assert read_recipe(["--config", "r.yaml", "--resume_from_checkpoint", "false"]).resume_from is None


def test_a_recipe_written_down_makes_the_same_settings_and_keeps_no_secret(settings):
    flags = [
        *settings(ema_half_life="0.1,0.5", adam_beta2=0.95, safety_benign_prompts="none"),
        "--hub_token",
        "hf_secret",
    ]
    written = read_recipe([*flags, "--overwrite", "--dry_run"]).as_yaml()
    assert not any(word in written for word in ("hf_secret", "overwrite", "dry_run"))
    Path("again.yaml").write_text(written)
    again, first = read_recipe(["--config", "again.yaml"]), read_recipe(flags)
    assert again.values | {"hub_token": None} == first.values | {"hub_token": None}
    assert again.training.ema_half_life == [0.1, 0.5] and again.training.adam_beta2 == 0.95


def test_help_begins_with_what_people_set(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    titles = [*GROUPS, "everything else"]
    assert sorted(titles, key=text.index) == titles, "sections in their order"
    ours, inherited = text.split("everything else")
    for name in ("dataset", "learning_rate", "lora_r", "ema_half_life", "safety_prompts", "dry_run"):
        assert f"--{name}" in ours and f"--{name} " not in inherited
    assert "--adam_beta2" in inherited
    assert all(action.help for action in build_parser()._actions)


# Recipes.

MODELS = {
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "testbed": "testbed",
}
NAMES = [
    f"{model}_{data}_{how}" for model in MODELS for data in ("dolly", "alpaca", "orca") for how in ("full", "lora")
]


def test_there_is_a_recipe_for_each_model_data_and_way():
    assert sorted(path.stem for path in RECIPES.glob("*")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_its_name_says(name):
    recipe = read_recipe(["--config", str(RECIPES / f"{name}.yaml")])
    model, data, how = name.split("_")
    training = recipe.training
    assert recipe.model.model_name_or_path == MODELS[model]
    assert recipe.run.dataset == data and (recipe.run.max_rows is not None) == (data == "orca")
    assert recipe.model.use_peft == (how == "lora") and training.output_dir == f"outputs/{name}"
    # Few steps of a moderate batch at a small learning rate; below TRL's defaults, where the model is a real one.
    assert training.max_steps == 200
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert batch == (16 if model == "testbed" else 64)
    if model != "testbed":
        assert training.learning_rate <= (1e-4 if how == "lora" else 1e-5)
        assert recipe.model.dtype == ("bfloat16" if how == "lora" else "float32")
    assert training.ema and training.safety_check and training.final_weights == "ema"
    assert checked_steps(training, 200, None) == [50, 100, 150, 200]


@pytest.mark.parametrize("model", MODELS)
def test_recipes_of_a_model_differ_in_nothing_but_data_and_way(model):
    of_data = {"dataset", "max_rows", "max_length", "output_dir", "per_device_train_batch_size",
               "gradient_accumulation_steps", "per_device_eval_batch_size"}  # fmt: skip
    of_way = {
        "learning_rate",
        "use_peft",
        "lora_r",
        "lora_alpha",
        "lora_target_modules",
        "dtype",
        "optim",
        "ema_device",
    }
    said = {name: yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in NAMES if name.startswith(model)}
    first = said[f"{model}_dolly_full"]
    for name, recipe in said.items():
        differ = {key for key in first.keys() | recipe.keys() if first.get(key) != recipe.get(key)}
        assert differ <= (of_data if name.endswith("full") else of_data | of_way), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("testbed")])
def test_recipes_of_the_testbed_run_on_real_rows(name, shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"dolly": "dolly_15k_subset", "alpaca": "alpaca_random_9k", "orca": "orca_dpo_pairs_sample"}
    path = shared_data / f"{data[name.split('_')[1]]}.jsonl"
    result = train(read_recipe(["--config", str(RECIPES / f"{name}.yaml"), "--dataset", str(path), "--disable_tqdm"]))
    assert result["steps"] == 200 and [row["weights"] for row in result["table"]] == ["base", "live", "ema"]


# What a dry run says.


def test_a_dry_run_is_a_recipe_with_comments_and_writes_nothing(settings, rows_file, capsys):
    flags = settings(learning_rate=1e-4, ema_half_life=2)
    assert main([*flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert list(Path().iterdir()) == []
    assert yaml.safe_load(out)["learning_rate"] == 1e-4
    Path("again.yaml").write_text(out)
    assert read_recipe(["--config", "again.yaml"]).values == read_recipe(flags).values
    comments = " ".join(line for line in out.splitlines() if line.startswith("#"))
    assert "steps: 4 of 2 rows each" in comments
    assert "half-life 2 steps, decay 0.707107 per step; share of the base left at the end 25.00%" in comments
    assert "the base once, live and ema after step 2, 4; each asks 2 harmful and 2 harmless prompts" in comments
    assert "5 x" in comments and "measured: one whole check" in comments
    for item in ("weights", "gradients", "optimizer", "EMA", "activations", "not counted"):
        assert item in comments


def test_a_dry_run_warns(settings, capsys):
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("years of work")
    assert main([*settings(ema_decay=0.999), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "share of the base left at the end 99.60%; that is more than half" in out
    assert "BUT THE RUN WOULD NOT START: output_dir run is not empty" in out
    assert main([*settings(dataset="nowhere.jsonl"), "--dry-run"]) == 2


def test_a_dry_run_needs_no_weights(settings, capsys):
    shutil.copytree(testbed.MODEL_FOLDER, "shape", ignore=shutil.ignore_patterns("*.safetensors"))
    assert main([*settings(model_name_or_path="shape"), "--dry-run"]) == 0
    assert "(estimated from what this device can do" in (out := capsys.readouterr().out)
    assert "the weights are not on this disk" in out


STEPS = [
    {"num_train_epochs": 1},
    {"num_train_epochs": 1.5, "gradient_accumulation_steps": 4},
    {"num_train_epochs": 2, "per_device_train_batch_size": 8, "dataloader_drop_last": True},
    {"num_train_epochs": 1, "per_device_train_batch_size": 1, "max_length": 24},  # which cuts some answers off
    {"max_steps": 5, "per_device_train_batch_size": 8},
]


@pytest.mark.parametrize("changed", STEPS, ids=str)
def test_planned_steps_are_the_trainers(settings, changed):
    rows = [{"instruction": f"Thing {i}" + " and more" * (i % 7), "response": "It is a lamp."} for i in range(40)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = read_recipe(settings(**{"max_steps": -1, "ema": False, "safety_check": False, "dataset": "long.jsonl", **changed}))  # fmt: skip
    rows, heldout = load_rows(recipe)
    trainer = build_trainer(recipe, rows, heldout)
    usable = usable_rows(recipe, rows, trainer.processing_class)
    assert usable == len(trainer.train_dataset)
    counted = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert count_steps(recipe.training, usable) == (counted[-1], counted[1])
    if changed.get("max_length"):
        assert usable < len(rows)


@pytest.mark.parametrize(
    "changed",
    [
        {"eval_steps": 3},
        {"eval_steps": 0.5, "eval_delay": 3},
        {"eval_strategy": "no", "eval_on_start": False, "safety_check_steps": 3},
        {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 8},
    ],
    ids=str,
)
def test_planned_checks_are_the_runs(settings, changed):
    flags = settings(**{"save_strategy": "no", "safety_benign_prompts": "none", **changed})
    result = train(read_recipe(flags))
    history = [json.loads(line) for line in Path("run/safety_history.jsonl").read_text().splitlines()]
    found = sorted({row["step"] for row in history if row["type"] == "report"} - {0})
    steps, per_epoch = count_steps(training := read_recipe(flags).training, result["train_rows"])
    assert steps == result["steps"] and checked_steps(training, steps, per_epoch) == found


@pytest.mark.parametrize(
    "changed",
    [{}, {"use_peft": True, "dtype": "bfloat16"}, {"ema_half_life": "1,2", "ema_dtype": "float64"}, {"optim": "sgd"}],
    ids=str,
)
def test_memory_that_is_counted_is_what_the_run_holds(settings, changed):
    recipe = read_recipe(settings(max_steps=2, safety_check=False, save_strategy="no", eval_strategy="no", **changed))
    planned = {item.name: item.size for item in estimate_memory(recipe).items}
    rows, heldout = load_rows(recipe)
    trainer = build_trainer(recipe, rows, heldout)
    trainer.train()

    def size(tensors) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    params = list(trainer.model.parameters())
    state = trainer.safe_ema.ema.state_dict()
    moments = [t for s in trainer.optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim()]
    assert planned["weights"] == size(params)
    assert planned["gradients"] == size(param for param in params if param.requires_grad)
    assert planned[f"optimizer ({recipe.training.optim.value})"] == size(moments)
    assert planned["EMA: where the weights started"] == size(state["base"].values())
    assert planned["EMA: how far the average is from there"] == sum(size(d.values()) for d in state["displacements"])


def saved_for_backward(shape: LlamaConfig, checkpointing: bool) -> int:
    """Bytes that a forward pass over 2 rows of 128 tokens keeps besides the weights."""
    model, saved = LlamaForCausalLM(shape).train(), {}
    if checkpointing:
        model.gradient_checkpointing_enable()

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.model(torch.zeros(2, 128, dtype=torch.long), use_cache=False)
    for param in model.parameters():
        saved.pop(param.untyped_storage().data_ptr(), None)
    assert output.last_hidden_state.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_grow_with_the_layers_as_a_forward_pass_does(settings, tiny, checkpointing):
    shutil.copytree(testbed.MODEL_FOLDER, "shape", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    planned, held = [], []
    for layers in (2, 5):
        shape = LlamaConfig(vocab_size=len(tiny[1]), hidden_size=96, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
        shape.save_pretrained("shape")
        recipe = read_recipe(settings(model_name_or_path="shape", max_length=128, activation_checkpointing=checkpointing))  # fmt: skip
        planned += [item.size for item in estimate_memory(recipe).items if item.name.startswith("activations")]
        held.append(saved_for_backward(shape, checkpointing))
    assert planned[1] - planned[0] == pytest.approx(held[1] - held[0], rel=0.05)
