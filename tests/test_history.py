"""Files that are whole or absent, whatever breaks, and a history that is started and resumed."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from hf_safe_ema.history import History, check_writable, read_jsonl, set_aside, write_jsonl, write_whole

needs_a_user_who_is_not_root = pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write to read-only folders"
)
needs_posix = pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")


def row(step: int, **more) -> dict:
    return {"type": "report", "step": step, **more}


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_whole_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "notes.txt"
    write_whole(path, "first\n")
    write_whole(path, "zweite Zeile — ünï\n")
    assert path.read_text(encoding="utf-8") == "zweite Zeile — ünï\n"
    assert names_in(path.parent) == ["notes.txt"]


@needs_posix
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_written_file_has_the_rights_that_the_user_asks_for(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "a", "text")
    finally:
        assert os.umask(before) == mask
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_rows_come_back_as_they_were(tmp_path):
    rows = [row(1, text="line\nbreak,   “quotes” \x85 and \\"), row(2, rate=None, interval=[0.0, 0.25])]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8").count("\n") == 2
    assert read_jsonl(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("bad", [{"step": object()}, {"step": "\ud800"}], ids=["not JSON", "not UTF-8"])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [row(1)])
    with pytest.raises((TypeError, UnicodeEncodeError)):
        write_jsonl(path, [row(1), row(2), bad])
    assert read_jsonl(path) == [row(1)]
    assert names_in(tmp_path) == ["rows.jsonl"]


def test_rows_that_fail_to_come_leave_what_was_there(tmp_path):
    def rows():
        yield row(1)
        raise RuntimeError("no more")

    write_jsonl(tmp_path / "rows.jsonl", [row(0)])
    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "rows.jsonl", rows())
    assert read_jsonl(tmp_path / "rows.jsonl") == [row(0)]


@needs_a_user_who_is_not_root
def test_a_folder_that_became_read_only(tmp_path):
    history = History(tmp_path)
    history.add(row(1))
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError):
            history.add(row(2))
        with pytest.raises(ValueError, match=r"cannot be written to \(Permission denied\)"):
            check_writable(tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert read_jsonl(history.path) == [row(1)]


FILL_THE_DISK = """
import resource, sys
from hf_safe_ema.history import History
history = History(sys.argv[1])
history.start()
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
history.add({"step": 1, "text": "x" * 1000})
try:
    history.add({"step": 2, "text": "x" * 10000})
except OSError as error:
    print(type(error).__name__)
