"""The Optuna study of a sweep: what waits in it, who makes what, and what is made again.

Several processes on several machines may work on one study. Numbers of trials are dealt out by its storage, so of two that would make
the same run the first makes it, whoever asks.

Knows: trials and their notes. Does not know: how a run is made (sweep.py, sweep_run.py).
"""

import contextlib
import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sweep_config import LIVE, SweepConfig

if TYPE_CHECKING:
    import optuna

WEIGHTS = "weights"
"""The study's parameter that says of which weights a trial is."""

CHOSEN, PROCESS, POINT, OF, AGAIN, SAME_AS = "chosen", "process", "point", "of", "again", "same_as"
"""What a trial notes: the run's own settings, who makes it, all that was measured; and whether it is other weights of the run of
another trial, a run that was stopped and is made again, or a repetition that needed no run."""

HEARTBEAT_SECONDS = 30


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
            heartbeat_stale_trial_callback=make_again,
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
    known = {key_of(trial) for trial in study.get_trials(deepcopy=False)}
    for chosen in config.grid():
        if as_key(chosen) not in known:
            enqueue(study, chosen)
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


def as_key(chosen: dict[str, Any]) -> str:
    """What a run was given, as text that is the same for the same settings.

    Args:
        chosen (`dict`):
            Values under `vary`.
    """
    return json.dumps(chosen, sort_keys=True)


def key_of(trial) -> str | None:
    """What the run of a trial was given; None for one that has not come so far.

    Args:
        trial (`optuna.trial.FrozenTrial`):
            Any.
    """
    return trial.user_attrs.get(CHOSEN)


def enqueue(study: "optuna.Study", chosen: dict[str, Any], **attributes) -> None:
    """Let a run wait in the study.

    Args:
        study (`optuna.Study`):
            Of the sweep.
        chosen (`dict`):
            Values under `vary`.
        attributes:
            What its trial notes besides.
    """
    study.enqueue_trial({**chosen, WEIGHTS: LIVE}, user_attrs={CHOSEN: as_key(chosen), **attributes})


def make_again(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
    """Let a run whose process was killed wait again.

    Args:
        study (`optuna.Study`):
            Of the sweep.
        trial (`optuna.trial.FrozenTrial`):
            Of that run.
    """
    if key_of(trial) is not None:
        enqueue(study, json.loads(key_of(trial)), **{AGAIN: trial.number})


def give_up_orphans(study: "optuna.Study") -> None:
    """Let runs of this machine whose process is gone wait again; those of other machines lose their heartbeat in time.

    Args:
        study (`optuna.Study`):
            Of the sweep.
    """
    import psutil

    for trial in study.get_trials(deepcopy=False):
        host, pid, begun = trial.user_attrs.get(PROCESS, (None, 0, 0.0))
        if trial.state.name != "RUNNING" or host != socket.gethostname():
            continue
        if not (psutil.pid_exists(pid) and psutil.Process(pid).create_time() == begun):
            with contextlib.suppress(ValueError, RuntimeError):  # another process has just done it
                study.tell(trial.number, state=trial.state.FAIL)
                make_again(study, trial)


def retry_failed(study: "optuna.Study") -> None:
    """Let runs that failed, and have not been made since, wait again.

    Args:
        study (`optuna.Study`):
            Of the sweep.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if OF not in trial.user_attrs]
    done = {key_of(trial) for trial in trials if trial.state.name in ("COMPLETE", "RUNNING", "WAITING")}
    for key, trial in {key_of(trial): trial for trial in trials if trial.state.name == "FAIL"}.items():
        if key not in done:
            make_again(study, trial)


def this_process() -> tuple[str, int, float]:
    """Host, process id and start of this process: who makes a run."""
    import psutil

    return socket.gethostname(), os.getpid(), psutil.Process().create_time()


def earlier_twin(study: "optuna.Study", number: int, key: str, waiting: bool) -> int | None:
    """An earlier trial that makes, will make or has made the same run: of all that are alike the first makes it.

    Numbers are dealt out by the storage, so of two processes just one is the first. One that has its number but not its
    settings yet is waited for.

    Args:
        study (`optuna.Study`):
            Of the sweep.
        number (`int`):
            Of the trial that asks.
        key (`str`):
            What its run is given.
        waiting (`bool`):
            Whether trials that wait count too.

    Returns:
        `int`: its number; None if there is none.
    """
    alive = ("RUNNING", "COMPLETE", "WAITING") if waiting else ("RUNNING", "COMPLETE")
    until = time.monotonic() + 10
    while True:
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < number and OF not in t.user_attrs]
        if all(key_of(t) is not None or t.state.name != "RUNNING" for t in earlier) or time.monotonic() > until:
            break
        time.sleep(0.1)
    return next((t.number for t in earlier if key_of(t) == key and t.state.name in alive), None)


def values_of(study: "optuna.Study", key: str, weights: str) -> tuple[float, float] | None:
    """The objectives that are known of a run and weights; None if there are none.

    Args:
        study (`optuna.Study`):
            Of the sweep.
        key (`str`):
            What the run was given.
        weights (`str`):
            Of which the values are wanted.
    """
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "COMPLETE" and key_of(trial) == key and trial.params[WEIGHTS] == weights:
            return tuple(trial.values)
    return None
