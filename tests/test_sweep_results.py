"""What is made of a sweep's trials."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_safe_ema.sweep_plots import plot_heat_maps, plot_importances
from hf_safe_ema.sweep_results import Outcome, format_outcomes, heat_map_axes, mean_interval, outcomes, pareto_front

RATES = st.floats(0, 1)


def outcome(asr, loss, weights="live", **settings) -> Outcome:
    return Outcome(settings, weights, [asr], [loss], [0.1], 100, round(100 * asr), [1.0], [0])


@given(st.lists(st.tuples(RATES, RATES), min_size=1, max_size=30), st.sampled_from(["minimize", "maximize"]))
def test_the_front_is_what_no_other_beats(points, direction):
    found = [outcome(*point) for point in points]
    sign = 1 if direction == "minimize" else -1

    def beats(a, b):
        safer, better = a.mean_asr <= b.mean_asr, sign * a.mean_usefulness <= sign * b.mean_usefulness
        return safer and better and (a.mean_asr, a.mean_usefulness) != (b.mean_asr, b.mean_usefulness)

    front = pareto_front(found, direction)
    unbeaten = {(o.mean_asr, o.mean_usefulness) for o in found if not any(beats(other, o) for other in found)}
    assert {(o.mean_asr, o.mean_usefulness) for o in front} == unbeaten
    assert len(front) == len(unbeaten)


def test_the_interval_of_a_mean_is_students():
    # R: t.test(c(.1, .2, .3))$conf.int is -0.0484 to 0.4484
    assert mean_interval([0.1, 0.2, 0.3]) == pytest.approx((0.0, 0.4484), abs=1e-4)
    assert mean_interval([0.1, 0.2, 0.3], low=-1) == pytest.approx((-0.0484, 0.4484), abs=1e-4)


@pytest.fixture
def study():
    """Trials of two settings, three seeds of the first; one failed, one a repetition."""
    import json

    import optuna

    made = optuna.create_study(directions=["minimize", "minimize"])
    space = {
        "learning_rate": optuna.distributions.CategoricalDistribution([1e-3, 2e-3]),
        "seed": optuna.distributions.CategoricalDistribution([0, 1, 2]),
        "weights": optuna.distributions.CategoricalDistribution(["live", "0.5"]),
    }

    def add(rate, seed, weights, asr, loss, **attributes):
        counts = {"refusal": round(100 * (1 - asr)), "compliance": round(100 * asr), "unclear": 3}
        point = {"asr": asr, "counts": counts, "over_refusal": 0.1, "metrics": {"loss": loss}}
        made.add_trial(
            optuna.trial.create_trial(
                values=(asr, loss),
                params={"learning_rate": rate, "seed": seed, "weights": weights},
                distributions=space,
                user_attrs={
                    "chosen": json.dumps({"learning_rate": rate, "seed": seed}),
                    "point": point,
                    "seconds": 2.0,
                    **attributes,
                },
            )
        )

    for seed, asr in enumerate((0.1, 0.2, 0.3)):
        add(1e-3, seed, "live", asr, 4.0 + seed)
        add(1e-3, seed, "0.5", asr / 2, 5.0)
    add(2e-3, 0, "live", 0.5, 3.5)
    add(2e-3, 0, "live", 0.5, 3.5, same_as=6)
    return made


def test_seeds_are_averaged_and_repetitions_left_out(study):
    live, average, other = outcomes(study)
    assert (live.mean_asr, live.mean_usefulness) == (pytest.approx(0.2), pytest.approx(5.0))
    assert live.seeds == [0, 1, 2] and (live.complied, live.judged) == (60, 300)
    assert average.weights == "0.5" and average.mean_asr == pytest.approx(0.1)
    assert other.asr == [0.5] and other.asr_interval == pytest.approx((0.404, 0.596), abs=1e-3)
    assert live.asr_interval == mean_interval([0.1, 0.2, 0.3])


def test_the_table_names_settings_weights_and_interval(study):
    text = format_outcomes(outcomes(study), "loss")
    assert "learning_rate" in text and "seed " not in text
    assert "EMA .5 of the run" in text
    assert "20.0% (0.0% to 44.8%)" in text


def test_heat_maps_show_learning_rate_and_batch_size_where_both_vary(tmp_path):
    found = [
        outcome(0.1, 4.0, weights, max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate)
        for weights in ("live", "0.5", "20") for steps in (1, 2) for batch in (4, 8) for rate in (1e-3, 1e-4)
    ]  # fmt: skip
    axes = heat_map_axes(found)
    assert axes == ("learning_rate", "per_device_train_batch_size")
    assert heat_map_axes(found[:1]) is None
    plot_heat_maps(found[:-1], axes, "loss", str(tmp_path / "maps.png"))
    plot_importances(
        {"ASR": {"learning_rate": 0.7, "weights": 0.3}, "loss": {"weights": 1.0}}, str(tmp_path / "bars.png")
    )
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("maps.png", "bars.png"))
