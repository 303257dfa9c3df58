"""Half-lives and decays: what they come to, and that an error shows the value given and the way out."""

import pytest
from test_callback import sft_trainer

from hf_safe_ema import SafeEMACallback
from hf_safe_ema.decay import DEFAULT_HALF_LIFE, check_mode, resolve_decays, stuck_at_base


@pytest.mark.parametrize("half_life", [1, 7, 400])
def test_a_value_counts_half_after_its_half_life(half_life):
    (decay,) = resolve_decays(half_life=half_life)
    assert decay**half_life == pytest.approx(0.5)


def test_nothing_given_means_the_default():
    assert resolve_decays(total_steps=200) == resolve_decays(half_life=DEFAULT_HALF_LIFE, total_steps=200)


def test_values_keep_their_order_and_a_tuple_is_a_list():
    steps, fraction = resolve_decays(half_life=(50, 0.1), total_steps=100)
    assert [steps, fraction] == [*resolve_decays(50), *resolve_decays(10)]
    assert resolve_decays(decay=(0, 0.9)) == [0.0, 0.9]


def test_a_half_life_as_long_as_the_run_is_the_longest():
    assert resolve_decays(half_life=100, total_steps=100) == resolve_decays(half_life=100)
    with pytest.raises(ValueError, match="half_life=101 steps is longer than the run of 100 steps"):
        resolve_decays(half_life=101, total_steps=100)


@pytest.mark.parametrize("half_life", [None, 0.25, 50, [50, 0.5]])
def test_any_half_life_fits_a_run_without_steps(half_life):
    assert all(0 <= decay < 1 for decay in resolve_decays(half_life, total_steps=0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"half_life": float("nan")}, ValueError, "half_life=nan"),
        ({"half_life": 1.0}, ValueError, "half_life=1.0: a float is a fraction of the run"),
        ({"half_life": [5, -1]}, ValueError, "half_life=-1 steps"),
        ({"half_life": "50"}, TypeError, "half_life='50' is not a number"),
        ({"decay": float("nan")}, ValueError, "decay=nan"),
        ({"decay": [0.9, 1]}, ValueError, r"decay=1 is outside \[0, 1\)"),
        ({"decay": False}, TypeError, "decay=False is not a number"),
        ({"decay": "0.9"}, TypeError, "decay='0.9' is not a number"),
        ({"decay": []}, ValueError, r"decay=\[\] is empty"),
    ],
)
def test_errors_show_the_value_given(arguments, error, message):
    with pytest.raises(error, match=message):
        resolve_decays(**arguments, total_steps=100)


@pytest.mark.parametrize("sync_steps", [True, 2.0, "10", -1])
def test_syncs_are_a_whole_number_of_steps_apart(sync_steps):
    with pytest.raises(ValueError, match=r"sync_steps=.*whole number"):
        check_mode("lookahead", sync_steps)


@pytest.mark.parametrize(
    ("half_life", "steps", "warned"),
    [(100, 101, False), (100, 99, True), (100, 1, True), (100, 0, False)],
)
def test_more_than_half_of_the_base_left_at_the_end_is_warned_about(half_life, steps, warned):
    warning = stuck_at_base(*resolve_decays(half_life), steps)
    assert (warning is not None) == warned
    assert not warned or f"half-life {half_life} steps now" in warning


@pytest.mark.parametrize("steps", [0, 1, 1000])
def test_an_average_without_memory_is_never_stuck(steps):
    assert stuck_at_base(0.0, steps) is None


@pytest.mark.parametrize("arguments", [{}, {"half_life": 50}, {"decay": 0.0}], ids=str)
def test_a_run_that_trains_nothing_ends_with_the_model_it_was_given(tmp_path, arguments):
    trainer = sft_trainer(tmp_path, [SafeEMACallback(**arguments, check=None)], num_train_epochs=0, max_steps=-1)
    before = {name: param.clone() for name, param in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 0 and (tmp_path / "ema" / "model.safetensors").exists()
    assert all(param.equal(before[name]) for name, param in trainer.model.named_parameters())
