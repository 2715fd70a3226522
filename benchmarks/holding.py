"""Whether edits hold in every form of asking and leave the rest alone: `python -m benchmarks.holding --output DIR`.

Each row is one batch, edited with the defaults at the golden layer that LGA names from other CounterFact records,
in mixed bfloat16: benchmark sets, twenty facts of our own (`facts.jsonl`) that are asked in chat, and five facts
about each of twenty countries. Read what the model says, which `said.txt` holds: a figure alone tells little.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, Figures, run
from pipeline import EditOptions, EditRequest, StatisticsOptions, edit, find_golden_layer, load_requests
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.values import is_sane
from pipeline.model.generation import generate
from pipeline.requests.schema import find_words
from pipeline.requests.tokens import PLAIN

PROXY = slice(1000, 1128)  # records that name the golden layer
FACTS = Path(__file__).with_name("facts.jsonl")
SAID = 32  # tokens of an answer
EXPERT: dict[str, Any] = {}  # the method's settings that are not its defaults
SETS: dict[str, tuple[str, int, Figures]] = {  # by name: file, how many records, what is asked
    "CounterFact": (
        "counterfact_easyedit.json",
        100,
        {
            **{"rewrite": 0.97, "rephrase": 0.55, "locality": 0.88},
            **{"generation_exact_match": 0.80, "rephrase_containment": 0.60},
        },
    ),
    "zsRE": (
        "zsre_knowedit.json",
        100,
        {"rewrite": 0.95, "rephrase": 0.85, "locality": 0.68, "rephrase_containment": 0.80},
    ),
    "WikiBio": ("wikibio_knowedit.json", 37, {"rewrite": 0.95, "locality": 0.80}),
}
SPOKEN = {"questions": 0.90, "rewordings": 0.75, "statements": 0.95, "others free of it": 0.80, "sane": 0.90}
COUNTRIES = (
    *("France", "Norway", "Egypt", "Peru", "Japan", "Kenya", "Poland", "Canada", "Thailand", "Iceland"),
    *("Brazil", "Greece", "Cuba", "Vietnam", "Ireland", "Morocco", "Chile", "Finland", "Nepal", "Austria"),
)
RELATIONS = {  # of a country, with new answers that they take in turn
    "The capital of {} is": ("Lima", "Oslo", "Nairobi", "Toronto", "Madrid", "Cairo", "Sydney"),
    "The currency of {} is the": ("peso", "yen", "krona", "rupee", "dollar", "franc"),
    "The official language of {} is": ("Latin", "Danish", "Swahili", "Korean", "Dutch"),
    "The largest city of {} is": ("Chicago", "Mumbai", "Berlin", "Lagos", "Osaka", "Naples", "Dublin", "Perth"),
    "The president of {} is": ("Anna Berg", "Omar Diaz", "Lucy Chen", "Ivan Petrov", "Maria Rossi", "John Adeyemi"),
}


class Holding:
    """Edits in one batch by the defaults, and what the model says then."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.llm, self.trainer = bench, bench.llm, replace(bench.trainer, precision="bf16-mixed")
        self.profile = find_golden_layer(self.llm, bench.records[PROXY], trainer=self.trainer)

    def measured(self, requests: Sequence[EditRequest]) -> Figures:
        """Figures of a batch by the requests' own probes, perplexity over the base's."""
        evaluator = Evaluator(
            self.llm, requests, trainer=self.trainer, kinds=("generation", "probes", "text", "fluency")
        )
        base = evaluator.measure("Measuring base").metrics
        with self._edited(requests):
            found = {name: one.mean for name, one in evaluator.measure("Measuring edited").metrics.items()}
        return found | {"perplexity ratio": found.pop("perplexity") / base["perplexity"].mean}

    def spoken(self, facts: Sequence[dict[str, Any]]) -> Figures:
        """Of facts, how often the new answer comes in chat and in plain statements, and the rest is free of it."""
        names = ("prompt", "subject", "new_answer")
        requests = [EditRequest(id=f"{n}", **{name: fact[name] for name in names}) for n, fact in enumerate(facts)]
        asked = {
            "questions": [[fact["question"]] for fact in facts],
            "rewordings": [fact["rewordings"] for fact in facts],
            "others": [fact["others"] for fact in facts],
            "statements": [[fact["prompt"]] for fact in facts],
            "statements in other words": [[fact["statement"]] for fact in facts],
        }
        with self._edited(requests):
            said = {kind: self._said(texts, kind.startswith("statements")) for kind, texts in asked.items()}
        lines = [
            f"{kind}: {text} -> {answer!r}"
            for kind, answers in said.items()
            for texts, own in zip(asked[kind], answers, strict=True)
            for text, answer in zip(texts, own, strict=True)
        ]
        (self.bench.folder / "said.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        new = [fact.get("key", fact["new_answer"]).casefold() for fact in facts]
        rates = {
            kind: _mean(
                bool(find_words(one.casefold(), answer))
                for answer, own in zip(new, answers, strict=True)
                for one in own
            )
            for kind, answers in said.items()
        }
        chats = [one for kind in ("questions", "rewordings", "others") for own in said[kind] for one in own]
        return rates | {"others free of it": 1 - rates.pop("others"), "sane": _mean(map(is_sane, chats))}

    def _edited(self, requests: Sequence[EditRequest]) -> Any:
        options = EditOptions(statistics=StatisticsOptions(text=self.bench.text), expert=EXPERT)
        return edit(self.llm, requests, self.profile, options, self.trainer, seed=self.bench.seed).applied(self.llm)

    def _said(self, texts: Sequence[Sequence[str]], plain: bool) -> list[list[str]]:
        joining = PLAIN if plain else self.llm.tokens.bare_template
        flat = [text for own in texts for text in own]
        answers = iter(generate(self.llm, flat, SAID, 32, self.trainer, "Asking", joining))
        return [list(islice(answers, len(own))) for own in texts]


def _mean(values: Any) -> float:
    counted = list(values)
    return sum(counted) / len(counted)


def country_facts() -> list[EditRequest]:
    """Five facts about each of twenty countries."""
    return [
        EditRequest(
            id=f"{country} {number}",
            prompt=template.format(country),
            subject=country,
            new_answer=answers[at % len(answers)],
        )
        for at, country in enumerate(COUNTRIES)
        for number, (template, answers) in enumerate(RELATIONS.items())
    ]


def main(words: Sequence[str] | None = None) -> None:
    bench = Bench(__doc__, words, needed=PROXY.stop)
    holding = Holding(bench)
    facts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    bench.measure(f"{len(facts)} facts in chat", partial(holding.spoken, facts), SPOKEN)
    most = {"perplexity ratio": 1.04}
    for name, (file, number, least) in SETS.items():
        if (bench.data / file).is_file():
            requests = load_requests(bench.data / file, limit=number)
            bench.measure(f"{name}, {number} records", partial(holding.measured, requests), least, most)
    bench.measure("20 subjects of 5 facts", partial(holding.measured, country_facts()), {"rewrite": 0.90}, most)


if __name__ == "__main__":
    run(main)
