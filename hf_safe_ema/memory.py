"""How much memory a run will need, from the shapes of its model alone; no weights are loaded.

Knows: which tensors training, averaging and checking keep, and in which precision. Does not know: data, or how an
allocator lays tensors out. Activations are formulas for Llama-like decoders, exact for none of them.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from trl import get_peft_config

from .ema import select_parameters
from .recipe import Recipe
from .safety.generation import FIRST_BATCH_SIZE

PROMPT_TOKENS = 96
"""Of a safety prompt in its chat template, as assumed where none has been measured."""

_TILE_TOKENS = 4096
"""Tokens that TRL's loss looks at together; it never holds the logits of all."""

NOT_COUNTED = (
    "the driver's and PyTorch's own memory (about 1 GiB on a GPU), fragmentation, temporary tensors of the optimizer, "
    "data loading"
)


@dataclass(frozen=True)
class Item:
    """Something that takes memory.

    Args:
        name (`str`):
            What.
        size (`int`):
            Bytes.
        where (`str`):
            `"device"`, or the device that the average is kept on (`"cpu"`).
        when (`str`):
            `"always"`, `"training"` or `"checking"`.
    """

    name: str
    size: int
    where: str = "device"
    when: str = "always"


@dataclass(frozen=True)
class Memory:
    """An estimate for one process.

    Args:
        total_params (`int`), trained_params (`int`), averaged_params (`int`):
            How many there are.
        trained_bytes (`int`):
            Of the trained ones.
        items (`list[Item]`):
            What was counted.
        complete (`bool`):
            Whether the model's shape is one whose activations could be estimated.
    """

    total_params: int
    trained_params: int
    averaged_params: int
    trained_bytes: int
    items: list[Item]
    complete: bool

    def peak(self, where: str = "device") -> int:
        """Bytes at the fuller of the two moments, training and checking.

        Args:
            where (`str`, *optional*, defaults to `"device"`):
                As in [`Item`].
        """
        return max(self.at("training", where), self.at("checking", where))

    def at(self, when: str, where: str = "device") -> int:
        """Bytes at one moment.

        Args:
            when (`str`):
                `"training"` or `"checking"`.
            where (`str`, *optional*, defaults to `"device"`):
                As in [`Item`].
        """
        return sum(item.size for item in self.items if item.where == where and item.when in ("always", when))


def model_skeleton(recipe: Recipe, config: PretrainedConfig) -> nn.Module:
    """The model of a run with adapters and precision, its parameters without storage.

    Args:
        recipe ([`Recipe`]):
            Of the run.
        config (`PretrainedConfig`):
            Of the model.
    """
    dtype = getattr(config, "dtype", None) if recipe.model.dtype in ("auto", None) else recipe.model.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=recipe.training.trust_remote_code
        )
        peft_config = get_peft_config(recipe.model)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
    return model


def load_config(recipe: Recipe) -> PretrainedConfig:
    """The model's configuration.

    Args:
        recipe ([`Recipe`]):
            Of the run.

    Raises:
        ValueError: if there is no such model, or it cannot be had.
    """
    name = recipe.model.model_name_or_path
    try:
        return AutoConfig.from_pretrained(
            recipe.model_path,
            revision=recipe.model.model_revision,
            trust_remote_code=recipe.training.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model_name_or_path={name!r} cannot be loaded: {reason} Give a folder that holds a model, a name on the "
            "Hugging Face hub (for gated models such as Llama accept the licence there and run `hf auth login`), or "
            "testbed"
        ) from error


def estimate_memory(recipe: Recipe, prompts: int = 0) -> Memory:
    """What a run will keep in memory, in each process.

    Args:
        recipe ([`Recipe`]):
            Of the run.
        prompts (`int`, *optional*, defaults to 0):
            In the larger set of the safety check; 0: no check.

    Returns:
        [`Memory`]

    Raises:
        ValueError: if there is no such model, or nothing in it to average.
    """
    training, config = recipe.training, load_config(recipe)
    model = model_skeleton(recipe, config)
    params = list(model.parameters())
    trained = [param for param in params if param.requires_grad]
    items = [
        Item("weights", _weight_bytes(recipe, model)),
        Item("gradients", _bytes(trained), when="training"),
        Item(f"optimizer ({training.optim.value})", round(_optimizer_share(training.optim.value) * _bytes(trained))),
    ]
    if training.world_size > 1:
        items.append(Item("gradients once more, in the buckets of several processes", _bytes(trained)))
    averaged = []
    if training.ema:
        averaged = list(
            select_parameters(model.named_parameters(), training.ema_params, training.ema_exclude_params).values()
        )
        where = "device" if training.ema_device is None else training.ema_device.split(":")[0]
        where = "device" if where == training.device.type else where
        how_many = max(len(x) if isinstance(x, list) else 1 for x in (training.ema_half_life, training.ema_decay))
        width = getattr(torch, training.ema_dtype).itemsize
        items.append(Item("EMA: where the weights started", _bytes(averaged), where))
        items.append(Item("EMA: how far the average is from there", how_many * width * _count(averaged), where))
        items.append(Item("the live weights, set aside while the average is checked", _bytes(averaged), where, "checking"))  # fmt: skip
    shape = _Shape.of(config)
    if shape is not None:
        items += _activations(recipe, shape, model, prompts)
    return Memory(
        _count(params), _count(trained), _count(averaged), _bytes(trained), items, complete=shape is not None
    )


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free now; None if this system does not say.

    Args:
        device (`torch.device`):
            Of the run.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows, nor under these names everywhere
        return None


