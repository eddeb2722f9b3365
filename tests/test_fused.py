"""The fused halves of a layer give what the plain code gives, gradients included."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spvla.model.attention import rotate
from spvla.model.kernels import lora as fused
from spvla.model.lora import LoraPair

BATCH, TOKENS, HEADS, HEAD, HIDDEN, RANK = 3, 25, 2, 32, 160, 16
WIDTH = HEADS * HEAD
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PLACES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("own_positions", [False, True])
def test_heads_are_adapted_and_rotated_as_by_the_plain_code(place: str, own_positions: bool) -> None:
    draw = drawing(place)
    weight, lora = adapted_maps(draw, WIDTH, [WIDTH] * 3)
    angles = draw(BATCH if own_positions else 1, TOKENS, 1, HEAD // 2)
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))

    def plain(h: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in adapted(h, weight, lora).split(WIDTH, -1))
        return tuple(t.transpose(1, 2) for t in (rotate(q, (cos, sin)), rotate(k, (cos, sin)), v))

    assert_equal(draw, plain, lambda h: fused.heads(h, weight, lora, cos, sin), [lora.a, lora.b])


@pytest.mark.parametrize("place", PLACES)
def test_the_gated_mlp_is_that_of_the_plain_code(place: str) -> None:
    draw = drawing(place)
    weight, lora = adapted_maps(draw, WIDTH, [HIDDEN] * 2)
    down, lora_down = adapted_maps(draw, HIDDEN, [WIDTH])

    def plain(h: Tensor) -> tuple[Tensor, ...]:
        gate, up = adapted(h, weight, lora).chunk(2, -1)
        return (adapted(F.silu(gate) * up, down, lora_down),)

    trained = [lora.a, lora.b, lora_down.a, lora_down.b]
    assert_equal(draw, plain, lambda h: (fused.gated_mlp(h, weight, lora, down, lora_down),), trained)


def test_dropout_and_missing_adapters_are_left_to_the_plain_code() -> None:
    draw = drawing("cpu")
    _, lora = adapted_maps(draw, WIDTH, [WIDTH])
    h = draw(2, 3, WIDTH)
    assert fused.fits(h, lora, lora)
    assert not fused.fits(h, lora, None)
    assert not fused.fits(h, replace(lora, dropout=0.1))


@pytest.mark.parametrize(("rank", "fits"), [(8, False), (16, True), (24, False), (32, True)])
def test_a_gpu_fuses_ranks_that_its_tiles_can_have(rank: int, fits: bool) -> None:
    rows = SimpleNamespace(is_cuda=True)
    lora = LoraPair(a=torch.empty(rank, 8), b=torch.empty(8, rank), scale=1.0, outs=(8,))
    assert fused.fits(rows, lora, head=64) is fits


Draw = Callable[..., Tensor]


def drawing(place: str) -> Draw:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(place)


def adapted_maps(draw: Draw, inputs: int, outs: list[int]) -> tuple[Tensor, LoraPair]:
    weight = draw(sum(outs), inputs) * inputs**-0.5
    a, b = draw(len(outs) * RANK, inputs) * inputs**-0.5, draw(sum(outs), RANK) * RANK**-0.5
    return weight, LoraPair(a=a.requires_grad_(), b=b.requires_grad_(), scale=0.5, outs=tuple(outs))


def adapted(x: Tensor, weight: Tensor, lora: LoraPair) -> Tensor:
    return lora.add(x, F.linear(x, weight))


Run = Callable[[Tensor], tuple[Tensor, ...]]


def assert_equal(draw: Draw, plain: Run, ours: Run, trained: list[Tensor]) -> None:
    """Results, and gradients of the rows and of everything trained."""
    h = draw(BATCH, TOKENS, WIDTH).requires_grad_()
    results = [plain(h), ours(h)]
    weights = [draw(*y.shape) for y in results[0]]
    wanted, got = (
        [*run, *torch.autograd.grad(sum((y * w).sum() for y, w in zip(run, weights, strict=True)), [h, *trained])]
        for run in results
    )
    for ours_, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-4)
