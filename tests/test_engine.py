"""What a callback finds out about its run: on real arguments, models, handlers and (in one process) torch.distributed."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_safe_ema import SafeEMACallback, engine
from hf_safe_ema.engine import SaveMoment


@pytest.fixture
def one_of_one():
    """torch.distributed at work, in this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def arguments(tmp_path, **changes) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **changes)


def handler_of(*callbacks: TrainerCallback) -> CallbackHandler:
    return CallbackHandler(list(callbacks), nn.Linear(2, 2), None, None, None)


def test_sharded_parameters_are_refused_by_the_name_of_their_engine(one_of_one):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    engine.refuse_sharded(model)
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"sharded by FSDP2 or tensor parallelism.*train with DDP or in one process"):
        engine.refuse_sharded(model)


def test_whole_parameters_under_ddp_are_not_refused(one_of_one):
    model = DistributedDataParallel(nn.Linear(4, 4))
    engine.refuse_sharded(model)
    engine.refuse_unsynchronized(model)


def test_one_process_may_evaluate_before_it_trains():
    model = nn.Linear(4, 4)
    setattr(model, engine.PREPARED, True)
    engine.refuse_unsynchronized(model)
    engine.forget_evaluation(model)
    assert getattr(model, engine.PREPARED), "one process is left as accelerate made it"


@pytest.mark.parametrize("value", [None, {"asr": 0.5}, ("live", [1, 2])])
def test_one_process_agrees_with_itself(one_of_one, value):
    assert engine.same_on_every_rank(value) == value


def test_the_tokenizer_of_a_processor_is_inside_it(tiny):
    class Processor:
        tokenizer = tiny[1]

    assert engine.tokenizer_of({"processing_class": Processor()}) is tiny[1]
    assert engine.tokenizer_of({"processing_class": tiny[1]}) is tiny[1]
    assert engine.tokenizer_of({}) is None


@pytest.mark.parametrize(
    ("metric", "name"), [("ema_asr", "eval_ema_asr"), ("eval_ema_asr", "eval_ema_asr"), ("loss", "eval_loss"), (None, None)]
)  # fmt: skip
def test_a_metric_goes_by_its_full_name(metric, name):
    assert engine.full_name(metric) == name


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_forward_passes_are_in_the_precision_of_the_run(tmp_path, bf16, dtype):
    model = nn.Linear(2, 2)
    with engine.precision_of(arguments(tmp_path, bf16=bf16), model):
        assert model(torch.ones(1, 2)).dtype == dtype
    assert model(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "step", "epoch", "evaluated"),
    [
        ({"eval_strategy": "no"}, 4, 1.0, False),
        ({"eval_strategy": "steps", "eval_steps": 2}, 4, 0.4, True),
        ({"eval_strategy": "steps", "eval_steps": 2}, 5, 0.5, False),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5}, 4, 0.4, False),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 4}, 4, 0.4, True),
        ({"eval_strategy": "epoch"}, 10, 1.0, True),
        ({"eval_strategy": "epoch"}, 11, 1.1, False),
        ({"eval_strategy": "epoch", "eval_delay": 2}, 10, 1.0, False),
    ],
    ids=str,
)
def test_steps_that_the_trainer_evaluates(tmp_path, settings, step, epoch, evaluated):
    args = arguments(tmp_path, **settings)
    state = TrainerState(global_step=step, epoch=epoch, max_steps=20)
    state.eval_steps = args.eval_steps
    assert engine.is_evaluated(args, state) == evaluated


class Logging(TrainerCallback):
    """Hands values over at the end of a step, as ours does, and notes what loggers are told."""

    def __init__(self):
        self.told = []

    def on_step_end(self, args, state, control, **kwargs):
        engine.log_values(args, state, control, {"safety/ema_asr": 0.25})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append(logs)


@pytest.mark.parametrize("due", [True, False])
def test_logged_values_reach_the_loggers_and_leave_the_trainers_own_to_come(tmp_path, due):
    logging, state = Logging(), TrainerState(global_step=7, epoch=0.5)
    handler, control = handler_of(logging), TrainerControl(should_log=due)
    handler.call_event("on_step_end", arguments(tmp_path), state, control)
    assert logging.told == [{"safety/ema_asr": 0.25, "epoch": 0.5}]
    assert state.log_history == [{"safety/ema_asr": 0.25, "epoch": 0.5, "step": 7}]
    assert control.should_log == due


def test_values_logged_outside_a_trainer_are_in_its_history_still(tmp_path):
    state = TrainerState(global_step=3)
    engine.log_values(arguments(tmp_path), state, TrainerControl(), {"safety/base_share": 1.0})
    assert state.log_history[0]["safety/base_share"] == 1.0 and state.log_history[0]["step"] == 3


@pytest.mark.parametrize(
    ("first", "metric", "refused"),
    [("ours", "ema_asr", False), ("theirs", "ema_asr", True), ("theirs", "eval_ema_asr", True), ("theirs", "loss", False)],
)  # fmt: skip
def test_early_stopping_must_come_after_the_metrics_that_it_looks_at(tmp_path, first, metric, refused):
    class Ours(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            engine.refuse_late_early_stopping(self, args, {"eval_ema_asr"})

    callbacks = [Ours(), EarlyStoppingCallback()]
    handler = handler_of(*(callbacks if first == "ours" else reversed(callbacks)))
    # EarlyStoppingCallback itself insists on the first two.
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    args = arguments(tmp_path, metric_for_best_model=metric, **settings)
    with pytest.raises(ValueError, match="put SafeEMACallback first") if refused else contextlib.nullcontext():
        handler.on_train_begin(args, TrainerState(), TrainerControl())


class Attaching(TrainerCallback):
    """Asks to be called when a checkpoint is saved."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.moment = SaveMoment.attach(state, lambda folder, step: None)

    def on_train_end(self, args, state, control, **kwargs):
        self.moment.detach()


def test_a_second_run_of_a_trainer_does_not_add_a_second_moment(tmp_path):
    attaching, state = Attaching(), TrainerState()
    handler = handler_of(attaching)
    before = list(handler.callbacks)
    for _ in range(2):  # interrupted, and begun again
        handler.on_train_begin(arguments(tmp_path), state, TrainerControl())
    assert sum(isinstance(callback, SaveMoment) for callback in handler.callbacks) == 1
    handler.on_train_end(arguments(tmp_path), state, TrainerControl())
    assert handler.callbacks == before


def test_nothing_is_found_where_no_trainer_is_calling():
    assert engine.running_callback_handler() is None
    assert engine.resumed_checkpoint() is None
    assert SaveMoment.attach(TrainerState(), lambda folder, step: None) is None
    engine.forget_loss()
    with pytest.raises(RuntimeError, match="before training has begun"):
        SafeEMACallback(check=None).write_state("nowhere")
