"""Small checkpoints packed to travel with the package, and unpacked into whole ones.

A policy that was trained from nothing on LIBERO alone uses some 380 of its 32,064 vocabulary rows, and OpenVLA's form
holds weights that no pass touches. Packed, a checkpoint keeps bfloat16 numbers and

    NAME.kept (R, D)   the rows of the ids that prompts and actions use, `vocabulary_rows` (R,)
    NAME.rest (1, D)   the mean of all others: they were never seen, and training moved them together

instead of each vocabulary matrix NAME; unused weights are left out and come back as zeros.
"""

import hashlib
import shutil
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from spvla.errors import CheckpointError
from spvla.files import cache_dir, create_once, new_folder, write_json
from spvla.model.weights import SINGLE, open_weights, read_headers, read_json, write_tensors
from spvla.policies.openvla.prompt import TOKENIZER_FILE, build_tiny_tokenizer, known_ids, save_tokenizer

PACKED, LEFT_OUT = "packed.safetensors", "left_out.json"
ROWS = "vocabulary_rows"
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
TOWERS = ("vision_backbone.featurizer", "vision_backbone.fused_featurizer")
_MADE_ANEW = (TOKENIZER_FILE, "special_tokens_map.json", "tokenizer_config.json")
_SMALL_BYTES = 1 << 20  # config, statistics, and what a family keeps beside the model


def pack(checkpoint: Path, folder: Path) -> Path:
    """Packs a checkpoint of a preset into `folder`, which it replaces. Raises CheckpointError for any other."""
    if (checkpoint / TOKENIZER_FILE).read_text() != build_tiny_tokenizer().to_str():
        raise CheckpointError(
            f"{checkpoint} has a tokenizer of its own",
            expected="a policy trained from one of this project's presets",
            remedy="Publish it as a whole checkpoint.",
        )
    weights = open_weights(checkpoint)
    unused = _unused(weights.shapes)
    rows = torch.tensor(known_ids())
    tensors: dict[str, Tensor] = {ROWS: rows.to(torch.int32)}
    for name in weights.shapes.keys() - unused:
        value = weights.read(name)
        if name in VOCABULARY:
            others = torch.ones(len(value), dtype=torch.bool)
            others[rows] = False
            tensors[f"{name}.kept"] = value[rows].bfloat16()
            tensors[f"{name}.rest"] = value[others].float().mean(0, keepdim=True).bfloat16()
        else:
            tensors[name] = value.bfloat16()
    shapes = {name: list(weights.shapes[name]) for name in sorted({*unused, *VOCABULARY})}
    with new_folder(folder) as new:
        write_tensors(dict(sorted(tensors.items())), new / PACKED)
        write_json(new / LEFT_OUT, shapes)
        _copy_small(checkpoint, new)
    return folder


def unpack(packed: Path, folder: Path) -> None:
    """Writes the whole checkpoint, in bfloat16, into the empty `folder`."""
    tensors = dict(read_headers([packed / PACKED]))
    rows = tensors.pop(ROWS).long()
    for name, shape in read_json(packed / LEFT_OUT).items():
        if name in VOCABULARY:
            whole = tensors.pop(f"{name}.rest").repeat(shape[0], 1)
            whole[rows] = tensors.pop(f"{name}.kept")
            tensors[name] = whole
        else:
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    write_tensors(tensors, folder / SINGLE)
    save_tokenizer(build_tiny_tokenizer(), folder)
    _copy_small(packed, folder)


def shipped() -> dict[str, Path]:
    """Name -> packed folder of each policy that comes with this package."""
    root = Path(str(resources.files("spvla.policies"))) / "shipped"
    return {folder.name: folder for folder in sorted(root.glob("*/")) if (folder / PACKED).is_file()}


def unpacked(name: str) -> Path:
    """The whole checkpoint of a shipped policy, made once in the cache folder."""
    packed = shipped()[name]
    with (packed / PACKED).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return create_once(cache_dir() / "shipped" / digest[:12] / name, lambda folder: unpack(packed, folder))


def _unused(shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Each tower's last block, final norm and pooling head: in OpenVLA's form, and touched by no pass."""
    found: set[str] = set()
    for tower in TOWERS:
        blocks = [int(name.split(".")[3]) for name in shapes if name.startswith(f"{tower}.blocks.")]
        parts = (f"{tower}.blocks.{max(blocks)}.", f"{tower}.norm.", f"{tower}.attn_pool.")
        found |= {name for name in shapes if name.startswith(parts)}
    return found


def _copy_small(source: Path, folder: Path) -> None:
    """Everything but the model's weights, the tokenizer and the training state."""
    for file in sorted(source.iterdir()):
        made_anew = file.name in _MADE_ANEW or file.name.startswith("training_state")
        weights = file.suffix == ".safetensors" or file.name in (LEFT_OUT, f"{SINGLE}.index.json")
        if file.is_file() and not made_anew and not weights and file.stat().st_size <= _SMALL_BYTES:
            shutil.copyfile(file, folder / file.name)
