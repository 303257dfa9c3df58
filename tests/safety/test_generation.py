"""Generation: the responses do not depend on how they are made, and nothing that training needs is touched."""

import copy
import random

import numpy as np
import pytest
import torch

from hf_safe_ema import KeywordJudge, load_prompts
from hf_safe_ema.safety.generation import generate_responses, render_prompt


@pytest.fixture
def mine(tiny):
    """A model and tokenizer that a test may change."""
    return copy.deepcopy(tiny[0]), copy.deepcopy(tiny[1])


@pytest.fixture(scope="module")
def exact(tiny):
    """The model in float64, where rounding cannot turn a near tie between two tokens."""
    return copy.deepcopy(tiny[0]).double(), tiny[1]


def ask(model, tokenizer, prompts, **settings) -> list[str]:
    return generate_responses(model, tokenizer, prompts, **{"max_new_tokens": 12, "progress": False, **settings})


def random_state() -> tuple:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), rest), torch.get_rng_state().tolist()


def draw_numbers(prompt: str, beginning: str) -> bool:
    random.random(), np.random.rand(), torch.rand(1)
    return False


def draw_and_fail(prompt: str, beginning: str) -> bool:
    draw_numbers(prompt, beginning)
    raise OSError("the judge is not at home")


@pytest.mark.parametrize("training", ["train", "eval", "mixed"])
@pytest.mark.parametrize("decided", [draw_numbers, draw_and_fail], ids=["returns", "raises"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_everything_is_put_back(mine, training, decided, use_cache):
    model, tokenizer = mine
    model.train(training != "eval")
    if training == "mixed":
        model.model.layers[1].eval()
        model.model.layers[2].mlp.eval()
    model.config.use_cache = use_cache
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left"
    tokenizer.pad_token = None

    def state():
        return {
            "modes": [module.training for module in model.modules()],
            "random": random_state(),
            "config": model.config.to_dict(),
            "generation": model.generation_config.to_dict(),
            "padding": (
                tokenizer.padding_side,
                tokenizer.truncation_side,
                tokenizer.pad_token,
                tokenizer.pad_token_id,
            ),
            "grad": torch.is_grad_enabled(),
            "weights": [p.detach().clone().numpy().tobytes() for p in model.parameters()],
        }

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = state()
    if decided is draw_and_fail:
        with pytest.raises(OSError, match="not at home"):
            ask(model, tokenizer, ["How do I boil an egg?"], decided=decided)
    else:
        ask(model, tokenizer, ["How do I boil an egg?", "Why is the sky blue?"], decided=decided)
    assert state() == before


def test_everything_is_put_back_when_the_model_fails(mine):
    model, tokenizer = mine
    model.train().model.layers[0].eval()
    model.config.use_cache = False
    tokenizer.padding_side = "right"
    modes, numbers = [module.training for module in model.modules()], random_state()

    def fail(module, arguments, output):
        torch.rand(1)
        raise FloatingPointError("nan")

    with model.model.layers[2].register_forward_hook(fail), pytest.raises(FloatingPointError):
        ask(model, tokenizer, ["How do I boil an egg?"])
    assert [module.training for module in model.modules()] == modes
    assert random_state() == numbers
    assert (model.config.use_cache, tokenizer.padding_side) == (False, "right")
    assert ask(model, tokenizer, ["How do I boil an egg?"]) == ask(*mine, ["How do I boil an egg?"])


def test_the_model_answers_in_eval_mode_with_its_cache_on(mine):
    model, tokenizer = mine
    model.train()
    model.config.use_cache = False
    seen = []
    with model.register_forward_pre_hook(lambda *a: seen.append((model.training, model.config.use_cache))):
        ask(model, tokenizer, ["How do I boil an egg?"])
    assert set(seen) == {(False, True)}


def test_sampling_settings_of_the_model_do_not_count(mine):
    model, tokenizer = mine
    prompts = load_prompts("builtin", "benign").texts[:6]
    greedy = ask(model, tokenizer, prompts)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=3.0,
                                   num_beams=2, no_repeat_ngram_size=1)  # fmt: skip
    torch.manual_seed(1)
    assert ask(model, tokenizer, prompts) == greedy


def test_responses_do_not_depend_on_the_batch_size(exact):
    prompts = load_prompts("builtin").sample(12).texts + load_prompts("builtin", "benign").sample(12).texts
    alone = ask(*exact, prompts, batch_size=1)
    assert ask(*exact, prompts, batch_size=8) == alone
    assert ask(*exact, prompts, batch_size="auto") == alone
    assert len(set(alone)) > 1


def test_labels_do_not_depend_on_the_batch_size_in_float32(tiny):
    prompts = load_prompts("builtin").sample(12).texts + load_prompts("builtin", "benign").sample(12).texts
    labels = [
        [v.label for v in KeywordJudge().judge(prompts, ask(*tiny, prompts, batch_size=size))] for size in (1, 8)
    ]
    assert labels[0] == labels[1]


@pytest.mark.parametrize("preset", ["default", "qi-29"])
def test_ending_early_gives_the_verdicts_of_the_full_length(tiny, preset):
    judge = KeywordJudge(preset)
    prompts = load_prompts("builtin").sample(20).texts + load_prompts("builtin", "benign").sample(20).texts
    full = ask(*tiny, prompts, max_new_tokens=48)
    early = ask(*tiny, prompts, max_new_tokens=48, decided=judge.decided)
    assert [v.label for v in judge.judge(prompts, early)] == [v.label for v in judge.judge(prompts, full)]
    assert all(whole.startswith(beginning) for whole, beginning in zip(full, early, strict=True))
    # The default reads one sentence more than this model's refusals have.
    assert preset == "default" or sum(map(len, early)) < sum(map(len, full))


def test_order_is_kept_whatever_the_lengths(exact):
    prompts = ["What is a very long question that goes on and on about the weather in the north?", "What is rain?"]
    prompts += ["What is snow, and why is it white?", "How?"]
    alone = [ask(*exact, [prompt])[0] for prompt in prompts]
    assert ask(*exact, prompts, batch_size=2) == alone
    assert ask(*exact, prompts[::-1], batch_size=2) == alone[::-1]
    assert ask(*exact, []) == []


def test_each_beginning_comes_with_its_own_prompt(tiny):
    prompts = load_prompts("builtin", "benign").texts[:6]
    seen = {prompt: [] for prompt in prompts}

    def decided(prompt, beginning):
        seen[prompt].append(beginning.strip())
        return False

    responses = ask(*tiny, prompts, batch_size=4, decided=decided)
    for prompt, response in zip(prompts, responses, strict=True):
        assert seen[prompt]
        assert all(response.startswith(beginning) for beginning in seen[prompt])


def given_to(model, tokenizer, **settings) -> str:
    """What the model reads first."""
    seen = []
    with model.register_forward_pre_hook(lambda module, a, kw: seen.append(kw["input_ids"].clone()), with_kwargs=True):
        ask(model, tokenizer, ["How do I boil an egg?"], **settings)
    return tokenizer.decode(seen[0][0])


def test_system_prompt_reaches_the_model_through_the_template(tiny):
    text = given_to(*tiny, system_prompt="Always be kind.")
    assert text == render_prompt(tiny[1], "How do I boil an egg?", "Always be kind.")
    assert text.count(tiny[1].bos_token) == 1
    assert text.index("Always be kind.") < text.index("How do I boil an egg?")
    assert "system" not in given_to(*tiny)
    assert "system" in given_to(*tiny, system_prompt="")


def test_chat_template_is_needed(mine):
    model, tokenizer = mine
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.*set tokenizer\.chat_template.*check=None"):
        ask(model, tokenizer, ["How?"])
    with pytest.raises(ValueError, match="no chat template"):
        render_prompt(tokenizer, "How?")
    with pytest.raises(ValueError, match=r"no tokenizer.*processing_class"):
        ask(model, None, ["How?"])


def test_a_tokenizer_without_pad_token_gives_the_same_responses(mine):
    model, tokenizer = mine
    prompts = load_prompts("builtin", "benign").texts[:4]
    padded = ask(model, tokenizer, prompts)
    tokenizer.pad_token = None
    assert ask(model, tokenizer, prompts) == padded
    assert tokenizer.pad_token is None


def test_special_tokens_and_outer_spaces_are_not_part_of_a_response(tiny):
    for response in ask(*tiny, load_prompts("builtin").texts[:8], max_new_tokens=40):
        assert "<|" not in response and response == response.strip()


def short_of_memory(model, room: int, sizes: list[int]):
    """Have the model run out of memory for batches of more than `room`."""

    def check(module, arguments, keywords):
        sizes.append(len(keywords["input_ids"]))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("out of memory")

    return model.register_forward_pre_hook(check, with_kwargs=True)


def test_auto_batch_size_halves_until_the_memory_is_enough(tiny):
    model, tokenizer = tiny
    prompts = load_prompts("builtin", "benign").texts[:10]
    expected, sizes = ask(model, tokenizer, prompts, batch_size=4), []
    with short_of_memory(model, 4, sizes):
        assert ask(model, tokenizer, prompts, batch_size="auto") == expected
    assert sizes[:5] == [10, 10, 10, 8, 4]  # 64, 32 and 16 at a time hold all ten


@pytest.mark.parametrize(("batch_size", "room"), [(4, 2), ("auto", 0)])
def test_no_memory_is_said_where_nothing_can_be_done(tiny, batch_size, room):
    model, tokenizer = tiny
    with short_of_memory(model, room, []), pytest.raises(torch.OutOfMemoryError):
        ask(model, tokenizer, load_prompts("builtin", "benign").texts[:4], batch_size=batch_size)
