"""Averages of PEFT's adapters on a real Trainer: of which parameters, how exact, and what comes back from disk."""

import gc
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_safe_ema import SafeEMACallback, SafeSFTConfig, SafeSFTTrainer, SafetyCheck, testbed
from hf_safe_ema.checkpoint import STATE_PATH

STEPS = 4
ADAPTER = ("lora_", "modules_to_save")
# Short prompts, so that none is cut off before its response begins.
PAIRS = [pair for pair in testbed.read_pairs("finetune") if len(pair["prompt"]) < 80][:16]
ROWS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            "completion": [{"role": "assistant", "content": pair["response"]}],
        }
        for pair in PAIRS
    ]
)

KINDS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    # The testbed ties its embedding and its head: each of them alone is trained away from the other.
    "LoRA and a whole embedding": {"modules_to_save": ["embed_tokens"]},
    "LoRA and a whole head": {"modules_to_save": ["lm_head"]},
    "LoRA and both, still tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def runs(kinds=tuple(KINDS)) -> list:
    """Each kind in float32 and bfloat16."""
    return [(kind, dtype) for dtype in DTYPES for kind in kinds]


def lora(kind: str) -> LoraConfig:
    settings = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": "all-linear", **KINDS[kind]}
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def safe_ema(**changes) -> SafeEMACallback:
    check = SafetyCheck(num_prompts=2, max_new_tokens=3, progress=False)
    return SafeEMACallback(**{"half_life": 2, "check": check, **changes})


def settings_of(folder, **changes) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_length": 48,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        **changes,
    }


def peft_trainer(folder, kind: str, dtype: str, callbacks, **changes) -> SFTTrainer:
    """A run of a base in bfloat16. PEFT's default is adapters in float32; to train them in bfloat16 it must be asked."""
    model, tokenizer = testbed.load(dtype="bfloat16")
    torch.manual_seed(0)
    model = get_peft_model(model, lora(kind), autocast_adapter_dtype=dtype == "float32")
    return SFTTrainer(
        model,
        args=SFTConfig(**settings_of(folder, **changes)),
        processing_class=tokenizer,
        train_dataset=ROWS,
        eval_dataset=ROWS.select(range(4)),
        callbacks=list(callbacks),
    )


class Reference(TrainerCallback):
    """The definition of the average, m ← β m + (1−β) θ, of everything that is trained, in float64."""

    def __init__(self, callback: SafeEMACallback):
        self.callback = callback

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.start = {name: param.detach().double() for name, param in self.trained.items()}
        self.average = dict(self.start)

    def on_step_end(self, args, state, control, **kwargs):
        decay = self.callback.ema.decay
        for name, param in self.trained.items():
            self.average[name] = decay * self.average[name] + (1 - decay) * param.detach().double()


@dataclass
class Finished:
    folder: Path
    trainer: SFTTrainer
    callback: SafeEMACallback
    reference: Reference


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run of each kind leaves; each is run once."""
    known = {}

    def get(kind: str, dtype: str) -> Finished:
        if (kind, dtype) not in known:
            folder = tmp_path_factory.mktemp("run")
            reference = Reference(callback := safe_ema())
            trainer = peft_trainer(folder, kind, dtype, [callback, reference])
            trainer.train()
            known[kind, dtype] = Finished(folder, trainer, callback, reference)
        return known[kind, dtype]

    yield get
    known.clear()
    gc.collect()


def bits(tensors) -> dict[str, bytes]:
    return {name: tensor.detach().float().numpy().tobytes() for name, tensor in dict(tensors).items()}


def adapters_in(model) -> dict[str, torch.Tensor]:
    return {name: param for name, param in model.named_parameters() if any(part in name for part in ADAPTER)}


@pytest.mark.parametrize(("kind", "dtype"), runs())
def test_averaged_is_what_is_trained_in_float32(finished, kind, dtype):
    run = finished(kind, dtype)
    assert set(run.callback.ema.names) == set(run.reference.trained)
    assert {name for name in run.callback.ema.names if not any(part in name for part in ADAPTER)} == set()
    adapters = {param.dtype for name, param in run.reference.trained.items() if "lora_" in name}
    assert adapters == {DTYPES[dtype]}
    assert {tensor.dtype for tensor in run.callback.ema.displacement().values()} == {torch.float32}
    assert len(run.callback.ema.names) > len([name for name in run.callback.ema.names if "lora_A" in name]) > 0


@pytest.mark.parametrize(("kind", "dtype"), runs())
def test_the_average_is_that_of_the_definition(finished, kind, dtype):
    run = finished(kind, dtype)
    moved = run.callback.ema.displacement()
    for name, average in run.reference.average.items():
        expected = average - run.reference.start[name]
        assert expected.any(), name
        assert (moved[name].double() - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize(("kind", "dtype"), runs())
def test_the_saved_average_loads_as_an_adapter(finished, kind, dtype):
    run = finished(kind, dtype)
    loaded = AutoPeftModelForCausalLM.from_pretrained(run.folder / "ema", dtype=torch.bfloat16)
    assert bits(adapters_in(loaded)) == bits(run.callback.ema.averaged_parameters())
    # The model holds the average by now; what is tied or copied in one must be so in the other.
    tokens = run.trainer.processing_class("How do I boil an egg?", return_tensors="pt")
    with torch.no_grad():
        found, expected = (model.eval()(**tokens).logits for model in (loaded, run.trainer.model))
    if dtype == "float32":
        assert torch.equal(found, expected)
    else:  # the same values, but PEFT loads adapters in float32 and computes in it
        assert (found - expected).norm() <= 0.02 * expected.norm()


class FirstState(TrainerCallback):
    """The average's state as training begins."""

    def __init__(self, callback: SafeEMACallback):
        self.callback = callback

    def on_step_begin(self, args, state, control, **kwargs):
        if not hasattr(self, "state"):
            self.state = flat(self.callback.ema)


