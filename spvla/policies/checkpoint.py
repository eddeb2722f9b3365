"""Policies on disk: found by path or name, opened without remote code, written in the layout they came in.

CHECKPOINT/   config.json, model*.safetensors [+ index], tokenizer.json, preprocessor_config.json,
              dataset_statistics.json (or norm_stats in config.json)
ADAPTER/      adapter_config.json (names its base), adapter_model.safetensors, dataset_statistics.json,
              base.json (which base that is, wherever it lies now)
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le, Len
from typing_extensions import TypedDict

from spvla.errors import CheckpointError, UserError
from spvla.files import cache_dir, create_once, is_folder, new_folder, remembered, write_json
from spvla.model.loading import read_into
from spvla.model.lora_file import ADAPTER_CONFIG, MARKER_FILE, STATISTICS, map_shapes, read_lora, read_lora_config
from spvla.model.openvla import OpenVLA, OpenVLAConfig
from spvla.model.quantized import quantise, require_quantiser
from spvla.model.weights import fingerprint, open_weights, read_json, require_shapes, torch_dtype, write_weights
from spvla.policies import packed
from spvla.policies.openvla.presets import TOWER_FILE
from spvla.policies.presets import PRESETS, create_preset
from spvla.policies.statistics import require_statistics
from spvla.reading import Number

__all__ = [
    "base_of",
    "load_model",
    "policy_digest",
    "save_merged",
    "save_model",
]

CONFIG, BASE_NOTE = "config.json", "base.json"
PARTS = "*_checkpoint.pt"  # a family's own weights beside OpenVLA's
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # written by old versions of transformers; computed here
_COPIED = ("*.json", "*.model", "*.py")  # tokenizer, processor, and the original's code (never run here)
Heads = Annotated[int, Ge(1), Le(1024)]
_PRESETS_VERSION = 3  # raised when a preset's bytes change


def load_model(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
) -> OpenVLA:
    """The network of a base checkpoint, in evaluation mode. All is checked before any weight is read."""
    require_device(device)
    folder = resolve(path)
    weights = open_weights(folder)
    shapes = {name: shape for name, shape in weights.shapes.items() if not _IGNORED.fullmatch(name)}
    config = OpenVLAConfig.from_json(read_config(folder), shapes, _tower_heads(folder))
    with torch.device("meta"):
        model = OpenVLA(config)
    require_shapes(shapes, {name: tuple(t.shape) for name, t in model.state_dict().items()}, folder)
    wanted = torch_dtype(dtype)
    if load_in_8bit and load_in_4bit:
        raise UserError("load_in_8bit and load_in_4bit", expected="one of the two", remedy="Leave one out.")
    if load_in_8bit or load_in_4bit:
        bits = 8 if load_in_8bit else 4
        require_quantiser(bits=bits, device=device)
        quantise(model, bits=bits, dtype=wanted)
    tensors = ((name, value) for name, value in weights if not _IGNORED.fullmatch(name))
    read_into(model, tensors, device=device, dtype=wanted)
    return model.eval().requires_grad_(False).to(device)


def require_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"device {device!r} without a GPU that torch {torch.__version__} can use",
            expected="a CUDA device and a CUDA build of torch",
            remedy="Give device='cpu', or install torch for your CUDA version.",
        )


def resolve(path: str | Path) -> Path:
    """The folder of a path, of a shipped policy, of a preset (at random weights), or of a cached Hugging Face name."""
    if str(path) in packed.shipped():
        return packed.unpacked(str(path))
    if str(path) in PRESETS:
        folder = cache_dir() / "presets" / f"{path}-{_PRESETS_VERSION}"
        return create_once(folder, lambda new: create_preset(new, str(path)))
    folder = Path(path)
    with suppress(RuntimeError):  # there is no such user: a folder of that name, at most
        folder = folder.expanduser()
    if is_folder(folder):
        return folder.resolve()
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(path), local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            remedy = f"Correct the path, or if it is a name, download it first: hf download {path}"
    else:
        remedy = "Correct the path."
    raise CheckpointError(
        f"no checkpoint at {path}",
        expected=f"a folder, a Hugging Face name in the local cache, or {', '.join([*PRESETS, *packed.shipped()])}",
        remedy=remedy,
    )


class BaseNote(TypedDict):
    """base.json beside an adapter; empty texts where nothing is known."""

    hub_name: str
    fingerprint: str


def base_of(path: str | Path) -> tuple[Path, Path | None]:
    """(base, adapter) of an adapter folder, (base, None) of a whole checkpoint.

    A base that is not where the adapter's config says is looked for relative to the adapter's folder and its parents,
    and under the Hub's name that ADAPTER/base.json has. Raises CheckpointError for another base than the adapter's.
    """
    folder = resolve(path)
    if not (folder / ADAPTER_CONFIG).exists():
        return folder, None
    name = read_lora_config(folder).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} names no base",
            expected="base_model_name_or_path",
            remedy="Write the base checkpoint's path there.",
        )
    path = folder / BASE_NOTE
    note = read_json(path, BaseNote) if path.exists() else BaseNote(hub_name="", fingerprint="")
    return _find_base(folder, name, note), folder


def _find_base(folder: Path, name: str, note: BaseNote) -> Path:
    """The first of the places that holds the adapter's own base; `name` is what its config says."""
    places = [str(parent / name) for parent in (folder, *folder.parents)]
    there = list(_resolved([*places, name, *filter(None, [note["hub_name"]])]))
    wanted = note["fingerprint"]
    if base := next((p for p in there if not wanted or base_fingerprint(p) == wanted), None):
        return base
    hub_name = note["hub_name"]
    raise CheckpointError(
        f"{there[0]} is another base than that of {folder}" if there else f"no checkpoint at {name}, base of {folder}",
        expected="the checkpoint that the adapter was trained on" + f", {hub_name}" * bool(hub_name),
        remedy=f"Write where it lies as base_model_name_or_path into {folder / ADAPTER_CONFIG}"
        + f", or run: hf download {hub_name}" * bool(hub_name),
    )


