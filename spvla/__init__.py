"""Self-play fine-tuning and parallel LIBERO evaluation of vision-language-action models, on Ray.

    policy = spvla.load_policy("openvla/openvla-7b", device="cuda", dtype="bfloat16")
    seen = spvla.Observation(images=(image,), instruction="put the bowl on the plate")  # what `policy.needs` names
    actions = policy.act([seen], unnorm_key="libero_spatial")  # (B, K, 7) float64: the next K actions

    env = spvla.open_env("libero_spatial", 3)                                     # a task, to step through by oneself
    table = spvla.evaluate("CHECKPOINT", task_suite_name="libero_spatial")        # what the command does
    rows = spvla.Ledger.open("experiments/logs/ledger.sqlite").trials()           # what it found
    frames = spvla.FrameStore.open("datasets/libero_spatial_no_noops/index")  # what training reads

Importing does nothing; each name brings in what it needs when it is first used. Acting takes the package alone,
`open_env` and `evaluate` its extra [sim], `FrameStore` its extra [train].
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spvla.benchmarks.registry import open_env
    from spvla.data.store import FrameStore
    from spvla.eval.evaluate import evaluate_policies as evaluate
    from spvla.eval.ledger import Ledger
    from spvla.policies.registry import load_policy
    from spvla.types import Observation

__version__ = "0.1.0"
__all__ = ["FrameStore", "Ledger", "Observation", "evaluate", "load_policy", "open_env"]

_PLACES = {
    "FrameStore": "spvla.data.store:FrameStore",
    "Ledger": "spvla.eval.ledger:Ledger",
    "Observation": "spvla.types:Observation",
    "evaluate": "spvla.eval.evaluate:evaluate_policies",
    "load_policy": "spvla.policies.registry:load_policy",
    "open_env": "spvla.benchmarks.registry:open_env",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'spvla' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
