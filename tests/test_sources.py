"""Files, folders and hub datasets: the same rows wherever they come from, and clear words where nothing comes.

The hub is a server on this machine that answers as its HTTP API does, and is asked by the real `datasets` library.
"""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from datasets import Dataset

from hf_safe_ema import load_finetuning_data
from hf_safe_ema.sources import HUB_IDS, open_source


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def alpaca(*numbers: int) -> str:
    return jsonl(*({"instruction": f"Q{number}", "output": f"A{number}"} for number in numbers))


def lay_out(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def parquet(path: Path, *rows: dict, **options) -> bytes:
    Dataset.from_list(list(rows)).to_parquet(path, **options)
    return path.read_bytes()


def answers(dataset) -> list[str]:
    return [row["completion"][-1]["content"] for row in dataset]


CONFIGS = """---
configs:
- config_name: first
  data_files: one/*.jsonl
- config_name: second
  data_files:
  - split: train
    path: two/*.jsonl
  - split: validation
    path: three.jsonl
---
# Two configurations
"""
CONFIGURED = {"README.md": CONFIGS, "one/a.jsonl": alpaca(1), "two/b.jsonl": alpaca(2), "three.jsonl": alpaca(3)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ({"a.jsonl": alpaca(1, 2), "b.jsonl": alpaca(3)}, {}, ["A1", "A2", "A3"]),
        ({"a.jsonl": alpaca(1, 2), "b.jsonl": alpaca(3)}, {"max_rows": 2}, ["A1", "A2"]),
        ({"sub/a.json": json.dumps([{"prompt": "Q", "completion": "A"}])}, {}, ["A"]),
        ({"a.csv": "question,response\nQ1,None\nQ2,007\n"}, {}, ["None", "007"]),
        ({"train.jsonl": alpaca(1), "test.jsonl": alpaca(2)}, {}, ["A1"]),
        ({"train.jsonl": alpaca(1), "test.jsonl": alpaca(2)}, {"split": "test"}, ["A2"]),
        ({"data/train-00000-of-00002.jsonl": alpaca(1), "data/train-00001-of-00002.jsonl": alpaca(2)}, {}, ["A1", "A2"]),
        (CONFIGURED, {"config": "first"}, ["A1"]),
        (CONFIGURED, {"config": "second"}, ["A2"]),
        (CONFIGURED, {"config": "second", "split": "validation"}, ["A3"]),
        ({"a.jsonl": alpaca(1), "LICENSE": "free", "notes.md": "none", "README.md": "# Rows"}, {}, ["A1"]),
        ({"a.jsonl": alpaca(1), "b.jsonl": jsonl({"question": "Q2", "response": "A2"}), "c.jsonl": ""}, {}, ["A1", "A2"]),
        ({"a.jsonl.gz": gzip.compress(jsonl({"prompt": "Q1", "completion": 5}, {"prompt": "Q2", "completion": "A2"}).encode())},
         {}, ["5", "A2"]),
        ({"a.csv.gz": gzip.compress(b"instruction,output,n\nQ1,None,1\nQ2,007,\nQ3,1.50,3\n")}, {}, ["None", "007", "1.50"]),
    ],
)  # fmt: skip
def test_folders(tmp_path, files, options, expected, streaming):
    lay_out(tmp_path / "rows", files)
    assert answers(load_finetuning_data(tmp_path / "rows", streaming=streaming, **options)) == expected


def test_folder_of_parquet_and_a_saved_dataset(tmp_path):
    row = {"system_prompt": "Be brief.", "question": "Q", "response": "A"}
    parquet(tmp_path / "part-1.parquet", row)
    assert answers(load_finetuning_data(str(tmp_path))) == ["A"]
    Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    assert answers(load_finetuning_data(tmp_path / "saved")) == ["A"]


def test_a_file_beyond_max_rows_is_not_opened(tmp_path):
    lay_out(
        tmp_path, {"a.parquet": parquet(tmp_path / "a.parquet", {"prompt": "Q", "completion": "A"}), "b.parquet": "?"}
    )
    assert answers(load_finetuning_data(tmp_path, max_rows=1)) == ["A"]
    with pytest.raises(ValueError, match=r"b\.parquet: cannot be read as Parquet"):
        load_finetuning_data(tmp_path)


def test_files_of_another_kind_are_not_passed_over_in_silence(tmp_path, caplog):
    lay_out(tmp_path, {"a.jsonl": alpaca(1), "b.jsonl": alpaca(2), "c.csv": "question,response\nQ3,A3\n"})
    assert answers(load_finetuning_data(tmp_path)) == ["A1", "A2"]
    assert "1 of 3 files are not read (c.csv)" in caplog.text


