"""Policies of chunks at random weights, for those who begin with nothing: plain presets, and what their form adds.

Both cameras, proprio, chunks of eight; the discrete head, among whose tokens only actions compete, because no other was
ever an answer; and slots with an embedding each, because a small network that starts from nothing learns slowly to tell
slots apart by their position alone, which is all that zero vectors leave it.
"""

from pathlib import Path

from spvla.files import new_folder
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.heads import make_added
from spvla.policies.oft.parts import write_added
from spvla.policies.openvla import presets

FORM = OftForm(cameras=2, proprio=True, action_tokens_only=True, learned_slots=True)
PRESETS = {"small-oft": "small", "tiny-oft": "tiny"}  # name -> the plain preset that it is made of


def create_preset(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Writes a checkpoint; equal seeds give equal numbers."""
    plain = PRESETS[name]
    with new_folder(folder) as new:
        presets.create_preset(new, plain, seed=seed)
        width = presets.preset(plain).llm.width
        write_added(make_added(FORM, width, seed=seed), FORM, new)
    return folder
