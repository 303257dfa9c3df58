"""How long a check will take: that it says how it knows, and that it starts nothing that takes too long.

No test here times anything: what is asserted holds on any machine.
"""

import math

import pytest

from hf_safe_ema.memory import estimate_memory
from hf_safe_ema.plan import load_tokenizer
from hf_safe_ema.recipe import read_recipe
from hf_safe_ema.timing import PATIENCE, CheckTime, time_of_check


def time_of(tmp_path, **changes) -> CheckTime:
    settings = {
        "model_name_or_path": "testbed",
        "dataset": "dolly",
        "output_dir": tmp_path / "run",
        "use_cpu": "true",
        "bf16": "false",
        "safety_num_prompts": 3,
        "safety_max_new_tokens": 2,
        **changes,
    }
    recipe = read_recipe([f"--{name}={value}" for name, value in settings.items()])
    return time_of_check(recipe, estimate_memory(recipe, 3), load_tokenizer(recipe))


@pytest.mark.parametrize("benign", ["builtin", "none"])
def test_what_is_quick_is_measured(tmp_path, benign):
    found = time_of(tmp_path, safety_benign_prompts=benign)
    assert found.how.startswith("measured: one whole check of the base weights") and 0 < found.seconds < PATIENCE


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"load_in_4bit": "true", "use_peft": "true"}, "quantised weights are not loaded to measure"),
        ({"load_in_8bit": "true", "use_peft": "true"}, "quantised weights are not loaded to measure"),
        ({"safety_max_new_tokens": 10**7}, "measuring 8 prompts of each kind would take"),
    ],
    ids=str,
)
def test_what_is_not_measured_is_estimated_and_says_why(tmp_path, changed, reason):
    found = time_of(tmp_path, **changed)
    assert found.how.startswith("estimated from what this device can do") and reason in found.how


@pytest.mark.parametrize(("batch_size", "benign", "batches"), [(3, "none", 1), (1, "none", 3), (2, "builtin", 4)])
def test_an_estimate_is_never_below_what_starting_the_operations_takes(tmp_path, tiny, batch_size, benign, batches):
    tokens, layers = 10**7, tiny[0].config.num_hidden_layers
    found = time_of(tmp_path, safety_max_new_tokens=tokens, safety_batch_size=batch_size, safety_benign_prompts=benign)
    assert found.seconds >= batches * tokens * layers * 0.001
    assert math.isfinite(found.seconds)
