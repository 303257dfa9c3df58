"""What is saved comes back: the average's state to the bit, and a folder that from_pretrained loads."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_safe_ema import WeightEMA
from hf_safe_ema.checkpoint import STATE_PATH, last_checkpoint_at, load_ema_state, save_averaged_model, save_ema_state


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
