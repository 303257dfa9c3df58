"""push_to_hub against a stand-in for the hub on this machine: what is uploaded, which weights, and no answers ever."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load, load_file, save_file

from hf_safe_ema.history import hide_responses, write_jsonl

TOKEN = "hf_test"


@dataclass
class Hub:
    """What the stand-in was sent.

    Args:
        commits (list of `(repo, message, files)`):
            Files by path, those of large-file storage included.
    """

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def of(self, repo: str) -> dict[str, dict[str, bytes]]:
        """The commits to a repository in their order, by message."""
        return {message: files for name, message, files in self.commits if name == repo}


class HubRequest(BaseHTTPRequestHandler):
    """The part of the hub's HTTP API that huggingface_hub 2.4 needs to create a repository and upload a folder."""

    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, content: dict | None = None, status: int = 200) -> None:
        body = json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_PUT(self):
        self.hub.objects[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer()

    def do_POST(self):
        body = self.body()
        routes = (
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", lambda _: self.answer({"errors": [], "warnings": []})),
            (r"/api/models/(.+)/preupload/main", self.preupload),
            (r"/(.+)\.git/info/lfs/objects/batch", self.batch),
            (r"/api/models/(.+)/commit/main", self.commit),
        )
        for pattern, handle in routes:
            found = re.fullmatch(pattern, self.path)
            if found and self.headers["Authorization"] == f"Bearer {TOKEN}":
                handle(body, *found.groups())
                return
        self.refuse()

    def refuse(self):
        self.hub.refused.append(f"{self.command} {self.path}")
        self.answer({"error": "not found"}, status=404)

    do_GET = do_HEAD = refuse

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.answer({"url": f"{self.hub.url}/{name}", "name": name})

    def preupload(self, body: bytes, repo: str) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".bin", ".pt", ".pth", ".png")) else "regular"

        paths = [file["path"] for file in json.loads(body)["files"]]
        self.answer({"files": [{"path": path, "uploadMode": mode(path), "shouldIgnore": False} for path in paths]})

    def batch(self, body: bytes, repo: str) -> None:
        asked = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(body)["objects"]]
        for wanted in asked:
            if wanted["oid"] not in self.hub.objects:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}
        self.answer({"transfer": "basic", "objects": asked})

    def commit(self, body: bytes, repo: str) -> None:
        header, *operations = (json.loads(line) for line in body.splitlines())
        files = {}
        for operation in operations:
            value = operation["value"]
            content = base64.b64decode(value["content"]) if operation["key"] == "file" else None
            files[value["path"]] = self.hub.objects[value["oid"]] if content is None else content
        self.hub.commits.append((repo, header["value"]["summary"], files))
        number = len(self.hub.commits)
        self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{number:040x}", "commitOid": f"{number:040x}"})


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Request", (HubRequest,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def run_and_push(folder: Path) -> None:
    """Three runs that push, in a process of its own: huggingface_hub reads where the hub is when it is imported."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from hf_safe_ema import SafeEMACallback, SafeSFTConfig, SafeSFTTrainer, SafetyCheck, testbed

    class WaitForPush(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer._finish_current_push()

    rows = [{"prompt": row["prompt"], "completion": row["response"]} for row in testbed.read_pairs("finetune")[:16]]
    rows = Dataset.from_list(rows)
    quick = {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "max_length": 64, "bf16": False,
             "report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2}  # fmt: skip
    check = {"num_prompts": 4, "max_new_tokens": 24, "progress": False}

    def keep(name: str, callback) -> None:
        averaged = {key: value.contiguous() for key, value in callback.ema.averaged_parameters()}
        save_file(averaged, folder / f"{name}.safetensors")

    def to(name: str, **strategy) -> dict:
        return {**quick, "hub_model_id": f"someone/{name}", "hub_token": TOKEN, **strategy}

    model, tokenizer = testbed.load()
    args = SafeSFTConfig(
        str(folder / "full"),
        safety_num_prompts=check["num_prompts"],
        safety_max_new_tokens=check["max_new_tokens"],
        **to("full", push_to_hub=True, hub_strategy="every_save"),
    )
    trainer = SafeSFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[WaitForPush])
    trainer.train()
    keep("full", trainer.safe_ema)
    trainer.push_to_hub()

    callback = SafeEMACallback(check=SafetyCheck(**check))
    trainer = SFTTrainer(
        testbed.load()[0],
        args=SFTConfig(str(folder / "lora"), **to("lora", push_to_hub=True, hub_strategy="end")),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train()
    keep("lora", callback)
    trainer.save_model()  # with push_to_hub=True it pushes

    # Nothing said of a hub before the run; and an earlier run has left its answers in the same folder.
    earlier = {"weights": "live", "label": "compliance", "response": "An answer that an earlier run has left behind."}
    write_jsonl(folder / "later" / "safety" / "step-000000.jsonl", [earlier])
    callback = SafeEMACallback(check=SafetyCheck(**check), final_weights="live")
    trainer = SFTTrainer(
        testbed.load()[0],
        args=SFTConfig(str(folder / "later"), **to("later", save_strategy="no")),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    keep("later", callback)
    trainer.push_to_hub()


ON_LOOPBACK_ONLY = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[0] if event == "socket.getaddrinfo" else arguments[1][0]
        if host not in ("127.0.0.1", "localhost", b"127.0.0.1"):
            raise PermissionError(f"a test reached for {host}")

sys.addaudithook(refuse)
import pathlib, test_hub
test_hub.run_and_push(pathlib.Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> tuple[Hub, Path]:
    folder = tmp_path_factory.mktemp("runs")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                    "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    root = Path(__file__).resolve().parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    command = [sys.executable, "-c", ON_LOOPBACK_ONLY, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return hub, folder


def equal(uploaded: bytes, expected: dict[str, torch.Tensor]) -> bool:
    found = load(uploaded)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def averaged(folder: Path, name: str) -> dict[str, torch.Tensor]:
    saved_under = (lambda key: key.replace(".default.", ".")) if name == "lora" else str
    return {saved_under(key): value for key, value in load_file(folder / f"{name}.safetensors").items()}


def test_what_is_pushed_after_training_is_the_average(pushed):
    hub, folder = pushed
    full = hub.of("someone/full")["End of training"]
    assert equal(full["model.safetensors"], averaged(folder, "full"))
    lora = hub.of("someone/lora")["Model save"]
    assert equal(lora["adapter_model.safetensors"], averaged(folder, "lora"))
    # final_weights="live": the model itself is not the average, which is in ema/ all the same.
    later = hub.of("someone/later")["End of training"]
    assert not equal(later["model.safetensors"], averaged(folder, "later"))
    assert equal(later["ema/model.safetensors"], averaged(folder, "later"))


def test_what_is_pushed_while_training_is_the_live_model_of_the_checkpoint(pushed):
    hub, folder = pushed
    commits = hub.of("someone/full")
    assert list(commits) == ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    for step in (2, 4):
        checkpoint = load_file(folder / "full" / f"checkpoint-{step}" / "model.safetensors")
        assert equal(commits[f"Training in progress, step {step}"]["model.safetensors"], checkpoint)


@pytest.mark.parametrize(("repo", "library"), [("full", "transformers"), ("lora", "peft"), ("later", "transformers")])
def test_the_averaged_model_and_its_card_are_pushed_beside(pushed, repo, library):
    hub, folder = pushed
    files = {path: content for commit in hub.of(f"someone/{repo}").values() for path, content in commit.items()}
    weights = "adapter_model.safetensors" if repo == "lora" else "model.safetensors"
    assert equal(files[f"ema/{weights}"], averaged(folder, repo))
    card = ModelCard(files["ema/README.md"].decode())
    assert card.data.library_name == library
    assert "| EMA     | 4    |" in card.text
    assert files["safety_history.jsonl"] == (folder / repo / "safety_history.jsonl").read_bytes()


@pytest.mark.parametrize("repo", ["full", "lora", "later"])
def test_no_answer_is_ever_pushed(pushed, repo):
    hub, folder = pushed
    assert not list((folder / repo).glob("safety*/"))
    rows = [json.loads(line) for path in (folder / repo).glob("_safety*/*.jsonl") for line in path.open()]
    answers = {row["response"] for row in rows if len(row["response"]) > 15}
    assert len(answers) >= 4
    for message, files in hub.of(f"someone/{repo}").items():
        parts = {part for path in files for part in path.split("/")}
        assert not [
            part for part in parts if part.startswith(("_", ".", "safety.", "checkpoint-")) or part == "safety"
        ]
        for path, content in files.items():
            for answer in answers:
                assert answer.encode() not in content, (message, path)
                assert json.dumps(answer)[1:-1].encode() not in content, (message, path)


def test_the_run_asked_for_nothing_that_the_stand_in_does_not_know(pushed):
    hub, _ = pushed
    assert hub.refused == []


def test_responses_are_hidden_and_nothing_else(tmp_path):
    for name in ("safety", "safety.1", "safety.interrupted-4", "_safety"):
        write_jsonl(tmp_path / name / "step-000004.jsonl", [{"from": name}])
    (tmp_path / "safety.png").write_bytes(b"")
    (tmp_path / "safety_history.jsonl").write_text("{}")
    (tmp_path / "safety-notes").mkdir()
    (tmp_path / "safety.of.mine").mkdir()
    moved = {old.name: new.name for old, new in hide_responses(tmp_path).items()}
    assert moved == {
        "safety": "_safety.1",
        "safety.1": "_safety.1.1",
        "safety.interrupted-4": "_safety.interrupted-4",
    }
    assert hide_responses(tmp_path) == {}
    kept = {path.name for path in tmp_path.iterdir()} - {"_safety", *moved.values()}
    assert kept == {"safety.png", "safety_history.jsonl", "safety-notes", "safety.of.mine"}
    for old, new in moved.items():
        assert json.loads((tmp_path / new / "step-000004.jsonl").read_text()) == {"from": old}


def test_what_is_being_written_is_not_uploaded(tmp_path, monkeypatch, tiny):
    """An upload in the background goes on while the next files are written: it must not find halves of them."""
    from hf_safe_ema import WeightEMA
    from hf_safe_ema.checkpoint import save_averaged_model

    seen = []

    def look(*_) -> None:
        seen.append([str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()])

    model, tokenizer = tiny
    save_averaged_model(WeightEMA(model.named_parameters(), decay=0.9), model, tokenizer, tmp_path / "ema", look)
    with monkeypatch.context() as patched:
        patched.setattr("hf_safe_ema.history.os.fsync", look)
        write_jsonl(tmp_path / "safety_history.jsonl", [{"step": 1}])
    while_saving, while_writing = seen
    assert any(path.endswith("model.safetensors") for path in while_saving)
    as_the_trainer = {"ignore_patterns": ["_*", "checkpoint-*"]}
    assert list(filter_repo_objects(while_saving, **as_the_trainer)) == []
    assert {Path(path).parts[0] for path in filter_repo_objects(while_writing, **as_the_trainer)} == {"ema"}
