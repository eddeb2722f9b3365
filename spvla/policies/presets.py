"""Every policy that can be made by name, at random weights."""

from pathlib import Path

from spvla.policies.oft import presets as oft
from spvla.policies.openvla import presets as openvla

PRESETS = (*openvla.PRESETS, *oft.PRESETS)


def create_preset(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Writes the checkpoint of a name in PRESETS; equal seeds give equal policies."""
    family = oft if name in oft.PRESETS else openvla
    return family.create_preset(folder, name, seed=seed)
