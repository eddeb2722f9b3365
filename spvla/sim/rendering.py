"""Off-screen pictures of a MuJoCo world, the same to the bit as robosuite's, one camera at a time and on demand.

MUJOCO_GL chooses egl (default) or osmesa. With EGL the device is MUJOCO_EGL_DEVICE_ID if set, else the first of
CUDA_VISIBLE_DEVICES, which is the GPU that Ray gave this process.
"""

import os
from typing import Protocol

import mujoco
import numpy as np

from spvla.types import CAMERA_SIZE


class GLContext(Protocol):
    def make_current(self) -> None: ...
    def free(self) -> None: ...


def choose_device() -> None:
    """Makes MuJoCo's EGL display open on the GPU this process was given."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    if first.isdigit():  # a UUID (MIG) names no EGL device: MuJoCo then takes the first that works
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", first)


def open_context() -> GLContext:
    os.environ.setdefault("MUJOCO_GL", "egl")
    if os.environ["MUJOCO_GL"] == "osmesa":
        from mujoco.osmesa import GLContext as Context
    else:
        choose_device()
        from mujoco.egl import GLContext as Context
    return Context(640, 480)


def renderer_name() -> str:
    """OpenGL's own words, such as "Mesa llvmpipe (LLVM 15.0.6, 256 bits)": a protocol's pixels depend on it."""
    context = open_context()
    context.make_current()
    from OpenGL import GL

    name = f"{GL.glGetString(GL.GL_VENDOR).decode()} {GL.glGetString(GL.GL_RENDERER).decode()}"
    context.free()
    return name


class Renderer:
    """One OpenGL context and one model's textures and meshes on the device."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = model
        self.context = open_context()
        self.context.make_current()
        self.scene = mujoco.MjvScene(model, maxgeom=1000)
        self.device = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.device)
        self.options = mujoco.MjvOption()
        self.options.geomgroup[0] = 0  # collision meshes
        self.options.geomgroup[1] = 1  # visual meshes
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.nothing_held = mujoco.MjvPerturb()
        self.viewport = mujoco.MjrRect(0, 0, CAMERA_SIZE, CAMERA_SIZE)

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """(256, 256, 3) uint8, bottom row first as OpenGL has it: LIBERO's observations are the same."""
        self.context.make_current()
        self.camera.fixedcamid = self.model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self.options, self.nothing_held, self.camera, everything, self.scene)
        mujoco.mjr_render(self.viewport, self.scene, self.device)
        image = np.empty((CAMERA_SIZE, CAMERA_SIZE, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, self.viewport, self.device)
        return image

    def close(self) -> None:
        self.context.make_current()
        self.device.free()
        self.context.free()