def _count(params: Iterable[nn.Parameter]) -> int:
    return sum(param.numel() for param in params)


def _bytes(params: Iterable[nn.Parameter]) -> int:
    return sum(param.numel() * param.element_size() for param in params)


def _weight_bytes(recipe: Recipe, model: nn.Module) -> int:
    if not (recipe.model.load_in_4bit or recipe.model.load_in_8bit):
        return _bytes(model.parameters())
    # bitsandbytes packs the linear layers but the head: 4 bits and a float32 scale for 64 of them, or 8 bits.
    each = 0.5 + 4 / 64 if recipe.model.load_in_4bit else 1.0
    head = model.get_output_embeddings()
    packed = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    }
    return round(sum(p.numel() * (each if id(p) in packed else p.element_size()) for p in model.parameters()))


def _optimizer_share(name: str) -> float:
    """State of an optimizer, in copies of the trained parameters."""
    if "adafactor" in name or name in ("sgd", "lomo", "adalomo"):
        return 0.0
    copies = 1 if "lion" in name or "rmsprop" in name or name == "adagrad" else 2
    if "8bit" in name:
        return copies / 4
    return copies / 8 if "4bit" in name else float(copies)


@dataclass(frozen=True)
class _Shape:
    layers: int
    hidden: int
    mlp: int
    keys: int
    """Width of all key heads together; that of the values is the same."""
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "_Shape | None":
        text = config.get_text_config()
        try:
            head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            return cls(text.num_hidden_layers, text.hidden_size, text.intermediate_size, head * heads, text.vocab_size)
        except AttributeError:
            return None


def _activations(recipe: Recipe, shape: _Shape, model: nn.Module, prompts: int) -> list[Item]:
    training = recipe.training
    mixed = training.bf16 or training.fp16
    weight = model.get_input_embeddings().weight.element_size()
    compute = 2 if mixed else weight
    # Bytes that one decoder layer of a Llama saves for the backward pass, for each token: counted with
    # saved_tensors_hooks in transformers 5.23, with SDPA attention.
    if weight == 2:
        layer = 20 * shape.hidden + 8 * shape.mlp + 4 * shape.keys
    elif mixed:
        layer = 34 * shape.hidden + 12 * shape.mlp + 8 * shape.keys
    else:
        layer = 32 * shape.hidden + 16 * shape.mlp + 8 * shape.keys
    length = training.max_length or 1024
    tokens = training.train_batch_size * length
    checkpointed = bool(training.activation_checkpointing)
    saved = tokens * (shape.layers * shape.hidden * weight + layer if checkpointed else shape.layers * layer)
    # TRL works through the logits tile by tile, but sums the gradient of the head up in float32.
    head = min(tokens, _TILE_TOKENS) * min(shape.vocabulary, 32768) * (compute + 4)
    if not recipe.model.use_peft:
        head += 4 * shape.vocabulary * shape.hidden
    items = [Item("activations, where every row is max_length long", saved + head, when="training")]
    if mixed and weight == 4 and not recipe.model.use_peft:
        items.append(
            Item("16-bit copies of the weights in mixed precision", 2 * _count(model.parameters()), when="training")
        )
    if training.eval_strategy.value != "no" and training.ema:
        logits = training.eval_batch_size * length * shape.vocabulary * (compute + 8)
        items.append(Item("logits of a batch, for the held-out loss of the average", logits, when="checking"))
    if prompts:
        size = training.safety_batch_size
        batch = min(FIRST_BATCH_SIZE if size == "auto" else size, prompts)
        cache = 2 * shape.layers * shape.keys * compute * batch * (PROMPT_TOKENS + training.safety_max_new_tokens)
        items.append(Item("keys and values of the safety prompts answered together", cache, when="checking"))
    return items
