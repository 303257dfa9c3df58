"""Work of one process and of three real ones (gloo, on the CPU): the same results everywhere, or the same failure."""

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from hf_safe_ema.processes import ProcessFailedError, on_every_rank, rank_and_size

SIZE = 3


def failing(ranks: dict[int, Exception]):
    def work():
        rank = rank_and_size()[0]
        if rank in ranks:
            raise ranks[rank]
        return rank

    return work


def what_comes_of(work) -> dict:
    try:
        return {"results": on_every_rank(work)}
    except ProcessFailedError as error:
        return {"failure": str(error), "own": type(error.__cause__).__name__}


def of_one_process(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    outcomes = {
        "rank and size": rank_and_size(),
        "tensors": [t.tolist() for t in what_comes_of(lambda: torch.full((2,), float(rank)))["results"]],
        "nothing": what_comes_of(lambda: None),
        "two fail": what_comes_of(failing({0: ValueError("no room"), 2: KeyError("name")})),
        "all fail": what_comes_of(failing({i: OSError(f"disk {i}") for i in range(SIZE)})),
        "a lock": what_comes_of(lambda: threading.Lock() if rank == 1 else "packed"),
        "a failure as a result": [str(e) for e in what_comes_of(lambda: ValueError(f"kept by {rank}"))["results"]],
        "after all that": what_comes_of(lambda: 10 * rank),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    """What each of three processes had in its hands."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(of_one_process, (str(folder),), nprocs=SIZE)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


def test_results_come_in_the_order_of_the_ranks_to_all(outcomes):
    for rank, outcome in enumerate(outcomes):
        assert outcome["rank and size"] == [rank, SIZE]
        assert outcome["tensors"] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
        assert outcome["nothing"] == {"results": [None] * SIZE}


def test_all_that_failed_are_named_on_all(outcomes):
    for outcome in outcomes:
        assert (
            outcome["two fail"]["failure"] == "process 0 of 3: ValueError: no room; process 2 of 3: KeyError: 'name'"
        )
        assert all(
            f"process {rank} of 3: OSError: disk {rank}" in outcome["all fail"]["failure"] for rank in range(SIZE)
        )


def test_a_process_that_failed_still_has_its_own_traceback(outcomes):
    assert [outcome["two fail"]["own"] for outcome in outcomes] == ["ValueError", "NoneType", "KeyError"]


def test_a_result_that_cannot_be_sent_is_a_failure(outcomes):
    for outcome in outcomes:
        assert outcome["a lock"]["failure"].startswith("process 1 of 3: TypeError: ")


def test_an_exception_that_is_returned_is_a_result(outcomes):
    for outcome in outcomes:
        assert outcome["a failure as a result"] == [f"kept by {rank}" for rank in range(SIZE)]


def test_after_failures_they_work_together_as_before(outcomes):
    assert [outcome["after all that"] for outcome in outcomes] == [{"results": [0, 10, 20]}] * SIZE


def test_one_process_keeps_its_result_and_its_exception_as_they_are():
    lock = threading.Lock()  # could not be packed
    assert on_every_rank(lambda: lock) == [lock]
    with pytest.raises(ZeroDivisionError):
        on_every_rank(lambda: 1 / 0)
