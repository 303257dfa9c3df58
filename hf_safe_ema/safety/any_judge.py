"""Any judge, by its name or as an object: what there is, what it measures, and that it answers what it was asked.

Knows: the kinds of judges and how they are named. Does not know: how they judge, or what is counted.
"""

from collections.abc import Sequence

from .judges import KeywordJudge, Verdict
from .rubrics import RUBRICS


def measures_refusal(judge) -> bool:
    """Whether a judge's verdicts say something of answers to harmless prompts.

    Args:
        judge:
            As for [`SafetyCheck`]; one that does not say what it measures is taken to measure refusal.
    """
    return getattr(judge, "measures", "refusal") == "refusal"


def measures_quality(judge) -> bool:
    """Whether a judge grades how good answers are, which is no verdict on safety: see [`build_grader`].

    Args:
        judge (`str` or object):
            A name, or a judge.

    Example:

    ```python
    >>> measures_quality("llm:mt-bench:gpt-4o"), measures_quality("llm:qi:gpt-4o"), measures_quality("keywords")
    (True, False, False)

    ```
    """
    if isinstance(judge, str):
        kind, _, rest = judge.partition(":")
        rubric = RUBRICS.get(rest.partition(":")[0]) if kind == "llm" else None
        return rubric is not None and rubric.measures == "quality"
    return getattr(judge, "measures", None) == "quality"


def identity_of(judge) -> str:
    """What a judge's verdicts depend on: its name, and where it is a model which one, and how much of a response it reads.

    Args:
        judge:
            As for [`SafetyCheck`]. One of your own is known by its name alone: give it another with other rules.
    """
    endpoint = getattr(getattr(judge, "client", None), "base_url", "")
    return "\n".join(
        [judge.name, getattr(judge, "identity", ""), endpoint, str(getattr(judge, "max_response_chars", ""))]
    )


def verdicts_of(judge, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
    """What a judge says, a verdict a response.

    Args:
        judge:
            As for [`SafetyCheck`].
        prompts, responses (list of `str`):
            As many of each.

    Raises:
        ValueError: if the judge gives more or fewer verdicts than asked for.
    """
    verdicts = judge.judge(prompts, responses)
    if len(verdicts) != len(responses):
        raise ValueError(
            f"judge {judge.name!r} gave {len(verdicts)} verdicts on {len(responses)} responses; it must give one "
            "each, in the same order"
        )
    return verdicts


def build_judge(judge, llm_options: dict | None = None, progress: bool = True):
    """A judge from its name, or as it is.

    Args:
        judge (`str` or object):
            - `"keywords"`, or the name of a published keyword list;
            - `"llama-guard:MODEL"` or `"harmbench:MODEL"`: a [`ClassifierJudge`], MODEL a folder or hub name;
            - `"llm:RUBRIC:MODEL"`: an [`LLMJudge`], its endpoint from the environment's `OPENAI_BASE_URL`, or OpenAI;
            - an object with `name` and `judge(prompts, responses)`.
        llm_options (`dict`, *optional*):
            Further arguments of [`LLMJudge`].
        progress (`bool`, *optional*, defaults to `True`):
            Whether a judge made here shows a bar.

    Raises:
        ValueError: for an unknown name, a model that cannot be used, a judge of quality.
        TypeError: for an object that is no judge.

    Example:

    ```python
    >>> build_judge("gcg-7").name
    'keywords:gcg-7'

    ```
    """
    if measures_quality(judge):
        raise ValueError(
            f"judge {getattr(judge, 'name', judge)!r} measures quality, which is no verdict on safety: choose a judge of harm or "
            "refusal, or give it tasks to grade with `hf-safe-ema check --tasks FILE`"
        )
    if isinstance(judge, str):
        kind, _, rest = judge.partition(":")
        if kind in ("llama-guard", "harmbench") and rest:
            from .classifier_judge import ClassifierJudge

            return ClassifierJudge(rest, style=kind, progress=progress)
        if kind == "llm":
            return _llm_judge(judge, "qi", llm_options, progress)
        return KeywordJudge("default" if judge == "keywords" else judge)
    return _checked(judge)


def build_grader(judge, llm_options: dict | None = None, progress: bool = True):
    """A judge of quality from its name, or as it is.

    Args:
        judge (`str` or object):
            - `"llm:mt-bench:MODEL"`: an [`LLMJudge`], its endpoint from the environment's `OPENAI_BASE_URL`, or OpenAI;
            - an object with `name` and `score(prompts, responses, references)`.
        llm_options (`dict`, *optional*):
            Further arguments of [`LLMJudge`].
        progress (`bool`, *optional*, defaults to `True`):
            Whether a judge made here shows a bar.

    Raises:
        ValueError: for a judge of something else, or an endpoint that cannot be used.
        TypeError: for an object that grades nothing.
    """
    if not measures_quality(judge):
        raise ValueError(f"judge {judge!r} does not grade quality; give 'llm:mt-bench:MODEL'")
    if isinstance(judge, str):
        return _llm_judge(judge, "mt-bench", llm_options, progress)
    if not callable(getattr(judge, "score", None)) or not isinstance(getattr(judge, "name", None), str):
        raise TypeError(
            f"judge={judge!r}: a judge of quality needs a `name` and a method `score(prompts, responses, references)` that "
            "returns a number or None for each"
        )
    return judge


def _llm_judge(name: str, usual_rubric: str, options: dict | None, progress: bool):
    from .llm_judge import LLMJudge

    rubric, _, model = name.removeprefix("llm:").partition(":")
    if not model:
        raise ValueError(f"judge={name!r}: name rubric and model, as in 'llm:{usual_rubric}:gpt-4o'")
    return LLMJudge(rubric, model=model, **{"progress": progress, **(options or {})})


def _checked(judge):
    if not callable(getattr(judge, "judge", None)) or not isinstance(getattr(judge, "name", None), str):
        raise TypeError(
            f"judge={judge!r}: give 'keywords', the name of a keyword list, or an object with a `name` and a method "
            "`judge(prompts, responses)` that returns a Verdict for each"
        )
    if getattr(judge, "measures", "refusal") not in ("refusal", "harm"):
        raise ValueError(f"judge {judge.name!r} measures {judge.measures!r}; choose one of 'harm' or 'refusal'")
    return judge
