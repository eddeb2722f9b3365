"""LoRA adapters on disk (arxiv.org/abs/2106.09685), in the form in which peft keeps them; made, read, written.

    adapter_model.safetensors   base_model.model.MAP.lora_A.weight (r, in), base_model.model.MAP.lora_B.weight (out, r);
                                (r, 3, 14, 14) and (out, r, 1, 1) at the towers' patch embeddings
    adapter_config.json         rank, alpha, names of maps, the base's path

OpenVLA's fine-tuning puts them on every linear map and both patch embeddings (439 maps in the 7B model), lm_head and
SigLIP's unused pooling head among them, with alpha = min(rank, 16), A Gaussian, B zero.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from annotated_types import Ge
from torch import Tensor, nn
from typing_extensions import TypedDict

from spvla.errors import CheckpointError
from spvla.files import new_file, write_json
from spvla.model.linear import PatchLinear, named_maps
from spvla.model.weights import alone, read_headers, read_json, refuse_pickles, write_tensors
from spvla.reading import Count, Number

ADAPTER_WEIGHTS, ADAPTER_CONFIG, STATISTICS = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "dataset_statistics.json",
)
MARKER_FILE = "spvla.json"  # what a policy's family says of an adapter: peft refuses a config with entries of others
_PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": 0, ".lora_B.weight": 1}

Shapes = Mapping[str, tuple[int, int]]  # map -> (out, in), convolutions flattened


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What an adapter's folder holds, on the CPU."""

    rank: int
    alpha: float
    factors: dict[str, tuple[Tensor, Tensor]]  # map, by its name in the base's checkpoint -> A, B
    base: dict[str, Tensor] = field(default_factory=dict)  # the base's own tensors that stood beside them
    path: Path | None = None  # of the weights, for errors

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self, name: str) -> Tensor | None:
        """What the adapter adds to a map's weight: (out, in) float32, or None."""
        if name not in self.factors:
            return None
        a, b = self.factors[name]
        return self.scale * (b.float().flatten(1) @ a.float().flatten(1))

    def require_base(self, model: nn.Module) -> None:
        """Raises CheckpointError unless the adapter belongs on `model`."""
        shapes = {name: named.shape for name, named in named_maps(model).items()}
        self.require(shapes, lambda name: model.state_dict().get(name))

    def require(self, shapes: Shapes, base: Callable[[str], Tensor | None]) -> None:
        """Raises CheckpointError unless every map is in the base, with an A and a B of its size, and what the file has
        of the base itself (peft writes lm_head's weight, where that is adapted) is what the base has."""
        for name, (a, b) in self.factors.items():
            outputs, inputs = shapes.get(name, (0, 0))
            self._require_shape(name, "A", a, (self.rank, inputs))
            self._require_shape(name, "B", b, (outputs, self.rank))
        for name, ours in self.base.items():
            theirs = base(name)
            if theirs is None or not _equal(ours, theirs):
                got = f"{self.path} holds a {name} that is not the base's"
                raise CheckpointError(got, expected="the base that it was trained on", remedy="Give that one.")

    def require_all(self, model: nn.Module) -> None:
        """`require_base`; and every map of the model is adapted, as training wants it. Raises CheckpointError."""
        self.require_base(model)
        missing = [name for name in named_maps(model) if name not in self.factors]
        if missing:
            raise CheckpointError(
                f"{self.path} has nothing for {len(missing)} maps ({missing[0]}, ...)",
                expected="all-linear LoRA, as OpenVLA's fine-tuning makes it",
                remedy="Merge that adapter into its base, and start from the merged model.",
            )

    def write(self, folder: Path, *, base: str, norm_stats: dict[str, Any] | None = None) -> None:
        """As peft does. `base` is the checkpoint it belongs to; a new reader finds it by that path.

        Writes into `folder`, its config last: for an all-or-nothing checkpoint call it within `files.new_folder`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = alone(a), alone(b)
        with new_file(folder / ADAPTER_WEIGHTS) as beside:
            write_tensors(tensors, beside)
        if norm_stats is not None:
            write_json(folder / STATISTICS, norm_stats)
        write_json(folder / ADAPTER_CONFIG, self._config(base))

    def _config(self, base: str) -> dict[str, Any]:
        """Keys that peft 0.11.1, which OpenVLA pins, knows, and later versions too."""
        return {
            "peft_type": "LORA",
            "task_type": None,
            "auto_mapping": None,
            "base_model_name_or_path": base,
            "revision": None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted({name.rpartition(".")[2] for name in self.factors}),
            "modules_to_save": None,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": "gaussian",
            "use_rslora": False,
            "use_dora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "layers_to_transform": None,
            "layers_pattern": None,
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "loftq_config": {},
        }

    def _require_shape(self, name: str, factor: str, found: Tensor, wanted: tuple[int, int]) -> None:
        if tuple(found.flatten(1).shape) != wanted:
            raise CheckpointError(
                f"{self.path} holds {_PREFIX}{name}.lora_{factor}.weight as {tuple(found.shape)}",
                expected=f"{wanted if all(wanted) else 'no such tensor'}, as the base model asks",
                remedy="Give the adapter with the base that it was trained on.",
            )


def fresh_lora(model: nn.Module, *, rank: int, seed: int = 0) -> LoraFile:
    """An adapter on every map of a model that changes nothing yet. Equal seeds give equal ones on every rank."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, named in named_maps(model).items():
        outputs, inputs = named.shape
        a, b = torch.randn(rank, inputs, generator=generator) / rank, torch.zeros(outputs, rank)
        if isinstance(named.module, PatchLinear):
            a, b = a.view(rank, *named.module.weight.shape[1:]), b[..., None, None]
        factors[name] = a, b
    return LoraFile(rank=rank, alpha=min(rank, 16), factors=factors)


