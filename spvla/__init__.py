"""Self-play fine-tuning and parallel LIBERO evaluation of vision-language-action models, on Ray.

    policy = spvla.load_policy("openvla/openvla-7b", device="cuda", dtype="bfloat16")
    seen = spvla.Observation(images=(image,), instruction="put the bowl on the plate")  # what `policy.needs` names
    actions = policy.act([seen], unnorm_key="libero_spatial")  # (B, K, 7) float64: the next K actions

Importing does nothing; `load_policy` brings torch in when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spvla.policies.registry import load_policy
    from spvla.types import Observation

__version__ = "0.1.0"
__all__ = ["Observation", "load_policy"]


def __getattr__(name: str) -> Any:
    if name == "load_policy":
        from spvla.policies.registry import load_policy

        return load_policy
    if name == "Observation":
        from spvla.types import Observation

        return Observation
    raise AttributeError(f"module 'spvla' has no attribute {name!r}")
