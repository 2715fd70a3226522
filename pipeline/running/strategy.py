"""Lightning's model-parallel strategy (FSDP2) for models that were spread when they were loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pipeline.running.sharding import as_spread, put, whole


class ShardedStrategy(ModelParallelStrategy):
    """Trains and runs models whose weights `load_model` has spread over all devices.

    What is trained beside the model's own weights (an adapter's factors) is whole on every device; its gradients
    are averaged here, those of spread weights by FSDP2. A checkpoint holds what is trained, whole, as one device's.
    """

    def __init__(self, devices: int) -> None:
        super().__init__(data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup(self, trainer: Trainer) -> None:
        """As the parent's, for a model that is in its place already."""
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()  # what a stage has beside the model
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average what FSDP2 does not."""
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        for weight in self.lightning_module.parameters():
            if weight.grad is not None and not isinstance(weight.grad, DTensor):
                distributed.all_reduce(weight.grad)
                weight.grad /= self.world_size

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, whole, on the CPU."""
        return {name: whole(weight).cpu() for name, weight in _trained(self.lightning_module).items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put what was trained back."""
        trained = _trained(self.lightning_module)
        for name, tensor in checkpoint["state_dict"].items():
            put(trained[name], tensor)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state, whole, on the CPU."""
        own = Strategy.optimizer_state(self, optimizer)
        state: dict[str, Any] = apply_to_collection(own, Tensor, lambda tensor: whole(tensor).cpu())
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put the optimiser's state back, spread as its weights are."""
        Strategy.load_optimizer_state_dict(self, checkpoint)
        for optimizer in self.optimizers:
            for weight, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        state[name] = as_spread(value, weight)

    load_checkpoint = Strategy.load_checkpoint  # as from one device: every process reads it
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer


def _trained(module: LightningModule | None) -> dict[str, Tensor]:
    assert module is not None
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
