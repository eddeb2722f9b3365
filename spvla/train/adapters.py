"""LoRA adapters as one flat float32 vector, and the frozen linear maps ("sites") they sit on.

A site is a linear map of the model, or several that read the same input (q, k, v; gate, up), so that one matrix product
serves them all. An adapter holds, for each site, A (n r, in) and B (out, r), n maps of rank r stacked:
    y = x W' + b + scale (x A') spread(B)'        spread puts the n parts of B on a block diagonal
Peft's own parameters become views of the flat vector: what is trained here is what peft saves, and optimiser, clipping,
averaging over workers and the moving average each are one operation on one vector.
Source of the form: LoRA, arxiv.org/abs/2106.09685.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.errors import UserError


class Site(NamedTuple):
    """The frozen part. `outs` are the output sizes of the maps stacked in `weight`."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    outs: tuple[int, ...]


class Lora(NamedTuple):
    """The trained part of one site."""

    a: Tensor  # (n r, in)
    b: Tensor  # (out, r)
    scale: float
    dropout: float  # 0 outside training


def adapted(x: Tensor, site: Site, lora: Lora | None) -> Tensor:
    """(..., in) -> (..., out)."""
    if lora is None:
        return F.linear(x, site.weight, site.bias)
    y = F.linear(x, site.weight)
    if site.bias is not None:
        y = y + site.bias  # in one step with LoRA's sum
    if lora.dropout:
        x = F.dropout(x, lora.dropout)
    narrow = lora.scale * F.linear(x, lora.a)  # (..., n r)
    b = lora.b if len(site.outs) == 1 else torch.block_diag(*lora.b.split(site.outs))  # (out, n r)
    return y + F.linear(narrow, b)


def fuse(modules: Sequence[nn.Module]) -> Site:
    """Stacks the weights of linear (or patch-convolution) maps; theirs become views, so no weight is held twice."""
    maps = [base_layer(m) for m in modules]
    outs = tuple(len(m.weight) for m in maps)
    bias = None if maps[0].bias is None else maps[0].bias.data
    if len(maps) == 1:
        return Site(maps[0].weight.data.flatten(1), bias, outs)
    assert bias is None, "the maps that Llama stacks have no bias"
    site = Site(torch.cat([m.weight.data for m in maps]), None, outs)
    point_at(modules, site)
    return site


def point_at(modules: Sequence[nn.Module], site: Site) -> None:
    """Makes the modules' weights views of the site's."""
    for module, rows in zip(modules, site.weight.detach().split(site.outs), strict=True):
        base = base_layer(module)
        base.weight.data = rows.view(base.weight.shape)
        if site.bias is not None:
            base.bias.data = site.bias.detach()


def base_layer(module: nn.Module) -> nn.Module:
    """The map under a peft layer, or the module itself."""
    return getattr(module, "base_layer", module)


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


class Adapter(Flat):
    """One named adapter of a peft model, over the sites of a network; or, with `bind` False, a copy of its values."""

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Sequence[nn.Module]],  # site -> the modules it stacks
        *,
        dtype: torch.dtype,
        trainable: bool,
        bind: bool = True,
    ) -> None:
        found = {site: pairs for site, modules in parts.items() if (pairs := _pairs(site, modules, name))}
        if not found:
            raise UserError(
                f"a model without an adapter named {name}",
                expected="LoRA on the linear maps of the language model and the towers",
                remedy="Add one with spvla.policies.checkpoint.add_lora.",
            )
        stacked = [ts for pairs in found.values() for ts in ([p.a for p in pairs], [p.b for p in pairs])]
        parameters = [t for ts in stacked for t in ts]
        super().__init__(parameters, dtype=dtype, trainable=trainable)
        if bind:
            _point_into(parameters, self.master)
        leaves = iter(self.leaves([(sum(len(t) for t in ts), ts[0][0].numel()) for ts in stacked]))
        self._loras = {site: Lora(next(leaves), next(leaves), pairs[0].scale, 0.0) for site, pairs in found.items()}

    def lora(self, site: str, dropout: float = 0.0) -> Lora | None:
        """The site's leaves, or None where this adapter does not reach."""
        lora = self._loras.get(site)
        return lora._replace(dropout=dropout) if lora is not None and dropout else lora

    def digest(self) -> str:
        """sha256 of sites, shapes, scales and values: equal for equal behaviour."""
        meaning = [(site, tuple(lora.a.shape), tuple(lora.b.shape), lora.scale) for site, lora in self._loras.items()]
        return hashlib.sha256(repr(meaning).encode() + self.master.cpu().numpy().tobytes()).hexdigest()


class _Pair(NamedTuple):
    a: nn.Parameter  # (r, in), or (r, 3, 14, 14) at a patch convolution
    b: nn.Parameter  # (out, r), or (out, r, 1, 1)
    scale: float


def _pairs(site: str, modules: Sequence[nn.Module], name: str) -> list[_Pair]:
    """Peft's LoRA parameters of a site's maps; empty where the adapter does not reach."""
    having = [m for m in modules if name in getattr(m, "lora_A", {})]
    if having and len(having) < len(modules):
        raise UserError(
            f"adapter {name} on {len(having)} of the {len(modules)} maps of {site}",
            expected="all-linear LoRA, as OpenVLA's fine-tuning makes it",
            remedy="Merge that adapter into its base, and start from the merged model.",
        )
    return [_Pair(m.lora_A[name].weight, m.lora_B[name].weight, float(m.scaling[name])) for m in having]


def has_adapter(parts: Mapping[str, Sequence[nn.Module]], name: str) -> bool:
    return any(name in getattr(m, "lora_A", {}) for modules in parts.values() for m in modules)


def _point_into(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Makes each parameter a view of its part of `flat`."""
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.view(parameter.shape)
        parameter.requires_grad_(False)  # the leaves are the Adapter's own
