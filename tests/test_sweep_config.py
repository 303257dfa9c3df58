"""What a sweep's file may say."""

import pytest
from sweeps import write_sweep_file

from hf_safe_ema.recipe import read_recipe
from hf_safe_ema.sweep_config import as_flags, read_sweep, run_name


def test_a_grid_is_all_combinations_and_each_is_a_recipe_of_its_own(tmp_path):
    config = read_sweep(str(write_sweep_file(tmp_path, vary={"learning_rate": [1e-3, 2e-3], "seed": [0, 1, 2]})))
    assert [tuple(chosen.values()) for chosen in config.grid()] == [
        (1e-3, 0), (1e-3, 1), (1e-3, 2), (2e-3, 0), (2e-3, 1), (2e-3, 2)
    ]  # fmt: skip
    recipe = read_recipe(as_flags(config.settings({"learning_rate": 2e-3, "seed": 1})))
    assert (recipe.training.learning_rate, recipe.training.seed, recipe.training.max_steps) == (2e-3, 1, 4)
    assert recipe.training.ema_half_life == [0.5, 1]
    assert recipe.training.save_strategy == "no"


def test_what_the_sweep_says_goes_before_its_recipe_and_a_recipe_before_our_own_defaults(tmp_path):
    base = tmp_path / "recipe.yaml"
    base.write_text("learning_rate: 5.0e-4\nmax_steps: 9\nsave_strategy: steps\noutput_dir: elsewhere\n")
    config = read_sweep(str(write_sweep_file(tmp_path, train={"config": str(base)})))
    settings = config.settings({"learning_rate": 1e-3})
    assert (settings["max_steps"], settings["learning_rate"], settings["save_strategy"]) == (4, 1e-3, "steps")
    assert "output_dir" not in settings


def test_ranges_are_for_samplers(tmp_path):
    vary = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    config = read_sweep(str(write_sweep_file(tmp_path, vary=vary, sampler="tpe", trials=3)))
    assert config.grid() == [] and config.trials == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vary": None}, "vary missing"),
        ({"vary": {}}, "give values by setting"),
        ({"train": None, "output_dir": None}, "output_dir missing"),
        ({"varry": {"seed": [1]}}, "did you mean vary"),
        ({"vary": {"learning_rate": []}}, "give at least one"),
        ({"vary": {"learning_rate": 1e-3}}, "give a list of values"),
        ({"vary": {"learning_rate": [1e-3, 1e-3]}}, "each value once"),
        ({"vary": {"learning_rate": ["fast"]}}, "learning_rate"),
        ({"vary": {"learning_rte": [1e-3]}}, "did you mean --learning_rate"),
        ({"vary": {"learning_rate": {"low": 1, "high": 2}}}, "choose a sampler"),
        ({"vary": {"learning_rate": {"low": 2, "high": 1}}, "sampler": "tpe", "trials": 2}, "must be below"),
        ({"vary": {"learning_rate": {"low": 1}}, "sampler": "tpe", "trials": 2}, "give low and high"),
        ({"vary": {"learning_rate": {"low": "1e-4", "high": 1}}, "sampler": "tpe", "trials": 2}, "are numbers"),
        (
            {"vary": {"learning_rate": {"low": 0, "high": 1, "log": True}}, "sampler": "tpe", "trials": 2},
            "low above 0",
        ),
        ({"vary": {"max_steps": [5]}}, "also under train"),
        ({"vary": {"ema_half_life": [0.5]}}, "see half_lives"),
        ({"vary": {"output_dir": ["a"]}}, "is not for a single run"),
        ({"half_lives": [1.5]}, "1.5"),
        ({"half_lives": [0.5, 0.5]}, "each once"),
        ({"half_lives": []}, "half_lives"),
        ({"sampler": "bayes"}, "choose one of grid"),
        ({"sampler": "tpe"}, "say how many runs"),
        ({"sampler": "tpe", "trials": 0}, "say how many runs"),
        ({"trials": 3}, "a grid makes all its runs"),
        ({"direction": "down"}, "minimize"),
        ({"launch": "torchrun -m"}, "a list of words"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_before_any_run(tmp_path, changed, said):
    path = write_sweep_file(tmp_path, **changed)
    if "train" in changed:  # left out by write_sweep_file's own argument
        path.write_text("\n".join(line for line in path.read_text().splitlines() if "output_dir" not in line))
    with pytest.raises((ValueError, TypeError), match=said) as error:
        read_sweep(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "not valid YAML"), ("- a\n", "must be a YAML mapping"), (None, "no such")]
)
def test_a_file_that_cannot_be_read_says_so(tmp_path, text, said):
    path = tmp_path / "sweep.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, OSError), match=said):
        read_sweep(str(path))


def test_runs_have_names_that_tell_them_apart_and_are_safe_in_a_path():
    chosen = {"dataset": "../a/b", "seed": 0}
    names = [
        run_name(chosen, chosen),
        run_name(chosen, {**chosen, "max_steps": 5}),
        run_name({"dataset": "../a b"}, {}),
    ]
    assert len(set(names)) == 3
    assert not any(set(name) & set("/\\ ") for name in names)
    assert run_name({}, {"a": 1, "b": 2}) == run_name({}, {"b": 2, "a": 1})
