"""Plain OpenVLA in the registry of families: one image, one step, and nothing beside the model's own weights."""

from pathlib import Path

from spvla.errors import CheckpointError, UserError
from spvla.model.lora_file import STATISTICS
from spvla.model.weights import open_weights, read_json
from spvla.policies.checkpoint import load_model, norm_stats, read_config
from spvla.policies.openvla.policy import OpenVLAPolicy
from spvla.policies.openvla.prompt import load_tokenizer
from spvla.policies.registry import PLAIN_OPENVLA, Description, PolicyFlags

ONLY = PolicyFlags(use_l1_regression=False, num_images_in_input=1, use_proprio=False, num_open_loop_steps=1)
FOREIGN = "*_checkpoint.pt"  # a part of another family, which plain OpenVLA would leave out and act as somebody else


def describe(base: Path, adapter: Path | None, flags: PolicyFlags) -> Description:
    """Raises CheckpointError for a folder of another kind of model, UserError for flags that OpenVLA cannot heed."""
    open_weights(base)  # headers only
    read_config(base)
    for folder in (base, *([adapter] if adapter else [])):
        if foreign := sorted(folder.glob(FOREIGN)):
            raise CheckpointError(
                f"{folder} with {foreign[0].name}",
                expected="a plain OpenVLA checkpoint, or a family that knows this file",
                remedy="Give a checkpoint of a family that is supported.",
            )
    refuse_real_proprio(adapter or base)
    for flag, only in vars(ONLY).items():
        if (said := getattr(flags, flag)) not in (None, only):
            raise UserError(
                f"--{flag} {said} for {adapter or base}",
                expected=f"{only}, since its files are those of a plain OpenVLA policy",
                remedy=f"Leave --{flag} out, or give the checkpoint that it is for.",
            )
    return PLAIN_OPENVLA


def refuse_real_proprio(folder: Path) -> None:
    """OpenVLA writes zeros for the robot's state. Raises CheckpointError for statistics that were measured."""
    stats = read_json(folder / STATISTICS) if (folder / STATISTICS).exists() else {}
    entries = {
        key: entry for key, entry in stats.items() if isinstance(entry, dict)
    }  # others are refused by name later
    measured = [key for key, entry in entries.items() if any(map(any, entry.get("proprio", {}).values()))]
    if measured:
        raise CheckpointError(
            f"{folder / STATISTICS} with proprio of {measured[0]}, and no file that tells what reads it",
            expected="a plain OpenVLA checkpoint, whose statistics have zeros there",
            remedy="If it is an OpenVLA-OFT policy, say so: --num_images_in_input and --num_open_loop_steps.",
        )


def open(
    base: Path,
    description: Description,
    *,
    name: str,
    device: str,
    dtype: str,
    load_in_8bit: bool,
    load_in_4bit: bool,
    decode_batch_size: int,
) -> OpenVLAPolicy:
    """Raises CheckpointError."""
    model = load_model(base, device=device, dtype=dtype, load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit)
    return OpenVLAPolicy(
        model=model,
        tokenizer=load_tokenizer(base),
        norm_stats=norm_stats(base),
        name=name,
        decode_batch_size=decode_batch_size,
    )
