"""Gates: what a batch must reach to be published, and what it did reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.evaluation.metrics import Estimate
from pipeline.options.updates import GateOptions

OF_BATCH = ("rewrite", "rephrase", "locality")
OF_MODEL = ("earlier", "perplexity", "drift")  # whatever the batch


@dataclass(frozen=True)
class Gate:
    """One gate: what was reached, what is asked for, and whether as a least or as a most."""

    name: str
    value: float
    bound: float
    least: bool

    @property
    def passed(self) -> bool:
        """Whether it is reached; no number is not."""
        return self.value >= self.bound if self.least else self.value <= self.bound

    def __str__(self) -> str:
        sign = (">=" if self.least else "<=") if self.passed else ("<" if self.least else ">")
        return f"{self.name} {self.value:.3f} {sign} {self.bound:g}"


@dataclass(frozen=True)
class Figures:
    """What was measured of one state of the model."""

    metrics: Mapping[str, Estimate]  # of the batch, and perplexity
    earlier: float | None  # rewrite of earlier facts; None where there are none
    perplexity_ratio: float  # as a multiple of the base model's
    drift: float  # the largest change of an edited weight from the base, as a share of its norm

    def gates(self, options: GateOptions, names: Sequence[str] = OF_BATCH + OF_MODEL) -> list[Gate]:
        """Those gates of the options that this can be held against."""
        values = {name: self.metrics[name].mean for name in OF_BATCH if name in self.metrics}
        values |= {"perplexity": self.perplexity_ratio, "drift": self.drift}
        if self.earlier is not None:
            values["earlier"] = self.earlier
        return [
            Gate(name, values[name], bound, least=name not in ("perplexity", "drift"))
            for name in names
            if name in values and (bound := getattr(options, name))  # 0 and null: not asked for
        ]


def missed(gates: Sequence[Gate]) -> str:
    """The gates that are not passed, in words; empty when all are."""
    return ", ".join(str(gate) for gate in gates if not gate.passed)
