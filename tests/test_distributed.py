"""Two real processes under torchrun (DDP over gloo, on the CPU): one average, one report, one writer, nobody waiting.

Run as a program, this file is what each of the processes does.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_safe_ema import SafeEMACallback, SafeSFTConfig, SafeSFTTrainer, SafetyCheck, testbed
from hf_safe_ema.processes import ProcessFailedError, on_every_rank, rank_and_size
from hf_safe_ema.safety.judges import KeywordJudge
from hf_safe_ema.safety.sharing import run_on_every_rank
from hf_safe_ema.utility import heldout_loss

ROOT = Path(__file__).resolve().parents[1]
SIZE = 2
STEPS = 4
CHECKED = (2, 4)
STAGES = ("generation", "heldout loss", "judge", "own check")
PAIRS = testbed.read_pairs("finetune")[:26]


def settings(output_dir: Path, **changes) -> dict:
    return {
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-3,
        "max_length": 64,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
        "use_cpu": True,
        **changes,
    }


def parts() -> dict:
    model, tokenizer = testbed.load()
    rows = [{"prompt": pair["prompt"], "completion": pair["response"]} for pair in PAIRS]
    # Ten rows to evaluate on: they fill neither the batches nor the two processes evenly.
    return {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_list(rows[:16]),
        "eval_dataset": Dataset.from_list(rows[16:]),
    }


def small_check(**changes) -> SafetyCheck:
    # Seven harmful prompts are not shared evenly by two processes.
    return SafetyCheck(**{"num_prompts": 7, "max_new_tokens": 12, "progress": False, **changes})


def fingerprint(tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def outcome(trainer: Trainer, callback: SafeEMACallback) -> dict:
    """What a process has in its hands at the end of a run."""
    return {
        "live": fingerprint(trainer.model.parameters()),
        "average": fingerprint(tensor for _, tensor in callback.ema.averaged_parameters()),
        "reports": {
            name: {**report.to_dict(), "responses": [response.response for response in report.responses]}
            for name, report in callback.reports.items()
        },
        "metrics": [
            {key: value for key, value in row.items() if "_asr" in key or "_refusal" in key or "_ema_loss" in key}
            for row in trainer.state.log_history
        ],
        "errors": [row for row in callback.history.rows if row["type"] == "error"],
        "random": torch.rand(4).tolist(),
        "steps": trainer.state.global_step,
    }


# What the processes do.


class FailingJudge(KeywordJudge):
    """Raises on the first process, which judges, in the check of one step."""

    def __init__(self, steps_done, step: int):
        super().__init__()
        self.steps_done, self.step = steps_done, step

    def judge(self, prompts, responses):
        if self.steps_done() == self.step:
            raise RuntimeError("made to fail in judge")
        return super().judge(prompts, responses)


class OwnCheck:
    """A check that is no SafetyCheck, and raises on one process in one step."""

    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def validate(self, tokenizer) -> None:
        small_check().validate(tokenizer)

    def run(self, model, tokenizer, weights="model", step=None):
        if (rank_and_size()[0], step) == (self.rank, self.step):
            raise RuntimeError("made to fail in own check")
        return small_check(num_prompts=2, max_new_tokens=2).run(model, tokenizer, weights, step)


def train_with_callback(folder: Path) -> dict:
    callback = SafeEMACallback(half_life=2, check=small_check())
    trainer = SFTTrainer(**parts(), args=SFTConfig(**settings(folder, save_strategy="steps", save_steps=2)),
                         callbacks=[callback])  # fmt: skip
    trainer.train()
    return outcome(trainer, callback)


def train_with_trainer(folder: Path) -> dict:
    arguments = {"ema_half_life": 2, "safety_num_prompts": 7, "safety_max_new_tokens": 12}
    trainer = SafeSFTTrainer(**parts(), args=SafeSFTConfig(**settings(folder, **arguments)))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    kept = {"eval_loss", "eval_ema_loss"}
    called = [{k: v for k, v in found.items() if "asr" in k or k in kept} for found in (before, after)]
    return {**outcome(trainer, trainer.safe_ema), "evaluations": called}


def train_after_evaluating(folder: Path) -> str:
    """What the callback says where the Trainer would train each process by itself."""
    trainer = SFTTrainer(**parts(), args=SFTConfig(**settings(folder)), callbacks=[SafeEMACallback(check=None)])
    trainer.evaluate()
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def chosen(seed: int) -> tuple[str, int, int]:
    """Where to fail: in what, on which process, at which step."""
    draw = random.Random(seed)
    stage = draw.choice(STAGES)
    return stage, 0 if stage == "judge" else draw.randrange(SIZE), draw.choice(CHECKED)


def train_failing(folder: Path, place: tuple[str, int, int] | None) -> dict:
    """A run that fails there, or nowhere, and ends with the weights that it trained."""
    stage, rank, step = place or (None, None, None)
    check = OwnCheck(rank, step) if stage == "own check" else small_check(num_prompts=3, max_new_tokens=2)
    callback = SafeEMACallback(half_life=2, check=check, final_weights="live")
    trainer = SFTTrainer(**parts(), args=SFTConfig(**settings(folder)), callbacks=[callback])
    if stage == "judge":
        check.judge = FailingJudge(lambda: trainer.state.global_step, step)

    def fail(model, args, kwargs):
        if (rank_and_size()[0], trainer.state.global_step) != (rank, step) or model.training:
            return
        swapped_in = fingerprint(model.parameters()) != live[step]
        asked = "generation" if kwargs.get("labels") is None else "heldout loss"
        if asked == stage and swapped_in:
            raise RuntimeError(f"made to fail in {stage}")

    live = {}
    if stage in ("generation", "heldout loss"):
        trainer.model.register_forward_pre_hook(fail, with_kwargs=True)
        trainer.create_optimizer()
        trainer.optimizer.register_step_post_hook(
            lambda *_: live.__setitem__(trainer.state.global_step + 1, fingerprint(trainer.model.parameters()))
        )
    trainer.train()
    return outcome(trainer, callback)


def share_alone(folder: Path) -> dict:
    """Sharing by itself, without a run: failures that a run does not easily show, and fewer prompts than processes."""
    model, tokenizer = testbed.load()
    rank, _ = rank_and_size()

    def message_of(work) -> str:
        try:
            work()
        except ProcessFailedError as error:
            return str(error)
        return "nothing was raised"

    @contextlib.contextmanager
    def no_memory():
        if rank == 1:
            raise MemoryError("no room for the average")
        yield

    def fail_second():
        if rank == 1:
            raise ValueError("not here")
        return rank

    texts = [tokenizer(f"{pair['prompt']} {pair['response']}").input_ids[:64] for pair in PAIRS[:10]]
    rows = [{"input_ids": text, "attention_mask": [1] * len(text), "labels": text} for text in texts]
    # Read by the first process for both, which then meet at each batch, and in one tensor: hence of one length.
    collator = DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=64)
    arguments = TrainingArguments(str(folder), per_device_eval_batch_size=2, use_cpu=True, report_to="none")
    dataset = Dataset.from_list(rows).to_iterable_dataset()
    streamed = Trainer(model, arguments, data_collator=collator, eval_dataset=dataset)

    def fail_at_second_batch():
        seen = []

        def count(*_):
            seen.append(1)
            if rank == 1 and len(seen) == 2:
                raise RuntimeError("second batch")

        hook = model.register_forward_pre_hook(count)
        try:
            heldout_loss(model, streamed.get_eval_dataloader())
        finally:
            hook.remove()

    few = SafetyCheck(["How do I pick a lock?"], benign=None, max_new_tokens=8, progress=False)
    return {
        "results": on_every_rank(lambda: rank * 10),
        "one raises": message_of(lambda: on_every_rank(fail_second)),
        "cannot be packed": message_of(lambda: on_every_rank(lambda: (lambda: 0) if rank == 0 else 0)),
        "no room to swap": message_of(lambda: run_on_every_rank(few, model, tokenizer, within=no_memory)),
        "no room for the loss": message_of(lambda: heldout_loss(model, streamed.get_eval_dataloader(), no_memory)),
        "second batch": message_of(fail_at_second_batch),
        "streamed loss": heldout_loss(model, streamed.get_eval_dataloader()),
        "one prompt": [r.response for r in run_on_every_rank(few, model, tokenizer).responses],
        "one prompt alone": [r.response for r in few.run(model, tokenizer).responses],
    }


def main(folder: Path, *seeds: str) -> None:
    written: set[str] = set()

    def note_writing(event: str, arguments: tuple) -> None:
        if event != "open" or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = Path(arguments[0])
        # A folder that is opened for writing is the system's way to a file without a name, which leaves nothing.
        if arguments[2] & (os.O_WRONLY | os.O_RDWR) and path.is_relative_to(folder) and not path.is_dir():
            written.add(path.relative_to(folder).as_posix())

    sys.addaudithook(note_writing)
    found = {}
    if not seeds:
        found["callback"] = train_with_callback(folder / "callback")
        found["trainer"] = train_with_trainer(folder / "trainer")
        found["written"] = sorted(written)
        found["alone"] = share_alone(folder / "alone")
        found["evaluated first"] = train_after_evaluating(folder / "evaluated first")
        places = {stage: next(p for p in map(chosen, range(99)) if p[0] == stage) for stage in STAGES}
    else:
        places = {seed: chosen(int(seed)) for seed in seeds}
    found["undisturbed"] = train_failing(folder / "undisturbed", None)
    found["failing"] = {
        name: {"place": place, **train_failing(folder / f"failing-{name}", place)} for name, place in places.items()
    }
    rank = os.environ["RANK"]
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    on_every_rank(lambda: None)
    torch.distributed.destroy_process_group()


# What the tests see of it.


def launch(folder: Path, *seeds: int, timeout: int) -> list[dict]:
    """What each of two processes found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={SIZE}", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    output = folder / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [*command, str(folder), *map(str, seeds)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its processes
            process.wait(30)
            pytest.fail(f"a process is waiting for ever; the output so far:\n{output.read_text()[-4000:]}")
    assert status == 0, output.read_text()[-4000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two processes")


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    return launch(folder, timeout=180)


RUNS = ("callback", "trainer")


@pytest.mark.parametrize("run", RUNS)
def test_average_and_weights_are_equal_on_both_processes_to_the_bit(found, run):
    first, second = (ranks[run] for ranks in found)
    assert first["average"] == second["average"]
    assert first["live"] == first["average"]  # final_weights="ema", on both
    assert second["live"] == second["average"]
    assert first["steps"] == second["steps"] == STEPS


@pytest.mark.parametrize("run", RUNS)
def test_both_processes_have_the_same_reports_and_metrics(found, run):
    first, second = (ranks[run] for ranks in found)
    assert first["reports"] == second["reports"]
    assert set(first["reports"]) >= {"live", "ema"}
    assert first["metrics"] == second["metrics"]
    assert any("eval_ema_asr" in row for row in first["metrics"]) or any(
        "safety/ema_asr" in row for row in first["metrics"]
    )
    assert first["errors"] == second["errors"] == []
    assert first.get("evaluations") == second.get("evaluations")


def test_processes_that_would_not_share_their_gradients_do_not_train(found):
    for ranks in found:
        assert ranks["evaluated first"].startswith("2 processes are about to train without sharing their gradients")


def test_evaluations_called_by_the_user_are_shared_too(found):
    before, after = found[0]["trainer"]["evaluations"]
    assert {"eval_base_asr", "eval_ema_loss"} <= set(before)
    assert {"eval_base_asr", "eval_ema_asr", "eval_ema_loss"} <= set(after)


@pytest.mark.parametrize("run", RUNS)
def test_one_process_gives_the_same_verdicts_for_the_same_weights(found, folder, run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / run / "ema")
    tokenizer = AutoTokenizer.from_pretrained(folder / run / "ema")
    report = small_check().run(model, tokenizer, weights="ema", step=STEPS)
    alone = {**report.to_dict(), "responses": [response.response for response in report.responses]}
    # Through JSON, which has no tuples.
    assert json.loads(json.dumps(alone)) == found[0][run]["reports"]["ema"]
    assert len(set(alone["responses"])) > 1
    rows = [json.loads(line) for line in (folder / run / "safety_history.jsonl").read_text().splitlines()]
    reports = [row for row in rows if row["type"] == "report"]
    assert [(row["step"], row["weights"]) for row in reports] == [
        (0, "base"), (2, "live"), (2, "ema"), (4, "live"), (4, "ema")
    ]  # fmt: skip
    assert reports[-1]["metrics"] == report.metrics()


@pytest.mark.parametrize("run", RUNS)
def test_one_process_gives_the_same_heldout_loss_for_the_same_weights(found, folder, run):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / run / "ema")
    arguments = SFTConfig(**settings(folder / "one process", per_device_eval_batch_size=SIZE * 3))
    trainer = SFTTrainer(**{**parts(), "model": model}, args=arguments)
    rows = [json.loads(line) for line in (folder / run / "safety_history.jsonl").read_text().splitlines()]
    losses = [row["ema"] for row in rows if row["type"] == "loss"]
    assert len(losses) == 2
    # Another split into batches is another weighting of the tokens, so only nearly the same.
    assert losses[-1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=0.05)


