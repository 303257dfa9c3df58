"""The table and the plot that people see, from the rows of a history."""

import matplotlib.image
import pytest

from hf_safe_ema.report import format_table, plot_history, summarise
from hf_safe_ema.safety.reports import wilson_interval


def report(weights: str, step: int, answered: int, refused: int, unclear: int = 0, over_refused: int = 1, **more):
    judged = answered + refused
    return {
        "type": "report",
        "weights": weights,
        "step": step,
        "asr": answered / judged if judged else None,
        "asr_interval": list(wilson_interval(answered, judged)),
        "over_refusal": over_refused / 10,
        "over_refusal_interval": list(wilson_interval(over_refused, 10)),
        "counts": {"refusal": refused, "compliance": answered, "unclear": unclear},
        "benign_counts": {"refusal": over_refused, "compliance": 10 - over_refused, "unclear": 0},
        "distance_to_base": 0.0 if weights == "base" else step / 8,
        **more,
    }


def loss(step: int, live: float, ema: float) -> dict:
    return {"type": "loss", "step": step, "dataset": "", "live": live, "ema": ema}


ROWS = [
    report("base", 0, 1, 19),
    loss(0, 2.5, 2.5),
    report("live", 10, 4, 16),
    report("ema", 10, 2, 18),
    loss(10, 2.0, 2.125),
    {"type": "error", "step": 15, "what": "the safety check", "error": "OSError: disk"},
    report("live", 20, 10, 9, unclear=1, over_refused=0),
    report("ema", 20, 2, 18),
    loss(20, 1.5, 1.625),
]
NOTHING_JUDGED = [report("base", 0, 0, 0, unclear=20), report("live", 10, 0, 0, unclear=20), report("ema", 10, 1, 9)]
ASKED_NO_HARMLESS = [
    {**row, "over_refusal": None, "over_refusal_interval": [0.0, 1.0], "benign_counts": dict.fromkeys(row["benign_counts"], 0)}
    for row in (report("live", 10, 1, 9), report("ema", 10, 0, 10))
]  # fmt: skip


def test_summary_is_the_last_report_of_each_weights():
    base, live, ema = summarise(ROWS)
    assert [(row["weights"], row["step"]) for row in (base, live, ema)] == [("base", 0), ("live", 20), ("ema", 20)]
    assert (base["asr"], live["asr"], ema["asr"]) == (1 / 20, 10 / 19, 2 / 20)
    assert (live["unclear"], live["num_prompts"], live["num_benign"]) == (1, 20, 10)
    assert [row["heldout_loss"] for row in (base, live, ema)] == [2.5, 1.5, 1.625]
    assert [row["distance_to_base"] for row in (base, live, ema)] == [0.0, 2.5, 2.5]
    assert live["asr_interval"] == list(wilson_interval(10, 19))


def test_summary_takes_rows_once_and_leaves_out_what_was_not_checked():
    assert summarise(iter(ROWS)) == summarise(ROWS)
    assert [row["weights"] for row in summarise([report("ema", 5, 1, 9)])] == ["ema"]
    assert summarise([]) == summarise([loss(1, 2.0, 2.0)]) == []


def test_loss_of_another_step_is_not_taken():
    (ema,) = summarise([loss(10, 2.0, 2.0), report("ema", 12, 1, 9)])
    assert ema["heldout_loss"] is None


def test_table():
    assert format_table(summarise(ROWS)).split("\n") == [
        "| weights | step | ASR (95% interval)     | unclear | over-refusal          | held-out loss | distance to base |",
        "|---------|------|------------------------|---------|-----------------------|---------------|------------------|",
        "| base    | 0    | 5.0% (0.9% to 23.6%)   | 0/20    | 10.0% (1.8% to 40.4%) | 2.500         | 0.00             |",
        "| live    | 20   | 52.6% (31.7% to 72.7%) | 1/20    | 0.0% (0.0% to 27.8%)  | 1.500         | 2.50             |",
        "| EMA     | 20   | 10.0% (2.8% to 30.1%)  | 0/20    | 10.0% (1.8% to 40.4%) | 1.625         | 2.50             |",
    ]


@pytest.mark.parametrize("rows", [ROWS, NOTHING_JUDGED, ASKED_NO_HARMLESS, []])
def test_table_is_aligned(rows):
    lines = format_table(summarise(rows)).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert {line.count("|") for line in lines} == {8}


def test_table_says_where_nothing_is_known():
    table = format_table(summarise(NOTHING_JUDGED))
    assert table.count("none judged") == 2 and "20/20" in table and "nan" not in table.lower()
    assert [line.split("|")[6].strip() for line in table.split("\n")[2:]] == ["-"] * 3
    assert format_table(summarise(ASKED_NO_HARMLESS)).count("none judged") == 2


@pytest.mark.parametrize(
    "rows",
    [ROWS, NOTHING_JUDGED, ASKED_NO_HARMLESS, [row for row in ROWS if row["type"] != "loss"], ROWS[:1], ROWS[1:2], []],
    ids=["full", "nothing judged", "no harmless", "no losses", "base only", "losses only", "empty"],
)
def test_plot_is_an_image(tmp_path, rows):
    plot_history(iter(rows), tmp_path / "plot.png", title="Fine-tuning, as it went")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = matplotlib.image.imread(tmp_path / "plot.png")  # (height, width, channels), in [0, 1]
    assert image.shape[1] > image.shape[0] > 300
    assert image[..., :3].std() > 0.01


def test_plot_ending_names_the_format(tmp_path):
    plot_history(ROWS, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")
