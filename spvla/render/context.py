"""The OpenGL context that pictures are drawn in, and whether this machine can open one.

MUJOCO_GL chooses egl (the default) or osmesa; MuJoCo's other backends open a window. With EGL the device is
MUJOCO_EGL_DEVICE_ID where set, else one of CUDA_VISIBLE_DEVICES, which are the GPUs that Ray or SLURM gave this
process, else the first that works. MuJoCo is imported late, because with an unusable MUJOCO_GL its import fails.
"""

import glob
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

from spvla.errors import InfrastructureError, UserError
from spvla.render.devices import cuda_numbers, drawing_device, visible_gpus
from spvla.types import ENV_NUMBER

BACKENDS = ("egl", "osmesa")
BUFFER = (640, 480)  # ignored by EGL; OSMesa draws into it
TRY_S = 60.0  # a driver's start
EGL_PACKAGES = ("libegl1", "libgl1", "libegl-mesa0", "libgl1-mesa-dri")
INSTALL_EGL = f"apt-get install -y {' '.join(EGL_PACKAGES)}"

# In a process of its own: a broken driver may end it with a signal.
_TRY = """
import os, sys
from spvla.render.context import InfrastructureError, renderer_name
try:
    print(renderer_name(), flush=True)
except InfrastructureError as e:
    sys.exit(str(e.__cause__))
os._exit(0)
"""


class GLContext(Protocol):
    def make_current(self) -> None: ...
    def free(self) -> None: ...


def draw_on_one_core() -> None:
    """For one of many environments: Mesa's software renderer would start a thread for each core, all of which the
    others use already. The same picture to the bit, for a tenth less work."""
    os.environ.setdefault("LP_NUM_THREADS", "0")


def draw_on_gpu(number: int) -> None:
    """For one of many environments that share a machine's GPUs: the `number`-th of those that this process may see,
    round and round. Does nothing where there is at most one."""
    os.environ[ENV_NUMBER] = str(number)


def backend() -> str:
    """What MUJOCO_GL asks for. Raises UserError for what needs a screen, and a device that robosuite refuses."""
    asked = os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL", "").strip().lower() or BACKENDS[0]
    if asked not in BACKENDS:
        raise UserError(f"MUJOCO_GL={asked}", expected=" or ".join(BACKENDS), remedy="Correct it, or unset it for egl.")
    named, visible = os.environ.get("MUJOCO_EGL_DEVICE_ID"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if named and visible and named not in visible:  # robosuite's import would end in an assertion
        raise UserError(
            f"MUJOCO_EGL_DEVICE_ID={named} with CUDA_VISIBLE_DEVICES={visible}",
            expected="one of those devices",
            remedy="Unset MUJOCO_EGL_DEVICE_ID: a GPU that this process may see is found by itself.",
        )
    return asked


def try_drawing() -> str:
    """The renderer's name, found by another process in a second. Raises UserError where this machine cannot draw."""
    asked = backend()
    try:
        done = subprocess.run([sys.executable, "-c", _TRY], capture_output=True, text=True, timeout=TRY_S)
    except subprocess.TimeoutExpired:
        raise _unusable(asked, f"nothing within {TRY_S:.0f} s") from None
    if done.returncode != 0:
        raise _unusable(asked, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout.strip()


def _unusable(asked: str, why: str) -> UserError:
    other = BACKENDS[asked == BACKENDS[0]]
    return UserError(
        f"MuJoCo draws nothing with MUJOCO_GL={asked} ({why})",
        expected="a driver that works",
        remedy=f"{INSTALL_EGL if asked == 'egl' else 'Install libosmesa6'}; or set MUJOCO_GL={other}.",
    )


def open_context() -> GLContext:
    """Raises InfrastructureError where this machine cannot draw."""
    kind = backend()
    try:
        if kind == "osmesa":
            from mujoco.osmesa import GLContext as Context

            context = Context(*BUFFER)
        else:
            from mujoco.egl import GLContext as Context

            with device_named(choose_device()):
                context = Context(*BUFFER)
        context.make_current()
    except Exception as e:  # each backend fails in its own ways
        raise InfrastructureError(
            f"MuJoCo cannot draw with MUJOCO_GL={kind} ({e}); expected a working driver. `spvla doctor` names the gap."
        ) from e
    return context


def choose_device() -> int | None:
    """The EGL device that draws; None where someone named one already, or the driver is to choose."""
    if "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return None
    gpus, number = len(glob.glob("/dev/nvidia[0-9]*")), os.environ.get(ENV_NUMBER)
    visible = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return drawing_device(cuda_numbers(), visible, int(number) if number else None, gpus)


@contextmanager
def device_named(device: int | None) -> Iterator[None]:
    """MuJoCo reads the variable when it opens its first context. Later it must be gone: robosuite's import fails where
    it is none of CUDA's numbers."""
    if device is None:
        yield
        return
    os.environ["MUJOCO_EGL_DEVICE_ID"] = str(device)
    try:
        yield
    finally:
        del os.environ["MUJOCO_EGL_DEVICE_ID"]


@cache
def renderer_name() -> str:
    """OpenGL's own words, such as "Mesa llvmpipe (LLVM 15.0.6, 256 bits)". Pixels differ between renderers."""
    context = open_context()
    from OpenGL import GL

    name = f"{GL.glGetString(GL.GL_VENDOR).decode()} {GL.glGetString(GL.GL_RENDERER).decode()}"
    context.free()
    return name


def draws_in_software() -> bool:
    """Whether the current context does."""
    from OpenGL import GL

    return b"llvmpipe" in GL.glGetString(GL.GL_RENDERER)