def _resolved(places: Sequence[str]) -> Iterator[Path]:
    for place in places:
        if Path(place).is_absolute() and not is_folder(Path(place)):
            continue
        with suppress(CheckpointError):
            yield resolve(place)


def base_fingerprint(base: Path) -> str:
    """Of a checkpoint's weights; remembered for as long as its files do not change."""
    weights = open_weights(base)
    return remembered("fingerprint", list(weights.files), lambda: fingerprint(weights))


def note_base(folder: Path, base: Path) -> None:
    """Writes beside an adapter which base it belongs to, wherever that lies."""
    snapshot = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$", str(base))
    hub_name = f"{snapshot[1]}/{snapshot[2]}" if snapshot else ""
    write_json(folder / BASE_NOTE, BaseNote(hub_name=hub_name, fingerprint=base_fingerprint(base)))


class _Text(TypedDict, total=False):
    num_attention_heads: Heads
    num_key_value_heads: Heads | None
    rms_norm_eps: Number
    rope_theta: Number


class _Config(TypedDict, total=False):
    """config.json, as far as it is read."""

    model_type: str
    timm_model_ids: Annotated[list[str], Len(2, 2)]
    text_config: _Text | None
    norm_stats: dict[str, Any] | None


class _Tower(TypedDict):
    num_heads: Heads


def read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG, _Config)
    if config.get("model_type") != "openvla":
        raise CheckpointError(
            f"{folder / CONFIG} of model type {config.get('model_type')!r}",
            expected="openvla",
            remedy="Give a checkpoint of the OpenVLA family.",
        )
    return config


def norm_stats(folder: Path) -> dict[str, Any]:
    """Action statistics by data set: config.json's norm_stats, and dataset_statistics.json over them.

    Raises CheckpointError for such as no policy can act by.
    """
    stats: dict[str, Any] = {}
    if (folder / CONFIG).exists():
        own = read_config(folder).get("norm_stats")
        stats.update(require_statistics(own or {}, f"norm_stats of {folder / CONFIG}"))
    if (folder / STATISTICS).exists():
        stats.update(require_statistics(read_json(folder / STATISTICS), str(folder / STATISTICS)))
    return stats


