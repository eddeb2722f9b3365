"""Safetensors in Hugging Face's layout: one file, or shards with an index. Pickles are refused.

Everything is checked from the files' headers before the first weight is read, so nothing is loaded by halves.
"""

import errno
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from spvla import reading
from spvla.errors import CheckpointError
from spvla.files import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a checkpoint on disk: names and shapes at once, values when asked for."""

    files: dict[Path, list[str]]  # file -> names of its tensors
    shapes: dict[str, tuple[int, ...]]
    sizes_bytes: dict[str, int]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, value on the CPU), one at a time, file by file."""
        for path, names in self.files.items():
            with _opened(path) as f:
                for name in names:
                    yield name, f.get_tensor(name)

    def read(self, name: str) -> Tensor:
        path = next(path for path, names in self.files.items() if name in names)
        with _opened(path) as f:
            return f.get_tensor(name)


def open_weights(folder: Path) -> Weights:
    """Raises CheckpointError where files are missing, truncated or pickled."""
    if (folder / INDEX).exists():
        return read_headers(_indexed_files(folder))
    if (folder / SINGLE).exists():
        return read_headers([folder / SINGLE])
    refuse_pickles(folder)
    raise CheckpointError(
        f"{folder} holds no weights",
        expected=f"{SINGLE}, or shards with {INDEX}",
        remedy="Give a checkpoint folder; an interrupted download leaves none.",
    )


def read_headers(paths: Iterable[Path]) -> Weights:
    """Names and shapes of safetensors files."""
    files: dict[Path, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    sizes_bytes: dict[str, int] = {}
    for path in paths:
        with _opened(path) as f:
            files[path] = list(f.keys())
            for name in files[path]:
                part = f.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                sizes_bytes[name] = math.prod(shapes[name]) * _BYTES.get(part.get_dtype(), 4)
    return Weights(files=files, shapes=shapes, sizes_bytes=sizes_bytes)


def fingerprint(weights: Weights) -> str:
    """sha256 over every tensor's name, shape and first row: tells two models apart in a moment, however they are split
    into files."""
    rows: dict[str, Tensor] = {}
    for path, names in weights.files.items():
        with _opened(path) as f:
            rows |= {n: f.get_slice(n)[:1] if weights.shapes[n] else f.get_tensor(n) for n in names}
    digest = hashlib.sha256()
    for name, row in sorted(rows.items()):
        digest.update(
            f"{name}:{weights.shapes[name]}\n".encode() + alone(row).view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def require_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raises CheckpointError, naming the first tensor, if the two differ."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    other = [name for name in wanted if name in found and tuple(found[name]) != tuple(wanted[name])]
    remedy = "Copy the checkpoint again from its source, or give the base that it belongs to."
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors ({missing[0]}, ...)",
            expected=f"{len(wanted)} in all",
            remedy=remedy,
        )
    if other:
        name = other[0]
        raise CheckpointError(
            f"{folder} holds {name} as {tuple(found[name])}", expected=f"{tuple(wanted[name])}", remedy=remedy
        )
    if extra:
        raise CheckpointError(
            f"{folder} holds {len(extra)} unknown tensors ({extra[0]}, ...)",
            expected="the tensors of an OpenVLA model and no others",
            remedy=remedy,
        )


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file. Raises OSError, as all writing does; safetensors has its own for a full disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(errno.EIO, str(e)) from e


def write_weights(
    tensors: Iterable[tuple[str, Callable[[], Tensor], int]], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes (name, how to get the value, its size in bytes) in shards; holds one shard in memory at a time."""
    shards: list[list[tuple[str, Callable[[], Tensor], int]]] = [[]]
    for entry in tensors:
        if shards[-1] and sum(size for *_, size in shards[-1]) + entry[2] > max_shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        write_tensors({key: alone(get()) for key, get, _ in shard}, folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key, *_ in shard}
        total = sum(size for shard in shards for *_, size in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def read_json(path: Path, form: Any = dict[str, Any]) -> Any:
    """As `reading.read_json`. Raises CheckpointError."""
    return reading.read_json(path, form, remedy="Copy it again from its source.", error=CheckpointError)


def alone(t: Tensor) -> Tensor:
    """The tensor on the CPU in memory of its own: not a part of a larger one."""
    t = t.detach().cpu().contiguous()
    return t.clone() if t.untyped_storage().nbytes() != t.nbytes else t


def pickles(folder: Path) -> list[Path]:
    """Weights in pickles; transformers leaves its arguments in one, too."""
    return sorted(p for pattern in PICKLES for p in folder.glob(pattern) if p.name != "training_args.bin")


def refuse_pickles(folder: Path) -> None:
    if found := pickles(folder):
        raise CheckpointError(
            f"{found[0]} is a pickle, which can run code when opened",
            expected="safetensors",
            remedy=f"Convert it: python -m spvla.model.convert {folder}",
        )


class _Index(TypedDict):
    weight_map: dict[str, str]  # tensor -> file


def _indexed_files(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX, _Index)["weight_map"]
    if not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map", expected="tensor: shard", remedy="Copy it again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).exists():
            raise CheckpointError(
                f"{folder / name} is missing",
                expected=f"the {len(names)} shards that {INDEX} names",
                remedy="Copy the checkpoint again from its source.",
            )
    return [folder / name for name in names]


class _opened:
    """`with _opened(path) as f`: safe_open whose complaints name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> safe_open:
        try:
            self.file = safe_open(str(self.path), framework="pt")
        except (SafetensorError, OSError) as e:
            size = self.path.stat().st_size if self.path.exists() else 0
            raise CheckpointError(
                f"{self.path} ({size} bytes) cannot be read: {e}",
                expected="a whole safetensors file",
                remedy="Copy it again from its source: it may be truncated.",
            ) from e
        return self.file.__enter__()

    def __exit__(self, *exc: object) -> None:
        self.file.__exit__(*exc)


def torch_dtype(name: str) -> torch.dtype:
    """'float32', 'bfloat16' or 'float16' -> torch's."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise CheckpointError(f"dtype {name!r}", expected=f"one of {', '.join(names)}", remedy="Correct the name.")
    return names[name]