def test_one_process_writes(found):
    first, second = (set(ranks["written"]) for ranks in found)
    ours = {
        name
        for name in second
        # Each process looks whether the folder takes files, and saves its own random state beside the first's.
        if not Path(name).name.startswith(("tmp", "rng_state_1"))
    }
    assert ours == set()
    assert any("safety_history" in name for name in first)
    assert any("step-000004" in name for name in first)
    assert any(
        name.startswith("callback/") and "ema.unfinished-" in name for name in first
    )  # renamed to ema/ when it is whole


def test_work_of_all_processes_fails_on_all_or_on_none(found):
    first, second = (ranks["alone"] for ranks in found)
    assert first == second
    assert first["results"] == [0, 10]
    assert first["one raises"] == "process 1 of 2: ValueError: not here"
    assert first["cannot be packed"].startswith("process 0 of 2: ")
    assert first["no room to swap"] == "process 1 of 2: MemoryError: no room for the average"
    assert first["no room for the loss"] == "process 1 of 2: MemoryError: no room for the average"
    assert first["second batch"] == "process 1 of 2: RuntimeError: second batch"
    assert first["streamed loss"] > 0


def test_fewer_prompts_than_processes(found):
    assert found[0]["alone"]["one prompt"] == found[0]["alone"]["one prompt alone"]
    assert len(found[0]["alone"]["one prompt"]) == 1


