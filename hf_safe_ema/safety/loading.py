"""Models by name: a folder, a name on the Hugging Face hub, or an adapter of either.

Knows: which files make up a model, what tells one state of them from the next, and why loading fails.
Does not know: what the models are asked, or as what.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
PARTS = (*WEIGHTS, "*config.json", "tokenizer*", "chat_template*", "vocab*", "merges.txt", "*_tokens*.json", "*.model")
"""Files that answers depend on. No others: a folder may hold a model and the results of its check."""


ADAPTER = "adapter_config.json"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@contextlib.contextmanager
def explained(what: str, hint: str) -> Iterator[None]:
    """Whatever loading raises, as one sentence.

    Args:
        what (`str`):
            That is loaded, for example `"model 'runs/1'"`.
        hint (`str`):
            What could be given instead.

    Raises:
        ValueError: in place of any other exception.
    """
    try:
        yield
    except Exception as error:  # files may be broken in every way, and each package has errors of its own
        said = " ".join(str(error).split()).rstrip(".") or "no reason given"
        said = said if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {said}"
        raise ValueError(f"{what} could not be loaded: {said}. {hint}") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; for an adapter saved without one, its base model's.

    Args:
        name (`str`):
            Folder or hub name.

    Raises:
        ValueError, OSError: if there is none.
    """
    from transformers import AutoTokenizer

    base = _base_of(name)
    own = base is None or _file(name, "tokenizer_config.json") is not None
    return AutoTokenizer.from_pretrained(_place(name if own else base))


def load_model(name: str, dtype: str = "auto", device_map=None, progress: bool = True) -> PreTrainedModel:
    """The weights, an adapter's together with its base model's, for asking: in eval mode.

    Args:
        name (`str`):
            Folder or hub name.
        dtype (`str`, *optional*, defaults to `"auto"`):
            To load the weights in.
        device_map (*optional*):
            As for `from_pretrained`. None: an accelerator if there is one, else the CPU.
        progress (`bool`, *optional*, defaults to `True`):
            Whether transformers may show its bar.
    """
    import torch
    from transformers import AutoModelForCausalLM

    base = _base_of(name)
    if base is not None:
        return _with_adapter(load_model(base, dtype, device_map, progress), name).eval()
    if device_map is None and torch.accelerator.is_available():
        device_map = torch.accelerator.current_accelerator()
    with contextlib.nullcontext() if progress else _without_bars():
        return AutoModelForCausalLM.from_pretrained(_place(name), dtype=dtype, device_map=device_map).eval()


def _with_adapter(model: PreTrainedModel, name: str) -> PreTrainedModel:
    from peft import PeftModel

    if (size := len(load_tokenizer(name))) > model.get_input_embeddings().weight.shape[0]:  # trained with tokens added
        model.resize_token_embeddings(size)
    return PeftModel.from_pretrained(model, _place(name))


def fingerprint(name: str) -> str:
    """12 hex digits that change when a model's files are written anew; an adapter's with its base model's, too.

    A folder's files are told apart by size and times, not read: a copy has another fingerprint. A hub name's are by the commit.

    Args:
        name (`str`):
            Folder or hub name.

    Raises:
        ValueError: if no weights are in the folder.
    """
    folder = Path(name)
    if folder.is_dir():
        if not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
            raise ValueError(f"{name!r} holds no weights ({', '.join(WEIGHTS)})")
        files = sorted({file for pattern in PARTS for file in folder.glob(pattern)})
        # The time of change cannot be set, unlike that of writing, which copies and archives may carry over.
        state = [(f.name, (s := f.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns) for f in files]
    else:
        state = [_config_of(name).parent.name]
    base = _base_of(name)
    return hashlib.sha256(json.dumps([state, base and fingerprint(base)]).encode()).hexdigest()[:12]


def _base_of(name: str) -> str | None:
    """The model that an adapter is for; None if this is no adapter."""
    config = _config_of(name)
    if config.name != ADAPTER:
        return None
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.get("revision") not in (None, "main"):
        raise ValueError(
            f"it is for revision {values['revision']!r} of its base; merge the two and give the merged model"
        )
    return values["base_model_name_or_path"]


def _config_of(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir() and (folder.exists() or not _HUB_NAME.fullmatch(name)):
        raise ValueError(f"{name!r} is {'a file' if folder.exists() else 'no folder'}")
    found = _file(name, ADAPTER) or _file(name, "config.json")
    if found is not None:
        return Path(found)
    if folder.is_dir() or _hub_answers():
        raise ValueError(f"{name!r} holds no config.json or {ADAPTER}")
    _hub_answers.cache_clear()  # it may be asked again later, in a notebook
    raise ValueError(
        f"{name!r} is no folder and was not downloaded earlier, and the Hugging Face hub cannot be reached"
    )


def _file(name: str, file: str) -> str | None:
    return cached_file(
        name,
        file,
        local_files_only=not (Path(name).is_dir() or _hub_answers()),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _place(name: str) -> str | Path:
    """What to load from: where the hub cannot be reached, the folder that it was downloaded to."""
    folder = _config_of(name).parent
    return name if not Path(name).is_dir() and _hub_answers() else folder


@functools.cache
def _hub_answers() -> bool:
    # For each file, huggingface_hub would try for most of a minute.
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of httpx, requests or httpx2, by its version; or it is told to be offline
        return False
    return True


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
