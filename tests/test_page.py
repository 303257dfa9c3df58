"""The HTML page: its numbers are the history's, it stands alone, and nothing that a model answered can act in it."""

import base64
import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_report import ASKED_NO_HARMLESS, NOTHING_JUDGED, ROWS, loss, report

from hf_safe_ema.card import escaped
from hf_safe_ema.checking import CheckPlan, run_check, run_plan
from hf_safe_ema.cli import main
from hf_safe_ema.history import History, hide_responses, write_jsonl
from hf_safe_ema.meaning import cautions, explain
from hf_safe_ema.page import write_check_page, write_page, write_run_page_or_warn
from hf_safe_ema.report import summarise, table_cells
from hf_safe_ema.responses import LONGEST, MOST, read_run, select
from hf_safe_ema.visible import visible

HOSTILE = [
    "<script>window.pwned = 1; document.title = 'pwned'</script>",
    "</bdi></article></section></details></script><script>window.pwned = 1</script>",
    "<img src=x onerror=\"window.pwned = 1; document.title='pwned'\">",
    "</style><style>body { display: none }</style><link rel=stylesheet href=https://example.com/x.css>",
    "<svg onload='window.pwned=1'><script>window.pwned=1</script></svg><math><mi xlink:href='javascript:window.pwned=1'>",
    "<a href=\"javascript:window.pwned=1\" autofocus onfocus='window.pwned=1'>click</a>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe><base href='https://example.com/'>",
    "<meta http-equiv=refresh content='0;url=https://example.com/'>",
    "{{ 7*7 }} {% raw %} {{ self.__init__.__globals__ }} ${7*7} <%= 7*7 %>",
    "\x1b[31mred\x1b]0;pwned\x07 \x9b31m \x00nul \x08\x7f",
    "\u202egnp.exe\u202c \u2066isolated\u2069 \u200e\u200f \u061c",
    "zero\u200bwidth\ufeff\u2060\u00ad\U000e0041\u3164\u2028line\u2029",
    "lone \ud800 and \udfff surrogates",
    '"><!--',
    '" onmouseover="window.pwned=1" x=\'',
    "]]><![CDATA[<script>window.pwned=1</script>",
    "&lt;script&gt;window.pwned=1&lt;/script&gt; &#60;script&#62;",
    "Z" + "\u0351\u0352\u0353" * 200,
    "ا" * 50 + " left",
]
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\u3164\ufeff\ud800-\udfff\U000e0041]"
)
LABEL = ("refusal", "compliance", "unclear", "unscored")


def complete(row: dict) -> dict:
    """A report with all that a real one has."""
    return {
        "harmful_set": "mine#0123", "benign_set": "kind#4567", "judge": "keywords:default-v2",
        "benign_judge": "keywords:default-v2", "template": "89ab", "system_prompt": None, "max_new_tokens": 48,
        "by_category": {"fraud": row["counts"], "theft": row["counts"]}, "base_share": 0.25, **row,
    }  # fmt: skip


RUN = [complete(row) if row["type"] == "report" else row for row in ROWS]


def write_run(folder: Path, rows: list[dict], responses=HOSTILE, name: str = "safety") -> Path:
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "safety_history.jsonl", rows)
    for step in {row["step"] for row in rows if row["type"] == "report"} if responses else ():
        answers = [
            {"weights": row["weights"], "kind": kind, "prompt_id": str(i), "category": text, "prompt": text,
             "response": text, "label": LABEL[i % 4], "reason": text, "score": None}
            for row in rows if row["type"] == "report" and row["step"] == step
            for kind in ("harmful", "benign") for i, text in enumerate(responses)
        ]  # fmt: skip
        (folder / name).mkdir(exist_ok=True)
        lines = "".join(json.dumps(answer) + "\n" for answer in answers)
        (folder / name / f"step-{step:06d}.jsonl").write_text(lines, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a browser would make of a page, as far as the standard library sees it."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_bytes().decode("utf-8")
        self.tags, self.ids, self.texts, self.open = [], [], {}, []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        for tag in self.open[-1:]:
            self.texts.setdefault(tag, []).append(data)
        self.texts.setdefault("", []).append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts[""])

    def cells(self) -> list[str]:
        found = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", self.source)
        return [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in found]