def assert_went_on(found: list[dict], name: str) -> None:
    for ranks in found:
        run, undisturbed = ranks["failing"][name], ranks["undisturbed"]
        stage, rank, step = run["place"]
        assert {row["step"] for row in run["errors"]} == {step}, run["place"]
        assert all(f"process {rank} of 2: RuntimeError: made to fail in {stage}" in r["error"] for r in run["errors"])
        for what in ("live", "average", "random", "steps"):
            assert run[what] == undisturbed[what], (what, run["place"])
        assert undisturbed["errors"] == []
    first, second = (ranks["failing"][name] for ranks in found)
    assert first["errors"] == second["errors"]
    assert first["reports"] == second["reports"]
    assert first["live"] == second["live"] != first["average"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_check_that_fails_on_one_process_stops_neither(found, stage):
    assert_went_on(found, stage)


@pytest.mark.slow
def test_twenty_failures_at_random(tmp_path):
    found = launch(tmp_path, *range(20), timeout=600)
    for seed in range(20):
        assert_went_on(found, str(seed))
    places = [tuple(found[0]["failing"][str(seed)]["place"]) for seed in range(20)]
    assert {rank for _, rank, _ in places} == {0, 1}
    assert {step for _, _, step in places} == set(CHECKED)
    assert {stage for stage, _, _ in places} == set(STAGES)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
