"""The embedded asset set: every object and arena of LIBERO's four suites as plain geometry.

A fresh machine has no LIBERO meshes. `write` makes a folder that LIBERO's own classes load unchanged: the same file
names, bodies, joints and sites, extents and masses close to the originals', shapes and colours drawn by this code.
"""

import hashlib
from functools import cache
from pathlib import Path

from spvla.benchmarks.libero.primitives import fixtures, mjcf, objects, scenes, textures


@cache
def contents() -> dict[str, bytes]:
    """Relative path -> bytes of every file of the set."""
    assets = (*objects.assets(), *fixtures.assets())
    files = {asset.path: mjcf.object_xml(asset).encode() for asset in assets}
    files |= {f"scenes/{name}": text.encode() for name, text in scenes.files().items()}
    return files | {f"textures/{name}": textures.png(image) for name, image in textures.images().items()}


def _digest() -> str:
    """sha256 over all paths and bytes."""
    total = hashlib.sha256()
    for path, data in sorted(contents().items()):
        total.update(f"{path}\0{len(data)}\0".encode() + data)
    return total.hexdigest()


def write(folder: Path) -> None:
    """Write the set into `folder` (created when missing); may be repeated."""
    for path, data in contents().items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


DIGEST = _digest()  # a few milliseconds: the set is small
