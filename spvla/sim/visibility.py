"""Which of a scene's shapes a camera cannot see, so that they need not be drawn. Pictures stay equal to the bit.

A shape is left out when its bounding sphere lies outside the camera's view and, for every mirror in the scene, so does
its mirror image as seen through that mirror. Sites with nothing left of their colour (robosuite hides them so, by a
negative alpha) are left out as well. Software renderers spend nearly all their time on triangles, of which LIBERO's
robot and objects have 200,000.
"""

import mujoco
import numpy as np

SHOWN = (1, 2)  # geometry groups that LIBERO draws; 0 is for collisions
HIDDEN = 5  # a group that is never drawn
MARGIN = 1.01  # of a radius


class Visibility:
    """Knows a model's shapes, mirrors and cameras."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = model
        self.geoms = np.flatnonzero(np.isin(model.geom_group, SHOWN) & (model.geom_rbound > 0))
        self.groups = model.geom_group[self.geoms].copy()
        self.radii = model.geom_rbound[self.geoms] * MARGIN
        self.mirrors = [g for g in np.flatnonzero(np.isin(model.geom_group, SHOWN)) if _is_mirror(model, g)]
        # A shadow may fall into the picture from outside; no camera or site of LIBERO's is of the other kinds.
        casts_shadow = bool((model.light_castshadow & model.light_active).any())
        odd_camera = bool(model.cam_projection.any() or model.cam_sensorsize.any())
        mirror_site = any(m >= 0 and model.mat_reflectance[m] > 0 for m in model.site_matid)
        self.all_drawn = casts_shadow or odd_camera or mirror_site
        self.site_groups = model.site_group.copy()

    def hide(self, data: mujoco.MjData, camera: int) -> None:
        """Moves what `camera` cannot see to the hidden group; `show` undoes it."""
        model = self.model
        if self.all_drawn:
            return
        model.geom_group[self.geoms] = np.where(self.seen(data, camera), self.groups, HIDDEN)
        model.site_group[model.site_rgba[:, 3] <= 0] = HIDDEN  # MuJoCo would blend nothing, and keep the depth

    def show(self) -> None:
        self.model.geom_group[self.geoms] = self.groups
        self.model.site_group[:] = self.site_groups

    def seen(self, data: mujoco.MjData, camera: int) -> np.ndarray:
        """(G,) bool for `self.geoms`: False where no pixel can depend on the shape."""
        eye, axes = data.cam_xpos[camera], data.cam_xmat[camera].reshape(3, 3)
        slope = np.tan(np.radians(self.model.cam_fovy[camera]) / 2)  # pictures are square
        centres = data.geom_xpos[self.geoms]
        seen = in_view(centres, self.radii, eye, axes, slope)
        for mirror in self.mirrors:
            normal = data.geom_xmat[mirror].reshape(3, 3)[:, 2]
            surface = data.geom_xpos[mirror] + normal * _surface_height(self.model, mirror)
            images = centres - 2 * ((centres - surface) @ normal)[:, None] * normal
            through = in_view(images, self.radii, eye, axes, slope)
            if radius := self.model.geom_rbound[mirror]:
                through &= in_cone(images, self.radii, eye, data.geom_xpos[mirror], radius * MARGIN)
            seen |= through
        return seen


def in_view(centres: np.ndarray, radii: np.ndarray, eye: np.ndarray, axes: np.ndarray, slope: float) -> np.ndarray:
    """Whether spheres (G, 3), (G,) reach into a square pyramid that opens along the camera's -z axis."""
    x, y, z = ((centres - eye) @ axes).T
    side = np.maximum(np.abs(x), np.abs(y))
    return side <= -z * slope + radii * np.sqrt(1 + slope**2)


def in_cone(centres: np.ndarray, radii: np.ndarray, eye: np.ndarray, target: np.ndarray, radius: float) -> np.ndarray:
    """Whether spheres (G, 3), (G,) reach into the cone from `eye` around the sphere `target`, `radius`."""
    axis, lines = target - eye, centres - eye
    distance, distances = np.linalg.norm(axis), np.linalg.norm(lines, axis=1)
    if distance <= radius:
        return np.ones(len(centres), bool)
    angles = np.arccos(np.clip(lines @ axis / (distances * distance), -1, 1))
    return angles <= np.arcsin(radius / distance) + np.arcsin(np.minimum(1, radii / distances))


def _is_mirror(model: mujoco.MjModel, geom: int) -> bool:
    """MuJoCo mirrors the scene in planes and in the tops of boxes whose material reflects."""
    flat = model.geom_type[geom] in (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX)
    return bool(flat and model.geom_matid[geom] >= 0 and model.mat_reflectance[model.geom_matid[geom]] > 0)


def _surface_height(model: mujoco.MjModel, geom: int) -> float:
    return model.geom_size[geom, 2] if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_BOX else 0.0
