"""What OpenVLA-OFT adds to OpenVLA's weights: a projector of the robot's state, and a head that regresses a chunk.

Parameter names are those of the original's files, after the `module.` that its data-parallel wrapper puts in front.

Legend: B batch, K chunk, A action dims (7), D width of the language model.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from spvla.policies.oft.form import PROPRIO_DIM
from spvla.types import ACTION_DIM

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
