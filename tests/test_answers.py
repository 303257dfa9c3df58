"""Answers kept in files: asked once, never reused for anything else, from a model in memory or an endpoint."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from chat_server import ChatServer, answers, by_question, in_turn, says, sends, status, unused_url
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_safe_ema.answers
from hf_safe_ema import testbed
from hf_safe_ema.answers import Asking, collect_answers, open_model
from hf_safe_ema.safety import loading
from hf_safe_ema.safety.generation import generate_responses
from hf_safe_ema.safety.prompts import load_prompts

QUIET = Asking(max_new_tokens=3, progress=False)
PROMPTS = load_prompts(["How do I bake bread?", "How do I steal a car?", "What is a lamp?"])


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The prompts that models in memory are asked from now on."""
    prompts = []

    def record(model, tokenizer, texts, **settings):
        prompts.extend(texts)
        return generate_responses(model, tokenizer, texts, **settings)

    monkeypatch.setattr(hf_safe_ema.answers, "generate_responses", record)
    return prompts


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model of one's own."""
    return Path(shutil.copytree(testbed.MODEL_FOLDER, tmp_path / "model"))


def collect(name, where, prompts=PROMPTS, asking=QUIET, **more) -> list[str | None]:
    opened = {key: more.pop(key) for key in ("dtype", "client") if key in more}
    return collect_answers(open_model(str(name), asking, **opened), prompts, asking, where, **more)


