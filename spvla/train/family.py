"""What a training step asks of a policy family, and which families there are.

A family scores an action that it is shown, and proposes one of its own. Everything else of a step (vision towers,
adapters, losses, optimiser) is common. Its file stands beside this one, its model's class in FAMILIES below; weights
that it trains beside OpenVLA's are modules of that class.

Legend: B batch, C cameras, K chunk, A action tokens (7 K), R rows with logits, V vocabulary, D width.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from spvla.model.openvla import OpenVLA
from spvla.policies.oft.network import OpenVLAOFT
from spvla.train.chunks import chunks_of
from spvla.train.network import Network
from spvla.train.opponent import Opponent
from spvla.train.scoring import Inputs, PairLogits, ReferenceOutput, TokenSampler, score_pair, score_real
from spvla.types import Needs


class Family(Protocol):
    """One family's passes over a network, with the adapter that is attached; gradients flow where torch records them.

    `patches` (B C, 256, D) are the projected patches of all images, if the caller has them already.
    """

    needs: Needs  # what its batches hold
    regresses: bool  # numbers instead of tokens: then it has `regress` alone, and only behaviour cloning trains it

    def score(self, inputs: Inputs, *, patches: Tensor | None = None) -> Tensor:
        """Logits (B, R, V) of `inputs.targets` (B, R): the demonstrated action's A tokens, then what else has loss."""

    def score_pair(self, inputs: Inputs, generated: Tensor, *, patches: Tensor | None = None) -> PairLogits:
        """The same, and logits (B, A, V) of another action `generated` (B, A), in one pass."""

    def regress(self, inputs: Inputs, *, patches: Tensor | None = None) -> Tensor:
        """Normalised actions (B, K, 7) float32."""

    def propose(self, inputs: Inputs, sampler: TokenSampler, uniforms: Tensor) -> ReferenceOutput:
        """An action of its own, drawn by `uniforms` (B, A) in [0, 1), and the log-probs of both. No gradient."""


class OneStep:
    """OpenVLA itself: seven tokens, one after another, and the end of sequence. R = A + 1 = 8."""

    needs = Needs()
    regresses = False

    def __init__(self, network: Network) -> None:
        self.network = network

    def score(self, inputs: Inputs, *, patches: Tensor | None = None) -> Tensor:
        return score_real(self.network, inputs, patches=patches)

    def score_pair(self, inputs: Inputs, generated: Tensor, *, patches: Tensor | None = None) -> PairLogits:
        return score_pair(self.network, inputs, generated, patches=patches)

    def propose(self, inputs: Inputs, sampler: TokenSampler, uniforms: Tensor) -> ReferenceOutput:
        return Opponent(self.network, sampler).reply(inputs, uniforms)


FAMILIES: dict[type[nn.Module], Callable[[Network], Family]] = {OpenVLA: OneStep, OpenVLAOFT: chunks_of}


def needs_of(model: OpenVLA) -> Needs:
    """What a model looks at and answers with."""
    return model.form.needs() if isinstance(model, OpenVLAOFT) else OneStep.needs


def family_of(network: Network) -> Family:
    """By the class of the model."""
    return FAMILIES[type(network.model)](network)
