"""hf_safe_ema: keep an aligned chat model safe while fine-tuning it, with an average of its weights.

The public names, nothing else; each module loads when one of its names is first used.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "ClassifierJudge",
    "KeywordJudge",
    "LLMJudge",
    "PromptSet",
    "SafeEMACallback",
    "SafeSFTConfig",
    "SafeSFTTrainer",
    "SafetyCheck",
    "SafetyReport",
    "UnsafeModelError",
    "Verdict",
    "WeightEMA",
    "last_complete_checkpoint",
    "load_finetuning_data",
    "load_prompts",
    "split_heldout",
]

if TYPE_CHECKING:
    from .callback import SafeEMACallback
    from .checkpoint import last_complete_checkpoint
    from .data import load_finetuning_data, split_heldout
    from .ema import WeightEMA
    from .findings import UnsafeModelError
    from .safety.check import SafetyCheck
    from .safety.classifier_judge import ClassifierJudge
    from .safety.judges import KeywordJudge, Verdict
    from .safety.llm_judge import LLMJudge
    from .safety.prompts import PromptSet, load_prompts
    from .safety.reports import SafetyReport
    from .trainer import SafeSFTConfig, SafeSFTTrainer

_HOMES = {
    "callback": ("SafeEMACallback",),
    "checkpoint": ("last_complete_checkpoint",),
    "data": ("load_finetuning_data", "split_heldout"),
    "ema": ("WeightEMA",),
    "findings": ("UnsafeModelError",),
    "safety.check": ("SafetyCheck",),
    "safety.classifier_judge": ("ClassifierJudge",),
    "safety.judges": ("KeywordJudge", "Verdict"),
    "safety.llm_judge": ("LLMJudge",),
    "safety.prompts": ("PromptSet", "load_prompts"),
    "safety.reports": ("SafetyReport",),
    "trainer": ("SafeSFTConfig", "SafeSFTTrainer"),
}


def __getattr__(name: str):
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
