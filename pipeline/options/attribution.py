"""How the golden layer is found."""

from dataclasses import dataclass

from pipeline.errors import UserError, check_above, check_at_least, check_choice

SCOPES = ("mlp", "down", "attention", "block")
OLD_ANSWERS = ("dataset", "model")
ORDERS = ("signed", "magnitude")


@dataclass(kw_only=True)
class AttributionOptions:
    """How the golden layer is found."""

    method: str = "lga"
    """lga: layer gradient analysis, with kin under research (lga_past_first, lga_subject, lga_cosine,
    lga_cosine_past_first, lga_cosine_last); gradient_norm, gradient_norm_subject: size of the new answer's
    gradient, over all tokens or at the subject's last; causal_tracing: ROME's; sweep: the truth, by editing each
    request alone at each block; middle: the middle block; fixed: the one that --layer names."""
    layer: int | None = None
    """fixed: the block, counted from 0."""
    scope: str = "mlp"
    """Whose weights are scored: mlp, down (the MLP's down-projection), attention or block (both)."""
    fences: float = 1.0
    """Tukey's factor: blocks with scores outside [Q1 - f*IQR, Q3 + f*IQR] are set aside; 0: none are."""
    old_answers: str = "dataset"
    """dataset: the requests' old answers (the model's greedy answer where one is missing); model: always that."""
    order: str = "signed"
    """signed: the paper's ranking, by score; magnitude: by absolute score, for facts the model knows well."""
    top_k: int = 1
    """How many golden layers to name."""
    batch_size: int = 16
    """The most requests in a batch; fewer where their tokens would take much memory."""
    trial: str = "memit"
    """sweep: the way to edit: memit, emmet, rome, alphaedit or lora."""
    samples: int = 10
    """causal_tracing: how often a subject is corrupted."""
    noise: float = 3.0
    """causal_tracing: the corruption's size, in standard deviations of the embeddings."""

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_choice("old_answers", self.old_answers, OLD_ANSWERS)
        check_choice("order", self.order, ORDERS)
        check_at_least("fences", self.fences, 0)
        check_at_least("top_k", self.top_k, 1)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("samples", self.samples, 1)
        check_above("noise", self.noise, 0)
        if self.layer is not None:
            check_at_least("layer", self.layer, 0)
        if (self.method == "fixed") != (self.layer is not None):
            raise UserError(
                f"layer: {'which? give the block that --method fixed names' if self.layer is None else self.layer}"
                f"{'' if self.layer is None else f' is for --method fixed alone, not for {self.method}'}"
            )
