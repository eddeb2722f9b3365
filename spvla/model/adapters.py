"""LoRA adapters (arxiv.org/abs/2106.09685) in peft's form: made, read, written, switched.

OpenVLA's fine-tuning puts them on every linear map and both patch convolutions (439 modules in the 7B model), lm_head
and SigLIP's unused pooling head among them, with alpha = min(rank, 16), A Gaussian, B zero.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from spvla.errors import CheckpointError
from spvla.files import new_file, write_json
from spvla.model.openvla import OpenVLA
from spvla.model.weights import alone, read_headers, read_json, refuse_pickles, write_tensors

ADAPTER_WEIGHTS, ADAPTER_CONFIG, STATISTICS = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "dataset_statistics.json",
)
_PREFIX = "base_model.model."


def linear_names(model: nn.Module) -> list[str]:
    """Last names of all linear maps and patch convolutions, as peft's "all-linear" finds them."""
    if isinstance(model, PeftModel):
        return sorted(next(iter(model.peft_config.values())).target_modules)
    return sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)})


def lora_config(model: nn.Module, *, rank: int, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=min(rank, 16),
        lora_dropout=dropout,
        target_modules=linear_names(model),
        init_lora_weights="gaussian",
    )


def add_lora(
    model: OpenVLA | PeftModel, *, rank: int, dropout: float = 0.0, adapter_name: str = "default", seed: int = 0
) -> PeftModel:
    """Puts a fresh float32 adapter on a model, or one more on a model that has some, and makes it the active one.

    B is zero, so the model acts as before. Equal seeds give equal adapters on every rank.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, lora_config(model, rank=rank, dropout=dropout))
            model.set_adapter(adapter_name)
            return model
        model.language_model.unpack()
        return get_peft_model(model, lora_config(model, rank=rank, dropout=dropout), adapter_name=adapter_name)


def load_adapter(
    model: OpenVLA | PeftModel, folder: Path, *, adapter_name: str = "default", trainable: bool = False
) -> PeftModel:
    """Puts the adapter of a folder on a model, in float32, and makes it the active one."""
    adapter = read_adapter(folder)
    peft_model = add_lora(model, rank=adapter.rank, adapter_name=adapter_name)
    config = peft_model.peft_config[adapter_name]
    if adapter.alpha != config.lora_alpha:
        for layer in lora_layers(peft_model):
            layer.scaling[adapter_name] = adapter.alpha / adapter.rank
        config.lora_alpha = adapter.alpha
    wanted = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    adapter.require({k: tuple(v.shape) for k, v in wanted.items()})
    set_peft_model_state_dict(peft_model, {k: v.float() for k, v in adapter.tensors.items()}, adapter_name=adapter_name)
    for layer in lora_layers(peft_model):
        for part in (layer.lora_A, layer.lora_B):
            part[adapter_name].requires_grad_(trainable)
    return peft_model


@contextmanager
def use_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Within the block the model acts with adapter `name`, or as the bare base (None). Gradients' settings stay."""
    layers = list(lora_layers(model))
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        layer._active_adapter = layer._active_adapter if name is None else [name]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (m for m in model.modules() if isinstance(m, LoraLayer))


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    adapter_name: str = "default",
    base: str,
    norm_stats: dict[str, Any] | None = None,
) -> None:
    """Writes one adapter as peft does. `base` is the checkpoint it belongs to; a new reader finds it by that path.

    Writes into `folder`, its config last: for an all-or-nothing checkpoint call it within `files.new_folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    with new_file(folder / ADAPTER_WEIGHTS) as beside:
        write_tensors({name: alone(t) for name, t in state.items()}, beside)
    if norm_stats is not None:
        write_json(folder / STATISTICS, norm_stats)
    config = model.peft_config[adapter_name].to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    write_json(folder / ADAPTER_CONFIG, {**plain, "base_model_name_or_path": base, "inference_mode": True})


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter folder's content: tensors by peft's names, without an adapter's name in them."""

    folder: Path
    rank: int
    alpha: float
    tensors: dict[str, Tensor]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def modules(self) -> list[str]:
        """Names, in the base, of the maps that are adapted."""
        return sorted({n.removeprefix(_PREFIX).rpartition(".lora_")[0] for n in self.tensors})

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(map, A (r, in), B (out, r)); convolutions flattened."""
        for module in self.modules():
            a, b = (self.tensors[f"{_PREFIX}{module}.lora_{part}.weight"] for part in "AB")
            yield module, a.flatten(1), b.flatten(1)

    def delta(self, module: str) -> Tensor | None:
        """What the adapter adds to a module's weight: (out, in) float32, or None."""
        a, b = (self.tensors.get(f"{_PREFIX}{module}.lora_{part}.weight") for part in "AB")
        if a is None or b is None:
            return None
        return self.scale * (b.float().flatten(1) @ a.float().flatten(1))

    def require_base(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError unless every map is in the base, with an A and a B of its size."""
        wanted = {}
        for module in self.modules():
            outputs, *inputs = shapes.get(f"{module}.weight", (0, 0))
            wanted[f"{_PREFIX}{module}.lora_A.weight"] = (self.rank, math.prod(inputs))
            wanted[f"{_PREFIX}{module}.lora_B.weight"] = (outputs, self.rank)
        self.require(wanted)

    def require(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError unless names and shapes are those."""
        for name in [*wanted, *self.tensors]:
            here, there = self.tensors.get(name), wanted.get(name)
            if here is None or there is None or tuple(here.flatten(1).shape) != (there[0], math.prod(there[1:])):
                found = "nothing" if here is None else tuple(here.shape)
                raise CheckpointError(
                    f"{self.folder / ADAPTER_WEIGHTS} holds {name} as {found}",
                    expected=f"{there or 'no such tensor'}, as the base model asks",
                    remedy="Give the adapter with the base that it was trained on.",
                )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    try:
        unsupported = [k for k in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(k)]
        if config["peft_type"] == "LORA" and not unsupported and config["r"] > 0 and config["lora_alpha"]:
            return config
        got = f"{path} of type {config['peft_type']} {' '.join(unsupported)}".strip()
    except (KeyError, TypeError) as e:
        got = f"{path} without a plain {e}"
    raise CheckpointError(got, expected="a plain LoRA adapter, as peft saves it", remedy="Give an adapter folder.")


def read_adapter(folder: Path) -> StoredAdapter:
    """Raises CheckpointError on anything but a whole LoRA adapter in safetensors.

    Its numbers must be finite: 0 times NaN is NaN, so others would spoil the policies that are resident beside it.
    """
    config = read_adapter_config(folder)
    path = folder / ADAPTER_WEIGHTS
    if not path.exists():
        refuse_pickles(folder)
        raise CheckpointError(
            f"{folder} holds no {ADAPTER_WEIGHTS}", expected="an adapter as peft saves it", remedy="Copy it again."
        )
    tensors = dict(read_headers([path]))
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            got = f"{path} holds NaN or infinity in {name}"
            raise CheckpointError(got, expected="finite numbers", remedy="Take another checkpoint.")
    return StoredAdapter(folder=folder, rank=config["r"], alpha=config["lora_alpha"], tensors=tensors)