def save_model(
    model: OpenVLA, folder: Path, *, source: str | Path, norm_stats: Mapping[str, Any] | None = None
) -> None:
    """Writes a whole model as a checkpoint; config, tokenizer and processor come from `source`, its base."""
    state = model.state_dict()
    with new_folder(folder) as new:
        write_weights([(name, lambda t=t: t, t.nbytes) for name, t in sorted(state.items())], new)
        _copy_companions(resolve(source), new, norm_stats)


def save_merged(adapter: str | Path, folder: Path) -> None:
    """Adds an adapter to its base and writes the whole as a checkpoint that OpenVLA's own code loads.

    Works tensor by tensor, so it needs little memory and no GPU, and can run beside training.
    """
    base, adapter_folder = base_of(adapter)
    if adapter_folder is None:
        raise CheckpointError(
            f"{adapter} is no adapter", expected="an adapter folder", remedy="Nothing is to be merged."
        )
    lora = read_lora(adapter_folder)
    weights = open_weights(base)
    lora.require(map_shapes(weights.shapes), lambda name: weights.read(name) if name in weights.shapes else None)

    def merged(name: str) -> torch.Tensor:
        value = weights.read(name)
        change = lora.delta(name.removesuffix(".weight"))
        return value if change is None else (value.float() + change.view(value.shape)).to(value.dtype)

    with new_folder(folder) as new:
        write_weights([(n, lambda n=n: merged(n), weights.sizes_bytes[n]) for n in sorted(weights.shapes)], new)
        _copy_companions(base, new, norm_stats(adapter_folder) or norm_stats(base))
        _copy_parts(adapter_folder, new)


def _copy_parts(adapter: Path, new: Path) -> None:
    """What an adapter's folder holds of a family's own beside LoRA: files trained in full, and its marker."""
    for f in adapter.glob(PARTS):
        shutil.copyfile(f, new / f.name)
    if (adapter / MARKER_FILE).exists():
        write_json(new / CONFIG, {**read_json(new / CONFIG), **read_json(adapter / MARKER_FILE)})


def policy_digest(path: str | Path) -> str:
    """sha256 of all that decides a policy's behaviour: weights of base and adapter, config, tokenizer, statistics.

    Remembered in the cache folder for as long as no file changes its size or time of change.
    """
    folders = [p for p in base_of(path) if p is not None]
    patterns = ("*.safetensors", PARTS, CONFIG, MARKER_FILE, TOWER_FILE, ADAPTER_CONFIG, "tokenizer.json", STATISTICS)
    found = [f for folder in folders for f in sorted({f for pattern in patterns for f in folder.glob(pattern)})]
    files = [f for f in found if not f.name.startswith("training_state")]  # the optimiser's
    return remembered("policy", files, lambda: _digest_of(files))


def _digest_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for f in files:
        digest.update(f"{f.name}:{_file_digest(f)}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    """Of an adapter's config only what acts: where its base lies is no part of the policy."""
    if path.name == ADAPTER_CONFIG:
        config = read_lora_config(path.parent)
        return json.dumps([config["r"], config["lora_alpha"]])
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _tower_heads(folder: Path) -> dict[str, int]:
    path = folder / TOWER_FILE
    if not path.exists():
        return {}
    return {name: tower["num_heads"] for name, tower in read_json(path, dict[str, _Tower]).items()}


def _copy_companions(source: Path, new: Path, stats: Mapping[str, Any] | None) -> None:
    """All small files of the source but its index and statistics; config.json and statistics get `stats`."""
    for pattern in _COPIED:
        for f in source.glob(pattern):
            left = f.name in (STATISTICS, ADAPTER_CONFIG) or f.name.startswith("training_state")
            if not left and not f.name.endswith(".index.json"):
                shutil.copyfile(f, new / f.name)
    stats = dict(norm_stats(source) if stats is None else stats)
    write_json(new / CONFIG, {**read_config(source), "norm_stats": stats})
    write_json(new / STATISTICS, stats)
