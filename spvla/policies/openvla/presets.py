"""Models by name, and checkpoints of them with random weights: so the whole way can be gone without any download.

    7b      OpenVLA's own size
    small   30 M parameters, of which the 12 M that LIBERO uses fit 23.5 MiB in bfloat16; learns LIBERO from nothing
    tiny    8 M, of which 2 M outside the vocabulary; for tests and two CPU cores

What is counted for "small": no weight of a tower's last block, final norm or pooling, which never run; of the
vocabulary the rows of LIBERO's words and the 256 actions going in, and of the 256 actions coming out. The reasons are
in docs/training.md.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spvla.errors import UserError
from spvla.files import new_folder, write_json
from spvla.model.llama import LlamaConfig
from spvla.model.openvla import OpenVLA, OpenVLAConfig
from spvla.model.vision import TowerConfig
from spvla.model.weights import write_weights
from spvla.policies.openvla.actions import ACTION_TOKEN_BEGIN, VOCAB_SIZE
from spvla.policies.openvla.images import DINO_MEAN, DINO_STD, SIGLIP_MEAN, SIGLIP_STD
from spvla.policies.openvla.prompt import BOS, EOS, PAD, build_tiny_tokenizer, save_tokenizer
from spvla.types import IMAGE_SIZE

DINO_ID, SIGLIP_ID = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
TOWER_FILE = "tiny_vision.json"  # head counts of towers whose size was never published

_SEVEN_B_SIGLIP_MLP = 4304
PRESETS = ("small", "tiny")  # those that can be made here
# Every embedding's first number, and that of the rows of actions in the output head, which has no bias: actions thus
# begin some 11 above all other words. Otherwise a policy's first hundred steps go into learning to answer in them.
_CONSTANT = 3.0
ACTION_IDS = slice(ACTION_TOKEN_BEGIN + 1, VOCAB_SIZE)  # rows of the vocabulary that stand for actions


def preset(name: str) -> OpenVLAConfig:
    """ "7b", "small" or "tiny". Raises UserError. A tower's depth counts its last block, which never runs."""
    if name == "7b":
        return OpenVLAConfig(
            dino=_dino(width=1024, depth=24, num_heads=16, mlp_hidden=4096),
            siglip=_siglip(width=1152, depth=27, num_heads=16, mlp_hidden=_SEVEN_B_SIGLIP_MLP),
            llm=LlamaConfig(),
        )
    if name == "small":
        tower = {"width": 256, "depth": 6, "num_heads": 4, "mlp_hidden": 640}  # heads of 64: kernels are made for that
        return OpenVLAConfig(
            dino=_dino(**tower),
            siglip=_siglip(**tower),
            llm=LlamaConfig(width=256, depth=6, num_heads=4, mlp_hidden=512),
        )
    if name == "tiny":
        tower = {"width": 96, "depth": 4, "num_heads": 4}
        return OpenVLAConfig(
            dino=_dino(**tower, mlp_hidden=384),
            siglip=_siglip(**tower | {"depth": 3}, mlp_hidden=358),
            llm=LlamaConfig(width=96, depth=3, num_heads=4, mlp_hidden=256),
        )
    raise UserError(f"preset {name!r}", expected="7b, small or tiny", remedy="Correct the name.")


