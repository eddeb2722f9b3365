"""Meshes, drawn with only those triangles that touch a sample, after MuJoCo has drawn all else.

For software renderers, where it saves a third of a picture's time; the picture stays equal to the bit. MuJoCo draws a
scene's shapes in order, and of two at the same depth the later one shows. A mesh that is drawn afterwards may therefore
differ where it meets a shape that should have come later, at the very same depth to the last bit. OpenGL counts such
samples, and where there are any, MuJoCo draws the whole picture itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import mujoco
import numpy as np

from spvla.sim.opengl import OpenGL
from spvla.sim.triangles import project, select

OPAQUE = 0.995  # what is less, MuJoCo draws translucently
GEOM = int(mujoco.mjtObj.mjOBJ_GEOM)


@dataclass(frozen=True)
class Mesh:
    """The corners of `faces` (F, 3) index into `points` and `normals`, both (V, 3) float32."""

    points: np.ndarray
    normals: np.ndarray
    faces: np.ndarray


@dataclass(frozen=True)
class Shape:
    """A mesh in a scene."""

    geom: mujoco.MjvGeom
    mesh: Mesh
    kept: np.ndarray  # (K, 3) those of the mesh's faces that may touch a sample
    contested: bool  # a later shape is near


@dataclass(frozen=True)
class View:
    """A camera of square pictures, `size` pixels wide."""

    eye: np.ndarray  # (3,)
    axes: np.ndarray  # (3, 3) in columns; it looks along -z
    fovy_deg: float
    near_m: float
    far_m: float
    size: int

    @cached_property
    def slope(self) -> float:
        """Pixels that are one metre wide at a distance of one metre."""
        return self.size / 2 / np.tan(np.radians(self.fovy_deg) / 2)


class FineMeshes:
    """Those of a model's shapes that are meshes without a texture. Needs its OpenGL context."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = model
        self.numbers = {g: int(model.geom_dataid[g]) for g in range(model.ngeom) if _is_fine(model, g)}
        self.meshes = {number: read_mesh(model, number) for number in set(self.numbers.values())}
        self.kept = {g: np.empty_like(self.meshes[number].faces) for g, number in self.numbers.items()}
        self.pixels = np.empty((max((len(m.points) for m in self.meshes.values()), default=0), 2))
        self.samples = _sample_places()
        self.gl = OpenGL()

    @contextmanager
    def left_out(self, scene: mujoco.MjvScene, data: mujoco.MjData, view: View) -> Iterator[list[Shape]]:
        """The scene's fine meshes, which MuJoCo does not draw within the block; none where something shows through."""
        geoms = [scene.geoms[i] for i in range(scene.ngeom)]
        if any(geom.rgba[3] < OPAQUE or _is_plane_from_behind(geom, view.eye) for geom in geoms):
            yield []
            return
        ids = np.array([geom.objid if geom.objtype == GEOM else -1 for geom in geoms])
        fine = [i for i, g in enumerate(ids.tolist()) if g in self.numbers]
        turns = view.axes.T @ data.geom_xmat[ids[fine]].reshape(-1, 3, 3)
        shifts = (data.geom_xpos[ids[fine]] - view.eye) @ view.axes
        found = [self._kept(*where, view) for where in zip(ids[fine].tolist(), turns, shifts, strict=True)]
        kept = {i: faces for i, faces in zip(fine, found, strict=True) if faces is not None}
        contested = _meets_later(list(kept), *self._bounds(geoms, ids, data))
        meshes = [self.meshes[self.numbers[int(ids[i])]] for i in kept]
        parts = zip(kept.items(), meshes, contested, strict=True)
        shapes = [Shape(geoms[i], mesh, faces, bool(meets)) for (i, faces), mesh, meets in parts]
        for shape in shapes:
            shape.geom.type = mujoco.mjtGeom.mjGEOM_NONE
        yield shapes
        for shape in shapes:
            shape.geom.type = mujoco.mjtGeom.mjGEOM_MESH

    def draw(self, shapes: list[Shape], lights: int) -> Callable[[], bool]:
        """Call after `mjr_render`; what it returns says, after the pixels are read, whether the picture is right."""
        gl = self.gl
        contested = [shape for shape in shapes if shape.contested]
        gl.glEnableClientState(gl.VERTEX_ARRAY)
        gl.glEnableClientState(gl.NORMAL_ARRAY)
        ties = gl.samples_at_depth(lambda: [self._draw(shape) for shape in contested]) if contested else None
        for light in range(lights):
            gl.glEnable(gl.LIGHT0 + light)
        for shape in shapes:
            self._paint(shape.geom)
            self._draw(shape)
        for light in range(lights):
            gl.glDisable(gl.LIGHT0 + light)
        gl.glDisableClientState(gl.NORMAL_ARRAY)
        gl.glDisableClientState(gl.VERTEX_ARRAY)
        return lambda: ties is None or gl.result(ties) == 0

    def _bounds(
        self, geoms: list[mujoco.MjvGeom], ids: np.ndarray, data: mujoco.MjData
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes along the world's axes around a scene's shapes: centres and half sizes (G, 3), metres."""
        boxes, turns = self.model.geom_aabb[ids], data.geom_xmat[ids].reshape(-1, 3, 3)
        centres = data.geom_xpos[ids] + np.einsum("gij,gj->gi", turns, boxes[:, :3])
        halves = np.einsum("gij,gj->gi", np.abs(turns), boxes[:, 3:])
        halves[self.model.geom_type[ids] == mujoco.mjtGeom.mjGEOM_PLANE] = np.inf
        for i in np.flatnonzero(ids < 0):  # a site
            centres[i], halves[i] = geoms[i].pos, geoms[i].size.sum()
        return centres, halves + 1e-4

    def _kept(self, geom: int, turn: np.ndarray, shift: np.ndarray, view: View) -> np.ndarray | None:
        """(K, 3) the faces of a mesh that may touch a sample; None unless it lies wholly within the picture."""
        mesh, kept = self.meshes[self.numbers[geom]], self.kept[geom]
        if not project(mesh.points, turn, shift, view.slope, view.size, view.near_m, view.far_m, self.pixels):
            return None
        return kept[: select(mesh.faces, self.pixels, self.samples, kept)]

    def _paint(self, geom: mujoco.MjvGeom) -> None:
        gl, rgba = self.gl, geom.rgba
        glow = np.append(np.float32(geom.emission) * rgba[:3], np.float32(1))
        gl.glMaterialfv(gl.FRONT_AND_BACK, gl.EMISSION, glow.tobytes())
        gl.glColor4fv(rgba.tobytes())
        gl.glMaterialf(gl.FRONT_AND_BACK, gl.SHININESS, geom.shininess * 128)
        gl.glMaterialfv(gl.FRONT_AND_BACK, gl.SPECULAR, np.float32([geom.specular] * 3 + [1]).tobytes())

    def _draw(self, shape: Shape) -> None:
        gl, turn = self.gl, np.eye(4, dtype=np.float32)
        turn[:3, :3] = shape.geom.mat.T  # OpenGL's matrices go column by column
        gl.glPushMatrix()
        gl.glTranslatef(*shape.geom.pos)
        gl.glMultMatrixf(turn.tobytes())
        gl.glVertexPointer(3, gl.FLOAT, 0, shape.mesh.points.ctypes.data)
        gl.glNormalPointer(gl.FLOAT, 0, shape.mesh.normals.ctypes.data)
        gl.glDrawElements(gl.TRIANGLES, shape.kept.size, gl.UNSIGNED_INT, shape.kept.ctypes.data)
        gl.glPopMatrix()


def read_mesh(model: mujoco.MjModel, number: int) -> Mesh:
    """A mesh as MuJoCo's `mjr_uploadMesh` gives it to OpenGL. Without texture coordinates, a corner whose normal is far
    from its triangle's has the triangle's."""
    point, normal = model.mesh_vertadr[number], model.mesh_normaladr[number]
    points = model.mesh_vert[point : point + model.mesh_vertnum[number]]
    normals = model.mesh_normal[normal : normal + model.mesh_normalnum[number]]
    where = slice(model.mesh_faceadr[number], model.mesh_faceadr[number] + model.mesh_facenum[number])
    faces, chosen = model.mesh_face[where].astype(np.int64), model.mesh_facenormal[where].astype(np.int64)
    if model.mesh_texcoordadr[number] < 0:
        flat = face_normals(points[faces])
        a, b = normals[chosen], flat[:, None]
        far = a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2] < 0.8  # (F, 3)
        chosen = np.where(far, len(normals) + np.arange(len(faces))[:, None], chosen)
        normals = np.concatenate([normals, flat])
    pairs, corners = np.unique(faces * len(normals) + chosen, return_inverse=True)
    point, normal = np.divmod(pairs, len(normals))
    return Mesh(points[point].copy(), normals[normal].copy(), corners.reshape(-1, 3).astype(np.uint32))


def face_normals(triangles: np.ndarray) -> np.ndarray:
    """(F, 3 corners, 3) to (F, 3), in MuJoCo's float32 operations and their order."""
    a, b = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    x, y, z = (a[:, i] * b[:, j] - a[:, j] * b[:, i] for i, j in ((1, 2), (2, 0), (0, 1)))
    length = np.sqrt(x * x + y * y + z * z)
    thin = length < np.float32(1e-10)
    scale = np.float32(1) / np.where(thin, np.float32(1), length)
    return np.where(thin[:, None], np.float32([0, 0, 1]), np.stack([x * scale, y * scale, z * scale], axis=1))


def _is_fine(model: mujoco.MjModel, geom: int) -> bool:
    number, material = model.geom_dataid[geom], model.geom_matid[geom]
    if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_MESH or number < 0:
        return False
    return bool(material < 0 or (model.mat_texid[material] < 0).all())


def _is_plane_from_behind(geom: mujoco.MjvGeom, eye: np.ndarray) -> bool:
    """MuJoCo draws such planes translucently."""
    return geom.type == mujoco.mjtGeom.mjGEOM_PLANE and bool((eye - geom.pos) @ geom.mat[:, 2] < 1e-3)


def _meets_later(fine: list[int], centres: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """(len(fine),) whether the box of each meets that of a later shape which is not fine."""
    rows = np.array(fine, int)
    apart = np.abs(centres[rows, None] - centres) > halves[rows, None] + halves  # (len(fine), G, 3)
    meets = ~apart.any(axis=2) & (np.arange(len(halves)) > rows[:, None])
    meets[:, rows] = False
    return meets.any(axis=1)


def _sample_places() -> np.ndarray:
    """(S, 2) where, within a pixel, the current framebuffer takes its samples."""
    from OpenGL import GL

    places = np.full((max(1, GL.glGetIntegerv(GL.GL_SAMPLES)), 2), 0.5, np.float32)
    for i in range(len(places) if len(places) > 1 else 0):
        GL.glGetMultisamplefv(GL.GL_SAMPLE_POSITION, i, places[i])
    return places.astype(float)
