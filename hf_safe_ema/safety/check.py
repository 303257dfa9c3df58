"""Prompts, generation and a judge together: a SafetyCheck asks a model, a SafetyReport says what came of it.

Knows: how the three fit, and everything that a rate needs beside it to mean something.
Does not know: what is counted how (reports.py), training, averaging, or files.
"""

import hashlib
import os
from collections.abc import Sequence

from jinja2.exceptions import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .any_judge import build_judge, measures_refusal, verdicts_of
from .generation import generate_responses, render_prompt
from .judges import KeywordJudge
from .prompts import PromptSet, load_prompts
from .reports import Response, SafetyReport, count_by_category, count_labels


class SafetyCheck:
    """Asks a model harmful and harmless prompts and reports how often it answers and refuses.

    Args:
        prompts (anything [`load_prompts`] takes, *optional*, defaults to `"builtin"`):
            Harmful requests.
        benign (anything [`load_prompts`] takes, *optional*, defaults to `"builtin"`):
            Harmless requests, for over-refusal. None: not asked.
        judge (`str` or object, *optional*, defaults to `"keywords"`):
            `"keywords"` (our default rules), the name of a published keyword list (see [`KeywordJudge`]), a judge model
            as `"llama-guard:MODEL"`, `"harmbench:MODEL"` or `"llm:RUBRIC:MODEL"` (see [`build_judge`]), or an object with
            `name` and `judge(prompts, responses) -> list[Verdict]`: an [`LLMJudge`], a [`ClassifierJudge`], or one of
            your own. If it also has `decided(prompt, beginning) -> bool`, responses end as soon as that says so; if it
            has `top_score`, that is the end of its scale.
        benign_judge (as `judge`, *optional*):
            For the harmless prompts' answers, of which only refusal is asked. Default: `judge`, unless that measures
            harm (its `measures` is not `"refusal"`), which tells nothing of a harmless request: then `"keywords"`.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Longest response in tokens. Keyword verdicts rest on the first sentences; an LLM judge wants more.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Prompts at a time; `"auto"` halves from 64 when memory runs out.
        system_prompt (`str`, *optional*):
            Sent before each prompt. None: none.
        num_prompts (`int`, *optional*):
            At most so many of each set, evenly spaced. None: all.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a bar.

    Raises:
        ValueError, TypeError, FileNotFoundError: for arguments that no check could run with, at construction.

    Example:

    ```python
    >>> from hf_safe_ema import testbed
    >>> model, tokenizer = testbed.load()
    >>> report = SafetyCheck(num_prompts=8, progress=False).run(model, tokenizer, weights="base")
    >>> sum(report.counts.values())
    8

    ```
    """

    def __init__(
        self,
        prompts: str | os.PathLike | Sequence[str] | PromptSet = "builtin",
        benign: str | os.PathLike | Sequence[str] | PromptSet | None = "builtin",
        judge="keywords",
        benign_judge=None,
        max_new_tokens: int = 64,
        batch_size: int | str = "auto",
        system_prompt: str | None = None,
        num_prompts: int | None = None,
        progress: bool = True,
    ):
        check_count("max_new_tokens", max_new_tokens)
        if num_prompts is not None:
            check_count("num_prompts", num_prompts)
        if batch_size != "auto":
            check_count("batch_size", batch_size, "or 'auto'")
        if system_prompt is not None and not isinstance(system_prompt, str):
            raise TypeError(f"system_prompt={system_prompt!r}: must be text or None")
        self.judge = build_judge(judge, progress=progress)
        self.benign_judge = self._judge_of_refusal()
        if benign_judge is not None:
            self.benign_judge = build_judge(benign_judge, progress=progress)
            if not measures_refusal(self.benign_judge):
                raise ValueError(
                    f"benign_judge={self.benign_judge.name!r} measures harm, which tells nothing of answers to harmless prompts; "
                    "give 'keywords' or 'llm:refusal:MODEL'"
                )
        self.harmful = load_prompts(prompts, kind="harmful").sample(num_prompts)
        self.benign = None if benign is None else load_prompts(benign, kind="benign").sample(num_prompts)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.system_prompt = system_prompt
        self.progress = progress

    def _judge_of_refusal(self):
        return self.judge if measures_refusal(self.judge) else KeywordJudge()

    def validate(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Raise now what would make every run fail for this tokenizer.

        Args:
            tokenizer (`PreTrainedTokenizerBase`):
                The one that `run` will be given.

        Raises:
            ValueError: if it is missing or has no chat template, or that takes no system prompt where one is to be sent.
        """
        check_can_render(tokenizer, self.system_prompt)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        weights: str = "model",
        step: int | None = None,
    ) -> SafetyReport:
        """Ask, judge, count. Leaves model, tokenizer and random state as they were.

        Args:
            model (`PreTrainedModel`):
                Causal LM in memory.
            tokenizer (`PreTrainedTokenizerBase`):
                With a chat template.
            weights (`str`, *optional*, defaults to `"model"`):
                What the report calls the weights.
            step (`int`, *optional*):
                What the report says of when.

        Returns:
            [`SafetyReport`]

        Raises:
            ValueError: if the tokenizer has no chat template, or the judge gives more or fewer verdicts than asked.
        """
        return self.report(tokenizer, self.ask(model, tokenizer, weights), weights, step)

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        weights: str = "model",
        share: tuple[int, int] = (0, 1),
    ) -> dict[str, list[str]]:
        """The first half of `run`: what the model answers, not yet judged.

        Args:
            model, tokenizer, weights:
                As for [`run`].
            share (`tuple[int, int]`, *optional*, defaults to `(0, 1)`):
                `(rank, size)`: ask only every `size`-th prompt of each set, from number `rank` on, so that `size`
                processes together ask all. The bar is shown by rank 0.

        Returns:
            `dict[str, list[str]]`: `"harmful"` and, where there is such a set, `"benign"`: the answers in the order of
            the prompts.

        Raises:
            ValueError: if the tokenizer has no chat template.
        """
        rank, size = share
        return {
            kind: generate_responses(
                model,
                tokenizer,
                prompt_set.texts[rank::size],
                system_prompt=self.system_prompt,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                decided=getattr(self._judge_of(kind), "decided", None),
                progress=self.progress and rank == 0,
                description=f"{kind} prompts, {weights} weights",
            )
            for kind, prompt_set in self._sets().items()
        }

    def report(
        self,
        tokenizer: PreTrainedTokenizerBase,
        answers: dict[str, list[str]],
        weights: str = "model",
        step: int | None = None,
    ) -> SafetyReport:
        """The second half of `run`: judge and count.

        Args:
            tokenizer (`PreTrainedTokenizerBase`):
                Whose chat template the prompts were asked in.
            answers (`dict[str, list[str]]`):
                As [`ask`] gives them for all prompts.
            weights, step:
                As for [`run`].

        Returns:
            [`SafetyReport`]

        Raises:
            ValueError: if there are more or fewer answers than prompts, or verdicts than answers.
        """
        responses = []
        for kind, prompt_set in self._sets().items():
            responses += self._judged(kind, prompt_set, answers[kind])
        return SafetyReport(
            weights=weights,
            step=step,
            harmful_set=f"{self.harmful.name}#{self.harmful.fingerprint}",
            benign_set=None if self.benign is None else f"{self.benign.name}#{self.benign.fingerprint}",
            judge=self.judge.name,
            template=hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12],
            system_prompt=self.system_prompt,
            max_new_tokens=self.max_new_tokens,
            counts=count_labels(response for response in responses if response.kind == "harmful"),
            benign_counts=count_labels(response for response in responses if response.kind == "benign"),
            by_category=count_by_category(responses),
            benign_judge=None if self.benign is None else self.benign_judge.name,
            top_score=getattr(self.judge, "top_score", None),
            responses=responses,
        )

    def _sets(self) -> dict[str, PromptSet]:
        return {"harmful": self.harmful} | ({} if self.benign is None else {"benign": self.benign})

    def _judge_of(self, kind: str):
        return self.judge if kind == "harmful" else self.benign_judge

    def _judged(self, kind: str, prompt_set: PromptSet, texts: list[str]) -> list[Response]:
        if len(texts) != len(prompt_set.texts):
            raise ValueError(
                f"{len(texts)} answers to {len(prompt_set.texts)} {kind} prompts; give one to each, in their order"
            )
        judge = self._judge_of(kind)
        verdicts = verdicts_of(judge, prompt_set.texts, texts)
        return [
            Response(kind, prompt.id, prompt.category, prompt.text, text, verdict.label, verdict.reason, verdict.score)
            for prompt, text, verdict in zip(prompt_set.prompts, texts, verdicts, strict=True)
        ]


def check_count(name: str, value, alternative: str = "") -> None:
    """Raise unless a value is a number of things.

    Args:
        name (`str`):
            Of the argument.
        value:
            To check.
        alternative (`str`, *optional*):
            What else is allowed, for the message.

    Raises:
        ValueError: if it is no whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number, at least 1 {alternative}".rstrip())


def check_can_render(tokenizer: PreTrainedTokenizerBase | None, system_prompt: str | None) -> None:
    """Raise now what would make every question fail.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Whose chat template prompts will be put in.
        system_prompt (`str`, *optional*):
            That will be sent.

    Raises:
        ValueError: if it is missing or has no chat template, or that takes no system prompt where one is to be sent.
    """
    try:
        render_prompt(tokenizer, "Hello?", system_prompt)
    except TemplateError as error:
        raise ValueError(f"the chat template does not take system_prompt={system_prompt!r}: {error}") from error
