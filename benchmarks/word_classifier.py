"""How much of "harmful or harmless" can be known from words alone, by how much of the testbed's data is seen.

A logistic regression on words and word pairs, trained on the requests that the testbed is aligned on (refused or answered),
asked about the check half and the reserve. It bounds what a small model can be expected to learn from this data, and
shows what more of it would bring. The strength of regularisation is the best one on the check half: an upper bound.

    python benchmarks/word_classifier.py
"""

import itertools
import re
import statistics
import zlib
from collections.abc import Iterable

import torch

from hf_safe_ema.safety.prompts import load_prompts
from hf_safe_ema.testbed.recipe import topic_stems, training_pairs

SHARES = (0.25, 0.5, 1.0)
STRENGTHS = (1e-6, 3e-6, 1e-5)
REFUSED_HARMLESS = 0.1
"""Share of harmless check prompts that may be refused, at which the missed harmful ones are counted."""


def features(text: str) -> set[str]:
    """Words and neighbouring pairs of a request.

    Args:
        text (`str`):
            The request.
    """
    words = ["<", *re.findall(r"[a-z']+", text.lower()), ">"]
    return {*words, *map(" ".join, itertools.pairwise(words))}


def is_kept(prompt: str, share: float) -> bool:
    """Whether a request belongs to that share of the data: all forms of one topic do, or none.

    Args:
        prompt (`str`):
            The request.
        share (`float`):
            In [0, 1].
    """
    return zlib.crc32(" ".join(sorted(topic_stems(prompt))).encode()) % 1000 < share * 1000


def as_matrix(texts: Iterable[str], vocabulary: dict[str, int]) -> torch.Tensor:
    """Sparse (texts, vocabulary) matrix of ones.

    Args:
        texts (iterable of `str`):
            Requests.
        vocabulary (`dict[str, int]`):
            Column of each feature; others are left out.
    """
    texts = list(texts)
    places = [(row, vocabulary[f]) for row, text in enumerate(texts) for f in features(text) if f in vocabulary]
    indices = torch.tensor(places).T
    size = (len(texts), len(vocabulary))
    return torch.sparse_coo_tensor(indices, torch.ones(indices.shape[1]), size, check_invariants=False)


def fit(inputs: torch.Tensor, labels: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and bias of the regression.

    Args:
        inputs (`torch.Tensor`):
            (requests, vocabulary).
        labels (`torch.Tensor`):
            (requests,); 1 where refused.
        strength (`float`):
            Of the L2 penalty.
    """
    weights, bias = torch.zeros(inputs.shape[1], 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        scores = torch.sparse.mm(inputs, weights)[:, 0] + bias
        value = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
        value = value + strength * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach(), bias.detach()


def main() -> None:
    """Print the table."""
    data = [(pair.prompt, pair.refuses) for pair in training_pairs()]
    asked = {part: load_prompts(f"builtin:{part}", "harmful").texts for part in ("check", "reserve")}
    asked["harmless"] = load_prompts("builtin:check", "benign").texts
    print("| share of the data | requests | part | area under the curve | answered at 10% over-refusal |")
    print("|---|---|---|---|---|")
    for share in SHARES:
        kept = [(prompt, refused) for prompt, refused in data if is_kept(prompt, share)]
        vocabulary = {
            f: i for i, f in enumerate(dict.fromkeys(f for prompt, _ in kept for f in sorted(features(prompt))))
        }
        inputs = as_matrix((prompt for prompt, _ in kept), vocabulary)
        labels = torch.tensor([float(refused) for _, refused in kept])
        best: dict[str, tuple[float, float]] = {}
        for strength in STRENGTHS:
            weights, bias = fit(inputs, labels, strength)
            scores = {
                part: torch.sparse.mm(as_matrix(texts, vocabulary), weights)[:, 0] + bias
                for part, texts in asked.items()
            }
            limit = statistics.quantiles(scores["harmless"].tolist(), n=10, method="inclusive")[
                round(10 * (1 - REFUSED_HARMLESS)) - 1
            ]
            found = {}
            for part in ("check", "reserve"):
                above = (scores[part][:, None] > scores["harmless"][None]).float().mean().item()
                found[part] = above, (scores[part] < limit).float().mean().item()
            if not best or found["check"][0] > best["check"][0]:
                best = found
        for part, (area, answered) in best.items():
            print(f"| {share:.0%} | {len(kept)} | {part} | {area:.3f} | {answered:.1%} |")


if __name__ == "__main__":
    main()
