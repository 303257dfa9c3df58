"""`hf-safe-ema sweep`: many runs over learning rates, batch sizes, steps, ..., as an Optuna study of safety against usefulness.

One run trains once and measures the live weights and every average, so it gives as many trials of the study as there are
weights: they differ in the parameter `weights`.

Knows: which run comes next, how processes share them, and what is kept of each. Does not know: what may be varied
(sweep_config.py), how a run is made (sweep_run.py), or what the numbers say (sweep_results.py).
"""

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .sweep_config import BASE, ENDS_WITH_SWEEP, LIVE, SweepConfig, as_flags, run_name

if TYPE_CHECKING:
    import optuna

logger = logging.get_logger(__name__)

WEIGHTS = "weights"
"""The study's parameter that says of which weights a trial is."""

CHOSEN, PROCESS, POINT, OF, AGAIN, SAME_AS = "chosen", "process", "point", "of", "again", "same_as"
"""What a trial notes: the run's own settings, who makes it, all that was measured; and whether it is other weights of the run of
another trial, a run that was stopped and is made again, or a repetition that needed no run."""

RESULT = "result.json"
LOG = "output.txt"
HEARTBEAT_SECONDS = 30


class RunFailedError(RuntimeError):
    """A run ended without a result. The sweep goes on."""


def open_study(config: SweepConfig) -> "optuna.Study":
    """The study, made if it is not there, with all runs of a grid waiting in it.

    Args:
        config ([`SweepConfig`]):
            Of the sweep.

    Raises:
        ValueError: if a study of that name is there for another sweep, or the storage cannot be opened.
        ImportError: without Optuna.
    """
    optuna = _optuna()
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.RDBStorage(
            config.storage_url,
            engine_kwargs={"connect_args": {"timeout": 60}} if config.storage_url.startswith("sqlite") else None,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=4 * HEARTBEAT_SECONDS,
            heartbeat_stale_trial_callback=_make_again,
        )
        study = optuna.create_study(
            study_name=config.study,
            storage=storage,
            directions=["minimize", config.direction],
            sampler=_sampler(config),
            load_if_exists=True,
        )
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"storage {config.storage_url}: cannot be opened as a study of Optuna's ({text})") from error
    earlier = study.user_attrs.get("sweep")
    now = json.loads(json.dumps(config.same_study()))
    if earlier is not None and earlier != now:
        changed = [name for name in now if earlier.get(name) != now[name]]
        raise ValueError(
            f"study {config.study!r} in {config.storage_url} is of a sweep with other settings ({', '.join(changed)}); give "
            "another study or output_dir, or the same settings"
        )
    if earlier is None:
        study.set_metric_names(["asr", config.usefulness])
        study.set_user_attr("sweep", now)
    known = {_key(trial) for trial in study.get_trials(deepcopy=False)}
    for chosen in config.grid():
        if _as_key(chosen) not in known:
            _enqueue(study, chosen)
    return study


def _optuna():
    try:
        import optuna
    except ImportError as error:
        raise ImportError("a sweep needs Optuna: pip install 'hf-safe-ema[sweep]'") from error
    from optuna.exceptions import ExperimentalWarning

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", ExperimentalWarning)  # the heartbeat, there since Optuna 2.5
    return optuna


def _sampler(config: SweepConfig):
    from optuna import samplers

    made = {
        "grid": samplers.RandomSampler,  # all its runs wait in the study already
        "random": samplers.RandomSampler,
        "tpe": samplers.TPESampler,
        "nsga2": samplers.NSGAIISampler,
    }
    return made[config.sampler]()


def _enqueue(study: "optuna.Study", chosen: dict[str, Any], **attributes) -> None:
    study.enqueue_trial({**chosen, WEIGHTS: LIVE}, user_attrs={CHOSEN: _as_key(chosen), **attributes})