@pytest.mark.parametrize(
    ("files", "options", "kind", "message"),
    [
        ({}, {}, FileNotFoundError, r"no data found in this folder; put \.jsonl, \.json, \.csv, \.parquet files"),
        ({"README.md": "# Nothing"}, {}, FileNotFoundError, "no data found"),
        ({"a.jsonl": alpaca(1)}, {"split": "test"}, ValueError, r"no split 'test'; choose one of \['train'\]"),
        (CONFIGURED, {}, ValueError, r"config=None.*available configs: \['first', 'second'\]"),
        (CONFIGURED, {"config": "third"}, ValueError, r"config='third'.*Available: \['first', 'second'\]"),
        ({"a.jsonl": alpaca(1)}, {"revision": "main"}, ValueError, "only the hub has revisions"),
        (
            {"a.jsonl": alpaca(1), "b.jsonl": jsonl({"ask": "Q"})},
            {},
            ValueError,
            r"b\.jsonl: columns \['ask'\] fit none",
        ),
        ({"a.jsonl": alpaca(1), "b.jsonl": alpaca(2) + "{"}, {}, ValueError, r"b\.jsonl, line 2: not valid JSON"),
        ({"a.jsonl": ""}, {}, ValueError, "no row in it"),
        ({"a.txt": "Q"}, {}, ValueError, r"columns \['text'\] fit none"),
    ],
)
def test_what_is_said_of_bad_folders(tmp_path, files, options, kind, message):
    (tmp_path / "rows").mkdir()
    with pytest.raises(kind, match=message):
        load_finetuning_data(lay_out(tmp_path / "rows", files), **options)


