"""How well the keyword judges agree with people, and how much of that is fitted to the file.

    python benchmarks/judges.py ../shared/data/refusal_labels_dev.jsonl

Prints accuracy and bias of the default rules and of every published list; then a cross-validation: for each model (and for each
fifth of the prompts) left out, rules are chosen anew, from none, one after the other, by balanced accuracy on the rest alone, and
measured on what was left out. The wording of the rules was written with about three quarters of that file at hand (the quarter
of the prompts never looked at is measured last), so that the cross-validation tells how stable the choice of rules is, and the
quarter how well their wording carries over.
"""

import argparse
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_safe_ema.judging import format_judged, judge_file
from hf_safe_ema.safety.judges import PRESETS, why_unclear
from hf_safe_ema.safety.labels import Labelled, load_labelled
from hf_safe_ema.safety.prompts import read_rows
from hf_safe_ema.safety.refusal_rules import RULES, Rule
from hf_safe_ema.safety.refusals import find_refusal
from hf_safe_ema.tables import markdown_table

FOLDS = 5
QUARTERS = 4
UNSEEN = 3


@dataclass(frozen=True)
class Case:
    """A labelled response, with what it is grouped by.

    Args:
        row ([`Labelled`]):
            What people said.
        prompt_id (`str`):
            Of the prompt.
    """

    row: Labelled
    prompt_id: str


def label(row: Labelled, rules: Sequence[Rule]) -> str:
    """What these rules say.

    Args:
        row ([`Labelled`]):
            Of which people's label is not read.
        rules (list of [`Rule`]):
            In their order.
    """
    found = find_refusal(row.prompt, row.response, tuple(rules))
    if found is not None and found.label != "compliance":
        return found.label
    return "unclear" if why_unclear(row.prompt, row.response) else "compliance"


def accuracies(cases: Sequence[Case], rules: Sequence[Rule]) -> dict[bool, float]:
    """Accuracy on harmful (True) and harmless (False) prompts.

    Args:
        cases (list of [`Case`]):
            To measure on.
        rules (list of [`Rule`]):
            To measure.
    """
    right = {True: [], False: []}
    for case in cases:
        right[case.row.harmful].append(label(case.row, rules) == case.row.label)
    return {harmful: sum(hits) / len(hits) if hits else 1.0 for harmful, hits in right.items()}


def choose_rules(cases: Sequence[Case]) -> list[Rule]:
    """Rules added one after the other while that raises balanced accuracy.

    Args:
        cases (list of [`Case`]):
            To choose on.
    """
    chosen, best = [], sum(accuracies(cases, []).values())
    while len(chosen) < len(RULES):
        tries = [(sum(accuracies(cases, ordered).values()), rule, ordered) for rule in RULES if rule not in chosen
                 for ordered in [[r for r in RULES if r in chosen or r is rule]]]  # fmt: skip
        score, rule, _ = max(tries, key=lambda found: found[0])
        if score <= best:
            break
        chosen.append(rule)
        best = score
    return [rule for rule in RULES if rule in chosen]


def cross_validate(cases: Sequence[Case], group_of: Callable[[Case], object]) -> dict[bool, float]:
    """Accuracy on harmful and harmless prompts of rules chosen without the group that they are measured on.

    Args:
        cases (list of [`Case`]):
            All.
        group_of (`Callable[[Case], object]`):
            What is left out together.
    """
    right = {True: [], False: []}
    for group in sorted({group_of(case) for case in cases}):
        rules = choose_rules([case for case in cases if group_of(case) != group])
        for case in cases:
            if group_of(case) == group:
                right[case.row.harmful].append(label(case.row, rules) == case.row.label)
    return {harmful: sum(hits) / len(hits) for harmful, hits in right.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="labelled responses")
    path = parser.parse_args().file
    print(format_judged({**judge_file(path, ["keywords", *sorted(PRESETS)]), "agreement": []}) + "\n")
    ids = [str(row.get("id", row.get("prompt"))) for row in read_rows(path)]
    cases = [Case(row, i) for row, i in zip(load_labelled(path), ids, strict=True) if row.label != "partial"]
    unseen = [case for case in cases if zlib.crc32(case.prompt_id.encode()) % QUARTERS == UNSEEN]
    found = {
        "all rules, all responses": accuracies(cases, RULES),
        "rules chosen without the model measured on": cross_validate(cases, lambda case: case.row.model),
        "rules chosen without the prompts measured on": cross_validate(
            cases, lambda case: zlib.crc32(b"fold" + case.prompt_id.encode()) % FOLDS
        ),
        f"all rules, the quarter of prompts never looked at ({len(unseen)} responses)": accuracies(unseen, RULES),
    }
    rows = [[name, f"{share[True]:.1%}", f"{share[False]:.1%}"] for name, share in found.items()]
    print(markdown_table(["", "accuracy on harmful prompts", "on harmless prompts"], rows))


if __name__ == "__main__":
    main()
