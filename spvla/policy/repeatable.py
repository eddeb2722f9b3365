"""Sums in one order: what makes a row's result independent of its place in a batch on a GPU.

cuBLAS may cut a long sum into parts that it adds up through a workspace, and how it cuts depends on where in the output
a row lies. On an H200 in bfloat16, with one bucket of 64 requests of OpenVLA's size placed in other orders, 4.7% of all
tokens differed; without a workspace none did, and every logit was equal (docs/performance.md).
"""

import os

import torch

from spvla.errors import UserError

_NO_WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":0:0", "CUBLASLT_WORKSPACE_SIZE": "0"}


def keep_sums_in_order() -> None:
    """For this process, from its first matrix product on a GPU on. Raises UserError when that is past."""
    if all(os.environ.get(name) == value for name, value in _NO_WORKSPACE.items()):
        return
    if torch.cuda.is_initialized():
        names = " ".join(f"{name}={value}" for name, value in _NO_WORKSPACE.items())
        raise UserError(
            "a fixed decoding bucket after this process has begun to use its GPU",
            expected="to be asked before, because cuBLAS reads its settings once",
            remedy=f"Load this policy first, or start the process with {names}.",
        )
    os.environ.update(_NO_WORKSPACE)
