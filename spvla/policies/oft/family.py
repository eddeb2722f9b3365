"""OpenVLA-OFT in the registry of families."""

from pathlib import Path
from typing import Any

from spvla.errors import UserError
from spvla.policies.checkpoint import norm_stats
from spvla.policies.oft.checkpoint import open_model
from spvla.policies.oft.folder import form_of
from spvla.policies.oft.policy import OpenVLAOFTPolicy
from spvla.policies.oft.proprio import ProprioStats
from spvla.policies.openvla.prompt import load_tokenizer
from spvla.policies.registry import Description, PolicyFlags


def describe(base: Path, adapter: Path | None, flags: PolicyFlags) -> Description | None:
    """None for plain OpenVLA. Raises UserError: see `form_of`; and where statistics lack what the form reads."""
    folder = adapter or base
    form = form_of(folder, flags)
    if form is None:
        return None
    if form.proprio:
        require_proprio(norm_stats(folder) or norm_stats(base), folder)
    return Description(family="oft", needs=form.needs(flags.num_open_loop_steps), form=form)


def require_proprio(stats: dict[str, dict[str, Any]], folder: Path) -> None:
    """Raises UserError where no data set's statistics have proprio."""
    errors = []
    for name, entry in stats.items():
        try:
            ProprioStats.from_json(entry.get("proprio") or {}, name=f"{name} in {folder}")
        except UserError as e:
            errors.append(e)
    if errors and len(errors) == len(stats):
        raise errors[0]


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
) -> OpenVLAOFTPolicy:
    """Raises UserError."""
    options = {"device": device, "dtype": dtype, "load_in_8bit": load_in_8bit, "load_in_4bit": load_in_4bit}
    return OpenVLAOFTPolicy(
        model=open_model(base, description.form, **options),
        tokenizer=load_tokenizer(base),
        norm_stats=norm_stats(base),
        name=name,
        execute=description.needs.execute,
        decode_batch_size=decode_batch_size,
    )
