"""Killed at any moment and resumed, a run ends as if nothing had happened: real processes, really killed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_safe_ema import SafeEMACallback, SafetyCheck, Verdict, testbed
from hf_safe_ema.checkpoint import STATE_PATH, DamagedStateError, last_complete_checkpoint, why_incomplete
from hf_safe_ema.history import read_jsonl
from hf_safe_ema.resume import find_checkpoint

needs_posix = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and file size limits of POSIX")

STEPS = 10  # one epoch is six: the run crosses an epoch and does not end with one
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree")


def tiny_trainer(folder, kind: str = "full", callbacks=(), **changes) -> Trainer:
    """A run of seconds that touches everything: dropout, evaluations, checks, rotation of checkpoints."""
    tokenizer = AutoTokenizer.from_pretrained(testbed.MODEL_FOLDER)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, attention_dropout=0.1, tie_word_embeddings=True,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    model = LlamaForCausalLM(config)
    if kind == "lora":
        lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, lora)
    chosen = random.Random(0)
    rows = [[chosen.randrange(len(tokenizer)) for _ in range(12)] for _ in range(16)]
    rows = [{"input_ids": row, "labels": row} for row in rows]
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 3,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        processing_class=tokenizer,
        train_dataset=rows[:12],
        eval_dataset=rows[12:],
        callbacks=list(callbacks),
    )


def safe_ema(**changes) -> SafeEMACallback:
    check = SafetyCheck(num_prompts=2, max_new_tokens=3, progress=False)
    settings = {"check": check, "check_steps": 2, "final_weights": "live", **changes}
    if "decay" not in changes:
        settings.setdefault("half_life", 0.25)
    return SafeEMACallback(**settings)


def count_operations(folder: str, act) -> None:
    """Call `act` before every file operation of this process in the folder that Python sees, for good."""

    def hook(event, arguments):
        if event in OPERATIONS and isinstance(arguments[0], (str, Path)) and str(arguments[0]).startswith(folder):
            act()

    sys.addaudithook(hook)


def run(folder: str, kind: str, death: tuple[str, int] | None, out) -> None:
    """A process that trains, from the last whole checkpoint if there is one, and dies as it is told to."""
    torch.set_num_threads(1)
    os.dup2(out.fileno(), 1)
    trainer = tiny_trainer(folder, kind, [safe_ema()])
    moments = {"operation": 0, "forward": 0}

    def count(how: str) -> None:
        moments[how] += 1
        if death == (how, moments[how]):
            os.kill(os.getpid(), signal.SIGKILL)

    count_operations(folder, lambda: count("operation"))
    trainer.model.get_input_embeddings().register_forward_hook(lambda *_: count("forward"))
    if death is not None and death[0] == "bytes":  # the kernel kills, in the middle of a file
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (death[1], death[1]))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    live = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    save_file(live, Path(folder).parent / "live.safetensors")
    print(json.dumps(moments))


def start(folder: Path, kind: str, death: tuple[str, int] | None = None) -> tuple[int, list[str]]:
    """Run such a process to its end; its exit code and the lines it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl", "peft", "transformers.trainer", "hf_safe_ema.callback", "datasets"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(str(folder), kind, death, send))
    process.start()
    send.close()
    lines = []
    with os.fdopen(os.dup(receive.fileno()), encoding="utf-8") as output:
        for line in output:
            lines.append(line.rstrip("\n"))
            if death is not None and death[0] == "line" and len(lines) == death[1]:
                os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode, lines


