"""How the golden layer is found."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pipeline.errors import UserError
from pipeline.options.base import NO_FLAG, Count, Options, Positive, Weight, at_least, one_of, read_expert


@dataclass(kw_only=True)
class AttributionOptions(Options):
    """How the golden layer is found."""

    method: str = "lga"
    """lga, race, gradient_norm_subject, causal_tracing, middle or fixed. lga: layer gradient analysis; race: blocks
    that lga names, and some from all over the model, are tried by edits of a few requests, and the better ones by
    more; gradient_norm_subject: size of the new answer's gradient at the subject's last token; causal_tracing:
    ROME's; middle: the middle block; fixed: the one that --layer names."""
    layer: Annotated[int | None, at_least(0)] = None
    """fixed: the block, counted from 0."""
    scope: Annotated[str, one_of("mlp", "down", "attention", "block", "experts", "shared")] = "mlp"
    """Whose weights are scored: mlp, down (the MLP's down-projection), attention or block (both)."""
    old_answers: Annotated[str, one_of("dataset", "model")] = "dataset"
    """dataset: the requests' old answers (the model's greedy answer where one is missing); model: always that."""
    order: Annotated[str, one_of("magnitude", "signed")] = "magnitude"
    """magnitude: by absolute score; signed: the paper's ranking, by score, which a model that knows the old answers
    well turns upside down."""
    top_k: Count = 1
    """How many golden layers to name."""
    expert: dict[str, Any] = field(default_factory=dict)
    """Settings for experts, such as {"fences": 0}; docs/edit.md lists them."""
    fences: Annotated[Weight, NO_FLAG] = 1.0
    """Tukey's factor: blocks with scores outside [Q1 - f*IQR, Q3 + f*IQR] are set aside; 0: none are."""
    batch_size: Annotated[Count, NO_FLAG] = 16
    """The most requests in a batch; fewer where their tokens would take much memory."""
    samples: Annotated[Count, NO_FLAG] = 10
    """causal_tracing: how often a subject is corrupted."""
    noise: Annotated[Positive, NO_FLAG] = 3.0
    """causal_tracing: the corruption's size, in standard deviations of the embeddings."""

    def __post_init__(self) -> None:
        vars(self).update(read_expert(self.expert, AttributionOptions, "attribution", only=NO_FLAG))
        super().__post_init__()

    def check(self) -> None:
        """Raise UserError for a block without the method that takes it, or the other way round."""
        if self.method == "fixed" and self.layer is None:
            raise UserError("layer: which? give the block that --method fixed names")
        if self.method != "fixed" and self.layer is not None:
            raise UserError(f"layer: {self.layer} is for --method fixed alone, not for {self.method}")
