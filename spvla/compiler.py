"""numba, told to keep what it compiles in the cache folder: the code's own may be read-only, as HOME may be.

Left alone it raises where it can write to neither. Whatever imports numba, or robosuite, imports this first.
"""

import os

from spvla.files import cache_dir

os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))
import numba

__all__ = ["numba"]
