"""OpenVLA's forward pass, arranged for scoring two continuations of one prefix.

The same weights and numbers as spvla.model.openvla, laid out so that a training step does no more than it needs:
  * q, k, v share one matrix product, gate and up another, and so do their adapters (see adapters.py);
  * the generated tokens stand behind the real sequence. Rows up to there are plainly causal, which is the fastest
    attention there is; the last six rows attend to their prefix and to each other by a small mask. So neither
    continuation sees the other, and padding (on the right) needs no mask;
  * after the last layer's attention only the rows whose logits are wanted go on.

Legend: B batch, T rows (BOS, 256 patches, text, generated), D width, H heads, K head width, R rows with logits.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.model.attention import attend_new
from spvla.model.openvla import OpenVLA, OpenVLAConfig
from spvla.model.vision import NUM_PATCHES, PATCH_SIZE, TowerConfig, VisionTower
from spvla.train.adapters import Flat, Lora, Site, adapted, base_layer, fuse, point_at
from spvla.train.blocks import (
    Norm,
    Rows,
    llama_attention,
    llama_rest,
    project,
    project_qkv,
    rms_norm,
    vit_block,
)

LLAMA = "language_model.model"

Loras = Callable[[str], Lora | None]  # site -> adapter, as `Adapter.lora`
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (B, H, T, K)


def bare(site: str) -> None:
    """No adapter anywhere: the base model."""


class Network:
    """A model's frozen weights by site, and the passes over them. The adapter is an argument; None is the bare model.

    With `compiled`, torch.compile is used on each half layer; call with few distinct shapes.
    """

    def __init__(self, model: nn.Module, *, compiled: bool = False, columns: slice = slice(None)) -> None:
        """`columns` are those of the logits that are wanted, in float32; the others' weights are not multiplied."""
        self.columns = columns
        self.core: OpenVLA = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.llm = self.core.config.llm
        self.parts: dict[str, list[nn.Module]] = {}  # site -> the modules it stacks; where adapters look
        self.sites: dict[str, Site] = {}
        for site, names in _site_names(self.core.config):
            self.parts[site] = [self.core.get_submodule(name) for name in names]
            self.sites[site] = fuse(self.parts[site])
        compile_ = compile_once_a_shape if compiled else (lambda f: f)
        self._vit_block, self._project = compile_(vit_block), compile_(project)
        self._attention, self._rest = compile_(llama_attention), compile_(llama_rest)
        self._project_qkv = compile_(project_qkv)

    @property
    def dtype(self) -> torch.dtype:
        return self.sites["lm_head"].weight.dtype

    @property
    def device(self) -> torch.device:
        return self.sites["lm_head"].weight.device

    @property
    def vocabulary(self) -> int:
        return self.sites["lm_head"].outs[0]

    def train_all(self) -> Flat:
        """Makes every weight that takes part trainable. The model's parameters become views of the flat's `compute`."""
        held = {id(t) for parts in self.parts.values() for m in parts for t in base_layer(m).parameters()}
        others = [p for n, p in self.core.named_parameters() if id(p) not in held and not self._unused(n)]
        site_tensors = [t for site in self.sites.values() for t in site[:2] if t is not None]
        flat = Flat([*site_tensors, *others], dtype=self.dtype, trainable=True)
        leaves = iter(flat.leaves(flat.shapes))
        for name, site in self.sites.items():
            weight, bias = next(leaves), None if site.bias is None else next(leaves)
            self.sites[name] = Site(weight, bias, site.outs)
            point_at(self.parts[name], self.sites[name])
        for parameter in others:
            parameter.data = next(leaves).data
            parameter.requires_grad_()
        flat.trained[len(site_tensors) :] = others
        return flat

    def _unused(self, name: str) -> bool:
        """Weights of a checkpoint that no pass touches: each tower's last block, final norm and pooling."""
        return any(
            name.startswith((f"{tower}.blocks.{config.depth - 1}.", f"{tower}.norm.", f"{tower}.attn_pool."))
            for tower, config in _towers(self.core.config)
        )

    def patches(self, pixels: Tensor, loras: Loras) -> Tensor:
        """Pixel values (B, 6, 224, 224) -> projected patches (B, 256, D)."""
        halves = pixels.to(self.dtype).split(3, 1)
        towers = zip(_towers(self.core.config), halves, strict=True)
        features = [self._tower(name, config, half, loras) for (name, config), half in towers]
        names = [f"projector.fc{i}" for i in (1, 2, 3)]
        return self._project(torch.cat(features, -1), [self.sites[n] for n in names], [loras(n) for n in names])

    def embed(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        return F.embedding(ids, self.core.get_submodule(f"{LLAMA}.embed_tokens").weight)

    def hidden(self, x: Tensor, rows: Rows, loras: Loras, *, keep: Tensor, cache: Cache | None = None) -> Tensor:
        """Runs all layers and returns the rows `keep` (B, R), normed: (B, T, D) -> (B, R, D). Fills an empty cache."""
        for i in range(self.llm.depth):
            norm, heads = self._norm(f"{LLAMA}.layers.{i}.input_layernorm"), self.llm.num_heads
            attended, k, v = self._attention(x, norm, self.sites[f"{i}.qkv"], loras(f"{i}.qkv"), heads, rows)
            if cache is not None:
                cache.append((k, v))
            if i == self.llm.depth - 1:
                x, attended = take_rows(x, keep), take_rows(attended, keep)
            x = self._finish(i, x, attended, loras)
        return rms_norm(x, self._norm(f"{LLAMA}.norm"))

    def decode_hidden(self, x: Tensor, rows: Rows, loras: Loras, *, cache: Cache, at: Tensor) -> Tensor:
        """One token further: (B, 1, D) -> (B, 1, D), overwriting row `at` (B,) of the cache."""
        for i in range(self.llm.depth):
            norm, site = self._norm(f"{LLAMA}.layers.{i}.input_layernorm"), self.sites[f"{i}.qkv"]
            q, k, v = self._project_qkv(x, norm, site, loras(f"{i}.qkv"), self.llm.num_heads, rows)
            attended = attend_new(q, k, v, *cache[i], at).transpose(1, 2).flatten(2)
            x = self._finish(i, x, attended, loras)
        return rms_norm(x, self._norm(f"{LLAMA}.norm"))

    def logits(self, hidden: Tensor, loras: Loras) -> Tensor:
        """(..., D) -> (..., V), or the columns that are wanted."""
        site, lora = self.sites["lm_head"], loras("lm_head")
        if self.columns == slice(None):
            return adapted(hidden, site, lora)
        rows = site.weight[self.columns]
        lora = lora and lora._replace(a=lora.a.float(), b=lora.b[self.columns].float())
        return adapted(hidden.float(), Site(rows.float(), None, (len(rows),)), lora)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) -> cos and sin (B, T, 1, K), float32."""
        width = self.llm.width // self.llm.num_heads
        exponents = torch.arange(0, width, 2, device=positions.device).float() / width
        angles = positions[..., None].float() * self.llm.rope_theta**-exponents
        angles = torch.cat((angles, angles), -1)[:, :, None]
        return angles.cos(), angles.sin()

    def _finish(self, layer: int, x: Tensor, attended: Tensor, loras: Loras) -> Tensor:
        names = [f"{layer}.{part}" for part in ("o", "gate_up", "down")]
        norm = self._norm(f"{LLAMA}.layers.{layer}.post_attention_layernorm")
        return self._rest(x, attended, norm, [self.sites[n] for n in names], [loras(n) for n in names])

    def _tower(self, name: str, config: TowerConfig, pixels: Tensor, loras: Loras) -> Tensor:
        """(B, 3, 224, 224) -> features (B, 256, D): output of the last block but one, prefix tokens dropped."""
        tower: VisionTower = self.core.get_submodule(name)
        x = adapted(unfold(pixels), self.sites[f"{name}.patch"], loras(f"{name}.patch")) + tower.pos_embed
        prefix = [t.expand(len(x), -1, -1) for t in (tower.cls_token, tower.reg_token) if t is not None]
        x = torch.cat((*prefix, x), 1)
        for i, block in enumerate(tower.blocks[:-1]):  # the last block never runs
            names = [f"{name}.{i}.{part}" for part in ("qkv", "proj", "fc1", "fc2")]
            x = self._vit_block(
                x,
                [Norm(n.weight, n.bias, n.eps) for n in (block.norm1, block.norm2)],
                [self.sites[n] for n in names],
                [loras(n) for n in names],
                [getattr(scale, "scale_factor", None) for scale in (block.ls1, block.ls2)],
                config.num_heads,
            )
        return x[:, -NUM_PATCHES:]

    def _norm(self, name: str) -> Norm:
        return Norm(self.core.get_submodule(name).weight, None, self.llm.rms_norm_eps)


def compile_once_a_shape(function: Callable) -> Callable:
    """Compiled anew for each shape, with and without gradient, with and without adapter: more than torch expects."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, fullgraph=True)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, T, D), (B, R) -> (B, R, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def unfold(pixels: Tensor) -> Tensor:
    """Cuts an image into its patches, row by row: (B, 3, 224, 224) -> (B, 256, 3 * 14 * 14)."""
    grid = pixels.unflatten(3, (-1, PATCH_SIZE)).unflatten(2, (-1, PATCH_SIZE))  # (B, 3, 16, 14, 16, 14)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _towers(config: OpenVLAConfig) -> list[tuple[str, TowerConfig]]:
    return [("vision_backbone.featurizer", config.dino), ("vision_backbone.fused_featurizer", config.siglip)]


def _site_names(config: OpenVLAConfig) -> Iterator[tuple[str, list[str]]]:
    """Every site that takes part in the forward pass, with the checkpoint's names of the maps it stacks."""
    for tower, tower_config in _towers(config):
        yield f"{tower}.patch", [f"{tower}.patch_embed.proj"]
        for i in range(tower_config.depth - 1):  # the last block never runs
            for part, name in (("qkv", "attn.qkv"), ("proj", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
                yield f"{tower}.{i}.{part}", [f"{tower}.blocks.{i}.{name}"]
    for name in ("projector.fc1", "projector.fc2", "projector.fc3"):
        yield name, [name]
    for i in range(config.llm.depth):
        layer = f"{LLAMA}.layers.{i}"
        yield f"{i}.qkv", [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
        yield f"{i}.o", [f"{layer}.self_attn.o_proj"]
        yield f"{i}.gate_up", [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]
        yield f"{i}.down", [f"{layer}.mlp.down_proj"]
    yield "lm_head", ["language_model.lm_head"]
