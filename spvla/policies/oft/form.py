"""What a policy of the OpenVLA-OFT family (arxiv.org/abs/2502.19645) takes and gives, beside its weights.

A checkpoint's config says none of it in the original, whose users give it as flags. Here a folder's own files tell what
they can, a marker in its config tells the rest for checkpoints that this project wrote, and flags must agree.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from spvla.errors import CheckpointError
from spvla.policies.openvla.actions import NUM_BINS
from spvla.types import ACTION_DIM, Needs

Head = Literal["discrete", "l1"]

CAMERAS = ("agentview", "robot0_eye_in_hand")  # in the order of their patches
CHUNK = 8  # LIBERO's
FAMILY = "oft"


@dataclass(frozen=True, kw_only=True)
class OftForm:
    """`head` "discrete": 7 x chunk action tokens, the most likely of each; "l1": an MLP regresses the actions."""

    cameras: int = 1  # 1: agentview; 2: the wrist's as well
    proprio: bool = False
    chunk: int = CHUNK  # K actions of one pass
    head: Head = "discrete"
    action_tokens_only: bool = False  # discrete: the 256 action tokens alone compete; in the original all 32064 do
    learned_slots: bool = False  # slots begin as rows of the embedding, one each; in the original as zeros

    @property
    def slots(self) -> int:
        """Positions of the sequence that stand for the chunk's numbers."""
        return self.chunk * ACTION_DIM

    def needs(self, execute: int | None = None) -> Needs:
        """`execute` of the chunk's actions are executed before the policy is asked again; by default all."""
        return Needs(
            cameras=CAMERAS[: self.cameras], proprio=self.proprio, chunk=self.chunk, execute=execute or self.chunk
        )

    def to_json(self) -> dict[str, Any]:
        """The marker: `config.json`'s (or an adapter's spvla.json's) entry "spvla"."""
        return {"family": FAMILY, **asdict(self)}

    @classmethod
    def from_json(cls, marker: dict[str, Any]) -> "OftForm":
        """Inverse of `to_json`. Raises CheckpointError."""
        try:
            form = cls(**{k: v for k, v in marker.items() if k != "family"})
            whole = all(type(n) is int and n > 0 for n in (form.cameras, form.chunk)) and form.slots <= NUM_BINS
        except TypeError:
            whole = False
        if not whole or form.cameras > len(CAMERAS) or form.head not in get_args(Head):
            raise CheckpointError(
                f"a config with spvla = {marker}",
                expected=f"cameras of 1 or {len(CAMERAS)}, proprio, a chunk of 1 to 36, head discrete or l1",
                remedy="Take the config that was written with the checkpoint.",
            )
        return form
