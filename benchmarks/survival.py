"""Whether edits survive what is done to a model later: `python -m benchmarks.survival --output DIR`.

Twenty facts (`facts.jsonl`) are edited in one batch, by the default method and by `memit`, at the golden layer that
LGA names from CounterFact records. Then the edited model is quantised, or fine-tuned on ordinary text, and asked
again: prompts, the same in other words, and in chat. What it says then, `said.txt` holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.bench import Bench, Figures, on_cuda, run
from benchmarks.holding import FACTS, PROXY
from pipeline import (
    LLM,
    EditOptions,
    EditRequest,
    EvaluationOptions,
    GoldenProfile,
    StatisticsOptions,
    WeightUpdate,
    edit,
    find_golden_layer,
    load_model,
)
from pipeline.editing.export import export_merged
from pipeline.editing.gguf_export import MODEL, export_gguf
from pipeline.editing.update import UPDATE_FILE
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.plan import ORDINARY_TEXT
from pipeline.files import read_plain_text
from pipeline.requests.answers import contains_answer

METHODS: dict[str, dict[str, Any]] = {"auto": {}, "memit": {}}  # with settings that are not their defaults
KINDS = (None, "q8_0", "q5_0", "q4_0")  # of GGUF files; None: F16
RANK, ALPHA, LEARNING_RATE = 8, 16, 2e-4  # of the later fine-tuning
STEPS, ROWS, LENGTH = 100, 8, 64  # rows a step, and tokens a row
ASKED = ("generation", "made", "text")


class Survival:
    """What edited models say after what is done to them."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.llm = bench, bench.llm
        self.device = torch.device("cuda" if on_cuda(bench.trainer) else "cpu")
        facts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
        self.requests = [
            EditRequest(
                id=f"{number}",
                rephrases=(fact["statement"],),
                **{name: fact[name] for name in ("prompt", "subject", "new_answer")},
            )
            for number, fact in enumerate(facts)
        ]

    def measure(self, method: str) -> None:
        """Edit by a method, and measure the edited model in every form."""
        update = self._update(method)
        with TemporaryDirectory(dir=self.bench.folder) as name:
            folder = Path(name)
            export_merged(self.llm, update, folder)
            forms: dict[str, Callable[[], LLM]] = {"as edited": partial(load_model, folder)}
            forms |= {f"GGUF {kind or 'f16'}": partial(self._in_gguf, update, folder, kind) for kind in KINDS}
            forms |= {"NF4": partial(load_model, folder, nf4=self.device), "LoRA": partial(self._finetuned, folder)}
            for form, made in forms.items():
                self.bench.measure(f"{method}, {form}", partial(self._asked, f"{method}, {form}", made))

    @cached_property
    def _profile(self) -> GoldenProfile:
        return find_golden_layer(self.llm, self.bench.records[PROXY], trainer=self.bench.trainer)

    def _update(self, method: str) -> WeightUpdate:
        """The edit, kept in the output folder."""
        folder = self.bench.folder / method
        if not (folder / UPDATE_FILE).is_file():
            statistics = StatisticsOptions(text=self.bench.text)
            options = EditOptions(method=method, expert=METHODS[method], statistics=statistics)
            given = self.requests, self._profile, options, self.bench.trainer
            edit(self.llm, *given, seed=self.bench.seed).save(folder)
        return WeightUpdate.load(folder)

    def _in_gguf(self, update: WeightUpdate, folder: Path, kind: str | None) -> LLM:
        export_gguf(self.llm, update, folder / "gguf", kind)  # beside a merged model's files its own are not read
        return load_model(folder / "gguf" / MODEL)

    def _finetuned(self, folder: Path) -> LLM:
        """The edited model after a LoRA fine-tuning on ordinary text, merged."""
        llm = load_model(folder)
        llm.model.to(self.device)
        torch.manual_seed(self.bench.seed)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(llm.model, config)
        (ids,) = llm.tokens.texts([read_plain_text("data", self.bench.text or ORDINARY_TEXT)])
        tokens_SBT = torch.tensor([*islice(cycle(ids), STEPS * ROWS * LENGTH)]).view(STEPS, ROWS, LENGTH)
        learnt = [weight for weight in adapted.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=LEARNING_RATE)
        for batch_BT in tokens_SBT.to(self.device):
            adapted(input_ids=batch_BT, labels=batch_BT).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return LLM(adapted.merge_and_unload(), llm.tokenizer, llm.name)

    def _asked(self, name: str, made: Callable[[], LLM]) -> Figures:
        """How many prompts, rephrases and questions in chat are answered with the new answer; perplexity."""
        options = EvaluationOptions(fluency=0)
        measured = Evaluator(made(), self.requests, options, self.bench.trainer, ASKED).measure(name)
        with (self.bench.folder / "said.txt").open("a", encoding="utf-8") as file:
            for kind, said in measured.said.items():
                for request, prompts, answers in zip(self.requests, measured.asked[kind], said, strict=True):
                    for prompt, answer in zip(prompts, answers, strict=True):
                        mark = "holds" if contains_answer(answer, request.new_answer) else "does not hold"
                        print(f"{name}: {kind}: {mark}: {prompt} -> {answer!r}", file=file)
        figures = {"perplexity": measured.metrics["perplexity"].mean}
        for kind, said in measured.said.items():
            mean, count = measured.metrics[f"{kind}_containment"].mean, sum(map(len, said))
            figures[f"{kind} of {count}"] = mean * count
        return figures


def main(words: Sequence[str] | None = None) -> None:
    bench = Bench(__doc__, words, needed=PROXY.stop)
    survival = Survival(bench)
    for method in METHODS:
        survival.measure(method)


if __name__ == "__main__":
    run(main)