def flat(ema) -> dict[str, bytes]:
    """θ₀, displacement and average, to the bit."""
    state = ema.state_dict()
    parts = {"base": state["base"], "moved": state["displacements"][0], "average": dict(ema.averaged_parameters())}
    return {f"{part} {name}": value for part, tensors in parts.items() for name, value in bits(tensors).items()}


@pytest.mark.parametrize(("kind", "dtype"), runs())
def test_resumed_goes_on_with_the_average(finished, tmp_path, kind, dtype):
    run = finished(kind, dtype)
    first = FirstState(callback := safe_ema())
    trainer = peft_trainer(tmp_path, kind, dtype, [callback, first])
    trainer.train(resume_from_checkpoint=str(run.folder / "checkpoint-2"))
    assert callback.ema.num_updates == STEPS
    saved = load_file(run.folder / "checkpoint-2" / STATE_PATH)
    moved = {name.removeprefix("displacement.0."): value for name, value in saved.items() if "displacement.0" in name}
    assert {f"moved {name}": value for name, value in bits(moved).items()}.items() <= first.state.items()
    if dtype == "float32":
        assert flat(callback.ema) == flat(run.callback.ema)
    else:  # PEFT 0.21 loads adapters in float32: from there on they are trained in it, and only θ₀ stays the same
        base = {name: value for name, value in flat(run.callback.ema).items() if name.startswith("base")}
        assert base.items() <= flat(callback.ema).items()


@pytest.mark.parametrize(("kind", "dtype"), runs(["LoRA", "DoRA", "LoRA on the embedding"]))
def test_the_average_of_the_best_checkpoint_is_held_and_saved(tmp_path, kind, dtype):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    callback = safe_ema(check=None)
    trainer = peft_trainer(tmp_path, kind, dtype, [callback], **settings, metric_for_best_model="eval_loss")
    trainer.train()
    best = trainer.state.best_model_checkpoint
    live, saved = (
        AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in (best, tmp_path / "ema")
    )
    averages = bits(callback.ema.averaged_parameters())
    assert bits(adapters_in(live)) != averages
    assert bits(adapters_in(saved)) == averages
    assert bits(adapters_in(trainer.model)) == averages


@pytest.fixture
def qlora_trainer(tmp_path, monkeypatch):
    """Makes trainers of adapters in bfloat16, which is what TRL 1.16 makes them, on a base in four bits."""
    pytest.importorskip("bitsandbytes")
    # On CPUs with AVX512-BF16 bitsandbytes 0.50 packs the base anew when it is asked in evaluation mode: that rounds its
    # scales, and fails for widths that are no multiples of 32, as the testbed's.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)

    def make(**changes) -> SafeSFTTrainer:
        settings = settings_of(tmp_path, ema_half_life=1, safety_num_prompts=2, safety_max_new_tokens=3, **changes)
        torch.manual_seed(0)
        return SafeSFTTrainer(
            str(testbed.MODEL_FOLDER),
            args=SafeSFTConfig(**settings),
            train_dataset=ROWS,
            eval_dataset=ROWS.select(range(4)),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            peft_config=lora("LoRA"),
        )

    return make


def test_qlora(qlora_trainer, tmp_path):
    trainer = qlora_trainer(max_steps=2)
    assert trainer.model.is_loaded_in_4bit
    trainer.train()
    ema, adapters = trainer.safe_ema.ema, adapters_in(trainer.model)
    assert ema.names == list(adapters) and {param.dtype for param in adapters.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in ema.displacement().values()} == {torch.float32}
    assert all(tensor.any() for tensor in ema.displacement().values())
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ema", dtype=torch.bfloat16)
    assert bits(adapters_in(loaded)) == bits(ema.averaged_parameters()) == bits(adapters)
    responses = (tmp_path / "safety" / "step-000002.jsonl").read_text().splitlines()
    assert {json.loads(row)["weights"] for row in responses} == {"live", "ema"}


def test_qlora_holds_and_saves_the_average_of_the_best_checkpoint(qlora_trainer, tmp_path):
    trainer = qlora_trainer(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    trainer.train()
    averages = bits(trainer.safe_ema.ema.averaged_parameters())
    saved = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ema", dtype=torch.bfloat16)
    assert bits(adapters_in(trainer.model)) == bits(adapters_in(saved)) == averages


def test_qlora_resumes(qlora_trainer, tmp_path):
    qlora_trainer().train()
    trainer = qlora_trainer()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.safe_ema.ema.num_updates == STEPS
