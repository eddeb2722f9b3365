"""How many environments and policy actors a cluster should carry. Pure arithmetic."""

import math
from dataclasses import dataclass

DECODER_CPUS = 0.01  # a policy actor on the CPU: next to nothing booked, so that it fits beside the environments
ENV_CPUS = 0.99
ENVS_PER_DECODER = 32  # asked for where machines come on demand: what one H200 decodes for (docs/operations.md)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    envs: int
    decoders: int
    env_cpus: float  # booked for each environment
    device: str  # "cpu" or "cuda", for the policy actors


def sizes(*, cpus: float, gpus: float, num_envs: int, num_decoders: int, on_demand: bool = False) -> Sizes:
    """`num_envs` and `num_decoders` as the flags give them, 0 for by default.

    By default each GPU gets a policy actor and each CPU that those leave an environment; on a CPU-only cluster one
    policy actor shares the CPUs with the environments, of which there are then two at least, because a lone one
    leaves a core idle whenever it waits. More environments than CPUs share them.

    `on_demand`: machines are started for who asks, `cpus` and `gpus` in all at most. Then the default is one policy
    actor and the environments that keep it busy, rather than every machine that there could be.
    """
    device = "cuda" if gpus >= 1 else "cpu"
    if on_demand:
        decoders = num_decoders or 1
        envs = num_envs or max(2, int(min(cpus, ENVS_PER_DECODER * decoders)))
    else:
        decoders = num_decoders or (int(gpus) if device == "cuda" else 1)
        envs = num_envs or max(2, int(cpus) - decoders)
    share = (cpus - decoders * DECODER_CPUS) / envs if 0 < cpus < math.inf else ENV_CPUS
    return Sizes(
        envs=envs,
        decoders=decoders,
        env_cpus=max(0.01, min(ENV_CPUS, math.floor(share * 100) / 100)),
        device=device,
    )


def decode_batch_size(sizes: Sizes) -> int:
    """Half of the environments that share a policy actor: one half steps while the other is decoded.

    An odd number is rounded up on a GPU, where a larger batch costs hardly more, and down on a CPU, where each row has
    its price, that of a row filled up included.
    """
    half = sizes.envs / sizes.decoders / 2
    return max(1, math.floor(half) if sizes.device == "cpu" else math.ceil(half))
