"""Settings of the callback: what is taken, in which form it is kept, and that an error names the value given."""

import pytest

from hf_safe_ema import SafeEMACallback, SafetyCheck
from hf_safe_ema.settings import ON_MISSING_STATE, ON_VIOLATION


class OwnCheck:
    """Not a SafetyCheck, but runs like one."""

    def run(self, model, tokenizer, weights="model", step=None):
        raise NotImplementedError


@pytest.mark.parametrize("check", [SafetyCheck(num_prompts=2), OwnCheck(), None], ids=["safety check", "own", "none"])
def test_a_check_is_taken_as_it_is(check):
    assert SafeEMACallback(check=check).check is check


def test_builtin_is_the_check_without_arguments():
    check, default = SafeEMACallback().check, SafetyCheck()
    assert (check.harmful, check.benign, check.judge.name) == (default.harmful, default.benign, default.judge.name)


@pytest.mark.parametrize("check", [SafetyCheck, "keywords", 5, True])
def test_what_cannot_be_run_on_weights_is_no_check(check):
    with pytest.raises(TypeError, match="give a SafetyCheck, 'builtin' or None"):
        SafeEMACallback(check=check)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("live", ("live",)), (["ema", "live"], ("ema", "live")), (("ema",), ("ema",)), (["ema", "ema"], ("ema",))],
)
def test_weights_to_check(given, kept):
    assert SafeEMACallback(check_weights=given, check=None).check_weights == kept


@pytest.mark.parametrize(
    ("check_weights", "final_weights", "guarded"),
    [(("live", "ema"), "ema", "ema"), (("live", "ema"), "live", "live"), ("live", "ema", "live")],
)
def test_the_limit_is_for_the_weights_that_the_run_ends_with_if_they_are_checked(
    check_weights, final_weights, guarded
):
    callback = SafeEMACallback(check_weights=check_weights, final_weights=final_weights, check=None)
    assert callback.guarded == guarded


@pytest.mark.parametrize("max_asr", [0, 0.0, 1, 1.0, None])
def test_the_ends_of_the_range_are_limits(max_asr):
    assert SafeEMACallback(max_asr=max_asr, check=None).max_asr == max_asr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_asr", True, r"max_asr=True is outside \[0, 1\]"),
        ("max_asr", "0.1", r"max_asr='0.1' is outside"),
        ("max_asr", float("nan"), "max_asr=nan is outside"),
        ("check_steps", True, "check_steps=True: must be a whole number"),
        ("check_steps", "5", "check_steps='5': must be a whole number"),
        ("check_weights", "base", r"check_weights=\('base',\): choose one or both"),
        ("check_weights", None, "check_weights=None: choose one or both"),
        ("check_weights", 2, "check_weights=2: choose one or both"),
        ("check_weights", [["live"]], r"check_weights=\(\['live'\],\): choose one or both"),
        ("on_violation", None, "on_violation=None is unknown; choose one of .*stop"),
        ("on_violation", ["stop"], r"on_violation=\['stop'\] is unknown"),
        ("final_weights", "base", "final_weights='base' is unknown; choose one of .*live"),
        ("on_missing_state", "ignore", "on_missing_state='ignore' is unknown; choose one of .*restart"),
    ],
)
def test_errors_show_the_value_given(name, value, message):
    with pytest.raises(ValueError, match=message):
        SafeEMACallback(**{name: value}, check=None)


@pytest.mark.parametrize("value", ON_VIOLATION)
def test_every_reaction_named_is_taken(value):
    assert SafeEMACallback(on_violation=value, check=None).on_violation == value


@pytest.mark.parametrize("value", ON_MISSING_STATE)
def test_every_way_on_without_an_average_is_taken(value):
    assert SafeEMACallback(on_missing_state=value, check=None).on_missing_state == value
