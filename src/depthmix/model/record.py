"""`routing`: a context manager that records what the router does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depthmix.errors import DepthmixError
from depthmix.model.runtime import runtime_of


@dataclass
class RoutingRecord:
    """Gates that `routing` collected.

    Attributes:
        layers: places of the k late layers in the model's list of layers.
        gates: one tensor (batch, tokens, k) a forward, detached; (batch, k) of a classifier that
            pools its tokens. Padding is not left out.
    """

    layers: tuple[int, ...]
    gates: list[Float[Tensor, "b *t k"]] = field(default_factory=list)

    def mean(self) -> Float[Tensor, " k"]:
        """Return the mean weight of each late layer over all recorded tokens.

        Raises:
            DepthmixError: nothing was recorded.
        """
        if not self.gates:
            raise DepthmixError("no forward was recorded: run the model within the block")
        return torch.cat([gate.flatten(0, -2) for gate in self.gates]).mean(dim=0)


@contextmanager
def routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the gate of every forward of `model` within the block.

    Example::

        with depthmix.routing(model) as record:
            model.generate(**inputs)
        record.mean()                      # (k,)

    A forward in training mode with labels makes no mixture of all tokens and is not recorded.

    Raises:
        DepthmixError: no MoDE is attached to the model.
    """
    runtime = runtime_of(model)
    record = RoutingRecord(runtime.anatomy.layer_indices)
    runtime.records.append(record.gates)
    try:
        yield record
    finally:
        # By identity: two empty lists are equal.
        runtime.records = [gates for gates in runtime.records if gates is not record.gates]
