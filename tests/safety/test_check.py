"""SafetyCheck and SafetyReport: what is counted how, what a number carries, what cannot be asked for."""

import copy
import hashlib
import json
import math

import pytest

from hf_safe_ema import KeywordJudge, PromptSet, SafetyCheck, SafetyReport, Verdict, load_prompts
from hf_safe_ema.safety.prompts import Prompt
from hf_safe_ema.safety.reports import Rate, wilson_interval


class SaysByPrompt:
    """Gives each prompt the label that it names, whatever the response."""

    name = "by-prompt-v1"

    def judge(self, prompts, responses):
        return [Verdict(prompt.split()[0], "the prompt says so") for prompt in prompts]


def asked(*labels: str) -> PromptSet:
    """A set whose prompts name the label they are to get, in two categories by turns."""
    prompts = (Prompt(f"{label} {i}", f"id-{i}", ("theft", "fraud")[i % 2]) for i, label in enumerate(labels))
    return PromptSet("hand", tuple(prompts))


def run(tiny, harmful, benign=None, **settings) -> SafetyReport:
    weights = {key: settings.pop(key) for key in ("weights", "step") if key in settings}
    check = SafetyCheck(
        harmful, benign, **{"judge": SaysByPrompt(), "max_new_tokens": 2, "progress": False, **settings}
    )
    return check.run(*tiny, **weights)


def test_rates_by_hand(tiny):
    harmful = asked(*["compliance"] * 3, *["refusal"] * 1, *["unclear"] * 4)
    benign = asked(*["compliance"] * 1, *["refusal"] * 2, *["unclear"] * 2)
    report = run(tiny, harmful, benign)
    assert report.counts == {"refusal": 1, "compliance": 3, "unclear": 4}
    assert report.benign_counts == {"refusal": 2, "compliance": 1, "unclear": 2}
    assert (report.asr, report.refusal_rate, report.over_refusal) == (3 / 4, 1 / 8, 2 / 3)
    assert report.asr_interval == wilson_interval(3, 4)
    assert report.over_refusal_interval == wilson_interval(2, 3)
    assert (report.unclear, report.benign_unclear) == (4, 2)
    assert report.by_category == {
        "theft": {"refusal": 0, "compliance": 2, "unclear": 2},
        "fraud": {"refusal": 1, "compliance": 1, "unclear": 2},
    }
    assert report.metrics("eval_ema_") == {
        "eval_ema_asr": 0.75,
        "eval_ema_refusal_rate": 0.125,
        "eval_ema_over_refusal": 2 / 3,
        "eval_ema_unclear": 0.5,
        "eval_ema_benign_unclear": 0.4,
    }


@pytest.mark.parametrize("unclear", [0, 1, 5])
def test_unclear_answers_never_make_it_look_safer(tiny, unclear):
    report = run(tiny, asked("compliance", "refusal", *["unclear"] * unclear))
    assert report.asr == 0.5
    assert report.refusal_rate == 1 / (2 + unclear)
    assert report.asr_interval == wilson_interval(1, 2)


def test_where_nothing_was_judged_there_is_no_rate(tiny):
    report = run(tiny, asked("unclear", "unclear"), asked("unclear"))
    assert report.asr is report.over_refusal is None
    assert report.refusal_rate == 0.0
    assert report.asr_interval == report.over_refusal_interval == (0.0, 1.0)
    assert report.metrics() == {"refusal_rate": 0.0, "unclear": 1.0, "benign_unclear": 1.0}
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["asr"] is None


def test_without_harmless_prompts(tiny):
    report = run(tiny, asked("refusal"), None)
    assert report.benign_set is None and report.over_refusal is None
    assert report.metrics() == {"asr": 0.0, "refusal_rate": 1.0, "unclear": 0.0}


def test_a_number_comes_with_its_meaning(tiny):
    harmful, benign = load_prompts("builtin").sample(5), load_prompts("builtin", "benign").sample(3)
    report = run(tiny, harmful, benign, judge="qi-29", system_prompt="Be kind.", weights="ema", step=200)
    carried = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert carried["harmful_set"] == f"builtin-harmful-v2:check[5 of 240]#{harmful.fingerprint}"
    assert carried["benign_set"] == f"builtin-benign-v2:check[3 of 130]#{benign.fingerprint}"
    assert sum(carried["counts"].values()) == 5 and sum(carried["benign_counts"].values()) == 3
    assert carried["judge"] == "keywords:qi-29"
    assert carried["template"] == hashlib.sha256(tiny[1].chat_template.encode()).hexdigest()[:12]
    assert carried["system_prompt"] == "Be kind."
    assert carried["max_new_tokens"] == 2
    assert (carried["weights"], carried["step"]) == ("ema", 200)
    for rate in ("asr", "over_refusal"):
        low, high = carried[f"{rate}_interval"]
        assert 0 <= low <= carried[rate] <= high <= 1
    assert carried["refusal_rate"] <= 1 - carried["asr"]
    assert "responses" not in carried


def test_responses_are_kept_in_order_with_their_verdicts(tiny):
    report = run(tiny, asked("compliance", "refusal"), asked("unclear"))
    assert [(r.kind, r.prompt_id, r.category, r.prompt, r.label) for r in report.responses] == [
        ("harmful", "id-0", "theft", "compliance 0", "compliance"),
        ("harmful", "id-1", "fraud", "refusal 1", "refusal"),
        ("benign", "id-0", "theft", "unclear 0", "unclear"),
    ]
    assert all(r.reason == "the prompt says so" for r in report.responses)
    assert "compliance 0" not in repr(report)


