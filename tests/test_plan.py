"""A run before it is started: its tokenizer, rows, steps and checks, and how they are said."""

import pytest
from datasets import Dataset
from trl import SFTTrainer

from hf_safe_ema import testbed
from hf_safe_ema.plan import checked_steps, count_steps, describe, load_tokenizer, usable_rows
from hf_safe_ema.recipe import read_recipe

PAIRS = testbed.read_pairs("finetune")[:12]


@pytest.fixture
def recipe(tmp_path):
    """A function that reads a recipe of quick settings and of those given."""

    def read(**changes):
        settings = {
            "model_name_or_path": "testbed", "dataset": "dolly", "output_dir": tmp_path / "run", "max_length": 64,
            "per_device_train_batch_size": 4, "save_strategy": "no", "safety_check": "false", "use_cpu": "true", "bf16": "false",
            **changes,
        }  # fmt: skip
        return read_recipe([f"--{name}={value}" for name, value in settings.items()])

    return read


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": pair["prompt"]}],
                "completion": [{"role": "assistant", "content": pair["response"]}],
            }
            for pair in PAIRS
        ]
    )


# Tokenizers.


def test_a_chat_template_may_come_from_a_file_or_another_folder(recipe, tmp_path, tiny):
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    assert load_tokenizer(recipe(chat_template_path=tmp_path / "own.jinja")).chat_template.startswith("{{ messages[0]")
    assert load_tokenizer(recipe(chat_template_path=testbed.MODEL_FOLDER)).chat_template == tiny[1].chat_template


@pytest.mark.parametrize("changed", ["model_name_or_path", "chat_template_path"])
def test_a_tokenizer_that_cannot_be_had(recipe, tmp_path, changed):
    with pytest.raises(ValueError, match=r"the tokenizer of '.*' cannot be loaded: "):
        load_tokenizer(recipe(**{changed: tmp_path / "gone.jinja"}))


# Rows.


@pytest.mark.parametrize(
    "changed",
    [
        {"packing": "true", "max_length": 48},
        {"packing": "true", "max_length": 48, "packing_strategy": "wrapped"},
        {"max_length": 16},
        {"max_length": 16, "completion_only_loss": "false"},
    ],
    ids=str,
)
def test_rows_that_can_be_used_are_those_that_trl_makes(recipe, rows, tiny, changed):
    read = recipe(**changed)
    trainer = SFTTrainer(
        testbed.MODEL_FOLDER.as_posix(), args=read.training, train_dataset=rows, processing_class=load_tokenizer(read)
    )
    assert usable_rows(read, rows, load_tokenizer(read)) == len(trainer.train_dataset)


# Steps.


@pytest.mark.parametrize(
    ("changed", "rows", "steps", "per_epoch"),
    [
        ({"num_train_epochs": 1}, 16, 4, 4),
        ({"num_train_epochs": 1}, 17, 5, 5),
        ({"num_train_epochs": 1, "dataloader_drop_last": "true"}, 19, 4, 4),
        ({"num_train_epochs": 1}, 1, 1, 1),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 3}, 16, 2, 2),
        ({"num_train_epochs": 0.5}, 17, 3, 5),
        ({"num_train_epochs": 0}, 16, 0, 4),
        ({"max_steps": 7, "num_train_epochs": 1}, 16, 7, 4),
        ({"max_steps": 7}, None, 7, None),
    ],
    ids=str,
)
def test_steps(recipe, changed, rows, steps, per_epoch):
    assert count_steps(recipe(**changed).training, rows) == (steps, per_epoch)


def test_a_stream_has_no_end_of_its_own(recipe):
    with pytest.raises(ValueError, match="give max_steps"):
        count_steps(recipe(num_train_epochs=3).training, None)


# Checks.


@pytest.mark.parametrize(
    ("changed", "steps", "per_epoch", "checked"),
    [
        ({}, 10, 5, [10]),
        ({"safety_check_steps": 4}, 10, 5, [4, 8, 10]),
        ({"safety_check_steps": 20}, 10, 5, [10]),
        ({"safety_check_steps": 2, "eval_strategy": "steps", "eval_steps": 3}, 6, None, [2, 3, 4, 6]),
        ({"eval_strategy": "steps", "eval_steps": 4, "eval_delay": 5}, 13, None, [8, 12, 13]),
        ({"eval_strategy": "steps", "eval_steps": 0.3}, 10, None, [3, 6, 9, 10]),
        ({"eval_strategy": "epoch"}, 12, 5, [5, 10, 12]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, 12, 5, [10, 12]),
        ({"eval_strategy": "epoch"}, 12, None, [12]),  # a stream: where its epochs end is not known
        ({"safety_check_steps": 4}, 0, 5, []),
    ],
    ids=str,
)
def test_steps_that_are_checked(recipe, changed, steps, per_epoch, checked):
    assert checked_steps(recipe(safety_check="true", **changed).training, steps, per_epoch) == checked


@pytest.mark.parametrize("changed", [{}, {"ema": "false"}])
def test_nothing_is_checked_where_no_check_is_asked_for(recipe, changed):
    assert checked_steps(recipe(safety_check="false", safety_check_steps=2, **changed).training, 10, 5) == []


# How they are said.


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ["# steps: 3 of 4 rows each (1 process on cpu, no mixed precision), 1.00 epochs", "# checks: none"]),
        ({"max_steps": 6}, ["# steps: 6 of 4 rows", "2.00 epochs", "half-life 3 steps", "at the end 25.00%"]),
        ({"ema": "false"}, ["# average: none (ema: false)"]),
        ({"ema_decay": 0.0}, ["# average: decay 0 per step; share of the base left at the end 0.00%"]),
        ({"ema_half_life": "1,2"}, ["# average: half-life 1 steps", "# average 2 (kept, not checked): half-life 2 steps"]),
        ({"ema_mode": "lookahead", "ema_sync_steps": 2}, ["set to the average every 2 steps (lookahead)"]),
        ({"ema_decay": 0.99}, ["that is more than half: choose a shorter half-life"]),
        ({"save_strategy": "epoch"}, ["# disk: about "]),
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_says(recipe, rows, changed, said):
    plan = describe(recipe(**{"num_train_epochs": 1, **changed}), rows, None)
    assert all(text in plan for text in said), plan
    assert ("more than half" in plan) == ("ema_decay" in changed and changed["ema_decay"] > 0.9)
    assert "Nothing was trained, nothing was written." in plan


def test_a_plan_of_a_run_that_trains_nothing(recipe, rows):
    changes = {"num_train_epochs": 0, "safety_check": "true", "safety_num_prompts": 2, "safety_max_new_tokens": 2}
    plan = describe(recipe(**changes), rows, None)
    assert "# steps: 0 of 4 rows each" in plan and "more than half" not in plan
    assert "# checks: the base once; each asks 2 harmful and 2 harmless prompts" in plan and "  1 x " in plan


def test_a_plan_refuses_what_the_run_would(recipe, rows):
    with pytest.raises(ValueError, match="half_life=100 steps is longer than the run of 3 steps"):
        describe(recipe(num_train_epochs=1, ema_half_life=100), rows, None)


def test_a_stream_is_planned_by_its_steps(recipe, rows):
    plan = describe(recipe(max_steps=5), rows.to_iterable_dataset(), rows.to_iterable_dataset())
    assert "# data: a stream, of which a share is held out" in plan and "# steps: 5 of 4 rows" in plan
    assert "epochs" not in plan.split("# steps:")[1].split("\n")[0]
