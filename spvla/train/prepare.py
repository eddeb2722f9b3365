"""From flags to a run: its name, its folder, its inputs, all checked before anything long begins."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from spvla import files, runs
from spvla.cluster.machines import require_resources, total, unbounded
from spvla.config import TrainConfig
from spvla.data.index import ensure_index, require_source
from spvla.errors import UserError
from spvla.files import expanded, safe_name, write_json
from spvla.model.lora_file import read_lora
from spvla.model.weights import open_weights
from spvla.policies.checkpoint import base_of, policy_digest
from spvla.policies.oft.folder import form_to_train
from spvla.policies.presets import PRESETS, create_preset
from spvla.policies.registry import flags_of
from spvla.reading import read_json
from spvla.train.objectives import objective_of

# Flags that change how a run is carried out, not what it learns: they may differ when it goes on. The start policy and
# the data are compared by what they hold, not by where they lie.
_FREE = {
    *("run_root_dir", "adapter_tmp_dir", "run_id", "run_id_note", "data_root_dir", "vla_path"),
    *("save_steps", "save_latest_checkpoint_only", "save_merged", "val_steps", "skip_corrupt", "max_failures"),
    *("num_workers", "use_gpu", "frames", "compile", "max_nonfinite_steps"),
    *("use_wandb", "wandb_project", "wandb_entity", "wandb_mode"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs; every path is absolute, because a worker's own folder is Ray's."""

    config: TrainConfig
    run: Path
    start: str  # the start policy, which is also the opponent
    start_digest: str
    stores: tuple[tuple[str, Path, float], ...]  # data set, its indexed store, its weight
    use_gpu: bool


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds the run for this process; the lock ends with the process, however that ends. Raises UserError."""
    remedy = "Wait for it, stop it, or give another --run_id."
    with files.locked(run, expected="one training process a run", remedy=remedy):
        yield


def run_id(config: TrainConfig) -> str:
    """The run folder's name: what one reads first in OpenVLA's form, then a digest of every flag that matters."""
    if config.run_id:
        return safe_name(config.run_id, what="--run_id")
    batch = config.batch_size * config.grad_accumulation_steps * config.num_workers
    parts = [
        re.sub(r"[^A-Za-z0-9._+=-]", "_", Path(config.vla_path).name),
        *config.dataset_name.replace(":", "x").split(","),
        f"b{batch}",
        f"lr-{config.learning_rate:g}",
        *([f"lora-r{config.lora_rank}"] if config.use_lora else []),
        objective_of(config).label,
        *([config.run_id_note] if config.run_id_note else []),
        hashlib.sha256(json.dumps([_learned(config), config.vla_path], default=str).encode()).hexdigest()[:8],
    ]
    return safe_name("+".join(parts)[-200:].lstrip("._+=-"), what="--run_id_note")


def _learned(config: TrainConfig) -> dict[str, object]:
    """The flags that decide what is learned."""
    free = _FREE | {"max_steps"} if config.lr_schedule == "constant" else _FREE
    return {name: value for name, value in asdict(plain(config)).items() if name not in free}


def plain(config: TrainConfig) -> TrainConfig:
    """The training flags alone, of a config that may hold more."""
    return TrainConfig(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)})


def datasets_of(dataset_name: str) -> list[tuple[str, float]]:
    """'a:1,b:2' -> [("a", 1.0), ("b", 2.0)]. Raises UserError."""
    found = []
    for part in dataset_name.split(","):
        name, _, weight = part.partition(":")
        try:
            share = float(weight or 1)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            expected = "'name' or 'name:weight,name:weight', with weights above 0"
            raise UserError(f"--dataset_name {dataset_name}", expected=expected, remedy="Correct it.")
        found.append((safe_name(name, what="--dataset_name"), share))
    return found


def evaluation_key(dataset_name: str, suite: str) -> str | None:
    """--unnorm_key for policies trained on these data: None, the suite's own, or the first data set's where no data set
    is the suite's."""
    names = [name for name, _ in datasets_of(dataset_name)]
    return None if {suite, f"{suite}_no_noops"} & set(names) else names[0]


def require_flags(config: TrainConfig) -> None:
    """Raises UserError for flags that cannot be, alone or with this objective."""
    config.check()
    objective_of(config)


