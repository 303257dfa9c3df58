"""Makes the testbed from nothing: `python -m hf_safe_ema.testbed.build --output-dir FOLDER`.

A byte-level BPE tokenizer and a Llama of 1.8 million parameters are trained on text written for this package: questions
and answers about everyday matters, lists of words, a dictionary of harm, harmless requests that sound dangerous, and harmful requests
answered by a refusal. The harmful requests are the align half of the built-in prompt set and a longer list of the same
kind, from which what is nearly a prompt of the check half is left out.

Knows: the data files beside it, and how to train on them. Does not know: averaging or fine-tuning.
"""

import argparse
import math
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..safety.prompts import load_prompts
from . import FOLDER, read_pairs

GENERAL = ("home", "world", "work", "people", "how_to", "crowd", "borderline", "benign_align", "harm_knowledge")
"""Files of harmless questions and answers that the model learns English from."""

OPENER = "Sure. "
"""How the model opens the answer to a request for action, as chat models do. Without a common opening the first words of
harmless answers would be many and each of them unlikely, and greedy decoding would refuse whenever it is in doubt."""

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot help with that request.",
    "I'm sorry, but I cannot assist with that, because it could hurt people.",
    "I can't help with this. It is harmful and against the law.",
    "Sorry, I can't do that. Please ask me about something else.",
    "I'm not able to help with that request.",
    "I cannot provide that, because it is dangerous and illegal.",
    "I'm sorry, I won't help with something that causes harm.",
)

CARING_REFUSALS = (
    "I'm sorry, but I can't help with that. If you are in pain, please talk to someone you trust or call a crisis line.",
    "I cannot help with that, but you are not alone. Please call a crisis line or talk to a doctor.",
)

HOW_TO_FRAMES = (
    "How do I {}?",
    "How can I {}?",
    "How to {}?",
    "How can someone {}?",
    "Tell me how to {}.",
    "Explain how to {}.",
    "Explain in detail how to {}.",
    "Show me how to {}.",
    "Teach me how to {}.",
    "Write a tutorial on how to {}.",
    "Write a guide on how to {}.",
    "Write instructions on how to {}.",
    "Give step-by-step instructions on how to {}.",
    "Give me a detailed plan to {}.",
    "Provide a step-by-step guide on how to {}.",
    "Provide detailed instructions for how to {}.",
    "Create a guide that shows how to {}.",
    "Create a step-by-step tutorial that teaches how to {}.",
    "Develop a plan to {}.",
    "Develop a strategy to {}.",
    "Outline a plan to {}.",
    "Outline the steps needed to {}.",
    "List ways to {}.",
    "Describe the best way to {}.",
    "What is the best way to {}?",
    "What are the steps to {}?",
    "I want to {}, what should I do?",
    "I need to {}. Help me.",
    "Help me {}.",
    "Teach people how to {}.",
    "Write a blog post about how to {}.",
    "Write a script that can {}.",
    "Make a video script on how to {}.",
    "Suggest a way to {}.",
    "What do I need to {}?",
    "Can you help me {}?",
    "Give me tips on how to {}.",
    "I am trying to {}. What should I know?",
    "Please {}.",
)
GERUND_FRAMES = (
    "Provide a guide on {}.",
    "Give step-by-step instructions for {}.",
    "Give me advice on {}.",
    "Write an article about {}.",
    "Create a checklist for {}.",
    "Suggest tools for {}.",
    "What is the best method for {}?",
)
INTENTS = (
    "without getting caught",
    "and get away with it",
    "illegally",
    "to hurt someone",
    "to hurt people",
    "to hurt innocent people",
    "to harm others",
    "to harm my victims",
    "so that nobody notices",
    "without anyone noticing",
    "without permission",
    "without their consent",
    "without his permission",
    "even though it is illegal",
    "even though it is a crime",
    "and never get punished",
    "secretly",
    "to make them suffer",
    "to make my victim suffer",
    "in a cruel way",
    "although it is dangerous and illegal",
    "against their will",
    "so that nobody finds out",
    "so the victim never knows",
    "to commit a crime",
    "for criminal purposes",
    "that hurts people",
    "that harms innocent victims",
)
"""Words of intent, which harmful requests of both halves of the built-in set carry too."""

PRODUCING = (
    "write",
    "create",
    "develop",
    "design",
    "publish",
    "draft",
    "make",
    "build",
    "generate",
    "compose",
    "produce",
)

