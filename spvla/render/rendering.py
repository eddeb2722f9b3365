"""Off-screen pictures of a MuJoCo world, the same to the bit as robosuite's, one camera at a time and on demand."""

import atexit
from functools import cache
from weakref import WeakSet

import mujoco
import numpy as np

from spvla.render.context import GLContext, draws_in_software, open_context
from spvla.render.meshes import FineMeshes, View
from spvla.render.visibility import Visibility
from spvla.types import CAMERA_SIZE

MAX_GEOMS = 1000  # robosuite's: what a scene may hold


class Renderer:
    """An OpenGL context with one model's meshes and textures.

    spare_gpu: choose the triangles to draw on the CPU, as software always wants it, on a GPU too. A picture then takes
    as little as half of its time, for which a policy that decodes there waits, and 3 ms more of a core's.
    """

    def __init__(self, model: mujoco.MjModel, *, spare_gpu: bool = False) -> None:
        self.model = model
        self.context: GLContext | None = open_context()
        self.scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        model.vis.global_.offwidth = model.vis.global_.offheight = CAMERA_SIZE  # a buffer no larger than the picture
        if not (model.light_castshadow & model.light_active).any():
            model.vis.quality.shadowsize = 0  # 64 MB of shadow map for nothing
        self.device = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.device)
        self.options = mujoco.MjvOption()
        self.options.geomgroup[0] = 0  # collision shapes
        self.options.geomgroup[1] = 1  # what they look like
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.perturbation = mujoco.MjvPerturb()
        self.viewport = mujoco.MjrRect(0, 0, CAMERA_SIZE, CAMERA_SIZE)
        self.visibility = Visibility(model)
        choose = (spare_gpu or draws_in_software()) and not self.visibility.all_drawn  # with shadows, it draws twice
        self.fine = FineMeshes(model, self.device) if choose else None
        _close_at_exit()
        _OPEN.add(self)

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """(256, 256, 3) uint8, bottom row first as OpenGL has it; LIBERO's observations are the same."""
        assert self.context is not None, "closed"
        self.context.make_current()
        self.camera.fixedcamid = self.model.camera(camera).id
        self.visibility.hide(data, self.camera.fixedcamid)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self.options, self.perturbation, self.camera, everything, self.scene)
        self.visibility.show()
        if self.fine is None:
            mujoco.mjr_render(self.viewport, self.scene, self.device)
            return self._pixels()
        mirrored = self.visibility.mirrored(data, self.camera.fixedcamid)
        with self.fine.left_out(self.scene, data, self._view(data), mirrored) as shapes:
            mujoco.mjr_render(self.viewport, self.scene, self.device)
        right = self.fine.painter.paint(shapes, self.scene.nlight)
        image = self._pixels()
        if not right():
            mujoco.mjr_render(self.viewport, self.scene, self.device)
            image = self._pixels()
        return image

    def _view(self, data: mujoco.MjData) -> View:
        camera, frustum = self.camera.fixedcamid, self.scene.camera[0]
        return View(
            eye=data.cam_xpos[camera],
            axes=data.cam_xmat[camera].reshape(3, 3),
            fovy_deg=self.model.cam_fovy[camera],
            near_m=frustum.frustum_near,
            far_m=frustum.frustum_far,
            size=CAMERA_SIZE,
        )

    def _pixels(self) -> np.ndarray:
        image = np.empty((CAMERA_SIZE, CAMERA_SIZE, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, self.viewport, self.device)
        return image

    def close(self) -> None:
        """Silent, and may be repeated. Textures go before their context, and the context before the display."""
        if self.context is not None:
            self.context.make_current()
            self.device.free()
            self.context.free()
            self.context = None

    def __del__(self) -> None:
        if getattr(self, "context", None) is not None:
            self.close()


_OPEN: WeakSet[Renderer] = WeakSet()


@cache
def _close_at_exit() -> None:
    """Registered after MuJoCo's own exit function, which ends the display, and therefore called before it."""
    atexit.register(_close_all)


def _close_all() -> None:
    for renderer in list(_OPEN):
        renderer.close()
