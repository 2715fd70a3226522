"""Fine-tuning of the golden layer: mini-batches over epochs, loss on the new answers' tokens only.

Breadth-first mini-batches at one well-chosen layer are what makes plain fine-tuning a strong editor
(arXiv 2509.22072).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.model import LLM, TargetBatch, TargetRow, build_trainer, collate_targets, encode, target_logits
from pipeline.options import EditOptions, TrainerOptions
from pipeline.requests import EditRequest, ListDataModule


class FineTune(LightningModule):
    """Trains the MLP weights (or the down-projection) of the golden layers under `Trainer.fit`.

    Args:
        llm: the model, whose other weights the caller has frozen.
        layers: the blocks to train.
        options: `options.finetune` is what counts here.

    Attributes:
        weight_names: the weights it changes, by full name.
    """

    def __init__(self, llm: LLM, layers: Sequence[int], options: EditOptions) -> None:
        super().__init__()
        self.llm = llm
        self.model = llm.model
        self.options = options.finetune
        self.weight_names = [
            name for layer in layers for name in llm.blocks[layer].weight_names(self.options.scope)
        ]

    def run(
        self, requests: Sequence[EditRequest], trainer: TrainerOptions, logger: Logger | bool, seed: int
    ) -> None:
        """Train until the options' epochs are over or the mean loss is low enough."""
        rows = encode(self.llm, [(r.prompt, r.new_answer) for r in requests], tags=[r.id for r in requests])
        data = ListDataModule((rows, self._share, self.options.batch_size), seed=seed)
        learnt = EarlyStopping(
            "edit/loss_epoch",
            stopping_threshold=self.options.stop_loss,
            patience=self.options.epochs,
            check_on_train_epoch_end=True,
        )
        build_trainer(
            trainer,
            "Editing",
            logger,
            [learnt],
            max_epochs=self.options.epochs,
            log_every_n_steps=1,
            use_distributed_sampler=False,
        ).fit(self, datamodule=data)

    def _share(self, rows: list[TargetRow]) -> tuple[TargetBatch, int]:
        """This device's part of a batch over all devices, and the whole batch's size.

        A device for which no row is left takes one along that counts nothing: all must take part in a step.
        """
        own = rows[self.trainer.global_rank :: self.trainer.world_size] or [replace(rows[0], tag=None)]
        return collate_targets(own, self.llm.pad_token_id), len(rows)

    def training_step(self, shared: tuple[TargetBatch, int]) -> Tensor:
        """Mean over the requests of a batch, on all devices, of ℓ(x, y_new)."""
        batch, size = shared
        logits_NV = target_logits(self.model, batch)
        losses_B = batch.row_means(F.cross_entropy(logits_NV, batch.target_N, reduction="none"))
        if not losses_B.isfinite().all():
            raise UserError(
                f"edit: the loss is not a number in step {self.global_step}, in the batch of requests "
                f"{', '.join(filter(None, batch.tags))}; try a smaller --finetune.learning_rate"
            )
        counts_B = losses_B.new_tensor([tag is not None for tag in batch.tags])
        scale = self.trainer.world_size / size  # DDP takes the mean over devices
        loss = (losses_B * counts_B).sum() * scale
        hits_B = batch.row_means((logits_NV.argmax(-1) == batch.target_N).float())
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=size)
        self.log("edit/loss", loss.detach(), on_step=True, on_epoch=True, batch_size=size, sync_dist=True)
        accuracy = (hits_B * counts_B).sum() * scale
        self.log("edit/accuracy", accuracy, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        weights = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.Adam(weights, lr=self.options.learning_rate)
