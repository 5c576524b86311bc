"""Which process this is of those that train one manifold together (torchrun). Knows no training."""

from __future__ import annotations

import torch.distributed as dist


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1