print(len(history.path.read_text()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
history.add({"step": 3, "text": ""})
"""


@needs_posix
def test_a_full_disk_leaves_the_old_file_and_loses_no_row_once_there_is_room(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    error, size = done.stdout.split()
    assert error == "OSError"
    assert int(size) == len(json.dumps({"step": 1, "text": "x" * 1000})) + 1
    assert [found["step"] for found in read_jsonl(tmp_path / "safety_history.jsonl")] == [1, 2, 3]
    assert names_in(tmp_path) == ["safety_history.jsonl"]


WRITE_FOR_EVER = """
import sys
from hf_safe_ema.history import History
history = History(sys.argv[1])
history.start()
step = 0
while True:
    step += 1
    history.add({"step": step, "text": "x" * 20000})
    print(step, flush=True)
"""


@needs_posix
@pytest.mark.parametrize("rows", [1, 2, 5, 11, 23])
def test_a_killed_run_leaves_whole_lines_and_every_row_it_had_written(tmp_path, rows):
    child = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    written = 0
    try:
        while written < rows:
            written = int(child.stdout.readline())
    finally:
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
    assert child.returncode == -signal.SIGKILL
    written = max([written, *map(int, rest.split("\n")[:-1])])
    text = (tmp_path / "safety_history.jsonl").read_text()
    assert text.endswith("\n")
    found = [json.loads(line) for line in text.splitlines()]
    assert [each["step"] for each in found] == list(range(1, len(found) + 1))
    assert len(found) >= written
    assert all(each["text"] == "x" * 20000 for each in found)


def test_set_aside_takes_the_first_free_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert set_aside(path) is None
    for number in (1, 2, 3):
        path.write_text(str(number))
        assert set_aside(path) == tmp_path / f"rows.jsonl.{number}"
    (tmp_path / "rows.jsonl.2").unlink()
    path.write_text("4")
    assert set_aside(path).read_text() == "4"
    assert names_in(tmp_path) == ["rows.jsonl.1", "rows.jsonl.2", "rows.jsonl.3"]
    assert (tmp_path / "rows.jsonl.1").read_text() == "1"


def test_set_aside_takes_folders_with_what_is_in_them(tmp_path):
    (tmp_path / "safety").mkdir()
    (tmp_path / "safety" / "step-000001.jsonl").write_text("{}\n")
    assert set_aside(tmp_path / "safety") == tmp_path / "safety.1"
    assert names_in(tmp_path / "safety.1") == ["step-000001.jsonl"]


def test_check_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert names_in(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot be written to .*give a folder"):
            check_writable(folder)


def full_history(tmp_path) -> History:
    history = History(tmp_path)
    history.start()
    for step in (0, 10, 20, 30):
        history.add(row(step, weights="live"))
        history.add(row(step, weights="ema"))
        history.write_responses(step, [{"prompt": "Why?", "response": f"Because of {step}."}])
    return history


def test_history_on_disk_is_the_history_in_memory(tmp_path):
    history = full_history(tmp_path)
    assert read_jsonl(tmp_path / "safety_history.jsonl") == history.rows
    assert names_in(tmp_path / "safety") == [f"step-{step:06d}.jsonl" for step in (0, 10, 20, 30)]
    assert read_jsonl(tmp_path / "safety" / "step-000020.jsonl")[0]["response"] == "Because of 20."


def test_start_sets_an_earlier_run_aside(tmp_path):
    earlier = full_history(tmp_path).rows
    history = History(tmp_path)
    assert history.start() == [tmp_path / "safety_history.jsonl.1", tmp_path / "safety.1"]
    history.add(row(0))
    assert read_jsonl(tmp_path / "safety_history.jsonl.1") == earlier
    assert len(names_in(tmp_path / "safety.1")) == 4
    assert read_jsonl(tmp_path / "safety_history.jsonl") == [row(0)]
    assert history.start() == [tmp_path / "safety_history.jsonl.2"]


@pytest.mark.parametrize(("step", "kept"), [(20, [0, 10, 20]), (25, [0, 10, 20]), (0, [0]), (99, [0, 10, 20, 30])])
def test_resume_drops_what_comes_after_its_step(tmp_path, step, kept):
    full_history(tmp_path)
    (tmp_path / "safety" / "notes.jsonl").write_text("mine\n")
    history = History(tmp_path)
    history.resume(step)
    assert sorted({found["step"] for found in history.rows}) == kept
    assert read_jsonl(tmp_path / "safety_history.jsonl") == history.rows
    assert names_in(tmp_path / "safety") == ["notes.jsonl", *(f"step-{each:06d}.jsonl" for each in kept)]
    history.add(row(step + 1))
    assert read_jsonl(tmp_path / "safety_history.jsonl")[-1] == row(step + 1)


def test_resume_sets_aside_what_comes_after_its_step(tmp_path):
    full_history(tmp_path)
    later = [row for row in read_jsonl(tmp_path / "safety_history.jsonl") if row["step"] > 10]
    moved = [tmp_path / "safety_history.interrupted-10.jsonl", tmp_path / "safety.interrupted-10"]
    history = History(tmp_path)
    assert history.resume(10) == moved
    assert read_jsonl(moved[0]) == later
    assert names_in(moved[1]) == ["step-000020.jsonl", "step-000030.jsonl"]
    assert history.resume(10) == []  # and again: there is nothing left to do
    # A second stop at the same place does not overwrite what the first left.
    history.add(row(11, weights="ema"))
    history.write_responses(11, [{}])
    again = [tmp_path / "safety_history.interrupted-10.1.jsonl", tmp_path / "safety.interrupted-10.1"]
    assert history.resume(10) == again
    assert read_jsonl(moved[0]) == later and read_jsonl(again[0]) == [row(11, weights="ema")]


def test_resume_after_being_killed_in_it_loses_nothing_and_copies_nothing_twice(tmp_path):
    full_history(tmp_path)
    rows = read_jsonl(tmp_path / "safety_history.jsonl")
    later = [row for row in rows if row["step"] > 10]
    write_jsonl(tmp_path / "safety_history.interrupted-10.jsonl", later)  # so far it came
    history = History(tmp_path)
    history.resume(10)
    assert names_in(tmp_path) == [
        "safety", "safety.interrupted-10", "safety_history.interrupted-10.jsonl", "safety_history.jsonl",
    ]  # fmt: skip
    assert history.rows + read_jsonl(tmp_path / "safety_history.interrupted-10.jsonl") == rows


def test_rows_of_an_end_that_was_none_are_set_aside(tmp_path):
    history = full_history(tmp_path)
    history.add(row(31, weights="live", at_end=True), row(31, weights="ema", at_end=True))
    history.write_responses(31, [{}])
    resumed = History(tmp_path)
    resumed.resume(31)
    assert [found["step"] for found in resumed.rows] == [0, 0, 10, 10, 20, 20, 30, 30]
    assert names_in(tmp_path / "safety.interrupted-31") == ["step-000031.jsonl"]


def test_the_checkpoints_own_rows_are_the_history(tmp_path):
    saved = full_history(tmp_path).rows[:4]
    History(tmp_path / "new").resume(10, saved)
    assert read_jsonl(tmp_path / "new" / "safety_history.jsonl") == saved
    # What the folder has beyond them up to that step is kept (an evaluation right after the save) ...
    history = History(tmp_path)
    history.resume(20, saved)
    assert [found["step"] for found in history.rows] == [0, 0, 10, 10, 20, 20]
    # ... but not where it is another run's.
    history.resume(20, [row(0, weights="live"), row(20, loss=float("nan"))])
    assert len(read_jsonl(tmp_path / "safety_history.jsonl")) == 2
    assert len(read_jsonl(tmp_path / "safety_history.jsonl.1")) == 6 and (tmp_path / "safety.1").is_dir()
    # NaN is the same as NaN.
    assert history.resume(20, [row(0, weights="live"), row(20, loss=float("nan"))]) == []


def test_a_history_that_was_edited_by_hand_is_kept_but_not_gone_on_with(tmp_path):
    saved = full_history(tmp_path).rows[:2]
    (tmp_path / "safety_history.jsonl").write_text('{"type": "rep')
    history = History(tmp_path)
    history.resume(5, saved)
    assert (tmp_path / "safety_history.jsonl.1").read_text() == '{"type": "rep'
    assert read_jsonl(tmp_path / "safety_history.jsonl") == history.rows == saved


@pytest.mark.parametrize("begin", [lambda history: history.start(), lambda history: history.resume(10)])
def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path, begin):
    full_history(tmp_path)
    (tmp_path / ".safety_history.jsonl.abc.tmp").write_text("{")
    (tmp_path / "safety" / ".step-000040.jsonl.abc.tmp").write_text("{")
    (tmp_path / ".mine.tmp").write_text("")
    begin(History(tmp_path))
    assert [path.name for path in tmp_path.rglob(".*")] == [".mine.tmp"]


def test_rows_are_added_together_or_not_at_all(tmp_path):
    history = History(tmp_path)
    history.add(row(1), row(2))
    with pytest.raises(TypeError):
        history.add(row(3), row(4, what=object()))
    assert read_jsonl(history.path) == history.rows == [row(1), row(2)]


def test_what_the_history_says(tmp_path):
    history = History(tmp_path)
    history.add(row(0, weights="base", metrics={"asr": 0.1}), row(4, weights="live", metrics={"asr": 0.2}))
    history.add({"type": "loss", "step": 5, "dataset": "", "live": 1.0})
    history.add({"type": "error", "step": 6, "what": "the safety check of the ema weights", "error": "no"})
    history.add({"type": "error", "step": 7, "what": "saving the average's state", "error": "no"})
    assert history.report(4, "live")["metrics"] == {"asr": 0.2} and history.report(4, "ema") is None
    assert history.base_metrics() == {"asr": 0.1} and History(tmp_path).base_metrics() == {}
    assert [step for step in range(8) if history.is_checked(step)] == [0, 4, 6]
    assert history.has_loss(5, "") and not history.has_loss(5, "other") and not history.has_loss(4, "")


def test_resume_where_nothing_is_yet(tmp_path):
    history = History(tmp_path)
    history.resume(10)
    assert history.rows == [] and names_in(tmp_path) == []


def test_a_disabled_history_keeps_rows_and_touches_no_disk(tmp_path):
    full_history(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    history = History(tmp_path, enabled=False)
    history.resume(10)
    history.add(row(11))
    history.write_responses(11, [{}])
    assert [found["step"] for found in history.rows] == [0, 0, 10, 10, 11]
    assert history.start() == [] and history.rows == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before
