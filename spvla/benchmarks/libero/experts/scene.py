"""What an expert may know and a policy may not: where every surface is, read from the simulator's state.

Geometry is a cloud of surface points (N, 3), a few millimetres apart, of every geom that can collide. A cloud answers
each question an expert has (where to grasp, how high to travel, how low to let go) alike for boxes, cylinders and
meshes, so that experts work with any asset set.

Gripper frame, that of robosuite's `grip_site`: x is the axis along which the fingers close, z points out of the hand.
"""

from functools import cached_property, lru_cache
from itertools import product

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from spvla.benchmarks.libero.env import LiberoEnv

SPACING = 0.004  # m, between neighbouring surface points
FURNITURE = 0.25  # m; a geom with a longer half side is a table, a floor or a wall
WRIST = (0.088, 0.21)  # m from the grip site to the wrist: back and up
SIDES = (("finger_joint1_tip", "leftfinger"), ("finger_joint2_tip", "rightfinger"))  # bodies: pad and finger
ROBOT = ("robot0", "gripper0", "mount0")


class Scene:
    """The world as it stands: poses and clouds follow the simulation, step by step. Made anew after each reset."""

    def __init__(self, env: LiberoEnv) -> None:
        self.problem = env.env
        self.model, self.data = env.model, env.data
        self.hand = self.model.site("gripper0_grip_site").id
        self.fingers = [int(self.model.joint(f"gripper0_finger_joint{i}").qposadr[0]) for i in (1, 2)]
        mujoco.mj_kinematics(self.model, self.data)

    # --- the arm

    @property
    def position(self) -> np.ndarray:
        return self.data.site_xpos[self.hand].copy()

    @property
    def rotation(self) -> Rotation:
        return Rotation.from_matrix(self.data.site_xmat[self.hand].reshape(3, 3))

    @property
    def opening(self) -> float:
        """Metres between the fingers: 0.08 open, 0 closed."""
        return float(abs(self.data.qpos[self.fingers]).sum())

    def stretch(self, position: np.ndarray) -> float:
        """Metres from shoulder to wrist with the hand at `position`, fingers down; the arm is straight at 0.70."""
        across, up = position[:2] - self.shoulder[:2], position[2] + WRIST[1] - self.shoulder[2]
        return float(np.hypot(np.linalg.norm(across) - WRIST[0], up))

    @cached_property
    def shoulder(self) -> np.ndarray:
        return self.data.body("robot0_link2").xpos.copy()

    # --- things

    def body(self, name: str) -> int:
        return int(self.problem.obj_body_id[name])

    def where(self, name: str) -> np.ndarray:
        """A body's or a site's position, by LIBERO's name for it."""
        if name in self.problem.obj_body_id:
            return self.data.xpos[self.body(name)].copy()
        return self.data.site(name).xpos.copy()

    def turned(self, name: str) -> Rotation:
        if name in self.problem.obj_body_id:
            return Rotation.from_matrix(self.data.xmat[self.body(name)].reshape(3, 3))
        return Rotation.from_matrix(self.data.site(name).xmat.reshape(3, 3))

    def cloud(self, *names: str) -> np.ndarray:
        """(N, 3) surface points of these things, bodies below them included."""
        bodies = set().union(*(self.subtree(self.body(name)) for name in names))
        return self._world(np.isin(self._owner, list(bodies)))

    def obstacles(self, *without: str) -> np.ndarray:
        """(N, 3) surface points of all but the robot, furniture and these things."""
        left_out = set().union(set(), *(self.subtree(self.body(name)) for name in without))
        return self._world(~np.isin(self._owner, list(left_out)))

    def body_cloud(self, body: int) -> np.ndarray:
        return self._world(self._owner == body)

    def subtree(self, root: int) -> set[int]:
        found = {root}
        for body in range(root + 1, self.model.nbody):  # parents come first in MuJoCo's order
            if self.model.body_parentid[body] in found:
                found.add(body)
        return found

    @cached_property
    def ground(self) -> float:
        """Height of the table or floor that things stand on."""
        return min(float(self.cloud(name)[:, 2].min()) for name in self.problem.objects_dict)

    def holds(self, name: str) -> bool:
        """Both fingers touch it."""
        owned = self.subtree(self.body(name))
        touching = set()
        for contact in self.data.contact[: self.data.ncon]:
            first, second = (int(self.model.geom_bodyid[g]) for g in contact.geom)
            for one, other in ((first, second), (second, first)):
                if one in owned:
                    touching.add(self.model.body(other).name)
        return all(any(body.endswith(side) for body in touching) for side in SIDES)

    # --- surface points

    @property
    def _surface(self) -> tuple[np.ndarray, np.ndarray]:
        return surface(self.model)

    @cached_property
    def _owner(self) -> np.ndarray:
        return self.model.geom_bodyid[self._surface[1]]

    def _world(self, chosen: np.ndarray) -> np.ndarray:
        points, geoms = self._surface[0][chosen], self._surface[1][chosen]
        turns = self.data.geom_xmat[geoms].reshape(-1, 3, 3)
        return np.einsum("nij,nj->ni", turns, points) + self.data.geom_xpos[geoms]


@lru_cache(maxsize=1)  # a process plays one task at a time, attempt after attempt
def surface(model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) points in their geoms' frames, (N,) geom numbers."""
    points, geoms = [np.zeros((0, 3))], [np.zeros(0, int)]
    for geom in range(model.ngeom):
        if _collides(model, geom):
            points.append(_surface_of(model, geom))
            geoms.append(np.full(len(points[-1]), geom))
    return np.concatenate(points), np.concatenate(geoms)


def _collides(model: mujoco.MjModel, geom: int) -> bool:
    body = model.body(model.geom_bodyid[geom]).name
    plane = model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_PLANE
    solid = model.geom_contype[geom] or model.geom_conaffinity[geom]
    return bool(solid) and not plane and not body.startswith(ROBOT) and model.geom_size[geom].max() < FURNITURE


def _surface_of(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """(N, 3) points on one geom, in its own frame."""
    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = int(model.geom_dataid[geom])
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        return model.mesh_vert[first : first + count].astype(float)
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        return _box(size)
    if kind in (mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_CAPSULE):
        return _cylinder(size[0], size[1] + (size[0] if kind == mujoco.mjtGeom.mjGEOM_CAPSULE else 0))
    half = np.repeat(size[:1], 3) if kind == mujoco.mjtGeom.mjGEOM_SPHERE else size
    corners = _box(np.ones(3), SPACING / half.max())
    return corners / np.linalg.norm(corners, axis=1, keepdims=True) * half


def _box(half: np.ndarray, spacing: float = SPACING) -> np.ndarray:
    grids = [np.linspace(-h, h, max(2, int(np.ceil(2 * h / spacing)) + 1)) for h in half]
    faces = []
    for axis, sign in product(range(3), (0, -1)):
        sides = [grid if i != axis else grid[[sign]] for i, grid in enumerate(grids)]
        faces.append(np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 3))
    return np.concatenate(faces)


def _cylinder(radius: float, half: float) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, max(8, int(2 * np.pi * radius / SPACING)), endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], -1)
    heights = np.linspace(-half, half, max(2, int(np.ceil(2 * half / SPACING)) + 1))
    rows = [(radius * ring, z) for z in heights]
    rows += [(r * ring, z) for r in np.arange(0, radius, SPACING) for z in (-half, half)]
    return np.concatenate([np.column_stack([xy, np.full(len(xy), z)]) for xy, z in rows])
