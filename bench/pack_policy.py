"""Packs a trained preset into the folder that ships with the package.

python bench/pack_policy.py runs/small/checkpoints/step_020000 spvla/policies/shipped/spvla-small
"""

import sys
from pathlib import Path

from spvla.policies.packed import pack


def main() -> None:
    folder = pack(Path(sys.argv[1]), Path(sys.argv[2]))
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.name}")


if __name__ == "__main__":
    main()
