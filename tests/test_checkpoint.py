"""What is saved comes back: the average's state to the bit, and a folder that from_pretrained loads."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_safe_ema import WeightEMA
from hf_safe_ema.checkpoint import (
    ROWS_PATH,
    STATE_PATH,
    last_checkpoint_at,
    load_ema_state,
    read_notes,
    read_rows,
    save_averaged_model,
    save_ema_state,
    unmark_checkpoint,
    why_incomplete,
)


@torch.no_grad()
def train_a_little(model: nn.Module, *emas: WeightEMA, steps: int = 3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for ema in emas:
            ema.update()


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def linear(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.9, [0.9, 0.99, 0.5]], ids=["one", "three"])
def test_state_goes_round_to_the_bit(tmp_path, dtype, decay):
    model = linear(dtype)
    ema = WeightEMA(model.named_parameters(), decay=decay)
    train_a_little(model, ema)
    save_ema_state(ema, tmp_path / "checkpoint-3")
    resumed_model = copy.deepcopy(model)
    resumed = WeightEMA(resumed_model.named_parameters(), decay=decay)
    load_ema_state(resumed, tmp_path / "checkpoint-3")
    for _ in range(2):
        first, second = ema.state_dict(), resumed.state_dict()
        assert (first["num_updates"], first["decays"]) == (second["num_updates"], second["decays"])
        assert bits(first["base"]) == bits(second["base"])
        assert [bits(d) for d in first["displacements"]] == [bits(d) for d in second["displacements"]]
        train_a_little(model, ema, seed=1)  # and they go on alike
        train_a_little(resumed_model, resumed, seed=1)


def test_state_of_a_real_model_with_tied_weights(tmp_path, tiny):
    model = copy.deepcopy(tiny[0])
    ema = WeightEMA(model.named_parameters(), decay=0.9)
    train_a_little(model, ema, steps=1)
    save_ema_state(ema, tmp_path)
    resumed = WeightEMA(copy.deepcopy(model).named_parameters(), decay=0.9)
    load_ema_state(resumed, tmp_path)
    assert bits(dict(resumed.averaged_parameters())) == bits(dict(ema.averaged_parameters()))


def test_state_is_safetensors_alone_and_out_of_sight_of_peft(tmp_path):
    ema = WeightEMA(linear().named_parameters(), decay=0.9)
    save_ema_state(ema, tmp_path)
    save_ema_state(ema, tmp_path)  # over an earlier one
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [STATE_PATH] and len(STATE_PATH.parts) > 2
    with safe_open(tmp_path / STATE_PATH, framework="pt") as file:
        assert file.metadata()["format"] == "hf_safe_ema"


def test_a_checkpoint_without_state_says_what_to_do(tmp_path):
    ema = WeightEMA(linear().named_parameters(), decay=0.9)
    with pytest.raises(FileNotFoundError, match=r"saved without SafeEMACallback\. Resume without the callback"):
        load_ema_state(ema, tmp_path)


def damage_by(how: str, path) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-5])
    elif how == "cut in the header":
        path.write_bytes(content[:40])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other bytes":
        path.write_bytes(b"\xff" * len(content))
    else:
        path.write_bytes(content.replace(b"decays", b"decoys"))


@pytest.mark.parametrize("how", ["cut", "cut in the header", "empty", "other bytes", "no decays"])
def test_a_damaged_state_is_said_and_changes_nothing(tmp_path, how):
    model = linear()
    ema = WeightEMA(model.named_parameters(), decay=0.9)
    train_a_little(model, ema)
    save_ema_state(ema, tmp_path)
    damage_by(how, tmp_path / STATE_PATH)
    before = bits(ema.displacement())
    with pytest.raises(ValueError, match=r"ema_state\.safetensors is damaged .*resume from an earlier checkpoint"):
        load_ema_state(ema, tmp_path)
    assert bits(ema.displacement()) == before and ema.num_updates == 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: WeightEMA(linear().named_parameters(), decay=0.5), "decay"),
        (lambda: WeightEMA(linear().named_parameters(), decay=[0.9, 0.99]), "decay"),
        (lambda: WeightEMA(nn.Linear(3, 4).named_parameters(), decay=0.9), "other parameters"),
        (lambda: WeightEMA(linear().named_parameters(), decay=0.9, exclude="*bias"), "other parameters"),
    ],
)
def test_state_of_another_run_is_refused(tmp_path, other, message):
    save_ema_state(WeightEMA(linear().named_parameters(), decay=0.9), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_ema_state(other(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_model_loads_as_any_other_and_the_live_one_is_untouched(tmp_path, tiny, dtype):
    model = copy.deepcopy(tiny[0]).to(dtype).train()
    ema = WeightEMA(model.named_parameters(), decay=0.9)
    train_a_little(model, ema)
    live = bits(dict(model.named_parameters()))
    save_averaged_model(ema, model, tiny[1], tmp_path / "ema")
    assert bits(dict(model.named_parameters())) == live
    assert model.training

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ema", dtype="auto")
    assert loaded.dtype == dtype
    averaged = dict(ema.averaged_parameters())
    assert bits(dict(loaded.named_parameters())) == bits(averaged) != live
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ema")
    assert tokenizer.chat_template == tiny[1].chat_template
    assert tokenizer("How do I boil an egg?").input_ids == tiny[1]("How do I boil an egg?").input_ids


def test_averaged_model_replaces_the_one_before_as_a_whole(tmp_path, tiny):
    model = copy.deepcopy(tiny[0])
    ema = WeightEMA(model.named_parameters(), decay=0.9)
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "left-over.safetensors").write_text("of another model")
    train_a_little(model, ema, steps=1)
    save_averaged_model(ema, model, None, tmp_path / "ema")
    assert not (tmp_path / "ema" / "left-over.safetensors").exists()
    assert not (tmp_path / "ema" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]


class NoRoomForTokenizer:
    def save_pretrained(self, folder):
        raise OSError(28, "No space left on device")


def test_a_failed_save_leaves_the_folder_before_and_the_live_weights(tmp_path, tiny):
    model = copy.deepcopy(tiny[0])
    ema = WeightEMA(model.named_parameters(), decay=0.9)
    save_averaged_model(ema, model, None, tmp_path / "runs" / "ema")
    before = {path.name: path.read_bytes() for path in (tmp_path / "runs" / "ema").iterdir()}
    train_a_little(model, ema, steps=1)
    live = bits(dict(model.named_parameters()))
    with pytest.raises(OSError, match="No space left"):
        save_averaged_model(ema, model, NoRoomForTokenizer(), tmp_path / "runs" / "ema")
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs" / "ema").iterdir()} == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["ema"]
    assert bits(dict(model.named_parameters())) == live


def test_what_a_killed_save_left_is_cleared_away(tmp_path, tiny):
    model = copy.deepcopy(tiny[0])
    ema = WeightEMA(model.named_parameters(), decay=0.9)
    (tmp_path / ".ema.unfinished-1" / "ema").mkdir(parents=True)
    save_averaged_model(ema, model, None, tmp_path / "ema")
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]
    # Killed between the two renames: what was there before is not lost, should the next save fail.
    (tmp_path / ".ema.unfinished-2").mkdir()
    (tmp_path / "ema").rename(tmp_path / ".ema.unfinished-2" / "replaced")
    with pytest.raises(OSError, match="No space left"):
        save_averaged_model(ema, model, NoRoomForTokenizer(), tmp_path / "ema")
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]
    assert (tmp_path / "ema" / "model.safetensors").exists()


def test_notes_and_rows_come_back(tmp_path):
    ema = WeightEMA(linear().named_parameters(), decay=[0.9, 0.5])
    rows = [{"type": "report", "step": 3, "text": "ünï"}]
    save_ema_state(ema, tmp_path, {"step": 3, "request": {"half_life": 0.25}}, rows)
    found = read_notes(tmp_path)
    assert found == {"step": 3, "request": {"half_life": 0.25}, "decays": [0.9, 0.5], "num_updates": 0}
    assert read_rows(tmp_path) == rows
    (tmp_path / ROWS_PATH).write_text('{"type": ')
    assert read_rows(tmp_path) is None and read_rows(tmp_path / "absent") is None


@pytest.mark.parametrize("with_state", [True, False])
def test_unmarking(tmp_path, with_state):
    checkpoint = tmp_path / "checkpoint-3"
    unmark_checkpoint(checkpoint)
    assert not checkpoint.exists()
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    if with_state:
        save_ema_state(WeightEMA(linear().named_parameters(), decay=0.9), checkpoint)
    unmark_checkpoint(checkpoint)
    assert [path.name for path in checkpoint.rglob("*") if path.is_file()] == ["trainer_state.replaced.json"]


def fake_checkpoint(folder, weights: dict[str, bytes | str], ranks: int = 1) -> None:
    """What the Trainer leaves, with other weights; the zip files are torch's own."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    save_ema_state(WeightEMA(linear().named_parameters(), decay=0.9), folder, {"step": 3, "world_size": ranks})
    randoms = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    for name in ("optimizer.pt", "scheduler.pt", *randoms):
        torch.save({"state": torch.ones(3)}, folder / name)
    for name, content in weights.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