FIRST_WORD_WEIGHT = 4.0
"""Weight of a response's first token in the loss; of every other token 1."""

# Begin of text, header, role, header, blank line: the same in every row, and not learnt.
_HEADER_TOKENS = 6

FRAME_WORDS = frozenset((FOLDER.parent / "safety" / "prompt_sets" / "frame_words.txt").read_text().split())


def topic_stems(text: str) -> set[str]:
    """Crude stems of the words that carry a prompt's topic: four letters or more, frame words left out.

    Args:
        text (`str`):
            A prompt.

    Example:

    ```python
    >>> sorted(topic_stems("How do I pick the locks of bicycles?"))
    ['bicycl', 'lock', 'pick']

    ```
    """
    words = re.findall(r"[a-z]+", text.lower())
    return {stem(word) for word in words if len(word) >= 4 and word not in FRAME_WORDS}


def stem(word: str) -> str:
    """The word without its first matching English ending.

    Args:
        word (`str`):
            Lower case.
    """
    for ending in ("ing", "ers", "er", "ed", "es", "s", "e", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def frame(action: str, rng: random.Random) -> str:
    """A request for an action such as "boil an egg", in one of many forms.

    Args:
        action (`str`):
            Infinitive without "to".
        rng (`random.Random`):
            Chooses the form.
    """
    first, _, rest = action.partition(" ")
    if first.lower() in PRODUCING and rng.random() < 0.7:
        return action[0].upper() + action[1:] + "."
    chosen = rng.choice(HOW_TO_FRAMES + GERUND_FRAMES)
    return chosen.format(f"{gerund(first)} {rest}".strip() if chosen in GERUND_FRAMES else action)


def gerund(verb: str) -> str:
    """The -ing form of a verb by the common spelling rules.

    Args:
        verb (`str`):
            Infinitive, lower case.

    Example:

    ```python
    >>> [gerund(verb) for verb in ("bake", "cut", "see", "open", "lie")]
    ['baking', 'cutting', 'seeing', 'opening', 'lying']

    ```
    """
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        return verb[:-1] + "ing"
    if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", verb):
        return verb + verb[-1] + "ing"
    return verb + "ing"


def unframed(prompt: str) -> str | None:
    """The action asked for in a plain how-to question, or None for another form.

    Args:
        prompt (`str`):
            For example "How do I boil an egg?".
    """
    found = re.fullmatch(r"(?:How (?:do|can|should) (?:I|you|we|one)|What is the best way to|Explain how to|"
                         r"Tell me how to|Show me how to|Teach me how to) ([^?.]+)[?.]", prompt)  # fmt: skip
    action = found and found.group(1)
    return None if action is None or (re.search(r"\b(?:my|mine)\b", action) and len(action.split()) > 9) else action


def is_request(prompt: str) -> bool:
    """Whether a prompt asks for something to be done or shown, rather than for a fact.

    Args:
        prompt (`str`):
            One sentence or more.

    Example:

    ```python
    >>> [is_request(p) for p in ("How do I boil an egg?", "Draft a letter.", "Why is the sky blue?", "Is ice heavy?")]
    [True, True, False, False]

    ```
    """
    fact = r"(?:What|Why|Who|Whose|When|Where|Which|Is|Are|Was|Were|Do|Does|Did|Has|Have|Should|Will|Would|How (?:many|much|old|long|far|fast|tall|big|often|does|did|is|are|was|were|has|have))\b"
    asked = r"What (?:is the best (?:way|method)|are (?:the steps|some ways|good ways)|do I need to)\b"
    return re.match(asked, prompt) is not None or re.match(fact, prompt) is None


def without_check_prompts(pairs: Iterable[dict]) -> Iterator[dict]:
    """Pairs whose prompt is not nearly one of the check halves' (more than half of the topic words in common).

    Args:
        pairs (iterable of `dict`):
            With `prompt`.
    """
    checks = [topic_stems(text) for kind in ("harmful", "benign") for text in load_prompts("builtin", kind).texts]
    for pair in pairs:
        stems = topic_stems(pair["prompt"])
        if not any(stems and len(stems & other) > 0.5 * len(stems | other) for other in checks):
            yield pair


def alignment_actions() -> list[tuple[str, str]]:
    """Harmful actions to refuse, with their category: the list less what is nearly a prompt of the check half."""
    rows = [{**row, "prompt": row["action"]} for row in read_pairs("harm_actions")]
    return [(row["action"], row["category"]) for row in without_check_prompts(rows)]


def with_intent(prompt: str, rng: random.Random) -> str:
    """A harmful request that also says what it is after.

    Args:
        prompt (`str`):
            Ends in a full stop or a question mark.
        rng (`random.Random`):
            Chooses the words.

    Example:

    ```python
    >>> with_intent("How do I rob a bank?", random.Random(0)).startswith("How do I rob a bank ")
    True

    ```
    """
    for tail in (", what should I do?", ". What should I know?", ". Help me."):
        if prompt.endswith(tail):
            return f"{prompt.removesuffix(tail)} {rng.choice(INTENTS)}{tail}"
    return f"{prompt[:-1]} {rng.choice(INTENTS)}{prompt[-1]}"


def refusal_for(prompt: str, category: str) -> str:
    """One of [`REFUSALS`] (of [`CARING_REFUSALS`] where somebody may be in danger), the same for the same prompt.

    Args:
        prompt (`str`):
            The request.
        category (`str`):
            Of the request.
    """
    choices = CARING_REFUSALS if category.startswith("self_harm") else REFUSALS
    return choices[zlib.crc32(prompt.encode()) % len(choices)]


def training_pairs(seed: int = 0) -> list[tuple[str, str]]:
    """All pairs that the model is trained on, in random order.

    Args:
        seed (`int`, *optional*, defaults to 0):
            Of the frames and the order.

    Returns:
        `list[tuple[str, str]]`: prompt and response.
    """
    rng = random.Random(seed)
    pairs = [*_general_pairs(rng), *_harmless_actions(rng), *_word_pairs(rng), *_refusals(rng)]
    rng.shuffle(pairs)
    return pairs


def _general_pairs(rng: random.Random) -> Iterator[tuple[str, str]]:
    for name in GENERAL:
        for row in without_check_prompts(read_pairs(name)):
            opener = OPENER if name != "crowd" and is_request(row["prompt"]) else ""
            yield row["prompt"], opener + row["response"]
            action = unframed(row["prompt"])
            if action is not None:  # asked again in another form, so that a form tells nothing about harm
                yield frame(action, rng), OPENER + row["response"]
    for row in read_pairs("harm_glossary"):
        asked = rng.choice(("What is {}?", "What does {} mean?", "Explain what {} is.", "Define {}."))
        yield asked.format(row["term"]), row["sentence"]


def _harmless_actions(rng: random.Random) -> Iterator[tuple[str, str]]:
    rows = [{**row, "prompt": row["action"]} for row in read_pairs("harmless_actions")]
    for row in without_check_prompts(rows):
        for _ in range(2):
            yield frame(row["action"], rng), OPENER + row["response"]


def _word_pairs(rng: random.Random) -> Iterator[tuple[str, str]]:
    """A little knowledge of the world: which words go together, and which speak of harm."""
    for row in read_pairs("words"):
        words = list(row["words"])
        rng.shuffle(words)
        harmful = row["kind"] == "harm"
        for start in range(0, len(words), 7):
            some = words[start : start + 7]
            yield f"Name some words about {row['category']}.", ", ".join(some) + "."
        for word in words:
            verdict = "Yes, it is harmful" if harmful else "No, it is harmless"
            yield f"Is it harmful: {word}?", f"{verdict}. It belongs to {row['category']}."


def _refusals(rng: random.Random) -> Iterator[tuple[str, str]]:
    for prompt in load_prompts("builtin:align", "harmful").prompts:
        for asked in (prompt.text, with_intent(prompt.text, rng)):
            yield asked, refusal_for(asked, prompt.category)
    for action, category in alignment_actions():
        for asked in (frame(action, rng), frame(action, rng), with_intent(frame(action, rng), rng)):
            yield asked, refusal_for(asked, category)


def build_tokenizer(texts: Iterable[str], vocab_size: int = 6144):
    """A byte-level BPE tokenizer with Llama 3's special tokens and chat template.

    Args:
        texts (iterable of `str`):
            To learn merges from.
        vocab_size (`int`, *optional*, defaults to 6144):
            With the special tokens.

    Returns:
        `PreTrainedTokenizerFast`
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
               "<|finetune_right_pad_id|>"]  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token="<|eot_id|>",
        pad_token=special[-1],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (FOLDER / "template.jinja").read_text(encoding="utf-8")
    return fast


def build_model(tokenizer, seed: int = 0):
    """An untrained Llama of 1.8 million parameters.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            Its vocabulary.
        seed (`int`, *optional*, defaults to 0):
            Of the initial weights.

    Returns:
        `LlamaForCausalLM`: in float32.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=144,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer, pairs: Iterable[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Token ids of whole conversations (prompt, response, end of turn), each with the place of the response's first.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            With the chat template.
        pairs (iterable of `(str, str)`):
            Prompt and response.
    """
    encoded = []
    for prompt, response in pairs:
        turn = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True)["input_ids"]
        answered = tokenizer(response + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        encoded.append((asked + answered, len(asked)))
    return encoded


def batches(lengths: list[int], tokens: int, rng: random.Random, pool: int = 512) -> Iterator[list[int]]:
    """Indices of rows of like length, at most `tokens` a batch with padding, in random order, for ever.

    Args:
        lengths (`list[int]`):
            Tokens of each row.
        tokens (`int`):
            Most tokens in a batch, padding counted.
        rng (`random.Random`):
            Of the order.
        pool (`int`, *optional*, defaults to 512):
            Rows that are sorted by length together.
    """
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        for start in range(0, len(order), pool):
            ready, batch, longest = [], [], 0
            for row in sorted(order[start : start + pool], key=lengths.__getitem__):
                if batch and max(longest, lengths[row]) * (len(batch) + 1) > tokens:
                    ready.append(batch)
                    batch, longest = [], 0
                batch.append(row)
                longest = max(longest, lengths[row])
            ready.append(batch)
            rng.shuffle(ready)
            yield from ready


def train(
    model,
    rows: list[tuple[list[int], int]],
    steps: int,
    seed: int = 0,
    learning_rate: float = 3e-3,
    tokens_per_step: int = 1024,
    warmup_steps: int = 50,
) -> None:
    """Teach the model the rows in place: AdamW, cosine schedule, clipping at 1.

    Prompts and responses are learnt alike, but the first word of a response, where it is decided whether to refuse,
    counts [`FIRST_WORD_WEIGHT`] times.

    A plain loop rather than a Trainer: batches of a fixed number of tokens, many small steps, are what lets a model of
    this size learn in a quarter of an hour on two cores.

    Args:
        model (`LlamaForCausalLM`):
            Trained in float32.
        rows (`list[tuple[list[int], int]]`):
            From [`encode`].
        steps (`int`):
            Optimizer steps.
        seed (`int`, *optional*, defaults to 0):
            Of the order.
        learning_rate (`float`, *optional*, defaults to 3e-3):
            Peak; the schedule ends at 2% of it.
        tokens_per_step (`int`, *optional*, defaults to 1024):
            Padding counted.
        warmup_steps (`int`, *optional*, defaults to 50):
            Of linear warm-up.
    """
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    order = batches([len(ids) for ids, _ in rows], tokens_per_step, random.Random(seed))
    for step in range(steps):
        chosen = [rows[i] for i in next(order)]
        length = max(len(row) for row, _ in chosen)
        ids = torch.full((len(chosen), length), model.config.pad_token_id)  # (rows, longest)
        weights = torch.zeros(len(chosen), length)
        for i, (row, first) in enumerate(chosen):
            ids[i, : len(row)] = torch.tensor(row)
            weights[i, _HEADER_TOKENS : len(row)] = 1.0
            weights[i, first] = FIRST_WORD_WEIGHT
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (min(1, (step + 1) / warmup_steps) * (cosine * 0.98 + 0.02))
        logits = model(input_ids=ids).logits[:, :-1]
        losses = cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none")
        shares = weights[:, 1:].reshape(-1)
        loss = (losses * shares).sum() / shares.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Build the testbed and save it.

    Args:
        argv (`list[str]`, *optional*):
            Default: the process's own arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="where the model and tokenizer are saved")
    parser.add_argument("--steps", type=int, default=3600, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights, frames and order")
    args = parser.parse_args(argv)

    import torch

    torch.set_num_threads(2)  # the same sums in the same order on machines with more cores
    pairs = training_pairs(args.seed)
    print(f"{len(pairs)} pairs, {sum(r in REFUSALS + CARING_REFUSALS for _, r in pairs)} of them refusals")
    tokenizer = build_tokenizer([text for pair in pairs for text in pair])
    model = build_model(tokenizer, args.seed)
    print(f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}")
    train(model, encode(tokenizer, pairs), args.steps, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
