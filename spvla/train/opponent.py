"""The opponent: scores the real action, and plays its own.

One pass scores the real action, and the keys and values left behind serve to decode its own reply, whose log-probs fall
out of the decoding.
"""

import torch
from torch import Tensor

from spvla.train.blocks import Rows
from spvla.train.network import Cache, Loras, Network
from spvla.train.scoring import FED, Inputs, Reply, Speech, score_real
from spvla.types import ACTION_DIM


class Opponent:
    """Answers a prompt with an action of its own, drawn token after token."""

    def __init__(self, network: Network, loras: Loras, speech: Speech) -> None:
        self.network, self.loras, self.speech = network, loras, speech

    @torch.no_grad()
    def reply(self, inputs: Inputs, uniforms: Tensor) -> Reply:
        """`uniforms` (B, A) in [0, 1) decide what is sampled; greedy decoding ignores them.

        Scores the real action, then decodes over the keys and values of its prompt, overwriting the action's.
        """
        cache: Cache = []
        scored = score_real(self.network, inputs, self.loras, cache=cache)[:, :ACTION_DIM]
        logits, ids, logps = scored[:, 0], [], []
        for step in range(ACTION_DIM):
            ids.append(self.speech.choose(logits, uniforms[:, step]))
            logps.append(self.speech.logps(logits, ids[-1]))
            if step < FED:
                logits = self._next(ids[-1], inputs.first + 1 + step, cache)
        return Reply(
            generated=torch.stack(ids, 1),
            real_logps=self.speech.logps(scored, inputs.real),
            generated_logps=torch.stack(logps, 1),
        )

    def _next(self, ids: Tensor, at: Tensor, cache: Cache) -> Tensor:
        """Feeds one token each at row `at` (B,): (B,) ids -> (B, V) logits."""
        cos, sin = self.network.rotary(at[:, None])
        rows = Rows(cos=cos, sin=sin, mask=None, extra=0)
        hidden = self.network.decode_hidden(self.network.embed(ids[:, None]), rows, self.loras, cache=cache, at=at)
        return self.network.logits(hidden[:, 0], self.loras)