WHOLE = save({"weight": torch.ones(3)})
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SHARDS = {f"model-0000{number}-of-00002.safetensors": WHOLE for number in (1, 2)}


@pytest.mark.parametrize(
    ("weights", "ranks", "reason"),
    [
        ({"model.safetensors": WHOLE}, 1, None),
        ({**SHARDS, "model.safetensors.index.json": INDEX}, 1, None),
        (SHARDS, 1, "no weights are there"),
        ({**SHARDS, "model.safetensors.index.json": INDEX[:-4]}, 1, "model.safetensors.index.json cannot be read"),
        ({"model-00001-of-00002.safetensors": WHOLE, "model.safetensors.index.json": INDEX}, 1, "00002.safetensors is missing"),
        ({**SHARDS, "model-00002-of-00002.safetensors": WHOLE[:-1], "model.safetensors.index.json": INDEX}, 1, "is damaged"),
        ({"adapter_model.safetensors": WHOLE, "adapter_config.json": "{}"}, 1, None),
        ({"adapter_model.safetensors": WHOLE}, 1, "adapter_config.json cannot be read"),
        ({"style/adapter_model.safetensors": WHOLE, "style/adapter_config.json": "{}"}, 1, None),
        ({"style/adapter_model.safetensors": WHOLE[:-1], "style/adapter_config.json": "{}"}, 1, "is damaged"),
        ({"model.safetensors": WHOLE}, 3, None),
        ({"model.safetensors": WHOLE, "rng_state_1.pth": b""}, 3, "rng_state_1.pth is damaged"),
        ({"model.safetensors": WHOLE, "scaler.pt": b"PK"}, 1, "scaler.pt is damaged"),
    ],
)  # fmt: skip
def test_kinds_of_checkpoints(tmp_path, weights, ranks, reason):
    fake_checkpoint(tmp_path / "checkpoint-3", weights, ranks)
    found = why_incomplete(tmp_path / "checkpoint-3")
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("ranks", "missing"), [(1, "rng_state.pth"), (3, "rng_state_0.pth"), (3, "rng_state_2.pth")])
def test_the_random_state_of_every_process(tmp_path, ranks, missing):
    fake_checkpoint(tmp_path / "checkpoint-3", {"model.safetensors": WHOLE}, ranks)
    (tmp_path / "checkpoint-3" / missing).unlink()
    assert why_incomplete(tmp_path / "checkpoint-3") == f"{missing} is missing"
    # Without the average's notes only a gap shows.
    found = why_incomplete(tmp_path / "checkpoint-3", with_average=False)
    assert (found is None) == (missing == "rng_state_2.pth")


def test_averaged_adapter_loads_with_peft(tmp_path, tiny):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(tiny[0]), config)
    ema = WeightEMA(model.named_parameters(), decay=0.9)
    train_a_little(model, ema)
    live = bits(dict(model.named_parameters()))
    save_averaged_model(ema, model, tiny[1], tmp_path / "ema")
    assert bits(dict(model.named_parameters())) == live
    assert (tmp_path / "ema" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "ema" / "model.safetensors").exists()

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ema", dtype=torch.float32)
    found = {name: parameter for name, parameter in loaded.named_parameters() if "lora_" in name}
    assert bits(found) == bits(dict(ema.averaged_parameters()))
    tokens = tiny[1]("How do I boil an egg?", return_tensors="pt")
    with torch.no_grad(), ema.swapped_in():
        torch.testing.assert_close(loaded(**tokens).logits, model.eval()(**tokens).logits)


def test_checkpoint_of_a_step(tmp_path):
    assert last_checkpoint_at(tmp_path, 10) is None
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-20").write_text("a file")
    assert last_checkpoint_at(tmp_path, 10) == tmp_path / "checkpoint-10"
    assert last_checkpoint_at(tmp_path, 20) is last_checkpoint_at(tmp_path / "absent", 10) is None
