"""Metrics in the order and groups that they are shown in: how the model really behaves stands first."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.evaluation.metrics import Estimate

GROUPS: dict[str, dict[str, str]] = {
    "by generation": {
        "generation_exact_match": "requests answered by the model itself with the new answer and nothing more",
        "generation_containment": "requests in whose answer the new answer stands",
        "rephrase_exact_match": "rephrases answered with the new answer and nothing more",
        "rephrase_containment": "rephrases in whose answer it stands",
        "portability_exact_match": "portability probes answered with their answer and nothing more",
        "portability_containment": "portability probes in whose answer it stands",
        "distractor_exact_match": "requests after a sentence about something else, as in the first row",
        "distractor_containment": "the same, as in the second row",
    },
    "teacher-forced": {
        "rewrite": "tokens of the new answer that come first to the model, prompt as given",
        "rephrase": "the same, prompt in other words",
        "locality": "tokens of unrelated answers that did not change",
        "portability": "tokens of what follows from the new answer",
    },
    "by probability": {
        "efficacy_success": "prompts to which the new answer is likelier than the old one",
        "efficacy_magnitude": "by how much, as a difference of probabilities a token",
        "paraphrase_success": "rephrases to which the new answer is likelier than the old one",
        "paraphrase_magnitude": "by how much",
        "neighbourhood_success": "unrelated prompts to which the right answer is likelier than the new one",
        "neighbourhood_magnitude": "by how much",
        "rome_score": "harmonic mean of the three successes",
    },
    "damage": {
        "perplexity": "on ordinary text; lower is better, unchanged is the aim",
        "locality_kl": "how far next-token distributions after unrelated prompts moved, in nats",
        "text_kl": "the same in ordinary text",
        "fluency": "entropy of 2- and 3-grams in long generations, in bits; lower is repetitive",
    },
}
LONG_ONLY = ("rephrase_containment", "portability_containment", "distractor_containment")  # and magnitudes
IN_SHORT = tuple(  # what a short table shows
    name
    for members in GROUPS.values()
    for name in members
    if name not in LONG_ONLY and not name.endswith("_magnitude")
)
SHARES = tuple(  # what lies between 0 and 1
    name for group in ("by generation", "teacher-forced", "by probability") for name in GROUPS[group]
)


def grouped(names: Collection[str]) -> dict[str, list[str]]:
    """Names by group; a kind's axes (`portability/Reasoning`) stand behind it."""
    found: dict[str, list[str]] = {}
    for group, members in GROUPS.items():
        there = [name for member in members for name in names if name.partition("/")[0] == member]
        if there:
            found[group] = there
    return found


def meaning(name: str) -> str:
    """What a metric counts, in a line."""
    kind, _, axis = name.partition("/")
    counted = next(members[kind] for members in GROUPS.values() if kind in members)
    return f"of them {axis}" if axis else counted


def label(name: str) -> str:
    """A metric's name as it is shown."""
    return name.replace("_", " ").replace("rome score", "ROME's score").replace(" kl", " KL")


def figure_text(name: str, estimate: Estimate | None, interval: bool = True) -> str:
    """A metric's mean, with or without its interval; nothing where there is none."""
    if estimate is None:
        return ""
    digits = 2 if name in ("perplexity", "fluency") else 3
    mean = f"{estimate.mean:.{digits}f}"
    return f"{mean} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]" if interval else mean
