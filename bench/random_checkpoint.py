"""Writes a checkpoint at random weights, made where they are wanted: OpenVLA's own size, for measuring whole commands.

    python bench/random_checkpoint.py /tmp/random_7b                                        # 15 GB, one GPU
    python bench/random_checkpoint.py /tmp/random_oft --oft_head discrete                   # OpenVLA-OFT's form
    python bench/random_checkpoint.py /tmp/random_tiny --preset tiny --device cpu --dtype float32

It may act in every suite. Its actions differ from image to image and mean nothing: attention is made sharp, since at
unit scale it would average all patches, which are much alike between images, and action tokens are made to win.
"""

import argparse
import time
from pathlib import Path

import torch
from decode import random_model

from spvla.benchmarks.libero.suites import MAX_STEPS
from spvla.files import new_folder, write_json
from spvla.model.weights import torch_dtype
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.heads import make_added
from spvla.policies.oft.parts import write_added
from spvla.policies.openvla.actions import ACTION_TOKEN_BEGIN, VOCAB_SIZE
from spvla.policies.openvla.presets import TOWER_FILE, towers_json, write_model

LIMITS = {"q01": [-0.9] * 6 + [0.0], "q99": [0.9] * 6 + [1.0], "mask": [True] * 6 + [False]}
PROPRIO = {
    "q01": [-1.0] * 8,
    "q99": [1.0] * 8,
    "min": [-1.0] * 8,
    "max": [1.0] * 8,
    "mean": [0.0] * 8,
    "std": [1.0] * 8,
}
REST = {"min": [-1.0] * 7, "max": [1.0] * 7, "mean": [0.0] * 7, "std": [1.0] * 7}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="7b", choices=("7b", "tiny"))
    parser.add_argument("--oft_head", choices=("discrete", "l1"), default=None, help="OpenVLA-OFT's form")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    start_s = time.monotonic()
    model = random_model(args.preset, torch.device(args.device), torch_dtype(args.dtype))
    model.language_model.lm_head.weight[ACTION_TOKEN_BEGIN:VOCAB_SIZE] *= 4
    for layer in model.language_model.model.layers:
        attention = layer.self_attn
        attention.qkv_proj.weight[: 2 * attention.o_proj.out_features].mul_(4)  # q and k
    stats = {"action": LIMITS | REST} | ({"proprio": PROPRIO} if args.oft_head else {})
    with new_folder(args.folder) as new:
        write_model(model, new, norm_stats={suite: stats for suite in MAX_STEPS})
        if args.preset == "tiny":
            write_json(new / TOWER_FILE, towers_json(model.config))
        if args.oft_head:
            form = OftForm(cameras=2, proprio=True, head=args.oft_head)
            write_added(make_added(form, model.config.llm.width, seed=0), form, new)
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    print(f"{args.folder}: {size / 1e9:.1f} GB in {time.monotonic() - start_s:.0f} s")


if __name__ == "__main__":
    main()