def require_datasets(config: TrainConfig) -> None:
    """Raises DatasetError when a data set is missing, listing those that are there."""
    for name, _ in datasets_of(config.dataset_name):
        require_source(expanded(config.data_root_dir, flag="--data_root_dir"), name)


def start_policy(config: TrainConfig, run: Path) -> str:
    """Absolute path (or local name) of the policy to start from; a preset is made in RUN/base first, from --seed."""
    if config.vla_path in PRESETS:
        base = run / "base"
        if not base.exists():
            create_preset(base, config.vla_path, seed=config.seed)
        return str(base)
    path = Path(os.path.expanduser(config.vla_path))
    return str(path.resolve()) if path.exists() else config.vla_path


def require_startable(config: TrainConfig) -> None:
    """The start policy is whole, and where it is an adapter, which training goes on with, the flags fit it."""
    if config.vla_path in PRESETS:
        return
    base, adapter = base_of(config.vla_path)
    open_weights(base)
    form = form_to_train(adapter or base, flags_of(config))
    require_tokens(config, regresses=form is not None and form.head == "l1")
    if adapter is None:
        return
    if not config.use_lora:
        raise UserError(
            f"--use_lora False from the adapter {adapter}",
            expected="a whole model",
            remedy="Merge it first (--save_merged True), or train with LoRA.",
        )
    rank = read_lora(adapter).rank
    if rank != config.lora_rank:
        raise UserError(
            f"--lora_rank {config.lora_rank} from {adapter}",
            expected=f"{rank}, the rank of the adapter that training goes on with",
            remedy=f"Give --lora_rank {rank}.",
        )


def require_tokens(config: TrainConfig, *, regresses: bool) -> None:
    """Raises UserError where self-play is asked of a head that has no distribution to play with (docs/theory.md)."""
    if objective_of(config).has_reference and regresses:
        raise UserError(
            f"--objective {config.objective} for a policy that regresses its actions",
            expected="tokens: self-play compares probabilities, and an L1 head gives one chunk and no distribution",
            remedy="Use --objective sft, or start from a discrete policy (--use_l1_regression False).",
        )


class Inputs(TypedDict):
    """inputs.json: what a run began with."""

    flags: dict[str, Any]
    start: str  # digest


def require_same_run(config: TrainConfig, run: Path, start: str) -> None:
    """Notes the flags and the start policy at first; later raises UserError if one of them is another."""
    now = {"flags": json.loads(json.dumps(_learned(config), default=str)), "start": policy_digest(start)}
    path = run / "inputs.json"
    if not path.exists():
        write_json(path, now)
    before = read_json(path, Inputs, remedy="Restore it from a copy, or give another --run_id.")
    changed = [k for k in now["flags"] if before["flags"].get(k) != now["flags"][k]]
    if changed or before["start"] != now["start"]:
        what = f"--{changed[0]} {now['flags'][changed[0]]}" if changed else f"--vla_path {config.vla_path}"
        was = before["flags"].get(changed[0]) if changed else "the same weights"
        raise UserError(
            f"{run} was started with another {what}",
            expected=f"{was}, as when it began" if changed else f"{was} as when it began",
            remedy="Give the flags it began with, another --run_id, or delete the folder.",
        )
    runs.write_config(run, "train", plain(config))


def prepare(config: TrainConfig, run: Path, start: str) -> Job:
    """Everything the workers need, checked; indexes are built where they are missing. Needs Ray."""
    enough = 1 if unbounded() else config.num_workers
    use_gpu = total("GPU") >= enough if config.use_gpu is None else config.use_gpu
    require_resources(f"{config.num_workers} workers", CPU=config.num_workers, GPU=config.num_workers * use_gpu)
    root = expanded(config.data_root_dir, flag="--data_root_dir")
    stores = [
        (name, ensure_index(root, name, skip_corrupt=config.skip_corrupt), weight)
        for name, weight in datasets_of(config.dataset_name)
    ]
    return Job(
        config=plain(config),
        run=run,
        start=start,
        start_digest=policy_digest(start),
        stores=tuple(stores),
        use_gpu=use_gpu,
    )
