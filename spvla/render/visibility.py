"""Which of a scene's shapes a camera cannot see, so that they need not be drawn. Pictures stay equal to the bit.

A shape is left out when its bounding sphere lies outside the camera's view and no mirror in the scene can show it.
Sites with nothing left of their colour (robosuite hides them so, by a negative alpha) are left out as well. Software
renderers spend nearly all their time on triangles, of which LIBERO's robot and objects have 200,000.
"""

import mujoco
import numpy as np

SHOWN = (1, 2)  # geometry groups that LIBERO draws; 0 is for collisions
HIDDEN = 5  # a group that is never drawn
MARGIN = 1.01  # of a radius, and of a mirror's size
SLACK = 1e-4  # metres
ENDLESS = 1e6  # metres
ODD_CAMERA = ("cam_sensorsize", "cam_orthographic", "cam_projection")  # the last is the newer name of the second


class Visibility:
    """Knows a model's shapes, mirrors and cameras."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = model
        self.geoms = np.flatnonzero(np.isin(model.geom_group, SHOWN) & (model.geom_rbound > 0))
        self.groups = model.geom_group[self.geoms].copy()
        self.radii = model.geom_rbound[self.geoms] * MARGIN
        self.mirrors = [int(g) for g in np.flatnonzero(np.isin(model.geom_group, SHOWN)) if _is_mirror(model, int(g))]
        # A shadow may fall into the picture from outside; no camera or site of LIBERO's is of the other kinds.
        casts_shadow = bool((model.light_castshadow & model.light_active).any())
        odd_camera = any(getattr(model, name).any() for name in ODD_CAMERA if hasattr(model, name))
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
        directly = self._in_view(data.geom_xpos[self.geoms], data, camera)
        return directly | self.mirrored(data, camera)[self.geoms]

    def mirrored(self, data: mujoco.MjData, camera: int) -> np.ndarray:
        """(model.ngeom,) bool: False where no mirror can show the shape."""
        model, geoms = self.model, self.geoms
        found = np.zeros(model.ngeom, bool)
        for mirror in self.mirrors:
            axes, turns = data.geom_xmat[mirror].reshape(3, 3), data.geom_xmat[geoms].reshape(-1, 3, 3)
            surface = data.geom_xpos[mirror] + axes[:, 2] * _surface_height(model, mirror)
            images = data.geom_xpos[geoms] - 2 * ((data.geom_xpos[geoms] - surface) @ axes[:, 2])[:, None] * axes[:, 2]
            centres = data.geom_xpos[geoms] + np.einsum("gij,gj->gi", turns, model.geom_aabb[geoms, :3])
            around = (centres - surface) @ axes, axes.T @ turns, model.geom_aabb[geoms, 3:] + SLACK
            shown = through((data.cam_xpos[camera] - surface) @ axes, _half(model, mirror), *around)
            found[geoms] |= shown & self._in_view(images, data, camera)
        return found

    def _in_view(self, centres: np.ndarray, data: mujoco.MjData, camera: int) -> np.ndarray:
        slope = np.tan(np.radians(self.model.cam_fovy[camera]) / 2)  # pictures are square
        return in_view(centres, self.radii, data.cam_xpos[camera], data.cam_xmat[camera].reshape(3, 3), slope)


def in_view(centres: np.ndarray, radii: np.ndarray, eye: np.ndarray, axes: np.ndarray, slope: float) -> np.ndarray:
    """Whether spheres (G, 3), (G,) reach into a square pyramid that opens along the camera's -z axis."""
    x, y, z = ((centres - eye) @ axes).T
    side = np.maximum(np.abs(x), np.abs(y))
    return side <= -z * slope + radii * np.sqrt(1 + slope**2)


def through(
    eye: np.ndarray, mirror: np.ndarray, centres: np.ndarray, turns: np.ndarray, halves: np.ndarray
) -> np.ndarray:
    """(G,) whether an eye (3,) may see boxes in a mirror, all in the mirror's frame: from -mirror to mirror (2,) in x
    and y, facing z. Boxes lie around `centres` (G, 3), turned by (G, 3, 3), and reach as far as `halves` (G, 3).

    One sees a point where the line from the eye's mirror image to it crosses the mirror. For an eye at (x, y, h) and a
    mirror that ends at a, this gives (x - a) z + h x' <= a h for points (x', y', z), and so on.
    """
    (x, y, h), (a, b) = eye, mirror
    if abs(h) < SLACK:
        return np.ones(len(centres), bool)
    outward = np.array([[0, 0, -1], [h, 0, x - a], [-h, 0, -x - a], [0, h, y - b], [0, -h, -y - b]])
    reach = np.einsum("gpi,gi->gp", np.abs(outward @ turns), halves)
    inside = centres @ outward.T - reach <= np.array([0, a, a, b, b]) * h
    return inside.all(axis=1) & (h > 0)


def _is_mirror(model: mujoco.MjModel, geom: int) -> bool:
    """MuJoCo mirrors the scene in planes and in the tops of boxes whose material reflects."""
    flat = model.geom_type[geom] in (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX)
    return bool(flat and model.geom_matid[geom] >= 0 and model.mat_reflectance[model.geom_matid[geom]] > 0)


def _surface_height(model: mujoco.MjModel, geom: int) -> float:
    return model.geom_size[geom, 2] if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_BOX else 0.0


def _half(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """(2,) how far a mirror reaches to each side."""
    is_box = model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_BOX
    return model.geom_size[geom, :2] * MARGIN if is_box else np.full(2, ENDLESS)