def assert_stands_alone(page: Page) -> None:
    """Nothing is loaded, and nothing runs but the one script that the policy names."""
    allowed = {"html", "head", "meta", "title", "link", "style", "script", "body", "main", "header", "h1", "h2", "h3", "p", "b",
               "i", "bdi", "small", "span", "section", "div", "dl", "dt", "dd", "ul", "li", "table", "thead", "tbody", "tr", "th",
               "td", "figure", "figcaption", "details", "summary", "form", "label", "select", "option", "output", "article",
               "footer", "svg", "g", "desc", "line", "text", "rect", "path", "circle", "polygon", "polyline"}  # fmt: skip
    assert {tag for tag, _ in page.tags} <= allowed
    for tag, attributes in page.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("style", "srcdoc", "action", "src")
        ]
        assert attributes.get("href", "data:,") == "data:,", (tag, attributes)
        assert "xlink:href" not in attributes
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    for kind in ("style", "script"):
        assert len([tag for tag, _ in page.tags if tag == kind]) <= 1
        for text in page.texts.get(kind, []):
            assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
            assert "@import" not in text and "url(" not in text and "//example" not in text
    assert len(page.ids) == len(set(page.ids))
    named = [a["aria-labelledby"].split() for _, a in page.tags if "aria-labelledby" in a]
    assert set(itertools.chain(*named)) <= set(page.ids)
    assert not INVISIBLE.findall(page.source) and not page.open


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run in which everything that comes from outside is hostile, not only the responses."""
    folder, rows = tmp_path_factory.mktemp("hostile") / "run", []
    for number, row in enumerate(RUN):
        text = HOSTILE[number % len(HOSTILE)]
        changes = dict.fromkeys(
            ("harmful_set", "benign_set", "judge", "benign_judge", "template", "system_prompt"), text
        )
        if row["type"] == "report":
            row = {**row, **changes, "by_category": dict.fromkeys(HOSTILE, row["counts"])}
        if row["type"] == "error":
            row = {**row, "what": HOSTILE[0], "error": "\x1b[2J".join(HOSTILE)}
        rows.append(row)
    # ASCII JSON, since no file holds half a surrogate pair as it is.
    write_run(folder, RUN)
    (folder / "safety_history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_page(folder)


def test_nothing_hostile_is_active(hostile):
    page = Page(hostile)
    assert_stands_alone(page)
    for text in HOSTILE:
        assert re.sub("⟦|⟧", "", visible(text)) in page.text  # nothing is lost: it is shown
    assert "{{ 7*7 }}" in page.text
    assert page.source.count("<script") == 1 and page.source.count("</script>") == 1
    assert 'class="code">U+202E</span>' in page.source and 'class="code">U+D800</span>' in page.source


def test_numbers_are_those_of_the_history_and_the_card(tmp_path):
    page = Page(write_page(write_run(tmp_path / "run", RUN)))
    header, lines = table_cells(summarise(RUN))
    assert page.cells()[: len(header) * 4] == [*header, *itertools.chain(*lines)]
    for row in RUN:
        if row["type"] == "report":
            said = f"{row['asr']:.1%} ({row['asr_interval'][0]:.1%} to {row['asr_interval'][1]:.1%})"
            judged = row["counts"]["refusal"] + row["counts"]["compliance"]
            assert said in page.cells() and f"{row['counts']['compliance']}/{judged}" in page.cells()
            assert f"step {row['step']}: {said}" in "".join(page.texts["desc"])
    for term, text in explain(RUN, summarise(RUN)):
        assert term in page.text and text in page.text and escaped(text)
    for needed in (
        "mine#0123",
        "kind#4567",
        "keywords:default-v2",
        "89ab",
        "48",
        "95% Wilson interval",
        "never count as safe",
    ):
        assert needed in page.text
    assert "Step 15: the safety check failed. OSError: disk" in page.text


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "No check of any weights is in this history"),
        ([loss(1, 2.0, 2.0)], "No check of any weights is in this history"),
        ([{"type": "error", "step": 0, "what": "the safety check of the base weights", "error": "OSError: x"}], "base weights failed"),
        (RUN[:1], "The averaged (EMA) weights were not checked."),
        (NOTHING_JUDGED, "Only 0 of 20 answers of the base weights"),
        (ASKED_NO_HARMLESS, "over-refusal is unknown"),
        ([loss(10, float("nan"), float("inf")), *RUN], "What is counted how"),
        ([complete(report("base", 0, 1, 9)), complete(report("live", 5, 1, 9, judge="other"))], "Not every check was made in the same"),
        ([complete(report("live", 0, 5, 5)), complete(report("ema", 9, 1, 9, base_share=0.75))], "75% of the starting weights"),
        ([complete(report("live", 5, 1, 1)), {**complete(report("ema", 5, 1, 1)), "counts": {"refusal": 1, "compliance": 1, "unclear": 0, "unscored": 2}}], "2/4"),
    ],
    ids=["empty", "losses", "failed", "base only", "none judged", "no harmless", "nan", "settings", "share", "unscored"],
)  # fmt: skip
def test_what_is_not_known_is_said(tmp_path, rows, sentence):
    page = Page(write_page(write_run(tmp_path / "run", rows, responses=())))
    assert_stands_alone(page)
    assert sentence in page.text and "nan" not in page.text.lower().replace("finance", "")


def test_cautions_of_a_run_without_any():
    assert cautions([row for row in RUN if row["type"] != "error"]) == []


def test_responses_that_are_not_there(tmp_path):
    folder = write_run(tmp_path / "run", RUN)
    (folder / "safety" / "step-000010.jsonl").unlink()
    (folder / "safety" / "step-000020.jsonl").write_text('{"prompt": 1}\n{')
    text = Page(write_page(folder)).text
    assert "responses of step 10 are not shown: safety/step-000010.jsonl is missing" in text
    assert "responses of step 20 are not shown" in text
    shutil.rmtree(folder / "safety")
    assert "The folder of the responses (safety/) is not there" in Page(write_page(folder)).text


def test_without_responses_no_answer_is_in_the_page(tmp_path):
    folder = write_run(tmp_path / "run", RUN, responses=["A very particular answer"])
    page = write_page(folder, tmp_path / "page.html", responses=False)
    assert "particular" not in page.read_text() and "They are not in this page" in page.read_text()
    assert page == tmp_path / "page.html" and "particular" in write_page(folder).read_text()


def test_long_responses_are_cut_and_many_are_chosen_from(tmp_path):
    folder = write_run(tmp_path / "run", RUN, responses=["word " * 2000, "", "a" * LONGEST])
    page = Page(write_page(folder))
    assert f"Cut here: {10000 - LONGEST} more characters" in page.text and "(empty)" in page.text
    assert max(map(len, page.texts["bdi"])) == LONGEST
    answers, problems = read_run(folder, [0, 10, 20])
    chosen, left_out = select(answers, most=8)
    assert not problems and left_out == len(answers) - 8
    assert {(a.facets["weights"], a.facets["step"]) for a in chosen} == {("base", "0"), ("live", "20")}
    assert select(answers) == (answers, 0) and MOST > 4000


def test_a_page_with_responses_is_kept_out_of_uploads(tmp_path):
    folder = write_run(tmp_path / "run", RUN)
    page = write_page(folder, responses=False)
    assert page.name == "report.html" and page not in hide_responses(folder)
    # The folder is hidden now, so the page with responses is made where no upload takes it along.
    assert (folder / "_safety").is_dir() and write_page(folder) == folder / "_report.html"
    shutil.move(folder / "_report.html", folder / "report.html")
    assert hide_responses(folder) == {folder / "report.html": folder / "_report.html"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder; give the output folder"),
        ({}, "holds neither safety_history.jsonl nor results.json"),
        ({"safety_history.jsonl": "{"}, "is not the history of a run"),
        ({"safety_history.jsonl": "[1]"}, "is not the history of a run"),
        ({"safety_history.jsonl": '{"type": "report", "step": 1}'}, "row 1 has no 'weights'"),
        ({"results.json": '{"results": [{"model": 1}]}'}, "holds no results of hf-safe-ema check"),
        ({"results.json": "[]"}, "holds no results of hf-safe-ema check"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, capsys, files, message):
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    assert main(["report", str(folder)]) == 2
    assert message in capsys.readouterr().err and not (folder / "report.html").exists()


def test_the_command(tmp_path, capsys):
    folder = write_run(tmp_path / "run", RUN)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    assert main(["report", str(folder), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert main(["report", str(folder), "--html", str(tmp_path / "page.html"), "--without-responses"]) == 0
    assert HOSTILE[8] not in (tmp_path / "page.html").read_text()


def test_a_page_that_cannot_be_made_only_warns(tmp_path, caplog):
    (tmp_path / "safety_history.jsonl").write_text("{")
    assert write_run_page_or_warn(tmp_path, "title") is None
    assert "report.html was not written: ValueError" in caplog.text


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    plan = CheckPlan(models=["testbed"], judges=["keywords", "gcg-7"], num_prompts=24)
    return run_check(plan, folder), folder


def test_the_page_of_a_check(tmp_path, checked):
    results, folder = checked
    direct, later = write_check_page(results, tmp_path / "direct.html"), write_page(folder)
    for page in map(Page, (direct, later)):
        assert_stands_alone(page)
        for result in results:
            row = [result.model, result.prompt_set, result.judge]
            start = next(i for i in range(len(page.cells())) if page.cells()[i : i + 3] == row)
            assert f"{result.rate:.1%}" in page.cells()[start + 3]
            assert f"{result.interval[0]:.1%} to {result.interval[1]:.1%}" == page.cells()[start + 4]
            assert result.template in page.cells()[start:]
        answers = [attributes for tag, attributes in page.tags if tag == "article"]
        assert len(answers) == sum(len(result.responses) for result in results) == 4 * 24
        for result in results:
            for label, count in result.counts.items():
                wanted = {"data-judge": result.judge, "data-prompts": result.prompt_set, "data-label": label}
                assert sum(wanted.items() <= found.items() for found in answers) == count


def test_the_page_of_a_check_with_tasks(tmp_path):
    tasks = tmp_path / "sums.jsonl"
    write_jsonl(
        tasks, [{"question": f"What is {n} and <b>1</b>?", "answer": f"It is more.\n#### {n + 1}"} for n in (1, 2)]
    )
    folder = tmp_path / "check"
    checked = run_plan(CheckPlan(models=["testbed"], harmful=[], benign=[], tasks=[tasks]), folder)
    (found,) = checked.tasks
    for written in (write_check_page([], tmp_path / "direct.html", tasks=checked.tasks), write_page(folder)):
        page = Page(written)
        assert_stands_alone(page)
        start = page.cells().index("exact match")
        assert page.cells()[start - 1].startswith("sums.jsonl")
        assert page.cells()[start + 1 : start + 3] == [str(found.asked), str(found.scored)]
        assert f"{found.value:.1%}" in page.cells()[start + 3]


def test_a_check_of_an_earlier_version_has_no_responses_to_show(checked, tmp_path):
    _, folder = checked
    old = json.loads((folder / "results.json").read_text())
    for row in old["results"]:
        del row["verdicts"]
    (tmp_path / "results.json").write_text(json.dumps(old))
    text = Page(write_page(tmp_path)).text
    assert "Run the check again with the same output folder" in text and "There are none to show" in text


def test_an_empty_check(tmp_path):
    assert "Nothing was checked" in Page(write_check_page([], tmp_path / "page.html")).text


def test_history_writes_what_the_page_reads(tmp_path):
    history = History(tmp_path)
    history.add(*RUN)
    row = {
        "weights": "base",
        "kind": "harmful",
        "category": "",
        "prompt": "p",
        "response": "r",
        "label": "refusal",
        "reason": "x",
    }
    history.write_responses(0, [row])
    assert "responses of step 10 are not shown" in Page(write_page(tmp_path)).text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0"]  # fmt: skip
# Run by the test's own copy of the page, at its end; it writes what it sees where --dump-dom shows it.
PROBE = """
const filter = (name, value) => {
  const select = document.querySelector(`select[name=${name}]`);
  select.value = value; select.dispatchEvent(new Event("change", {bubbles: true}));
  return [...document.querySelectorAll(".answer")].filter((answer) => !answer.hidden).map((answer) => answer.getAttribute("data-" + name));
};
document.querySelectorAll("details").forEach((fold) => { fold.open = true; });
const shown = filter("weights", "ema");
const cleared = filter("weights", "").length;
document.documentElement.dataset.seen = JSON.stringify({
  pwned: window.pwned ?? null, title: document.title, shown: shown.length, values: [...new Set(shown)], cleared,
  plots: [...document.querySelectorAll(".plot > svg")].map((svg) => [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height]),
  labels: [...document.querySelectorAll(".plot > svg text")].filter((text) => text.getBoundingClientRect().width === 0).length,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  filters: getComputedStyle(document.querySelector("form.filters")).display,
});
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
def test_in_a_real_browser_nothing_hostile_runs_and_every_plot_is_seen(tmp_path, hostile):
    source = hostile.read_text(encoding="utf-8")
    # The policy lets in one more script, by its hash: the probe.
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    probed = source.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "</body>", f"<script>{PROBE}</script></body>"
    )
    (tmp_path / "page.html").write_text(probed, encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout).group(1)))
    assert "CONSOLE" not in done.stderr, done.stderr
    assert seen["pwned"] is None and seen["title"] == "Safety of a fine-tuning run: run"
    assert len(seen["plots"]) >= 5 and all(width > 100 and height > 100 for width, height in seen["plots"])
    assert seen["labels"] == 0 and seen["wide"] == 0
    assert seen["filters"] == "flex" and seen["values"] == ["ema"]
    assert 0 < seen["shown"] < seen["cleared"] == source.count("<article")