def outcome(folder: Path) -> dict[str, bytes]:
    """All that a run leaves for good, by name: its weights, the averaged model, its history, the responses."""
    names = ["live.safetensors", "run/safety_history.jsonl"]
    files = [folder / name for name in names]
    files += [path for part in ("ema", "safety") for path in (folder / "run" / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """kind -> what the undisturbed run leaves, and how many moments of which sort it has. Each is run once."""
    known = {}

    def get(kind: str) -> tuple[dict[str, bytes], dict[str, int]]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            code, lines = start(folder / "run", kind)
            assert code == 0
            sizes = [path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file()]
            moments = {**json.loads(lines[-1]), "line": len(lines) - 1, "bytes": max(sizes) - 1}
            known[kind] = outcome(folder), moments
        return known[kind]

    return get


def check_deaths(uninterrupted, tmp_path, kind: str, seed: int, how: str | None = None, times: int = 1) -> None:
    """Kill at moments that the seed chooses, and go on to the end."""
    expected, moments = uninterrupted(kind)
    chosen = random.Random(f"{kind} {seed}")
    for _ in range(times):
        how = how or chosen.choice(["operation", "operation", "forward", "bytes", "line"])
        at = chosen.randint(1, moments[how])
        if how == "bytes":  # small files are many: each size is as likely to be the one that is cut
            at = int(moments[how] ** chosen.uniform(0.5, 1))
        code, _ = start(tmp_path / "run", kind, (how, at))
        # 0: a resumed run may be over before that moment.
        assert code == -(signal.SIGXFSZ if how == "bytes" else signal.SIGKILL) or (code == 0 and times > 1)
        for history in tmp_path.glob("run/safety_history*.jsonl"):
            assert history.read_bytes()[-1:] == b"\n" and all(map(json.loads, history.read_text().splitlines()))
        how = None
    code, lines = start(tmp_path / "run", kind)
    assert code == 0, lines
    found = outcome(tmp_path)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{STEPS}"}
    assert not list((tmp_path / "run").rglob(".*"))  # nothing half-written is left lying about


@needs_posix
@pytest.mark.parametrize(
    ("kind", "how", "seed"),
    [("full", "operation", 0), ("full", "forward", 1), ("full", "bytes", 2), ("full", "line", 3),
     ("lora", "operation", 4), ("lora", "bytes", 5)],
)  # fmt: skip
def test_killed_and_resumed_is_as_if_nothing_had_happened(uninterrupted, tmp_path, kind, how, seed):
    check_deaths(uninterrupted, tmp_path, kind, seed, how)


@pytest.mark.slow
@needs_posix
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("seed", range(10, 30))
def test_twenty_deaths_one_or_two_in_a_run(uninterrupted, tmp_path, kind, seed):
    check_deaths(uninterrupted, tmp_path, kind, seed, times=1 + seed % 2)


# One process, stopped by an exception or finished: what the kinds of checkpoints and arguments do.


class Stop(TrainerCallback):
    """Raises KeyboardInterrupt at a moment of a step, as Ctrl-C would. Comes before or after SafeEMACallback."""

    def __init__(self, moment: str, step: int):
        def stop(args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

        setattr(self, moment, stop)


def ending(trainer: Trainer, callback: SafeEMACallback) -> tuple[dict[str, bytes], list[dict]]:
    """Everything that must be the same in the end, to the bit."""
    tensors = {name: value.detach() for name, value in trainer.model.named_parameters()}
    tensors.update({f"average of {name}": value for name, value in callback.ema.averaged_parameters()})
    tensors.update({f"displacement of {name}": value for name, value in callback.ema.displacement().items()})
    rows = (Path(trainer.args.output_dir) / "safety_history.jsonl").read_text()
    return {name: value.contiguous().numpy().tobytes() for name, value in tensors.items()}, rows


def whole_run(folder, settings: dict | None = None, kind: str = "full", **arguments):
    callback = safe_ema(**arguments)
    trainer = tiny_trainer(folder, kind, [callback], **(settings or {}))
    trainer.train()
    return ending(trainer, callback)


def stopped_run(
    folder, stop: Stop, settings: dict | None = None, kind: str = "full", first: bool = False, **arguments
):
    callbacks = [stop, safe_ema(**arguments)] if first else [safe_ema(**arguments), stop]
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(folder, kind, callbacks, **(settings or {})).train()


def resumed_run(folder, checkpoint, settings: dict | None = None, kind: str = "full", callbacks=(), **arguments):
    callback = safe_ema(**arguments)
    trainer = tiny_trainer(folder, kind, [callback, *callbacks], **(settings or {}))
    trainer.train(resume_from_checkpoint=checkpoint)
    return ending(trainer, callback)


KEEP_ALL = {"save_total_limit": None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run without a stop ends with, by its settings; each is run once."""
    known = {}

    def get(settings: dict, **arguments):
        key = repr((settings, arguments))
        if key not in known:
            known[key] = whole_run(tmp_path_factory.mktemp("whole"), settings, **arguments)
        return known[key]

    return get


@pytest.mark.parametrize(
    ("settings", "moment", "step", "checkpoint"),
    [
        # on_save comes before SafeEMACallback's own here: the checkpoint must hold the average by then.
        ({"save_total_limit": 1}, "on_save", 6, 6),
        ({"save_total_limit": 1}, "on_train_end", STEPS, STEPS),
        ({"load_best_model_at_end": True, "eval_steps": 3, "metric_for_best_model": "eval_ema_loss"}, "on_save", 9, 9),
        (
            {"load_best_model_at_end": True, "eval_steps": 3, "metric_for_best_model": "eval_loss"},
            "on_train_end",
            STEPS,
            3,
        ),
        ({"save_strategy": "epoch", "eval_strategy": "epoch"}, "on_save", 6, 6),
        ({"save_strategy": "epoch", "eval_strategy": "epoch"}, "on_train_end", STEPS, STEPS),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, "on_train_end", 12, 12),
        ({"save_strategy": "best", "eval_steps": 3, "metric_for_best_model": "eval_loss"}, "on_step_begin", 9, 3),
        ({"eval_on_start": True, "gradient_accumulation_steps": 2}, "on_step_begin", 7, 6),
        ({"restore_callback_states_from_checkpoint": True}, "on_step_begin", 7, 6),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_ways_of_saving(whole, tmp_path, settings, moment, step, checkpoint):
    stopped_run(tmp_path, Stop(moment, step), settings, first=moment == "on_save")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{checkpoint}")
    assert resumed_run(tmp_path, last_complete_checkpoint(tmp_path), settings) == whole(settings)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "lookahead", "sync_steps": 3},
        {"half_life": [2, 5, 0.5]},
        {"decay": 0.9, "ema_dtype": torch.float64, "exclude_params": "*layernorm*"},
    ],
    ids=str,
)
def test_kinds_of_averages(whole, tmp_path, arguments):
    stopped_run(tmp_path, Stop("on_step_begin", 7), KEEP_ALL, **arguments)
    assert resumed_run(tmp_path, True, KEEP_ALL, **arguments) == whole(KEEP_ALL, **arguments)


def without_dropout(trainer: Trainer) -> None:
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.0


class Preempt(TrainerCallback):
    """Has transformers' own JITCheckpointCallback save and stop at a moment of its choice, as SIGTERM would."""

    def __init__(self, moment: str, step: int):
        def request(args, state, control, **kwargs):
            if state.global_step == step:
                self.manager.is_checkpoint_requested = True

        setattr(self, moment, request)

    def watch(self, trainer: Trainer) -> None:
        jit = [each for each in trainer.callback_handler.callbacks if type(each).__name__ == "JITCheckpointCallback"]
        self.manager = jit[0].jit_manager


@pytest.fixture(scope="module")
def never_preempted(tmp_path_factory):
    known = {}

    def get(settings: dict, arguments: dict):
        key = repr(arguments)
        if key not in known:
            trainer = tiny_trainer(
                tmp_path_factory.mktemp("whole"), "full", [callback := safe_ema(**arguments)], **settings
            )
            without_dropout(trainer)
            trainer.train()
            known[key] = ending(trainer, callback)
        return known[key]

    return get


SHADOW, LOOKAHEAD = {}, {"mode": "lookahead", "sync_steps": 5}


@pytest.mark.parametrize(
    ("moment", "step", "saved", "arguments"),
    [
        ("on_optimizer_step", 4, 5, SHADOW),  # saved at on_step_end, before SafeEMACallback has seen step 5
        ("on_optimizer_step", 4, 5, LOOKAHEAD),  # and before it sets the weights to the average
        ("on_optimizer_step", 7, 8, SHADOW),  # and before the check that is due at step 8
        ("on_step_end", 4, 4, SHADOW),  # at the next on_step_begin
        ("on_step_begin", 4, 4, SHADOW),  # at on_pre_optimizer_step: step 5 is still taken
        ("on_step_end", 6, 6, SHADOW),  # at on_epoch_end
    ],
)
def test_preemption_checkpoints(never_preempted, tmp_path, moment, step, saved, arguments):
    # Without dropout: where it stops in the middle of a step, the Trainer does not restore the random state of its start.
    settings = {"save_strategy": "no", "enable_jit_checkpoint": True, "eval_strategy": "no"}
    checkpoint = str(tmp_path / f"checkpoint-{saved}")
    for resume in (None, checkpoint):
        callback, preempt = safe_ema(**arguments), Preempt(moment, step if resume is None else -1)
        trainer = tiny_trainer(tmp_path, "full", [callback, preempt], **settings)
        preempt.watch(trainer)
        without_dropout(trainer)
        trainer.train(resume_from_checkpoint=resume)
        assert last_complete_checkpoint(tmp_path) == checkpoint
        assert (trainer.state.global_step == STEPS) == (resume is not None)
    assert ending(trainer, callback) == never_preempted(settings, arguments)


@pytest.fixture(scope="module")
def stopped_at_7(tmp_path_factory):
    """A run stopped in step 7, with the checkpoints of steps 3 and 6; tests copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    stopped_run(folder, Stop("on_step_begin", 7), KEEP_ALL)
    return folder


@pytest.fixture
def stopped(stopped_at_7, tmp_path):
    return Path(shutil.copytree(stopped_at_7, tmp_path / "run"))


def test_from_a_checkpoint_that_was_moved_and_renamed(stopped, whole, tmp_path):
    (stopped / "checkpoint-6").rename(tmp_path / "the good one")
    # Into another folder, which has no history: the checkpoint has it.
    assert resumed_run(tmp_path / "elsewhere", str(tmp_path / "the good one"), KEEP_ALL) == whole(KEEP_ALL)


def test_from_a_run_that_was_moved(stopped, whole, tmp_path):
    stopped.rename(tmp_path / "moved")
    assert resumed_run(tmp_path / "moved", True, KEEP_ALL) == whole(KEEP_ALL)


def test_into_a_folder_with_another_runs_files(stopped, whole, tmp_path):
    other = whole_run(tmp_path / "other", {"max_steps": 4, **KEEP_ALL}, half_life=2)
    assert resumed_run(tmp_path / "other", str(stopped / "checkpoint-6"), KEEP_ALL) == whole(KEEP_ALL)
    assert (tmp_path / "other" / "safety_history.jsonl.1").read_text() == other[1]
    assert (tmp_path / "other" / "safety.1").is_dir() and (tmp_path / "other" / "ema.1").is_dir()


def test_resume_from_is_looked_at_first(stopped, tmp_path):
    shutil.copytree(stopped / "checkpoint-6", tmp_path / "copy")
    callback = safe_ema()
    callback.resume_from = str(tmp_path / "copy")
    (stopped / "checkpoint-6" / STATE_PATH).unlink()
    tiny_trainer(stopped, "full", [callback], **KEEP_ALL).train(resume_from_checkpoint=True)
    assert callback.ema.num_updates == STEPS


def test_a_checkpoint_that_cannot_be_found_says_how_to_name_it(stopped, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resuming from step 6.*set callback\.resume_from"):
        find_checkpoint(6, [None, stopped / "checkpoint-3", tmp_path / "absent"])


@pytest.mark.parametrize("with_another", [True, False])
@pytest.mark.parametrize("how", ["missing", "cut", "of another step"])
def test_an_average_that_is_missing_or_damaged_names_the_way_out(stopped, how, with_another):
    state = stopped / "checkpoint-6" / STATE_PATH
    if how == "missing":
        state.unlink()
    elif how == "cut":
        state.write_bytes(state.read_bytes()[:-7])
    else:
        shutil.copy(stopped / "checkpoint-3" / STATE_PATH, state)
    if not with_another:
        shutil.rmtree(stopped / "checkpoint-3")
    before = (stopped / "safety_history.jsonl").read_bytes()
    with pytest.raises((FileNotFoundError, DamagedStateError)) as caught:
        resumed_run(stopped, str(stopped / "checkpoint-6"), KEEP_ALL)
    assert isinstance(caught.value, FileNotFoundError) == (how == "missing")
    assert (f"train(resume_from_checkpoint='{stopped / 'checkpoint-3'}')" in str(caught.value)) == with_another
    assert "on_missing_state='restart'" in str(caught.value)
    assert (stopped / "safety_history.jsonl").read_bytes() == before
    assert last_complete_checkpoint(stopped) == (str(stopped / "checkpoint-3") if with_another else None)


def test_restarting_the_average(stopped):
    (stopped / "checkpoint-6" / STATE_PATH).unlink()
    callback = safe_ema(on_missing_state="restart")
    tiny_trainer(stopped, "full", [callback], **KEEP_ALL).train(resume_from_checkpoint=True)
    assert callback.ema.num_updates == STEPS - 6
    base = load_file(stopped / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(base[name], value) for name, value in callback.ema.state_dict()["base"].items())
    rows = read_jsonl(stopped / "safety_history.jsonl")
    assert [row["step"] for row in rows if row["type"] == "error"] == [6]
    assert [row["step"] for row in rows if row.get("weights") == "ema"] == [2, 4, 6, 8, 10]
    # The next checkpoint has a state, and can be gone on from without the argument.
    assert last_complete_checkpoint(stopped) == str(stopped / "checkpoint-10")
    resumed_run(stopped, str(stopped / "checkpoint-9"), KEEP_ALL)


@pytest.mark.parametrize("best", [False, True])
def test_save_only_model(tmp_path, best):
    settings = {"save_only_model": True, "save_total_limit": None}
    if best:
        settings.update(load_best_model_at_end=True, eval_steps=3)
    stopped_run(tmp_path, Stop("on_step_begin", 7), settings)
    assert last_complete_checkpoint(tmp_path) is None
    found = last_complete_checkpoint(tmp_path, save_only_model=True, with_average=best)
    assert found == str(tmp_path / "checkpoint-6")
    if best:  # the state is there, to be loaded with the best model: the Trainer goes on, with a fresh optimizer
        resumed_run(tmp_path, found, settings)
    else:
        with pytest.raises(FileNotFoundError, match="save_only_model"):
            resumed_run(tmp_path, found, settings)


def test_a_longer_run_keeps_the_decay_it_began_with(stopped, caplog):
    callback = safe_ema()
    tiny_trainer(stopped, "full", [callback], **KEEP_ALL, max_steps=12).train(resume_from_checkpoint=True)
    assert callback.ema.decay == 2 ** (-1 / (0.25 * STEPS)) and callback.ema.num_updates == 12
    assert "the run was of 10 steps when half_life=0.25 was made a decay of 0.757858, and is of 12 now" in caplog.text


@pytest.mark.parametrize(
    "arguments", [{"half_life": 3}, {"half_life": 0.5}, {"decay": 0.5}, {"half_life": [0.25, 0.5]}]
)
def test_another_decay_than_the_checkpoints_is_refused(stopped, arguments):
    with pytest.raises(ValueError, match=r"has decay 0\.757858 .* give what the run began with, or decay=0\.757858"):
        resumed_run(stopped, True, KEEP_ALL, **arguments)


def test_the_same_decay_in_other_words_is_taken(stopped, whole):
    assert resumed_run(stopped, True, KEEP_ALL, decay=2 ** (-1 / (0.25 * STEPS))) == whole(KEEP_ALL)


@pytest.mark.parametrize("save_strategy", ["steps", "epoch"])
def test_a_finished_run_takes_no_step_more(whole, tmp_path, save_strategy):
    settings = {**KEEP_ALL, "save_strategy": save_strategy}
    whole_run(tmp_path, settings)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoint-*/**/*")}
    callback = safe_ema()
    trainer = tiny_trainer(tmp_path, "full", [callback], **settings)
    result = trainer.train(resume_from_checkpoint=True)
    assert ending(trainer, callback) == whole(settings)
    assert result.global_step == trainer.state.global_step == STEPS and result.training_loss == 0.0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoint-*/**/*")} == before
    assert not (tmp_path / "ema.1").exists()


class Compliant:
    name = "compliant"

    def judge(self, prompts, responses):
        return [Verdict("compliance", "") for _ in responses]


@pytest.mark.parametrize("max_asr", [0.5, 1.0])
def test_a_run_that_max_asr_stopped_stays_stopped(tmp_path, max_asr):
    settings = {**KEEP_ALL, "save_steps": 4}
    check = SafetyCheck(num_prompts=2, max_new_tokens=3, progress=False, judge=Compliant())
    arguments = {"check": check, "check_steps": 4, "on_violation": "stop"}
    expected = whole_run(tmp_path / "whole", settings, **arguments, max_asr=0.5)
    stopped_run(tmp_path / "run", Stop("on_train_end", 4), settings, first=True, **arguments, max_asr=0.5)
    callback = safe_ema(**arguments, max_asr=max_asr)
    trainer = tiny_trainer(tmp_path / "run", "full", [callback], **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == (4 if max_asr == 0.5 else STEPS)
    assert (ending(trainer, callback) == expected) == (max_asr == 0.5)


def test_a_check_cut_off_after_its_checkpoint_is_made_up_for(tmp_path):
    # Evaluation at the end of the epoch comes after the checkpoint of its last step.
    settings = {"save_steps": 6, "eval_strategy": "epoch", **KEEP_ALL}
    expected = whole_run(tmp_path / "whole", settings, check_steps=None)
    stopped_run(tmp_path / "run", Stop("on_epoch_end", 6), settings, first=True, check_steps=None)
    found = resumed_run(tmp_path / "run", True, settings, check_steps=None)
    # (The Trainer does not repeat its own evaluation, which draws random numbers: what comes later is not to the bit.)
    rows, whole = ([json.loads(line) for line in text.splitlines()] for text in (found[1], expected[1]))
    assert [row for row in rows if row["step"] <= 6] == [
        row for row in whole if row["step"] <= 6 and row["type"] == "report"
    ]
    assert {row["step"] for row in rows} == {row["step"] for row in whole} == {0, 6, STEPS}


class OutOfMemory(TrainerCallback):
    done = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and not self.done:
            self.done = True
            raise RuntimeError("CUDA out of memory.")


def test_a_search_for_the_batch_size_keeps_the_first_base(tmp_path):
    callback = safe_ema()
    trainer = tiny_trainer(tmp_path, "full", [callback, OutOfMemory()], auto_find_batch_size=True, save_strategy="no",
                           per_device_train_batch_size=4, eval_on_start=True)  # fmt: skip
    first = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert callback.ema.num_updates == STEPS
    assert all(torch.equal(first[name], value) for name, value in callback.ema.state_dict()["base"].items())
    rows = read_jsonl(tmp_path / "safety_history.jsonl")
    reports = [(row["step"], row["weights"]) for row in rows if row["type"] == "report"]
    assert reports == [(0, "base")] + [(step, name) for step in (2, 4, 6, 8, 10) for name in ("live", "ema")]
    assert {row["step"] for row in read_jsonl(tmp_path / "safety_history.interrupted-0.jsonl")} == {2}


class StopInTheSave(TrainerCallback):
    """Raises KeyboardInterrupt when the Trainer saves the optimizer: after the weights, before the rest."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        def stop(_):
            raise KeyboardInterrupt

        optimizer.optimizer.register_state_dict_pre_hook(stop)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_half_overwritten_checkpoint_of_an_earlier_run_is_not_whole(tmp_path, kind):
    whole_run(tmp_path, {**KEEP_ALL, "max_steps": 3}, kind)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    trainer = tiny_trainer(tmp_path, kind, [safe_ema(), StopInTheSave()], **KEEP_ALL)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # All its files are there and whole, the weights of this run, the optimizer of the earlier one.
    assert trainer.state.global_step == 3 and (tmp_path / "checkpoint-3" / "optimizer.pt").exists()
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_keeps_a_checkpoint_from_being_whole(tmp_path, kind):
    whole_run(tmp_path, {**KEEP_ALL, "max_steps": 3}, kind)
    checkpoint = tmp_path / "checkpoint-3"
    assert why_incomplete(checkpoint) is None
    weights = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    names = ["trainer_state.json", weights, "optimizer.pt", "scheduler.pt", "rng_state.pth", str(STATE_PATH)]
    names += ["adapter_config.json"] if kind == "lora" else []
    for name in names:
        content = (checkpoint / name).read_bytes()
        for cut in (len(content) - 1, len(content) // 2, 20, 0, None):
            (checkpoint / name).write_bytes(content[:cut]) if cut is not None else (checkpoint / name).unlink()
            reason = why_incomplete(checkpoint)
            if name.endswith(".json") and content[:cut] == content.rstrip() and cut is not None:
                assert reason is None  # what was cut off is the newline at the end
            else:
                assert reason is not None and (name in reason or (name == weights and cut is None))
            assert last_complete_checkpoint(tmp_path) == (str(checkpoint) if reason is None else None)
        (checkpoint / name).write_bytes(content)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    assert why_incomplete(checkpoint) == "optimizer.pt is missing"
    assert why_incomplete(checkpoint, save_only_model=True) is None
    (checkpoint / "checkpoint-is-incomplete.txt").write_text("")
    assert "preemption" in why_incomplete(checkpoint, save_only_model=True)


def test_the_newest_whole_checkpoint_by_number(stopped, caplog):
    for step in (12, 100):
        shutil.copytree(stopped / "checkpoint-6", stopped / f"checkpoint-{step}")
    (stopped / "checkpoint-100" / "model.safetensors").unlink()
    (stopped / "checkpoint-new").mkdir()
    (stopped / "checkpoint-200").write_text("not a folder")
    assert last_complete_checkpoint(stopped) == str(stopped / "checkpoint-12")
    assert f"{stopped / 'checkpoint-100'} is passed over: no weights are there" in caplog.text
    assert last_complete_checkpoint(stopped / "absent") is None


def test_write_state(stopped, whole, tmp_path):
    with pytest.raises(RuntimeError, match="before training has begun"):
        SafeEMACallback(check=None).write_state(tmp_path)
    # A checkpoint whose state was lost, written again by hand: what write_state writes is all that is needed.
    callback = safe_ema()
    with pytest.raises(KeyboardInterrupt):
        callbacks = [callback, Stop("on_step_begin", 6)]
        tiny_trainer(tmp_path / "again", "full", callbacks, **KEEP_ALL).train()
    shutil.rmtree(stopped / "checkpoint-6" / "safe_ema")
    callback.write_state(stopped / "checkpoint-6")
    assert resumed_run(stopped, str(stopped / "checkpoint-6"), KEEP_ALL) == whole(KEEP_ALL)


def test_the_trainers_callbacks_are_as_before(tmp_path):
    trainer = tiny_trainer(tmp_path, "full", [safe_ema()])
    before = list(trainer.callback_handler.callbacks)
    for _ in range(2):
        trainer.train()
        assert trainer.callback_handler.callbacks == before


def test_checkpoints_of_later_steps_are_warned_about(stopped, caplog):
    resumed_run(stopped, str(stopped / "checkpoint-3"), KEEP_ALL)
    assert f"{stopped} holds checkpoint-6 from before, while this run starts at step 3" in caplog.text