def test_the_testbed_refuses_harmful_requests_more_than_harmless_ones(tiny):
    report = SafetyCheck(num_prompts=40, progress=False).run(*tiny, weights="base")
    assert report.refusal_rate > report.over_refusal


def test_the_same_check_twice_says_the_same(tiny):
    check = SafetyCheck(num_prompts=6, max_new_tokens=12, progress=False)
    assert check.run(*tiny) == check.run(*tiny)


def test_a_judge_that_decides_early_ends_the_responses(tiny):
    class Hasty(SaysByPrompt):
        def decided(self, prompt, beginning):
            return True

    patient = run(tiny, ["compliance 0"], max_new_tokens=16).responses[0].response
    hasty = run(tiny, ["compliance 0"], max_new_tokens=16, judge=Hasty()).responses[0].response
    assert patient.startswith(hasty) and len(hasty) < len(patient)


def test_a_judge_that_misses_an_answer_is_not_believed(tiny):
    class Forgetful(SaysByPrompt):
        def judge(self, prompts, responses):
            return super().judge(prompts, responses)[:-1]

    with pytest.raises(ValueError, match="judge 'by-prompt-v1' gave 1 verdicts on 2 responses"):
        run(tiny, asked("refusal", "refusal"), judge=Forgetful())


def test_num_prompts_limits_each_set():
    check = SafetyCheck(num_prompts=7)
    assert (len(check.harmful), len(check.benign)) == (7, 7)
    assert len(SafetyCheck(["a", "b"], num_prompts=7).harmful) == 2


@pytest.mark.parametrize(
    ("judge", "name"),
    [("keywords", "keywords:default-v2"), ("gcg-7", "keywords:gcg-7"), (KeywordJudge("qi-29"), "keywords:qi-29")],
)
def test_judges_by_name(judge, name):
    assert SafetyCheck(judge=judge).judge.name == name


class Nameless:
    def judge(self, prompts, responses):
        return []


class Measures(SaysByPrompt):
    def __init__(self, what):
        self.measures, self.name = what, f"measures-{what}"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"judge": "gpt-5"}, ValueError, "judge='gpt-5' is unknown; choose one of"),
        ({"judge": None}, TypeError, "judge=None: give 'keywords'"),
        ({"judge": Nameless()}, TypeError, "an object with a `name`"),
        ({"judge": len}, TypeError, "judge=<built-in"),
        ({"num_prompts": 0}, ValueError, "num_prompts=0.*at least 1"),
        ({"num_prompts": 2.5}, ValueError, "num_prompts=2.5.*whole number"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0.*at least 1"),
        ({"max_new_tokens": None}, ValueError, "max_new_tokens=None"),
        ({"max_new_tokens": True}, ValueError, "max_new_tokens=True"),
        ({"batch_size": 0}, ValueError, "batch_size=0.*at least 1 or 'auto'"),
        ({"batch_size": "8"}, ValueError, "batch_size='8'"),
        ({"system_prompt": 5}, TypeError, "system_prompt=5: must be text"),
        ({"prompts": 5}, TypeError, "prompts=5"),
        ({"prompts": []}, ValueError, "at least one"),
        ({"prompts": "absent.csv"}, FileNotFoundError, "absent.csv"),
        ({"benign": "builtin:train"}, ValueError, "builtin:align"),
        ({"benign_judge": Measures("harm")}, ValueError, "benign_judge='measures-harm' measures harm"),
        ({"judge": Measures("quality")}, ValueError, "'measures-quality' measures quality, which is no verdict"),
    ],
)
def test_what_no_check_could_run_with_is_refused_at_construction(settings, error, message):
    with pytest.raises(error, match=message):
        SafetyCheck(**settings)


def test_validate_says_now_what_would_fail_later(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    SafetyCheck().validate(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        SafetyCheck().validate(tokenizer)
    with pytest.raises(ValueError, match="no tokenizer"):
        SafetyCheck().validate(None)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    SafetyCheck().validate(tokenizer)
    with pytest.raises(ValueError, match="does not take system_prompt='Be kind\\.': no system"):
        SafetyCheck(system_prompt="Be kind.").validate(tokenizer)


def test_harmless_answers_are_never_judged_for_harm(tiny):
    judge = Measures("harm")
    report = run(tiny, asked("compliance"), asked("refusal"), judge=judge)
    assert (report.judge, report.benign_judge) == ("measures-harm", "keywords:default-v2")
    report = run(tiny, asked("compliance"), asked("refusal"), judge=judge, benign_judge=SaysByPrompt())
    assert (report.benign_judge, report.over_refusal) == ("by-prompt-v1", 1.0)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 100, 0.0215, 0.1118),
        (50, 100, 0.4038, 0.5962),
        (1, 1, 0.2065, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_against_known_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_solves_the_score_equation():
    for trials in (1, 7, 240):
        for successes in range(trials + 1):
            rate = successes / trials
            for bound in wilson_interval(successes, trials):
                assert 0 <= bound <= 1
                if 0 < bound < 1:  # the bounds are where the score test just rejects: |z| = 1.96
                    z = abs(rate - bound) / math.sqrt(bound * (1 - bound) / trials)
                    assert z == pytest.approx(1.959964, abs=1e-5)


def test_rate_of_nothing():
    assert Rate(0, 0).value is None
    assert Rate(3, 4).value == 0.75 and Rate(3, 4).interval == wilson_interval(3, 4)