def create_preset(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Writes a checkpoint of random weights in the Hugging Face layout; equal seeds give equal bytes."""
    model = OpenVLA(preset(name))
    initialise(model, seed)
    with new_folder(folder) as new:
        write_model(model, new)
        write_json(new / TOWER_FILE, towers_json(model.config))
    return folder


def write_model(model: OpenVLA, folder: Path, *, norm_stats: dict[str, Any] | None = None) -> None:
    """A checkpoint's files into an empty folder; its tokenizer knows LIBERO's words and spells others."""
    state = model.state_dict()
    write_weights([(name, lambda t=t: t, t.nbytes) for name, t in sorted(state.items())], folder)
    save_tokenizer(build_tiny_tokenizer(), folder)
    write_json(folder / "preprocessor_config.json", processor_json())
    write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
    write_json(folder / "config.json", config_json(model.config, norm_stats))


@torch.no_grad()
def initialise(model: OpenVLA, seed: int) -> None:
    """Random weights that train well: each parameter from a generator of its own, so order does not matter."""
    for name, parameter in model.state_dict().items():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
        parameter.copy_(_initial(name, parameter, model.config, generator))


def _initial(name: str, like: Tensor, config: OpenVLAConfig, generator: torch.Generator) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros_like(like)
    if "norm" in name or name.endswith("scale_factor"):
        return torch.ones_like(like)
    random = torch.randn(like.shape, generator=generator)
    if name.endswith(("pos_embed", "cls_token", "reg_token", "latent")):
        return 0.3 * random
    if name.endswith("embed_tokens.weight"):
        rows = 0.2 * random
        rows[:, 0] = _CONSTANT
        return rows
    if name.endswith("lm_head.weight"):  # words that are no actions are never the answer: theirs are zeros
        rows = torch.zeros_like(like)
        rows[ACTION_IDS] = 0.02 * random[ACTION_IDS]
        rows[ACTION_IDS, 0] = _CONSTANT
        return rows
    return random / math.sqrt(like[0].numel() * _writers(name, config))


def _writers(name: str, config: OpenVLAConfig) -> int:
    """How many maps add to the residual stream that this one adds to, so that their sum has unit variance; or 1."""
    if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
        return 2 * config.llm.depth
    if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
        tower = config.siglip if ".fused_featurizer." in name else config.dino
        return 2 * (tower.depth - 1)
    return 1


def config_json(config: OpenVLAConfig, norm_stats: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json as OpenVLA's own code reads it."""
    llm = config.llm
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 2048,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "timm_model_ids": [DINO_ID, SIGLIP_ID],
        "timm_override_act_layers": [None, None],
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "image_sizes": [IMAGE_SIZE, IMAGE_SIZE],
        "n_action_bins": 256,
        "norm_stats": norm_stats or {},
        "output_projector_states": False,
        "pad_to_multiple_of": 64,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "llama",
            "hidden_size": llm.width,
            "intermediate_size": llm.mlp_hidden,
            "num_hidden_layers": llm.depth,
            "num_attention_heads": llm.num_heads,
            "num_key_value_heads": llm.num_heads,
            "rms_norm_eps": llm.rms_norm_eps,
            "pad_token_id": PAD,
            "torch_dtype": "float32",
            "vocab_size": llm.vocab_size,
        },
    }


def processor_json() -> dict[str, Any]:
    """preprocessor_config.json as OpenVLA's own code reads it."""
    size = [IMAGE_SIZE, IMAGE_SIZE]
    resize = {"antialias": True, "interpolation": 3, "max_size": None, "size": size}
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "use_fused_vision_backbone": True,
        "input_sizes": [[3, *size], [3, *size]],
        "interpolations": ["bicubic", "bicubic"],
        "means": [list(DINO_MEAN), list(SIGLIP_MEAN)],
        "stds": [list(DINO_STD), list(SIGLIP_STD)],
        "tvf_crop_params": [{"output_size": size}, {"output_size": size}],
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": list(DINO_MEAN), "std": list(DINO_STD)},
            {"inplace": False, "mean": list(SIGLIP_MEAN), "std": list(SIGLIP_STD)},
        ],
        "tvf_resize_params": [resize, resize],
    }


def towers_json(config: OpenVLAConfig) -> dict[str, Any]:
    """TOWER_FILE: what `OpenVLAConfig.from_json` cannot see in tensor shapes."""
    towers = {DINO_ID: config.dino, SIGLIP_ID: config.siglip}
    return {name: {"embed_dim": t.width, "depth": t.depth, "num_heads": t.num_heads} for name, t in towers.items()}


def _dino(*, width: int, depth: int, num_heads: int, mlp_hidden: int) -> TowerConfig:
    return TowerConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_hidden=mlp_hidden,
        num_registers=4,
        class_token=True,
        layer_scale=True,
    )


def _siglip(*, width: int, depth: int, num_heads: int, mlp_hidden: int) -> TowerConfig:
    return TowerConfig(width=width, depth=depth, num_heads=num_heads, mlp_hidden=mlp_hidden, pool=True)