def read_lora(folder: Path) -> LoraFile:
    """Raises CheckpointError on anything but a whole LoRA adapter in safetensors.

    Its numbers must be finite: 0 times NaN is NaN, so others would spoil the policies that are resident beside it.
    """
    config = read_lora_config(folder)
    path = folder / ADAPTER_WEIGHTS
    if not path.exists():
        refuse_pickles(folder)
        raise CheckpointError(
            f"{folder} holds no {ADAPTER_WEIGHTS}", expected="an adapter as peft saves it", remedy="Copy it again."
        )
    halves: dict[str, dict[int, Tensor]] = {}
    base: dict[str, Tensor] = {}
    for key, tensor in read_headers([path]):
        name, which = _parse(key)
        if not tensor.isfinite().all():
            got = f"{path} holds NaN or infinity in {key}"
            raise CheckpointError(got, expected="finite numbers", remedy="Take another checkpoint.")
        if which is None:
            base[name] = tensor
        else:
            halves.setdefault(name, {})[which] = tensor
    for name, pair in halves.items():
        if len(pair) < 2:
            got = f"{path} holds {name} by half"
            raise CheckpointError(got, expected="lora_A and lora_B of each map", remedy="Copy it again.")
    factors = {name: (pair[0], pair[1]) for name, pair in halves.items()}
    return LoraFile(rank=config["r"], alpha=config["lora_alpha"], factors=factors, base=base, path=path)


class _Config(TypedDict):
    """adapter_config.json, as far as it is read."""

    peft_type: str
    r: Annotated[Count, Ge(1)]
    lora_alpha: Number
    base_model_name_or_path: NotRequired[str | None]


def read_lora_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    config = read_json(path, _Config)
    unsupported = [k for k in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(k)]
    if config["peft_type"] == "LORA" and not unsupported and config["lora_alpha"]:
        return config
    got = f"{path} of type {config['peft_type']} {' '.join(unsupported)}".strip()
    raise CheckpointError(got, expected="a plain LoRA adapter, as peft saves it", remedy="Give an adapter folder.")


def map_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Of a checkpoint's tensors."""
    weights = {name.removesuffix(".weight"): s for name, s in shapes.items() if name.endswith(".weight") and len(s) > 1}
    return {name: (s[0], math.prod(s[1:])) for name, s in weights.items()}


def _parse(key: str) -> tuple[str, int | None]:
    """(map, 0 for A or 1 for B); or (a tensor of the base, None)."""
    name = key.removeprefix(_PREFIX)
    for ending, which in _FACTORS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), which
    return name.replace(".base_layer.", "."), None


def _equal(a: Tensor, b: Tensor) -> bool:
    """In the narrower of the two types: one may be a copy that was rounded."""
    narrow = a.dtype if a.element_size() <= b.element_size() else b.dtype
    return a.shape == b.shape and torch.equal(a.to(b.device, narrow), b.to(narrow))
