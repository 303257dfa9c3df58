"""`hf-safe-ema sweep`: real runs in processes of their own, shared, killed, failed and gone on with."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import pytest
from sweeps import write_sweep_file

from hf_safe_ema import cli
from hf_safe_ema.recipe import read_recipe
from hf_safe_ema.sweep import run_sweep, suggest
from hf_safe_ema.sweep_config import as_flags, read_sweep
from hf_safe_ema.sweep_study import open_study
from hf_safe_ema.train import train

SWEEP = [sys.executable, "-m", "hf_safe_ema.cli", "sweep", "--config"]


def made(study) -> Counter:
    """How often each run was made, those that failed or were stopped among them."""
    trials = [t for t in study.trials if "of" not in t.user_attrs and t.state.name in ("COMPLETE", "FAIL")]
    return Counter(t.user_attrs["chosen"] for t in trials)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`(file, folder, study)` of a sweep of two runs, one of which diverges."""
    folder = tmp_path_factory.mktemp("sweep")
    path = write_sweep_file(folder, vary={"learning_rate": [1e-3, 1e30]})
    assert cli.main(["sweep", "--config", str(path)]) == 0
    return path, folder / "sweep", open_study(read_sweep(str(path)))


def test_one_run_gives_a_trial_for_the_live_weights_and_each_average(finished):
    found = {t.params["weights"]: t for t in finished[2].trials if t.params["learning_rate"] == 1e-3}
    assert set(found) == {"live", "0.5", "1"}
    assert all(t.state.name == "COMPLETE" and 0 <= t.values[0] <= 1 and 0 < t.values[1] < 20 for t in found.values())
    losses = {weights: t.values[1] for weights, t in found.items()}
    assert len(set(losses.values())) == 3
    base = finished[2].user_attrs["base"]["metrics"]["loss"]
    assert abs(losses["0.5"] - base) < abs(losses["live"] - base)


def test_a_point_is_what_the_same_run_of_train_ends_with(finished, tmp_path):
    config = read_sweep(str(finished[0]))
    settings = {
        **config.settings({"learning_rate": 1e-3}),
        "output_dir": str(tmp_path / "run"),
        "eval_strategy": "steps",
    }
    rows = {row["weights"]: row for row in train(read_recipe(as_flags({**settings, "eval_steps": 4})))["table"]}
    found = {t.params["weights"]: t for t in finished[2].trials if t.params["learning_rate"] == 1e-3}
    for ours, theirs in (("live", "live"), ("0.5", "ema")):
        assert found[ours].values[0] == rows[theirs]["asr"]
        assert found[ours].values[1] == pytest.approx(rows[theirs]["heldout_loss"], rel=1e-6)
        point = found[ours].user_attrs["point"]
        assert point["distance_to_base"] == pytest.approx(rows[theirs]["distance_to_base"], rel=1e-6)
    assert finished[2].user_attrs["base"]["asr"] == rows["base"]["asr"]


def test_a_run_that_fails_is_recorded_and_does_not_end_the_sweep(finished):
    (failed,) = (t for t in finished[2].trials if t.state.name == "FAIL" and "of" not in t.user_attrs)
    assert failed.params["learning_rate"] == 1e30
    assert failed.user_attrs["error"]
    results = json.loads((finished[1] / "sweep.json").read_text())
    assert next(json.loads(run["chosen"]) for run in results["failed"]) == {"learning_rate": 1e30}


def test_tables_and_plots_are_written(finished):
    rows = list(csv.DictReader((finished[1] / "trials.csv").open()))
    complete = [row for row in rows if row["state"] == "complete"]
    assert {row["weights"] for row in complete} == {"live", "0.5", "1"}
    assert all(float(row["asr_low"]) <= float(row["asr"]) <= float(row["asr_high"]) for row in complete)
    results = json.loads((finished[1] / "sweep.json").read_text())
    assert any(outcome["on_front"] for outcome in results["outcomes"])
    assert (finished[1] / "pareto.png").stat().st_size > 5000


def test_no_weights_stay_on_the_disk_unless_asked_for(finished):
    assert list(finished[1].rglob("*.safetensors")) == []


