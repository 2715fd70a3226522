"""How much memory a device needs for a stage, and how much fits into what it has.

A device holds weights, and what a stage makes beside them:

    needed(batch) = weights + beside(batch)

Weights. Where each device holds the whole model (`ddp`), those are all P bytes. Where blocks are sharded over N
devices (`fsdp`, `fsdp2`), embeddings, head and the last norm (E bytes) stay whole, a device keeps its N-th part of
the blocks, and while one block works the next is gathered:

    weights = E + (P − E) / N + 2 · the largest block

Beside. What is alive at once in the stage's fullest step: activations that the backward pass reads, logits over the
vocabulary, gradients, Adam's two moments, what solves for a weight. It is not worked out but counted, as
`pipeline.planning.alive` says. Devices that train together under `ddp` hold their trained weights' gradients twice:
they are sent from buffers of their own. Of sharded weights that are trained, gradients and moments are counted as
if they were whole, which is more than is needed.

Longest batch. beside(batch) is a constant and a share for each request, so two batches tell the line. Stages that
stop at so many tokens take no more memory for a longer batch.

Not counted: what Python and the libraries take themselves (a CUDA context is near 0.5 GB), what an allocator keeps
in reserve, and what is kept in the host's memory for each request.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor

from pipeline.options.shared import SHARDED
from pipeline.planning.shape import Shape

GATHERED = 2  # blocks: the one at work and the next
FURTHER = 4  # times the batch: where the line is looked at again


def weight_bytes(shape: Shape, strategy: str, devices: int) -> int:
    """Bytes of weights that a device holds while it works."""
    everything = sum(map(_bytes, shape.held()))
    if strategy not in SHARDED or devices == 1:
        return everything
    blocks = [sum(map(_bytes, shape.model.get_submodule(block.name).parameters())) for block in shape.blocks]
    return everything - sum(blocks) + -(-sum(blocks) // devices) + min(GATHERED, len(blocks)) * max(blocks)


def longest_batch(beside: Callable[[int], int], batch: int, room: int, most: int | None = None) -> int:
    """The most requests whose bytes beside the weights fit into `room`; 0 where not even one does.

    Args:
        beside: bytes by requests; never fewer for more of them.
        batch: what was asked for.
        room: bytes.
        most: where more would not run at once, how many do.
    """
    beside = cache(beside)
    if beside(batch) > room:
        fitting, too_many = 0, batch
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            fitting, too_many = (middle, too_many) if beside(middle) <= room else (fitting, middle)
        return fitting
    if most is not None and beside(most) <= room:
        return most
    further = min(most or FURTHER * batch, FURTHER * batch)
    share = (beside(further) - beside(batch)) / (further - batch)
    return batch + int((room - beside(batch)) / share)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
