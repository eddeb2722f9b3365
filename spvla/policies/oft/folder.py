"""What an OpenVLA-OFT checkpoint is, as its folder shows and flags say.

CHECKPOINT/  as plain OpenVLA's, and beside it action_head--N_checkpoint.pt (L1), proprio_projector--N_checkpoint.pt,
             and statistics with `proprio`
ADAPTER/     an adapter over a base, with the same .pt files, trained in full beside it

Nothing in the original's config tells this family from plain OpenVLA, nor how many images it sees. Folders that this
project writes carry their form as entry "spvla" of config.json (an adapter: of spvla.json).
"""

from pathlib import Path
from typing import Any

from spvla.errors import CheckpointError, UserError
from spvla.policies.oft.form import CAMERAS, CHUNK, OftForm
from spvla.policies.oft.parts import find_part, marker
from spvla.policies.registry import NO_FLAGS, PolicyFlags

ACTION_HEAD, PROPRIO_PROJECTOR = "action_head", "proprio_projector"
UNSUPPORTED = {"vision_backbone": "FiLM", "noisy_action_projector": "a diffusion head"}  # part -> what it belongs to


def form_of(folder: Path, flags: PolicyFlags = NO_FLAGS) -> OftForm | None:
    """The form of a checkpoint (or adapter) folder; None for plain OpenVLA.

    What the folder shows and what the flags say must agree. A folder that shows nothing is plain OpenVLA, unless a flag
    asks for what that never does: then it holds only tokens, as SimpleVLA-RL's do. Raises UserError.
    """
    for part, owner in UNSUPPORTED.items():
        if find_part(folder, part) is not None:
            raise CheckpointError(
                f"{folder} of a policy with {owner}",
                expected="an OpenVLA-OFT policy with a discrete or an L1 head",
                remedy="Give another checkpoint.",
            )
    marked, files = marker(folder), _shown(folder)
    if marked is None and not any(files.values()) and not _asks_for_chunks(flags):
        return None
    if marked is None:
        cameras = flags.num_images_in_input or (len(CAMERAS) if any(files.values()) else 1)
        marked = OftForm(cameras=cameras, chunk=CHUNK, **_kind(files))
    elif any(getattr(marked, name) != value for name, value in _kind(files).items()):
        raise CheckpointError(
            f"{folder} with {', '.join(part for part, there in files.items() if there) or 'no .pt files'}",
            expected=f"those of {marked}, as its config says",
            remedy="Copy the checkpoint again from its source.",
        )
    _require_agreement(folder, marked, flags)
    return marked


def _asks_for_chunks(flags: PolicyFlags) -> bool:
    return max(flags.num_images_in_input or 1, flags.num_open_loop_steps or 1) > 1


def _shown(folder: Path) -> dict[str, bool]:
    return {part: find_part(folder, part) is not None for part in (ACTION_HEAD, PROPRIO_PROJECTOR)}


def _kind(files: dict[str, bool]) -> dict[str, Any]:
    return {"proprio": files[PROPRIO_PROJECTOR], "head": "l1" if files[ACTION_HEAD] else "discrete"}


def _require_agreement(folder: Path, form: OftForm, flags: PolicyFlags) -> None:
    """Raises UserError on the first flag that says otherwise than the folder."""
    said = {
        "use_l1_regression": (flags.use_l1_regression, form.head == "l1"),
        "num_images_in_input": (flags.num_images_in_input, form.cameras),
        "use_proprio": (flags.use_proprio, form.proprio),
    }
    for flag, (value, shown) in said.items():
        if value is not None and value != shown:
            raise UserError(
                f"--{flag} {value} for {folder}",
                expected=f"{shown}, as the folder's own files show",
                remedy=f"Leave --{flag} out, or give the checkpoint that it is for.",
            )
    if flags.num_open_loop_steps is not None and not 1 <= flags.num_open_loop_steps <= form.chunk:
        raise UserError(
            f"--num_open_loop_steps {flags.num_open_loop_steps} for {folder}",
            expected=f"1 to {form.chunk}, the actions of its chunk",
            remedy="Correct it; the chunk's first actions are executed.",
        )


def form_to_train(folder: Path, flags: PolicyFlags) -> OftForm | None:
    """As `form_of`; but flags may make a new form of what is plain OpenVLA so far. Raises UserError."""
    shown = form_of(folder)
    if shown is not None or flags == NO_FLAGS:
        return form_of(folder, flags)
    return OftForm(
        cameras=flags.num_images_in_input or 1,
        proprio=bool(flags.use_proprio),
        head="l1" if flags.use_l1_regression else "discrete",
    )
