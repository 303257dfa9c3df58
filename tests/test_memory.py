"""What a run will keep in memory: counted on shapes alone, by optimizer, precision, adapters and place."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from hf_safe_ema import testbed
from hf_safe_ema.memory import Item, Memory, available_memory, estimate_memory
from hf_safe_ema.recipe import read_recipe


def recipe_of(tmp_path, **changes):
    settings = {"model_name_or_path": "testbed", "dataset": "dolly", "output_dir": tmp_path / "run", **changes}
    return read_recipe([f"--{name}={value}" for name, value in settings.items()])


def estimate(tmp_path, prompts: int = 0, **changes) -> Memory:
    return estimate_memory(recipe_of(tmp_path, **changes), prompts)


def size(memory: Memory, name: str) -> int:
    """Of the item whose name begins so; 0 where there is none."""
    return sum(item.size for item in memory.items if item.name.startswith(name))


def test_the_peak_is_at_the_fuller_moment():
    items = [
        Item("weights", 10),
        Item("gradients", 5, when="training"),
        Item("keys", 7, when="checking"),
        Item("average", 3, where="cpu"),
    ]
    memory = Memory(0, 0, 0, 0, items, complete=True)
    assert (memory.at("training"), memory.at("checking"), memory.peak()) == (15, 17, 17)
    assert memory.peak("cpu") == 3 and memory.peak("cuda") == 0


@pytest.mark.parametrize(
    ("optim", "copies"),
    [
        ("adamw_torch_fused", 2),
        ("adamw_bnb_8bit", 0.5),
        ("paged_adamw_8bit", 0.5),
        ("paged_adamw_32bit", 2),
        ("adamw_torch_4bit", 0.25),
        ("lion_32bit", 1),
        ("lion_8bit", 0.25),
        ("rmsprop", 1),
        ("adagrad", 1),
        ("adafactor", 0),
        ("sgd", 0),
    ],
)
def test_an_optimizer_keeps_copies_of_what_is_trained(tmp_path, optim, copies):
    memory = estimate(tmp_path, optim=optim)
    assert size(memory, f"optimizer ({optim})") == round(copies * memory.trained_bytes)


@pytest.mark.parametrize(("flag", "each"), [("load_in_4bit", 0.5 + 4 / 64), ("load_in_8bit", 1.0)])
def test_quantised_layers_are_packed_and_the_rest_is_not(tmp_path, tiny, flag, each):
    model, _ = tiny
    head = model.get_output_embeddings()
    packed = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    rest = sum(p.numel() for p in model.parameters()) - packed
    changes = {flag: "true", "use_peft": "true", "dtype": "float32"}
    adapters = size(estimate(tmp_path, use_peft="true", dtype="float32"), "weights") - 4 * (packed + rest)
    assert size(estimate(tmp_path, **changes), "weights") == round(each * packed) + 4 * rest + adapters


def test_adapters_alone_are_trained_and_averaged(tmp_path):
    full, lora = estimate(tmp_path), estimate(tmp_path, use_peft="true", lora_r=4)
    assert full.trained_params == full.averaged_params == full.total_params
    assert lora.total_params == full.total_params + lora.trained_params
    assert lora.averaged_params == lora.trained_params < full.trained_params / 10


def test_what_is_left_out_of_the_average_takes_no_room(tmp_path):
    memory = estimate(tmp_path, ema_exclude_params="*embed*")
    assert memory.averaged_params < memory.trained_params
    assert size(memory, "EMA: where the weights started") == 4 * memory.averaged_params


def test_without_an_average_none_is_counted(tmp_path):
    memory = estimate(tmp_path, ema="false", safety_check="false")
    assert memory.averaged_params == 0 and not any(
        "EMA" in item.name or "set aside" in item.name for item in memory.items
    )


@pytest.mark.parametrize(("device", "where"), [("cpu", "device"), ("cuda:0", "cuda"), (None, "device")])
def test_the_average_is_counted_where_it_is_kept(tmp_path, device, where):
    memory = estimate(tmp_path, use_cpu="true", **({"ema_device": device} if device else {}))
    kept = [item for item in memory.items if item.name.startswith("EMA")]
    assert {item.where for item in kept} == {where}
    elsewhere = sum(item.size for item in memory.items if item.where != "device")
    assert memory.peak("cuda") == elsewhere and (elsewhere > 0) == (where != "device")


def test_nothing_is_loaded_and_unknown_shapes_are_said_to_be_incomplete(tmp_path):
    GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100).save_pretrained(tmp_path / "shape")
    memory = estimate(tmp_path, prompts=8, model_name_or_path=tmp_path / "shape")
    assert not memory.complete and size(memory, "weights") == 4 * memory.total_params
    assert not any("activations" in item.name or "keys" in item.name for item in memory.items)
    assert estimate(tmp_path).complete


def test_keys_and_values_grow_with_the_prompts_answered_together(tmp_path):
    name = "keys and values"
    assert size(estimate(tmp_path, prompts=0), name) == 0
    two, four = (size(estimate(tmp_path, prompts=count), name) for count in (2, 4))
    assert 0 < 2 * two == four
    assert size(estimate(tmp_path, prompts=100, safety_batch_size=4), name) == four
    assert size(estimate(tmp_path, prompts=1000), name) == size(estimate(tmp_path, prompts=64), name)


def test_logits_are_counted_only_where_the_run_is_evaluated(tmp_path):
    name = "logits of a batch"
    assert size(estimate(tmp_path, eval_strategy="no"), name) == 0
    one, two = (size(estimate(tmp_path, eval_strategy="epoch", per_device_eval_batch_size=n), name) for n in (1, 2))
    assert 0 < 2 * one == two


def test_activations_grow_with_the_rows_and_fall_with_recomputing(tmp_path):
    settings = {"max_length": 4096, "use_peft": "true"}  # tokens enough for TRL's tiles
    by_rows = [
        size(estimate(tmp_path, per_device_train_batch_size=n, activation_checkpointing="false", **settings), "activations")
        for n in (1, 2, 3)
    ]  # fmt: skip
    assert by_rows[2] - by_rows[1] == by_rows[1] - by_rows[0] > 0
    again = estimate(tmp_path, per_device_train_batch_size=3, activation_checkpointing="true", **settings)
    assert size(again, "activations") < by_rows[2]


def test_free_memory_of_this_machine():
    free = available_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50


def test_a_model_that_is_not_there_names_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"model_name_or_path='.*gone' cannot be loaded.*Give a folder"):
        estimate(tmp_path, model_name_or_path=tmp_path / "gone")


def test_the_name_testbed_is_the_model_in_this_package(tmp_path):
    assert estimate(tmp_path).items == estimate(tmp_path, model_name_or_path=testbed.MODEL_FOLDER).items
