"""Meshes, drawn with only those triangles that touch a sample, after MuJoCo has drawn all else.

It saves a software renderer much of a picture's time, and a GPU up to half; the picture stays equal to the bit. MuJoCo
draws a scene's shapes in order, and of two at the same depth the later one shows. A mesh that is drawn afterwards may
therefore differ where it meets a shape that should have come later, at the very same depth to the last bit. OpenGL
counts such samples, and where there are any, MuJoCo draws the whole picture itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import mujoco
import numpy as np

from spvla.render.corners import Mesh, read_mesh
from spvla.render.painting import OPAQUE, Painter, Shape
from spvla.render.triangles import blank, project, reach, select

ENDLESS = 1e6  # metres
GEOM = int(mujoco.mjtObj.mjOBJ_GEOM)
COLOUR = int(mujoco.mjtTextureRole.mjTEXROLE_RGB)


@dataclass(frozen=True)
class View:
    """A camera of square pictures, `size` pixels wide."""

    eye: np.ndarray  # (3,)
    axes: np.ndarray  # (3, 3) in columns; it looks along -z
    fovy_deg: float
    near_m: float
    far_m: float
    size: int

    @property
    def lens(self) -> tuple[float, ...]:
        """All that decides how this camera's own frame becomes a picture."""
        return self.fovy_deg, self.near_m, self.far_m, self.size

    @cached_property
    def slope(self) -> float:
        """Pixels that are one metre wide at a distance of one metre."""
        return self.size / 2 / np.tan(np.radians(self.fovy_deg) / 2)


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Around a scene's G shapes, each along its shape's own axes. Metres."""

    turns: np.ndarray  # (G, 3, 3)
    origins: np.ndarray  # (G, 3) the shapes'
    centres: np.ndarray  # (G, 3) the boxes'
    halves: np.ndarray  # (G, 3)

    def later(self, fine: list[int]) -> np.ndarray:
        """(len(fine), G) which shapes are drawn after a fine one, are not fine, and may meet it."""
        rows, halves = np.array(fine, int), _turned(np.abs(self.turns), self.halves)  # along the world's axes
        apart = np.abs(self.centres[rows, None] - self.centres) > halves[rows, None] + halves  # (len(fine), G, 3)
        meets = ~apart.any(axis=2) & (np.arange(len(halves)) > rows[:, None])
        meets[:, rows] = False
        return meets

    def contested(self, shape: int, mesh: Mesh, kept: np.ndarray, later: np.ndarray) -> np.ndarray:
        """(C, 3) those faces of a shape's that may meet one of `later` (G,)."""
        found = np.zeros(len(kept), bool)
        for other in np.flatnonzero(later):
            turn = self.turns[other].T @ self.turns[shape]
            shift = self.turns[other].T @ (self.origins[shape] - self.centres[other])
            reach(kept, mesh.points, turn, shift, self.halves[other], found)
        alone = len(kept) < len(mesh.faces)  # see `blank`
        return kept[found] if alone or not found.any() else kept


@dataclass
class FineMesh:
    """A shape of the model that is a mesh."""

    mesh: Mesh
    buffer: int  # the renderer's
    texture: int | None  # the renderer's
    room: np.ndarray  # (F, 3), for the faces that a picture needs
    kept: np.ndarray | None = None  # (K, 3) those that the last one needed
    seen: tuple[object, ...] = ()  # how it stood before the camera then