def test_called_again_it_makes_no_run_and_other_settings_are_refused(finished, capsys):
    path, folder, study = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("result.json")}
    assert cli.main(["sweep", "--config", str(path)]) == 0
    assert "Pareto front" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("result.json")} == before
    assert len(open_study(read_sweep(str(path))).trials) == len(study.trials)
    other = write_sweep_file(path.parent / "..", vary={"learning_rate": [1e-3]}, output_dir=str(folder))
    assert cli.main(["sweep", "--config", str(other)]) == 2
    assert "with other settings (train, vary)" in capsys.readouterr().err


def test_a_storage_that_is_none_is_refused(tmp_path, capsys):
    path = write_sweep_file(tmp_path)
    assert cli.main(["sweep", "--config", str(path), "--storage", "nosuch://x"]) == 2
    assert "storage nosuch://x" in capsys.readouterr().err


def test_dry_run_lists_the_runs_and_makes_nothing(tmp_path, capsys):
    path = write_sweep_file(tmp_path)
    assert cli.main(["sweep", "--config", str(path), "--dry-run"]) == 0
    assert "2 runs" in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()


def test_two_processes_share_the_runs_and_a_killed_one_loses_none(tmp_path):
    path = write_sweep_file(tmp_path, vary={"learning_rate": [1e-3, 2e-3]}, half_lives=[0.5])
    config = read_sweep(str(path))
    processes = [subprocess.Popen([*SWEEP, str(path)], stdout=subprocess.DEVNULL) for _ in range(2)]
    # Killed while it makes a run: one that has written its settings and no result.
    victim, child = wait_for(lambda: running(config, {process.pid for process in processes}), processes)
    os.kill(victim, signal.SIGKILL)
    for process in processes:
        process.wait()
    wait_for(lambda: not alive(child) or None, [])  # the run ends with the sweep that has started it
    finished_before = {file: file.read_bytes() for file in (tmp_path / "sweep").rglob("result.json")}
    subprocess.run([*SWEEP, str(path)], check=True, stdout=subprocess.DEVNULL)
    study = open_study(config)
    assert all(file.read_bytes() == content for file, content in finished_before.items())
    complete = Counter(
        (t.user_attrs["chosen"], t.params["weights"]) for t in study.trials if t.state.name == "COMPLETE"
    )
    assert len(complete) == 4 and set(complete.values()) == {1}
    assert sorted(made(study).values()) == [1, 2]  # the one that was killed, and made again


def running(config, pids):
    """`(sweep's process, run's process)` of a run in the making."""
    for pid in pids if Path(config.output_dir, "study.db").exists() else ():
        with contextlib.suppress(psutil.Error):  # it may end while we look
            for child in psutil.Process(pid).children():
                command = child.cmdline()
                if "hf_safe_ema.sweep_run" in command and "--base" not in command:
                    return pid, child.pid
    return None


def alive(pid) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition, processes):
    until = time.monotonic() + 120
    while (found := condition()) is None:
        assert time.monotonic() < until
        assert not processes or any(process.poll() is None for process in processes), (
            "they ended before they were killed"
        )
        time.sleep(0.05)
    return found


def test_a_sampler_makes_as_many_runs_as_asked_and_no_run_twice(tmp_path):
    path = write_sweep_file(
        tmp_path, vary={"learning_rate": [1e-3]}, sampler="random", trials=3, half_lives=[0.5],
        usefulness="mean_token_accuracy",
    )  # fmt: skip
    study = run_sweep(read_sweep(str(path)))
    asked = [t for t in study.trials if "of" not in t.user_attrs]
    assert len(asked) == 3 and len(list((tmp_path / "sweep" / "runs").glob("learning_rate*"))) == 1
    assert study.directions[1].name == "MAXIMIZE" and all(0 <= t.values[1] <= 1 for t in study.trials)
    by_weights = {t.params["weights"]: tuple(t.values) for t in study.trials if "same_as" not in t.user_attrs}
    assert all(tuple(t.values) == by_weights[t.params["weights"]] for t in asked)


def test_ranges_are_drawn_from_as_the_file_says():
    trial = optuna.create_study().ask()
    assert 1e-5 <= suggest(trial, "learning_rate", {"low": 1e-5, "high": 1e-3, "log": True}) <= 1e-3
    assert suggest(trial, "max_steps", {"low": 100, "high": 300, "step": 100}) in (100, 200, 300)
    assert suggest(trial, "warmup_ratio", {"low": 0, "high": 0.5, "step": 0.25}) in (0, 0.25, 0.5)
    assert suggest(trial, "seed", [7]) == 7
    assert trial.distributions["learning_rate"].log and isinstance(trial.params["max_steps"], int)
