"""A Weights & Biases run, begun in the same way by every command that has one."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spvla.config import EvaluateConfig, TrainConfig
from spvla.errors import UserError
from spvla.files import write_text

if TYPE_CHECKING:
    from wandb import Run


class WandbRun:
    """One Weights & Biases run. `resume`: its id is kept in `folder`, so that a resumed command continues the curves.

    Raises UserError, before any work, where W&B cannot start.
    """

    def __init__(self, config: TrainConfig | EvaluateConfig, *, name: str, folder: Path, resume: bool = False) -> None:
        kept = folder / "wandb" / "id"
        known = kept.read_text(errors="replace").strip() if resume and kept.exists() else None
        self.run = _start(config, name=name, folder=folder, id=known, resume="allow" if resume else None)
        if resume and known is None:
            write_text(kept, self.run.id)

    def log(self, values: Mapping[str, Any], *, step: int | None = None) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _start(config: TrainConfig | EvaluateConfig, *, name: str, folder: Path, **more: Any) -> "Run":
    """`more` goes to wandb.init. The key stays where `wandb login` put it.

    WANDB_MODE decides unless a flag does. W&B itself reads it at its first start in a process only, so it is read here.
    """
    import wandb
    from draccus import encode

    try:
        return wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            mode=(os.environ.get("WANDB_MODE") or None) if config.wandb_mode == "online" else config.wandb_mode,
            name=name,
            dir=folder,
            config=encode(config),
            settings=wandb.Settings(console="off", silent=True),
            **more,
        )
    except wandb.errors.Error as e:
        raise UserError(
            f"--use_wandb True, but W&B cannot start ({str(e).splitlines()[0]})",
            expected="a login on this machine",
            remedy="Run `wandb login`, or give --wandb_mode offline.",
        ) from e
