"""The opponent: scores the real action, and plays its own.

One pass scores the real action, and the keys and values left behind serve to decode its own reply, whose log-probs fall
out of the decoding.
"""

import torch
from torch import Tensor

from spvla.model.llama import KeysValues
from spvla.train.network import Network
from spvla.train.scoring import FED, Inputs, ReferenceOutput, TokenSampler, score_real
from spvla.types import ACTION_DIM


class Opponent:
    """Answers a prompt with an action of its own, drawn token after token."""

    def __init__(self, network: Network, sampler: TokenSampler) -> None:
        self.network, self.sampler = network, sampler

    @torch.no_grad()
    def reply(self, inputs: Inputs, uniforms: Tensor) -> ReferenceOutput:
        """`uniforms` (B, A) in [0, 1) decide what is sampled; greedy decoding ignores them.

        Scores the real action, then decodes over the keys and values of its prompt, overwriting the action's.
        """
        caches: list[KeysValues] = []
        scored = score_real(self.network, inputs, caches=caches)[:, :ACTION_DIM]
        logits, ids, logps = scored[:, 0], [], []
        for step in range(ACTION_DIM):
            ids.append(self.sampler.choose(logits, uniforms[:, step]))
            logps.append(self.sampler.logps(logits, ids[-1]))
            if step < FED:
                logits = self._next(ids[-1], inputs.first + 1 + step, caches)
        return ReferenceOutput(
            generated=torch.stack(ids, 1),
            real_logps=self.sampler.logps(scored, inputs.real),
            generated_logps=torch.stack(logps, 1),
        )

    def _next(self, ids: Tensor, at: Tensor, caches: list[KeysValues]) -> Tensor:
        """Feeds one token each at row `at` (B,): (B,) ids -> (B, V) logits."""
        hidden = self.network.step(self.network.embed(ids[:, None]), at, caches)
        return self.network.logits(hidden[:, 0])
