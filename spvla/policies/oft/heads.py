"""What OpenVLA-OFT adds to OpenVLA's weights: a projector of the robot's state, and a head that regresses a chunk.

Parameter names are those of the original's files, after the `module.` that its data-parallel wrapper puts in front.

Legend: B batch, K chunk, A action dims (7), D width of the language model.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.policies.oft.form import OftForm
from spvla.types import ACTION_DIM, PROPRIO_DIM

BLOCKS = 2  # residual blocks of the action head


class ProprioProjector(nn.Module):
    """The normalised state becomes one embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(PROPRIO_DIM, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, proprio: Tensor) -> Tensor:
        """(B, 8) -> (B, D)."""
        return self.fc2(F.gelu(self.fc1(proprio)))


class ActionHead(nn.Module):
    """Each action is regressed from the seven hidden states that stand for it; neither squashed nor clipped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = _Mlp(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, K A, D) -> normalised actions (B, K, A)."""
        return self.model(hidden.unflatten(1, (-1, ACTION_DIM)).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(ACTION_DIM * width)
        self.fc1 = nn.Linear(ACTION_DIM * width, width)
        self.mlp_resnet_blocks = nn.ModuleList(_Residual(width) for _ in range(BLOCKS))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, ACTION_DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


def make_added(form: OftForm, width: int, *, seed: int) -> dict[str, nn.Module]:
    """What a form adds to OpenVLA, at random weights, by the names of a checkpoint's files."""
    wanted = {"action_head": form.head == "l1", "proprio_projector": form.proprio}
    kinds = {"action_head": ActionHead, "proprio_projector": ProprioProjector}
    added = {name: kinds[name](width) for name, is_wanted in wanted.items() if is_wanted}
    for name, module in added.items():
        _initialise(module, f"{seed}:{name}")
    return added


@torch.no_grad()
def _initialise(module: nn.Module, seed: str) -> None:
    """Unit variance through every map, from generators seeded by name, so that order does not matter."""
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear):
            digest = hashlib.sha256(f"{seed}.{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / linear.in_features**0.5)
            linear.bias.zero_()
