"""The small aligned Llama that ships with the package, and the harmless data to fine-tune it on.

Knows: where the files are. How they were made is in build.py; what the model is and is not, in docs/testbed.md.
"""

import json
from importlib import resources
from pathlib import Path

FOLDER = Path(str(resources.files(__name__)))
MODEL_FOLDER = FOLDER / "model"
DATA_FOLDER = FOLDER / "data"


def load(folder: str | Path = MODEL_FOLDER, dtype: str = "float32"):
    """The model and its tokenizer, from the installed package; nothing is downloaded.

    Args:
        folder (path, *optional*):
            Another build of it.
        dtype (`str`, *optional*, defaults to `"float32"`):
            To load the weights in. They are stored in bfloat16; fine-tune in float32.

    Returns:
        `(LlamaForCausalLM, PreTrainedTokenizerFast)`

    Example:

    ```python
    >>> model, tokenizer = load()
    >>> model.num_parameters() < 2_000_000
    True

    ```
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def read_pairs(name: str) -> list[dict[str, str]]:
    """Rows of one of the testbed's own data files.

    Args:
        name (`str`):
            File name without ending, for example `"finetune"`: a harmless instruction set in Dolly's manner.

    Returns:
        `list[dict]`: with `prompt` and `response` (the lists of harm words have other keys).
    """
    text = (DATA_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
