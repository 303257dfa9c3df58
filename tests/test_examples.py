"""The notebooks and scripts in examples/, run from top to bottom on the small Llama with a few rows and steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_safe_ema import testbed

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = ("alpaca", "dolly", "orca")
SCRIPTS = ("dpo", "plain_trainer", "subclass")
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A data file with ORCA's columns, whose chosen answers are read as instruction data."""
    pairs = testbed.read_pairs("finetune")[:80]
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for pair, other in zip(pairs, pairs[1:] + pairs[:1], strict=True):
            row = {"system": "Answer in brief.", "question": pair["prompt"], "chosen": pair["response"]}
            out.write(json.dumps({**row, "rejected": other["response"]}) + "\n")
    return file


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, rows, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for key, value in {"MODEL": "testbed", "DATA": str(rows), "STEPS": "6", "PROMPTS": "8", **OFFLINE}.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    history = [json.loads(line) for line in (tmp_path / f"outputs/{name}/safety_history.jsonl").open(encoding="utf-8")]
    assert {row["weights"] for row in history if row["type"] == "report"} == {"base", "live", "ema"}
    assert not [row for row in history if row["type"] == "error"]
    assert (tmp_path / f"outputs/{name}/safety.png").exists()
    said = [output["text"] for output in notebook.cells[-1].outputs if output.get("name") == "stdout"]
    assert "95% interval" in "".join(said)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_carries_a_whole_run_and_nothing_of_the_machine(name):
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = json.dumps(
        [{**o, "data": {k: v for k, v in o.get("data", {}).items() if k != "image/png"}} for o in outputs]
    )
    for path in ("/work/", "/tmp/", "/home/", "/root/", "site-packages"):
        assert path not in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_it_is(name, rows, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--data", str(rows), "--steps", "4"]
    command += [] if name == "subclass" else ["--num-prompts", "8"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **OFFLINE}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "outputs" / name
    history = [json.loads(line) for line in (folder / "safety_history.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["weights"] for row in history if row["type"] == "report"} == {"base", "live", "ema"}
    assert not [row for row in history if row["type"] == "error"]
    assert (folder / "ema" / "model.safetensors").exists()
    assert "| EMA" in done.stdout or "ema: harmful" in done.stdout
