"""What is trained, as one flat vector: a LoRA adapter with what a form adds to OpenVLA, or every weight.

Optimiser, clipping, averaging over workers and the moving average each are then one operation on one vector.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from spvla.model.linear import NamedMap, joined_maps
from spvla.model.lora import LoraPair
from spvla.model.lora_file import LoraFile
from spvla.model.openvla import OpenVLA, never_runs


class Flat:
    """Trained (or averaged) tensors as one vector.

    `master` (N,) float32 is what is trained; `compute` is its copy in the dtype of the matrix products (the same tensor
    where that is float32), and holds the leaves of every backward pass. After changing `master`, `refresh`.
    """

    def __init__(self, tensors: Sequence[Tensor], *, dtype: torch.dtype, trainable: bool) -> None:
        self.shapes = [tuple(t.shape) for t in tensors]
        self.master = torch.cat([t.detach().float().flatten() for t in tensors])
        self.compute = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.trainable = trainable
        self.trained: list[Tensor] = []  # `compute` in parts, as gradients are taken

    @torch.no_grad()
    def refresh(self) -> None:
        if self.compute is not self.master:
            self.compute.copy_(self.master)

    def add_gradient(self, objective: Tensor, total: Tensor) -> None:
        """Adds the gradient of `objective` () to `total` (N,) float32."""
        grads = torch.autograd.grad(objective, self.trained, materialize_grads=True)
        total.add_(torch.cat([grad.flatten() for grad in grads]))

    def matrices(self) -> Tensor:
        """(N,) bool: what belongs to tensors of two dimensions or more, so not to norms, biases and scales."""
        sizes = torch.tensor([math.prod(shape) for shape in self.shapes])
        kinds = torch.tensor([len(shape) > 1 for shape in self.shapes])
        return kinds.repeat_interleave(sizes).to(self.master.device)

    @torch.no_grad()
    def load(self, values: Tensor) -> None:
        self.master.copy_(values)
        self.refresh()

    def leaves(self, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Cuts `compute` into tensors that autograd treats as parameters."""
        sizes = [math.prod(shape) for shape in shapes]
        leaves = [part.view(shape).detach() for part, shape in zip(self.compute.split(sizes), shapes, strict=True)]
        if self.trainable:
            self.trained = [leaf.requires_grad_() for leaf in leaves]
        return leaves

    @contextmanager
    def attached(self, *, dropout: float = 0.0) -> Iterator[None]:
        """Within the block the model acts with these numbers; dropout on the adapter's inputs, if it is one."""
        yield


class FlatWeights(Flat):
    """Every weight that takes part in a pass. The model's parameters become views of `compute`."""

    def __init__(self, model: OpenVLA) -> None:
        parameters = [p for name, p in model.named_parameters() if not never_runs(model.config, name)]
        super().__init__(parameters, dtype=model.dtype, trainable=True)
        for parameter, leaf in zip(parameters, self.leaves(self.shapes), strict=True):
            parameter.data = leaf.data
            parameter.requires_grad_()
        self.trained = parameters


class Bare:
    """The model without an adapter, and with what its form adds as it is now, whatever is trained later."""

    def __init__(self, model: OpenVLA) -> None:
        self.added = added_parameters(model)
        self.own = [parameter.detach().clone() for parameter in self.added]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block the model acts so."""
        with valued(self.added, self.own):
            yield


class FlatLora(Flat):
    """An adapter on a model, from what a file holds. Raises CheckpointError where the file does not fit the model.

    Of joined maps the factors lie together: A (n r, in), then B (out, r). Maps that never run are not trained; they
    keep what the file has, so that an adapter is written as whole as it was read. Behind the factors stand the weights
    that the model's form adds to OpenVLA (heads, projectors), trained in full.
    """

    def __init__(self, model: OpenVLA, file: LoraFile, *, trainable: bool) -> None:
        file.require_all(model)
        self.file = file
        self.maps = {path: maps for path, maps in joined_maps(model).items() if not never_runs(model.config, path)}
        self.added = added_parameters(model)
        factors = [t.to(model.device) for _, t in self._factors()]
        super().__init__([*factors, *self.added], dtype=model.dtype, trainable=trainable)
        stacked = [shape for maps in self.maps.values() for shape in self._stacked(maps)]
        every = self.leaves([*stacked, *(tuple(p.shape) for p in self.added)])
        self.own = every[len(stacked) :]  # this adapter's values of what is added
        if trainable:  # gradients are taken at the model's own parameters, which become views of `compute`
            for parameter, leaf in zip(self.added, self.own, strict=True):
                parameter.data = leaf.data
                parameter.requires_grad_()
            self.trained = [*every[: len(stacked)], *self.added]
        leaves = iter(every)
        self.pairs = {
            path: LoraPair(
                a=next(leaves), b=next(leaves), scale=file.scale, outs=tuple(named.outputs for named in maps)
            )
            for path, maps in self.maps.items()
        }

    @contextmanager
    def attached(self, *, dropout: float = 0.0) -> Iterator[None]:
        modules = {path: maps[0].module for path, maps in self.maps.items()}
        before = {path: module.lora for path, module in modules.items()}
        for path, module in modules.items():
            module.lora = replace(self.pairs[path], dropout=dropout) if dropout else self.pairs[path]
        try:
            with valued(self.added, self.own):
                yield
        finally:
            for path, module in modules.items():
                module.lora = before[path]

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within the block what is added has the values that are trained, in float32: to be written."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = self.master.split(sizes)[len(sizes) - len(self.added) :]
        with valued(self.added, [part.view(p.shape) for part, p in zip(parts, self.added, strict=True)]):
            yield

    def to_file(self) -> LoraFile:
        """What is trained, as it is now."""
        parts = self.master.split([math.prod(shape) for shape in self.shapes])
        keys = [key for key, _ in self._factors()]  # behind them stands what is added
        now = {key: part.view(shape) for key, part, shape in zip(keys, parts, self.shapes, strict=False)}
        factors = {name: (now.get((name, 0), a), now.get((name, 1), b)) for name, (a, b) in self.file.factors.items()}
        return replace(self.file, factors=factors, base={})

    def _factors(self) -> Iterator[tuple[tuple[str, int], Tensor]]:
        """((map, 0), A) and ((map, 1), B) of the file, in the order of the vector."""
        for maps in self.maps.values():
            for which in (0, 1):
                for named in maps:
                    yield (named.name, which), self.file.factors[named.name][which]

    def _stacked(self, maps: Sequence[NamedMap]) -> list[tuple[int, int]]:
        """Shapes of A and B of joined maps."""
        rank = self.file.rank
        return [(len(maps) * rank, maps[0].shape[1]), (sum(named.outputs for named in maps), rank)]


def added_parameters(model: OpenVLA) -> list[nn.Parameter]:
    return [parameter for module in model.added().values() for parameter in module.parameters()]


@contextmanager
def valued(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the parameters hold these values, in the values' own memory."""
    before = [parameter.data for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.data
    try:
        yield
    finally:
        for parameter, kept in zip(parameters, before, strict=True):
            parameter.data = kept