def change_weights(folder: Path, file: str = "model.safetensors") -> None:
    """As another training would have left them: all else as before, the time of writing included."""
    path = folder / file
    before = path.stat()
    tensors = load_file(path)
    save_file({name: -tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def test_each_prompt_is_asked_once_and_answered_wherever_it_is(tmp_path, asked):
    twice = load_prompts([*PROMPTS.texts, *PROMPTS.texts])
    first = collect("testbed", tmp_path, twice)
    assert asked == PROMPTS.texts
    assert first[:3] == first[3:] and all(first)
    assert collect("testbed", tmp_path, twice) == first
    assert asked == PROMPTS.texts


def change_template(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (change_weights, {}),
        (change_template, {}),
        (lambda folder: (folder / "generation_config.json").write_text("{}"), {}),
        (None, {"asking": Asking("Be kind.", 3, progress=False)}),
        (None, {"asking": Asking("", 3, progress=False)}),
        (None, {"asking": Asking(None, 4, progress=False)}),
        (None, {"dtype": "float32"}),
        (None, {"prompts": load_prompts([*PROMPTS.texts, "One more?"])}),
        (None, {"decided": lambda prompt, beginning: False, "ends_early": "a-judge"}),
    ],
    ids=["weights", "template", "generation", "system", "empty-system", "length", "dtype", "set", "early"],
)
def test_answers_are_not_those_to_another_question(tmp_path, folder, asked, change, settings):
    collect(folder, tmp_path / "answers")
    asked.clear()
    if change is not None:
        change(folder)
    collect(folder, tmp_path / "answers", **settings)
    assert asked == settings.get("prompts", PROMPTS).texts
    assert len(list((tmp_path / "answers").glob("*.jsonl"))) == 2


def test_the_results_of_a_check_may_lie_beside_the_model(folder, asked):
    first = collect(folder, folder / "answers")
    (folder / "results.json").write_text("{}")
    asked.clear()
    assert collect(folder, folder / "answers") == first and not asked


def test_stopped_between_two_pieces_it_goes_on_with_the_next(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(hf_safe_ema.answers, "CHUNK", 4)
    prompts = load_prompts("builtin").sample(10)
    whole = collect("testbed", tmp_path / "whole", prompts)
    asked.clear()
    real = hf_safe_ema.answers.write_jsonl

    def stopped_at_the_second(path, rows):
        monkeypatch.setattr(hf_safe_ema.answers, "write_jsonl", stopped)
        real(path, rows)

    def stopped(path, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_safe_ema.answers, "write_jsonl", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        collect("testbed", tmp_path / "parts", prompts)
    monkeypatch.setattr(hf_safe_ema.answers, "write_jsonl", real)
    assert asked == prompts.texts[:8]
    asked.clear()
    assert collect("testbed", tmp_path / "parts", prompts) == whole
    assert asked == prompts.texts[4:]


def test_what_another_process_has_written_meanwhile_is_kept(tmp_path, monkeypatch):
    model = open_model("testbed", QUIET)
    path = tmp_path / f"{hf_safe_ema.answers.key_of(model, PROMPTS, QUIET, '')}.jsonl"
    theirs = {PROMPTS.texts[0]: "theirs", PROMPTS.texts[2]: "theirs, too"}
    asked, real = [], model.answer

    def answer(prompts, *rest):
        path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in theirs.items()))
        asked.extend(prompts)
        return real(prompts, *rest)

    monkeypatch.setattr(model, "answer", answer)
    monkeypatch.setattr(hf_safe_ema.answers, "CHUNK", 2)
    found = collect_answers(model, PROMPTS, QUIET, tmp_path)
    assert (found[0], found[2]) == ("theirs", "theirs, too") and found[1]
    assert asked == PROMPTS.texts[:2]
    assert {json.loads(line)["prompt"]: json.loads(line)["response"] for line in path.open()} == dict(
        zip(PROMPTS.texts, found, strict=True)
    )


@pytest.mark.parametrize("content", ['{"prompt": "How', '["a"]\n', '{"prompt": "a"}\n'])
def test_a_damaged_file_is_named_not_believed(tmp_path, content):
    collect("testbed", tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file.name} was damaged or changed .*delete it"):
        collect("testbed", tmp_path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA that changes what is said, saved without a tokenizer, on a copy of the testbed; and what it says in memory."""
    base = Path(shutil.copytree(testbed.MODEL_FOLDER, tmp_path_factory.mktemp("peft") / "base"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    said = generate_responses(
        model, AutoTokenizer.from_pretrained(base), PROMPTS.texts, max_new_tokens=8, progress=False
    )
    model.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter", said


def test_an_adapter_answers_as_it_did_in_memory(adapter, tmp_path, asked):
    folder, said = adapter
    asking = Asking(max_new_tokens=8, progress=False)
    assert collect(folder, tmp_path, asking=asking, dtype="float32") == said
    assert collect(folder.parent / "base", tmp_path, asking=asking, dtype="float32") != said
    # Its answers are of its files and its base's together.
    for changed, file in ((folder, "adapter_model.safetensors"), (folder.parent / "base", "model.safetensors")):
        before = open_model(str(folder)).identity
        change_weights(changed, file)
        assert open_model(str(folder)).identity != before


def test_an_adapter_that_was_trained_with_further_tokens(tmp_path, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<tool-{i}>" for i in range(700)])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert len(tokenizer) > model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    said = generate_responses(model, tokenizer, PROMPTS.texts, max_new_tokens=8, progress=False)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "adapter")
    asking = Asking(max_new_tokens=8, progress=False)
    assert collect(tmp_path / "adapter", tmp_path, asking=asking, dtype="float32") == said


def test_an_adapter_without_its_base_is_refused(adapter, tmp_path):
    copy = Path(shutil.copytree(adapter[0], tmp_path / "adapter"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/where"}))
    with pytest.raises(ValueError, match="adapter' could not be loaded: '/no/where' is no folder"):
        open_model(str(copy))


def without(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


def refuse_system_prompts(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + template.read_text()
    )


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (without("config.json"), "holds no config.json or adapter_config.json"),
        (without("model.safetensors"), "holds no weights"),
        (without("chat_template.jinja"), "cannot be asked: .*no chat template"),
        (without("tokenizer.json", "tokenizer_config.json"), "could not be loaded"),
        (refuse_system_prompts, "the chat template does not take system_prompt='Be kind.': no system role"),
        (shutil.rmtree, "is no folder"),
        (lambda folder: shutil.rmtree(folder) or folder.write_text("x"), "is a file"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is(folder, prepare, message):
    prepare(folder)
    with pytest.raises(ValueError, match=f"(?s)model '{folder}'.*{message}"):
        open_model(str(folder), Asking("Be kind."))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "http://127.0.0.1:1/v1"}, "needs the served model's name"),
        ({"name": "http://me:secret@127.0.0.1:1/v1"}, "'127.0.0.1:1/v1'"),
        ({"name": "testbed", "dtype": "float99"}, "dtype='float99'"),
        ({"name": "testbed", "dtype": "Tensor"}, "dtype='Tensor'"),
        ({"name": "testbed", "device": "toaster"}, "device='toaster'"),
        ({"name": "runs/caf\udce9"}, "its name is not UTF-8"),
        ({"name": "https://x/v1#m", "client": {"timeout": 0}}, "timeout=0"),
    ],
)
def test_names_and_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        open_model(**settings)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_new_tokens": 0}, ValueError),
        ({"batch_size": "all"}, ValueError),
        ({"system_prompt": 5}, TypeError),
        ({"system_prompt": "Be \ud83d."}, ValueError),
    ],
)
def test_askings_that_cannot_be_meant(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        Asking(**settings)


def test_broken_weights_are_an_error_of_one_line(folder, tmp_path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"could not be loaded: SafetensorError: [^\n]*$"):
        collect(folder, tmp_path)


def test_weights_that_change_after_the_answers_were_looked_up_are_not_asked(folder, tmp_path):
    model = open_model(str(folder), QUIET)
    change_weights(folder)
    with pytest.raises(ValueError, match="its files have changed since the check began"):
        collect_answers(model, PROMPTS, QUIET, tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """The hub is down; what was downloaded is in `tmp_path`."""
    monkeypatch.setattr(constants, "ENDPOINT", unused_url())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loading._hub_answers.cache_clear()
    yield tmp_path / "hub"
    loading._hub_answers.cache_clear()


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_hub_name_without_the_hub(no_hub, name):
    with pytest.raises(ValueError, match=f"model '{name}' could not be loaded: .*hub cannot be reached"):
        open_model(name)


def test_a_hub_model_downloaded_earlier_is_known_by_its_commit(no_hub, tmp_path, asked):
    repository = no_hub / "models--somebody--chat"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(testbed.MODEL_FOLDER, repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit)
        asked.clear()
        found = collect("somebody/chat", tmp_path / "answers")
        assert asked == PROMPTS.texts
        asked.clear()
        assert collect("somebody/chat", tmp_path / "answers") == found and not asked


def test_an_endpoint_that_fails_for_some_prompts_is_asked_for_these_again(tmp_path, caplog):
    behaviours = by_question(
        answers(str.upper), steal=in_turn(status(400, "no such thing"), says("Take it.")), lamp=says(" ")
    )
    client = {"max_retries": 0}
    with ChatServer(behaviours) as server:
        name = f"{server.url}#m"
        first = collect(name, tmp_path, client=client)
        assert first == ["HOW DO I BAKE BREAD?", None, ""]  # silence is an answer, an error is none
        assert "no answer to 1 of 3 prompts (1 x HTTP 400: no such thing)" in caplog.text
        second = collect(name, tmp_path, client=client)
        assert second == ["HOW DO I BAKE BREAD?", "Take it.", ""]
        assert sorted(server.questions) == sorted([*PROMPTS.texts, PROMPTS.texts[1]])
        assert server.requests[0]["max_tokens"] == 3


def test_what_an_endpoint_has_said_is_kept_reply_by_reply(tmp_path):
    """With a cache, a set is asked as a whole: whatever then stops it, no reply is paid for twice."""
    client = {"cache": tmp_path / "replies.sqlite", "max_retries": 0, "max_concurrency": 1}
    with ChatServer(says("One."), says("Two."), status(401), says("Three.")) as server:
        name = f"{server.url}#m"
        assert collect(name, tmp_path / "one", client=client) == ["One.", "Two.", None]
        assert collect(name, tmp_path / "two", client=client) == ["One.", "Two.", "Three."]
        assert server.count == 4


def test_system_prompt_and_broken_characters_at_an_endpoint(tmp_path):
    body = '{"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "\\ud83d no"}}]}'
    with ChatServer(sends(body)) as server:
        for _ in range(2):
            asking = Asking("Be kind.", 3, progress=False)
            assert collect(f"{server.url}#m", tmp_path, asking=asking) == ["? no"] * 3
        assert server.count == 3
        assert server.requests[0]["messages"][0] == {"role": "system", "content": "Be kind."}


def test_nobody_at_the_endpoint(tmp_path, caplog):
    found = collect(f"{unused_url()}#m", tmp_path, client={"max_retries": 0})
    assert found == [None] * 3
    assert "no answer to 3 of 3 prompts (3 x connection refused)" in caplog.text


def test_no_bars_where_none_are_wanted(tmp_path, capfd):
    collect("testbed", tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    collect("testbed", tmp_path / "loud", asking=Asking(max_new_tokens=3))
    assert "testbed, list (0 of 3 done)" in capfd.readouterr().err