def _make_again(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
    """Let a run whose process was killed wait again."""
    if _key(trial) is not None:
        _enqueue(study, json.loads(_key(trial)), **{AGAIN: trial.number})


def _as_key(chosen: dict[str, Any]) -> str:
    return json.dumps(chosen, sort_keys=True)


def _key(trial) -> str | None:
    """What the run of a trial was given; None for one that has not come so far."""
    return trial.user_attrs.get(CHOSEN)


def run_sweep(config: SweepConfig, retry_failed: bool = False) -> "optuna.Study":
    """Make the runs that are missing, one after another. Call it again, here or elsewhere, to go on or to share them.

    Args:
        config ([`SweepConfig`]):
            Of the sweep.
        retry_failed (`bool`, *optional*, defaults to `False`):
            Whether runs that failed before are made again; those that were stopped or killed are in any case.

    Returns:
        `optuna.Study`: with a trial for each run and weights.

    Raises:
        ValueError: if study or folder cannot be used.

    Example:

    ```python
    >>> from hf_safe_ema.sweep_config import read_sweep
    >>> study = run_sweep(read_sweep("examples/sweep.yaml"))  # doctest: +SKIP
    >>> study.best_trials[0].params  # doctest: +SKIP
    {'learning_rate': 0.001, 'per_device_train_batch_size': 32, 'weights': '0.5'}

    ```
    """
    study = open_study(config)
    _give_up_orphans(study)
    if retry_failed:
        _retry_failed(study)
    _measure_base(config, study)
    with _ended_by_sigterm():
        while _is_more(config, study):
            study.optimize(
                functools.partial(_objective, config, study),
                n_trials=1,
                catch=(Exception,),
                callbacks=[_say_how_it_went],
            )
    return study


def count_runs(config: SweepConfig) -> int:
    """How many runs a sweep makes.

    Args:
        config ([`SweepConfig`]):
            Of the sweep.
    """
    return config.trials if config.sampler != "grid" else len(config.grid())


def _is_more(config: SweepConfig, study: "optuna.Study") -> bool:
    import optuna

    optuna.storages.fail_stale_trials(study)  # of other machines: their runs wait again
    trials = study.get_trials(deepcopy=False)
    if any(trial.state.name == "WAITING" for trial in trials):
        return True
    if config.sampler == "grid":
        return False
    return sum(OF not in trial.user_attrs and AGAIN not in trial.user_attrs for trial in trials) < config.trials


def _say_how_it_went(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
    what = f"run {trial.number} ({_key(trial)})"
    if trial.state.name == "FAIL":
        logger.warning(f"{what} failed, the sweep goes on: {trial.user_attrs.get('error', 'no reason known')}")
    elif trial.state.name == "COMPLETE":
        print(f"{what}: {trial.user_attrs.get('seconds', 0):.0f} s", flush=True)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends the process as Ctrl-C does, so that the run it has started ends too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _give_up_orphans(study: "optuna.Study") -> None:
    """Let runs of this machine whose process is gone wait again; those of other machines lose their heartbeat in time."""
    import psutil

    for trial in study.get_trials(deepcopy=False):
        host, pid, begun = trial.user_attrs.get(PROCESS, (None, 0, 0.0))
        if trial.state.name != "RUNNING" or host != socket.gethostname():
            continue
        if not (psutil.pid_exists(pid) and psutil.Process(pid).create_time() == begun):
            with contextlib.suppress(ValueError, RuntimeError):  # another process has just done it
                study.tell(trial.number, state=trial.state.FAIL)
                _make_again(study, trial)


def _retry_failed(study: "optuna.Study") -> None:
    trials = [trial for trial in study.get_trials(deepcopy=False) if OF not in trial.user_attrs]
    done = {_key(trial) for trial in trials if trial.state.name in ("COMPLETE", "RUNNING", "WAITING")}
    for key, trial in {_key(trial): trial for trial in trials if trial.state.name == "FAIL"}.items():
        if key not in done:
            _make_again(study, trial)


def _this_process() -> tuple[str, int, float]:
    import psutil

    return socket.gethostname(), os.getpid(), psutil.Process().create_time()


def _measure_base(config: SweepConfig, study: "optuna.Study") -> None:
    """The starting point, once a study. Only warns when it fails."""
    if BASE in study.user_attrs:
        return
    try:
        first = {name: v[0] if isinstance(v, list) else v["low"] for name, v in config.vary.items()}
        result = _run(config, Path(config.output_dir) / "runs" / BASE, first, "--base")
        study.set_user_attr(BASE, result["points"][BASE])
    except RunFailedError as error:
        logger.warning(f"the starting point could not be measured, the sweep goes on: {error}")


def _objective(config: SweepConfig, study: "optuna.Study", trial: "optuna.Trial") -> tuple[float, float]:
    """One run, or what is known of one with the same settings."""
    from optuna import TrialPruned

    chosen = {name: _suggest(trial, name, values) for name, values in config.vary.items()}
    weights = trial.suggest_categorical(WEIGHTS, config.weights)
    trial.set_user_attr(PROCESS, _this_process())
    trial.set_user_attr(CHOSEN, _as_key(chosen))
    twin = _twin(study, trial.number, _as_key(chosen), waiting=config.sampler == "grid")
    if twin is not None:
        known = _values_of(study, _as_key(chosen), weights)
        if known is None or config.sampler == "grid":
            raise TrialPruned(f"run {twin} has the same settings")
        trial.set_user_attr(SAME_AS, twin)
        return known
    try:
        folder = Path(config.output_dir) / "runs" / run_name(chosen)
        result = _finished(folder) or _run(config, folder, chosen)
        trial.set_user_attr("seconds", result["seconds"])
        values = {name: _values(config, point) for name, point in result["points"].items()}
        for name, point in result["points"].items():
            if name != weights:
                _add(study, trial, name, values[name], point, result)
        trial.set_user_attr(POINT, result["points"][weights])
        if values[weights] is None:
            raise RunFailedError(f"no finite ASR and {config.usefulness} of the {weights} weights: the run diverged")
        return values[weights]
    except RunFailedError as error:
        trial.set_user_attr("error", str(error))
        raise
    except KeyboardInterrupt:
        trial.set_user_attr("error", "stopped")
        _enqueue(study, chosen, **{AGAIN: trial.number})
        raise


def _suggest(trial: "optuna.Trial", name: str, values: list | dict[str, Any]):
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    if all(isinstance(values.get(key, 1) or 1, int) for key in ("low", "high", "step")):
        return trial.suggest_int(
            name, values["low"], values["high"], step=values.get("step") or 1, log=bool(values.get("log"))
        )
    return trial.suggest_float(
        name, values["low"], values["high"], step=values.get("step"), log=bool(values.get("log"))
    )


def _twin(study: "optuna.Study", number: int, key: str, waiting: bool) -> int | None:
    """An earlier trial that makes, will make or has made the same run: of all that are alike the first makes it.

    Numbers are dealt out by the storage, so of two processes just one is the first. One that has its number but not its
    settings yet is waited for.
    """
    alive = ("RUNNING", "COMPLETE", "WAITING") if waiting else ("RUNNING", "COMPLETE")
    until = time.monotonic() + 10
    while True:
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < number and OF not in t.user_attrs]
        if all(_key(t) is not None or t.state.name != "RUNNING" for t in earlier) or time.monotonic() > until:
            break
        time.sleep(0.1)
    return next((t.number for t in earlier if _key(t) == key and t.state.name in alive), None)


def _values_of(study: "optuna.Study", key: str, weights: str) -> tuple[float, float] | None:
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "COMPLETE" and _key(trial) == key and trial.params[WEIGHTS] == weights:
            return tuple(trial.values)
    return None


def _values(config: SweepConfig, point: dict) -> tuple[float, float] | None:
    """The objectives; None where one could not be measured."""
    found = (point.get("asr"), point.get("metrics", {}).get(config.usefulness))
    if point.get("metrics") and config.usefulness not in point["metrics"]:
        raise RunFailedError(
            f"usefulness: {config.usefulness!r} is not measured; there are {', '.join(point['metrics'])}"
        )
    return found if all(value is not None and math.isfinite(value) for value in found) else None


def _add(study: "optuna.Study", trial: "optuna.Trial", weights: str, values, point: dict, result: dict) -> None:
    """A trial of the study for other weights of the same run, unless it has come there before a kill."""
    from optuna.trial import TrialState, create_trial

    key = trial.user_attrs[CHOSEN]
    if _values_of(study, key, weights) is not None:
        return
    study.add_trial(
        create_trial(
            state=TrialState.FAIL if values is None else TrialState.COMPLETE,
            values=values,
            params={**trial.params, WEIGHTS: weights},
            distributions=trial.distributions,
            user_attrs={CHOSEN: key, OF: trial.number, POINT: point, "seconds": result["seconds"]},
        )
    )


def _finished(folder: Path) -> dict | None:
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _run(config: SweepConfig, folder: Path, chosen: dict[str, Any], *flags: str) -> dict:
    """Make one run in a process of its own, which ends when this one does.

    Raises:
        RunFailedError: with the last line that it has said.
    """
    if folder.exists():
        shutil.rmtree(folder)  # of a run that was killed: it has no result
    folder.mkdir(parents=True)
    settings = {**config.settings(chosen), "output_dir": str(folder)}
    command = [
        *(config.launch or [sys.executable, "-m"]),
        "hf_safe_ema.sweep_run",
        str(folder / RESULT),
        ENDS_WITH_SWEEP,
        *flags,
    ]
    log = folder / LOG
    with log.open("wb") as output:
        run = subprocess.Popen(
            [*map(str, command), *as_flags(settings)], stdin=subprocess.PIPE, stdout=output, stderr=output
        )
        try:
            code = run.wait()
        finally:
            run.stdin.close()  # the run watches it, see sweep_run.py
            run.wait()
    if not config.keep_models:
        for left in (folder / "ema", *folder.glob("checkpoint-*")):
            shutil.rmtree(left, ignore_errors=True)
    result = _finished(folder)
    if code != 0 or result is None:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing said"]
        raise RunFailedError(f"exit code {code}: {said[-1][:300]} (all of it in {log})")
    return result
