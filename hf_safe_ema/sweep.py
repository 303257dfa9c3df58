"""`hf-safe-ema sweep`: many runs over learning rates, batch sizes, steps, ..., as an Optuna study of safety against usefulness.

One run trains once and measures the live weights and every average, so it gives as many trials of the study as there are
weights: they differ in the parameter `weights`.

Knows: when the next run is made, in which process and folder, and what of it becomes a trial. Does not know: what may be varied
(sweep_config.py), how processes share a study (sweep_study.py), how a run is made (sweep_run.py), or what the numbers say
(sweep_results.py).
"""

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .sweep_config import BASE, ENDS_WITH_SWEEP, SweepConfig, as_flags, run_name
from .sweep_study import (
    AGAIN,
    CHOSEN,
    OF,
    POINT,
    PROCESS,
    SAME_AS,
    WEIGHTS,
    as_key,
    earlier_twin,
    enqueue,
    give_up_orphans,
    key_of,
    open_study,
    retry_failed,
    this_process,
    values_of,
)

if TYPE_CHECKING:
    import optuna

logger = logging.get_logger(__name__)

RESULT = "result.json"
LOG = "output.txt"


class RunFailedError(RuntimeError):
    """A run ended without a result. The sweep goes on."""


def run_sweep(config: SweepConfig, retry: bool = False) -> "optuna.Study":
    """Make the runs that are missing, one after another. Call it again, here or elsewhere, to go on or to share them.

    Args:
        config ([`SweepConfig`]):
            Of the sweep.
        retry (`bool`, *optional*, defaults to `False`):
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
    give_up_orphans(study)
    if retry:
        retry_failed(study)
    with _ended_by_sigterm():
        _measure_base(config, study)
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
    what = f"run {trial.number} ({key_of(trial)})"
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


def _measure_base(config: SweepConfig, study: "optuna.Study") -> None:
    """The starting point, once a study. Only warns when it fails."""
    if BASE in study.user_attrs:
        return
    try:
        first = {name: v[0] if isinstance(v, list) else v["low"] for name, v in config.vary.items()}
        # In a folder of its own: another process may do the same just now.
        result = _run(config, Path(config.output_dir) / "runs" / f"{BASE}-{os.getpid()}", first, "--base")
        study.set_user_attr(BASE, result["points"][BASE])
    except RunFailedError as error:
        logger.warning(f"the starting point could not be measured, the sweep goes on: {error}")


def _objective(config: SweepConfig, study: "optuna.Study", trial: "optuna.Trial") -> tuple[float, float]:
    """One run, or what is known of one with the same settings."""
    from optuna import TrialPruned

    chosen = {name: suggest(trial, name, values) for name, values in config.vary.items()}
    weights = trial.suggest_categorical(WEIGHTS, config.weights)
    trial.set_user_attr(PROCESS, this_process())
    trial.set_user_attr(CHOSEN, as_key(chosen))
    twin = earlier_twin(study, trial.number, as_key(chosen), waiting=config.sampler == "grid")
    if twin is not None:
        known = values_of(study, as_key(chosen), weights)
        if known is None or config.sampler == "grid":
            raise TrialPruned(f"run {twin} has the same settings")
        trial.set_user_attr(SAME_AS, twin)
        return known
    try:
        folder = Path(config.output_dir) / "runs" / run_name(chosen, config.settings(chosen))
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
        enqueue(study, chosen, **{AGAIN: trial.number})
        raise


def suggest(trial: "optuna.Trial", name: str, values: list | dict[str, Any]):
    """A value of a setting, of the sampler's choice.

    Args:
        trial (`optuna.Trial`):
            To note it in.
        name (`str`):
            Of the setting.
        values (list or `dict`):
            As in the sweep's file: values, or `low` and `high` with `log` or `step`. Whole numbers make whole ones.
    """
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    step, log = values.get("step"), bool(values.get("log"))
    if all(isinstance(number, int) for number in (values["low"], values["high"], step or 1)):
        return trial.suggest_int(name, values["low"], values["high"], step=step or 1, log=log)
    return trial.suggest_float(name, values["low"], values["high"], step=step, log=log)


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
    if values_of(study, key, weights) is not None:
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