class FineMeshes:
    """Those of a model's shapes that are meshes. Needs its OpenGL context, where `device` has its textures."""

    def __init__(self, model: mujoco.MjModel, device: mujoco.MjrContext) -> None:
        self.model, self.painter = model, Painter()
        numbers = {g: int(model.geom_dataid[g]) for g in range(model.ngeom) if _is_fine(model, g)}
        textures = {g: int(device.texture[t]) for g in numbers if (t := _texture(model, g)) >= 0}
        textured = {numbers[g] for g in textures}
        meshes = {n: read_mesh(model, n, textured=n in textured) for n in set(numbers.values())}
        buffers = {n: self.painter.upload(mesh) for n, mesh in meshes.items()}
        self.of_geom = {
            g: FineMesh(meshes[n], buffers[n], textures.get(g), np.empty_like(meshes[n].faces))
            for g, n in numbers.items()
        }
        most = max((len(mesh.places) for mesh in meshes.values()), default=0)
        self.pixels, self.sides = np.empty((most, 2)), np.empty(most, np.uint8)  # room for any mesh's places
        self.samples = _sample_places()

    @contextmanager
    def left_out(
        self, scene: mujoco.MjvScene, data: mujoco.MjData, view: View, mirrored: np.ndarray
    ) -> Iterator[list[Shape]]:
        """The scene's fine meshes, which MuJoCo does not draw within the block. The last one may be translucent; where
        more shows through, or what is not a fine mesh, there are none.

        Those `mirrored` (ngeom,) stay with MuJoCo, which draws them a second time behind the mirror.
        """
        geoms = [scene.geoms[i] for i in range(scene.ngeom)]
        ids = np.array([geom.objid if geom.objtype == GEOM else -1 for geom in geoms])
        fine = [i for i, g in enumerate(ids.tolist()) if g in self.of_geom and not mirrored[g]]
        seen_through = [i for i, geom in enumerate(geoms) if _is_translucent(geom, view.eye)]
        if len(seen_through) > 1 or not set(seen_through) <= set(fine):
            yield []
            return
        fine.sort(key=lambda i: i in seen_through)
        turns = view.axes.T @ data.geom_xmat[ids[fine]].reshape(-1, 3, 3)
        shifts = (data.geom_xpos[ids[fine]] - view.eye) @ view.axes
        meshes = [self.of_geom[g] for g in ids[fine].tolist()]
        found = [self._kept(*where, view) for where in zip(meshes, turns, shifts, strict=True)]
        boxes = self._boxes(geoms, ids, data)
        later = boxes.later(fine)
        later[len(fine) - len(seen_through) :] = False  # MuJoCo draws it last as well
        shapes = [
            Shape(
                geom=geoms[i],
                mesh=own.mesh,
                buffer=own.buffer,
                texture=own.texture,
                kept=kept,
                contested=boxes.contested(i, own.mesh, kept, after),
            )
            for i, own, kept, after in zip(fine, meshes, found, later, strict=True)
        ]
        for shape in shapes:
            shape.geom.type = mujoco.mjtGeom.mjGEOM_NONE
        yield shapes
        for shape in shapes:
            shape.geom.type = mujoco.mjtGeom.mjGEOM_MESH

    def _boxes(self, geoms: list[mujoco.MjvGeom], ids: np.ndarray, data: mujoco.MjData) -> "Boxes":
        around, turns = self.model.geom_aabb[ids], data.geom_xmat[ids].reshape(-1, 3, 3)
        origins, shifts, halves = data.geom_xpos[ids], around[:, :3].copy(), around[:, 3:].copy()
        halves[self.model.geom_type[ids] == mujoco.mjtGeom.mjGEOM_PLANE] = ENDLESS
        for i in np.flatnonzero(ids < 0):  # a site
            turns[i], origins[i], shifts[i], halves[i] = np.eye(3), geoms[i].pos, 0, geoms[i].size.sum()
        return Boxes(turns=turns, origins=origins, centres=origins + _turned(turns, shifts), halves=halves + 1e-4)

    def _kept(self, own: FineMesh, turn: np.ndarray, shift: np.ndarray, view: View) -> np.ndarray:
        """(K, 3) the faces of a mesh that may touch a sample."""
        seen = turn.tobytes(), shift.tobytes(), view.lens
        if own.kept is not None and own.seen == seen:
            return own.kept  # neither it nor the camera moved
        mesh, kept, pixels, sides = own.mesh, own.room, self.pixels, self.sides
        if project(mesh.places, turn, shift, view.slope, view.size, view.near_m, view.far_m, pixels, sides):
            kept = kept[: select(mesh.triangles, pixels, self.samples, mesh.faces, kept)]
        else:
            blank(mesh.triangles, pixels, sides, self.samples, mesh.faces, kept)
        own.seen, own.kept = seen, kept
        return kept


def _is_fine(model: mujoco.MjModel, geom: int) -> bool:
    number, texture = model.geom_dataid[geom], _texture(model, geom)
    if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_MESH or number < 0:
        return False
    flat = model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_2D  # and not around it, as a cube
    return texture < 0 or bool(flat and model.mesh_texcoordadr[number] >= 0)


def _texture(model: mujoco.MjModel, geom: int) -> int:
    """Its number, or -1."""
    material = model.geom_matid[geom]
    return int(model.mat_texid[material, COLOUR]) if material >= 0 else -1


def _is_translucent(geom: mujoco.MjvGeom, eye: np.ndarray) -> bool:
    """As planes are, too, when MuJoCo draws them from behind."""
    behind = geom.type == mujoco.mjtGeom.mjGEOM_PLANE and (eye - geom.pos) @ geom.mat[:, 2] < 1e-3
    return bool(geom.rgba[3] < OPAQUE or behind)


def _turned(turns: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.einsum("gij,gj->gi", turns, vectors)


def _sample_places() -> np.ndarray:
    """(S, 2) where, within a pixel, the current framebuffer takes its samples."""
    from OpenGL import GL

    places = np.full((max(1, GL.glGetIntegerv(GL.GL_SAMPLES)), 2), 0.5, np.float32)
    for i in range(len(places) if len(places) > 1 else 0):
        GL.glGetMultisamplefv(GL.GL_SAMPLE_POSITION, i, places[i])
    return places.astype(float)
