"""A Weights & Biases run, begun in the same way by every command that has one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spvla.config import EvaluateConfig, TrainConfig
from spvla.errors import UserError

if TYPE_CHECKING:
    from wandb import Run


def start_run(config: TrainConfig | EvaluateConfig, *, name: str, folder: Path, **more: Any) -> "Run":
    """`more` goes to wandb.init. The key stays where `wandb login` put it. Raises UserError where W&B cannot start."""
    import wandb
    from draccus import encode

    try:
        return wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            mode=None if config.wandb_mode == "online" else config.wandb_mode,  # None: WANDB_MODE decides
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