def test_a_folder_whose_path_is_a_pattern_is_said_to_be_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="takes for patterns"):
        load_finetuning_data(lay_out(tmp_path / "a[1]", {"a.jsonl": alpaca(1)}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xlsx", "PK", r"unknown ending '\.xlsx'; use one of \.jsonl, \.json, \.csv, \.parquet"),
        ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n\n{"prompt"\n', "line 3: not valid JSON"),
        ("rows.json", '{\n"data": []}', "holds a dict; a .json file must hold a list of objects"),
        ("rows.json", '[{"prompt": "a", "completion": "b"}', "not valid JSON"),
        ("rows.csv", 'prompt,completion\na,b\na,"b\n', r"after line 2: not valid CSV \(unexpected end of data\)"),
        ("rows.csv", "prompt,completion\na,b, or c\n", "line 2: 1 more values than columns; put texts .* quotes"),
        ("rows.csv", "", "no row in it"),
        ("rows.csv", "prompt,completion\n", "no row in it"),
        ("rows.parquet", "PAR0", "cannot be read as Parquet"),
        ("rows.jsonl", '{"prompt": "é", "completion": "b"}\n'.encode("latin1"), r"not UTF-8 \(line 1, byte 12.*iconv"),
        ("rows.csv", "prompt,completion\na,b\na,é\n".encode("latin1"), r"not UTF-8 \(line 3, byte 2.*iconv"),
        ("rows.json", '[{"prompt": "é", "completion": "b"}]'.encode("latin1"), "not UTF-8 .*iconv"),
        ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n'.encode("utf-16"), "not UTF-8"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_said_of_bad_files(tmp_path, name, content, message, streaming):
    lay_out(tmp_path, {name: content})
    with pytest.raises(ValueError, match=message) as caught:
        list(load_finetuning_data(tmp_path / name, streaming=streaming))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["absent.jsonl", "data/absent.csv", "./absent", "Dolly", "a/b/c", Path("owner/name")])
def test_what_is_nowhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    said = rf"^{re.escape(str(name))}: no such file or folder; .*hub id.*'dolly'.*'orca_dpo'"
    with pytest.raises(FileNotFoundError, match=said):
        load_finetuning_data(name)


def test_a_folder_here_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "owner" / "name", {"a.jsonl": alpaca(1)})
    assert answers(load_finetuning_data("owner/name")) == ["A1"]


@pytest.mark.parametrize("source", [None, 3, ["dolly"], ""])
def test_what_is_no_name(source):
    with pytest.raises(TypeError, match=r"give one of .*'dolly'"):
        open_source(source)


# ---------------------------------------------------------------------------------------------------------------- hub

COMMIT = f"{1:040d}"

LONG = "It is so. " * 400
HUB_FILES = {
    # Files, columns and headers as in the datasets themselves.
    "databricks/databricks-dolly-15k": lambda folder: {
        "README.md": "---\nlicense: cc-by-sa-3.0\n---\n# Dolly",
        "databricks-dolly-15k.jsonl": jsonl(
            {"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"},
            {"instruction": "How many?", "context": "Two and three.", "response": 5, "category": "closed_qa"},
            {"instruction": "None?", "context": "", "response": "", "category": "open_qa"},
        ),
    },
    "tatsu-lab/alpaca": lambda folder: {
        "README.md": "---\ndataset_info:\n  features:\n" + "".join(
            f"  - name: {name}\n    dtype: string\n" for name in ("instruction", "input", "output", "text")
        ) + "  splits:\n  - name: train\n    num_examples: 1\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: data/train-*\n---\n# Alpaca",
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(
            folder / "alpaca", {"instruction": "Add.", "input": "2, 3", "output": "5", "text": "Below is an instruction"}
        ),
    },
    "Open-Orca/OpenOrca": lambda folder: {
        "README.md": "---\nlicense: mit\n---\n# OpenOrca",
        "1M-GPT4-Augmented.parquet": parquet(
            folder / "gpt4",
            *({"id": f"niv.{i}", "system_prompt": "Be brief." if i else "", "question": f"Q{i}", "response": f"A{i} {LONG}"}
              for i in range(300)),
            batch_size=100,
        ),
        "3_5M-GPT3_5-Augmented.parquet": parquet(
            folder / "gpt35", {"id": "flan.1", "system_prompt": "", "question": "Q", "response": "GPT-3.5"}
        ),
    },
    "Open-Orca/SlimOrca": lambda folder: {
        "README.md": "---\nlicense: mit\n---\n# SlimOrca",
        "oo-labeled_correct.gpt4.sharegpt.jsonl": jsonl(
            {"conversations": [{"from": "system", "value": "Be brief.", "weight": None},
                               {"from": "human", "value": "Why?", "weight": 0.0},
                               {"from": "gpt", "value": "Because.", "weight": 1.0}]},
            {"conversations": [{"from": "human", "value": "Why?", "weight": 0.0},
                               {"from": "gpt", "value": "So.", "weight": 1.0}]},
        ),
    },
    "Intel/orca_dpo_pairs": lambda folder: {
        "README.md": "---\nlicense: apache-2.0\n---\n# Pairs",
        "orca_rlhf.jsonl": jsonl({"system": "Be brief.", "question": "Why?", "chosen": "Because.", "rejected": "No."}),
    },
    "someone/table": lambda folder: {"rows.csv": "instruction,output,score\nQ1,None,1\nQ2,007,2\nQ3,,\nQ4,0,4\n"},
    "someone/parts": lambda folder: CONFIGURED,
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as `datasets` and `huggingface_hub` use to find, download and stream a dataset."""

    protocol_version = "HTTP/1.1"

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.server.requests.append((self.command, path))
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.send_content(self.server.root / match[1], match[2])
        elif match := re.fullmatch(
            r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+(?:/(.*))?)?", path
        ):
            self.send_description(match[1], match[2], match[3] or "", url.query, body)
        else:
            self.reply(404)

    do_GET = do_HEAD = do_POST = handle_request

    def send_content(self, folder: Path, name: str):
        if not (folder / name).is_file():
            return self.reply(404, {"X-Error-Code": "EntryNotFound" if folder.is_dir() else "RepoNotFound"})
        content = (folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or self.command == "HEAD":
            return self.reply(200, headers, content)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.reply(206, headers, content[first : last + 1])

    def send_description(self, repo: str, what: str | None, under: str, query: str, body: str):
        folder = self.server.root / repo
        if not (folder / under).is_dir():
            return self.reply(404, {"X-Error-Code": "EntryNotFound" if folder.is_dir() else "RepoNotFound"})
        if what == "tree":
            deep = "recursive=true" in query.lower()
            answer = [self.entry(folder, path) for path in sorted((folder / under).glob("**/*" if deep else "*"))]
        elif what == "paths-info":
            wanted = urllib.parse.parse_qs(body).get("paths", []) if body[:1] != "{" else json.loads(body)["paths"]
            answer = [self.entry(folder, folder / name) for name in wanted if (folder / name).exists()]
        else:
            files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
            answer = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files],
                      "private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    @staticmethod
    def entry(folder: Path, path: Path) -> dict:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0", "size": 0}
        content = path.read_bytes()
        return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}

    def reply(self, status: int, headers: dict[str, str] | None = None, content: bytes = b""):
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, **(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A running hub with the named datasets, small, and two more; `requests` is what it was asked."""
    root = tmp_path_factory.mktemp("hub")
    for repo, files in HUB_FILES.items():
        lay_out(root / repo, files(tmp_path_factory.mktemp("parquet")))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.requests = root, []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# The hub's address is read when `huggingface_hub` is imported, so whoever asks it is a process of its own.
ASK = """
import json, sys
from hf_safe_ema import load_finetuning_data
answers = []
for name, options in json.loads(sys.argv[1]):
    try:
        answers.append([dict(row) for row in load_finetuning_data(name, **options)])
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print("\\n" + json.dumps(answers))
"""


def ask(home: Path, *calls: tuple[str, dict], endpoint: str = "http://127.0.0.1:1", **settings: str) -> list:
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **settings}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(calls)], env=environment, cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def address(hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


def pair(answer: str, question: str = "Why?", system: str | None = None) -> dict:
    prompt = [{"role": "system", "content": system}] if system else []
    return {"prompt": [*prompt, {"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}]}  # fmt: skip


EXPECTED = {
    "dolly": [pair("Because."), pair("5", "How many?\n\nTwo and three.")],
    "alpaca": [pair("5", "Add.\n\n2, 3")],
    "orca": [pair(f"A{i} {LONG}".strip(), f"Q{i}", "Be brief." if i else None) for i in range(300)] + [pair("GPT-3.5", "Q")],
    "slimorca": [pair("Because.", system="Be brief."), pair("So.")],
    "orca_dpo": [pair("Because.", system="Be brief.")],
}  # fmt: skip


def test_named_datasets_come_from_the_hub_and_are_there_without_it_afterwards(hub, tmp_path):
    assert set(EXPECTED) == set(HUB_IDS)
    got = ask(tmp_path, *[(name, {}) for name in EXPECTED], ("tatsu-lab/alpaca", {}), endpoint=address(hub))
    assert got == [*EXPECTED.values(), EXPECTED["alpaca"]]
    asked = len(hub.requests)
    offline = ask(tmp_path, ("dolly", {}), ("orca", {"streaming": True, "max_rows": 2}), HF_HUB_OFFLINE="1")
    assert offline == [EXPECTED["dolly"], EXPECTED["orca"][:2]]
    assert len(hub.requests) == asked


def test_streams_from_the_hub_are_the_same_and_keep_nothing_on_the_disk(hub, tmp_path):
    calls = [(name, {"streaming": True}) for name in EXPECTED]
    assert ask(tmp_path, *calls, endpoint=address(hub)) == list(EXPECTED.values())
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    assert kept == []
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".arrow", ".parquet", ".jsonl")]


@pytest.mark.parametrize("streaming", [False, True])
def test_max_rows_from_the_hub_leaves_the_other_files_alone(hub, tmp_path, streaming):
    hub.requests.clear()
    [rows] = ask(tmp_path, ("orca", {"max_rows": 20, "streaming": streaming}), endpoint=address(hub))
    assert rows == EXPECTED["orca"][:20]
    fetched = {path.rpartition("/")[2] for command, path in hub.requests if command == "GET"}
    assert "1M-GPT4-Augmented.parquet" in fetched
    assert "3_5M-GPT3_5-Augmented.parquet" not in fetched
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".arrow", ".parquet")]


def test_any_dataset_of_the_hub(hub, tmp_path):
    table, second, validation, *errors = ask(
        tmp_path,
        ("someone/table", {}),
        ("someone/parts", {"config": "second", "revision": "main"}),
        ("someone/parts", {"config": "second", "split": "validation", "streaming": True}),
        ("someone/parts", {}),
        ("dolly", {"split": "test"}),
        ("someone/nothing", {}),
        endpoint=address(hub),
    )
    assert answers(table) == ["None", "007", "0"]
    assert answers(second) == ["A2"]
    assert answers(validation) == ["A3"]
    assert re.match(r"ValueError: 'someone/parts': .*available configs: \['first', 'second'\]", errors[0])
    assert re.match(r"ValueError: 'dolly' \(databricks/databricks-dolly-15k\): .*split 'test'.*\['train'\]", errors[1])
    assert re.match(r"ValueError: 'someone/nothing': .*no file or folder 'someone/nothing' here", errors[2])


def test_without_the_hub_the_id_and_the_way_out_are_named(tmp_path):
    errors = ask(tmp_path, *[(name, {}) for name in HUB_IDS], ("dolly", {"streaming": True}), HF_HUB_OFFLINE="1")
    for name, error in zip([*HUB_IDS, "dolly"], errors, strict=True):
        assert re.match(rf"ValueError: '{name}' \({HUB_IDS[name]}\): could not load", error)
        assert "HF_HUB_OFFLINE" in error
        assert f"`hf download {HUB_IDS[name]} --repo-type dataset --local-dir FOLDER`" in error
