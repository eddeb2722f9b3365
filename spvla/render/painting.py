"""Meshes drawn by OpenGL into the picture that MuJoCo has begun, with the state that it left: lights, eye, depth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mujoco
import numpy as np

from spvla.render.corners import Mesh
from spvla.render.opengl import OpenGL

OPAQUE = 0.995  # what is less, MuJoCo draws translucently


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A mesh in a scene."""

    geom: mujoco.MjvGeom
    mesh: Mesh
    buffer: int  # the renderer's, as `Painter.upload` gave it
    texture: int | None  # the renderer's
    kept: np.ndarray  # (K, 3) those of the mesh's faces that may touch a sample
    contested: np.ndarray  # (C, 3) those of them near a later shape


class Painter:
    """Needs the OpenGL context in which MuJoCo draws."""

    def __init__(self) -> None:
        self.gl = OpenGL()

    def upload(self, mesh: Mesh) -> int:
        """A buffer with the mesh's points, normals and texture coordinates, one after the other."""
        return self.gl.upload(mesh.points.tobytes() + mesh.normals.tobytes() + mesh.texture.tobytes())

    def paint(self, shapes: list[Shape], lights: int) -> Callable[[], bool]:
        """Call after `mjr_render`; what it returns says, after the pixels are read, whether the picture is right."""
        gl = self.gl
        contested = [shape for shape in shapes if len(shape.contested)]
        gl.glEnableClientState(gl.VERTEX_ARRAY)
        gl.glEnableClientState(gl.NORMAL_ARRAY)
        ties = gl.samples_at_depth(lambda: [self._draw(s, s.contested) for s in contested]) if contested else None
        for light in range(lights):
            gl.glEnable(gl.LIGHT0 + light)
        for shape in shapes:
            self._colour(shape.geom)
            with self._textured(shape):
                draw = self._draw if shape.geom.rgba[3] >= OPAQUE else self._blend
                draw(shape, shape.kept)
        for light in range(lights):
            gl.glDisable(gl.LIGHT0 + light)
        gl.glBindBuffer(gl.ARRAY_BUFFER, 0)
        gl.glDisableClientState(gl.NORMAL_ARRAY)
        gl.glDisableClientState(gl.VERTEX_ARRAY)
        return lambda: ties is None or gl.result(ties) == 0

    def _colour(self, geom: mujoco.MjvGeom) -> None:
        gl, rgba = self.gl, geom.rgba
        glow = np.append(np.float32(geom.emission) * rgba[:3], np.float32(1))
        gl.glMaterialfv(gl.FRONT_AND_BACK, gl.EMISSION, glow.tobytes())
        gl.glColor4fv(rgba.tobytes())
        gl.glMaterialf(gl.FRONT_AND_BACK, gl.SHININESS, geom.shininess * 128)
        gl.glMaterialfv(gl.FRONT_AND_BACK, gl.SPECULAR, np.array([geom.specular] * 3 + [1], np.float32).tobytes())

    def _blend(self, shape: Shape, faces: np.ndarray) -> None:
        """Over what is drawn. MuJoCo draws what is translucent front to back, and then again back to front."""
        gl = self.gl
        gl.glDepthMask(0)
        gl.glEnable(gl.BLEND)
        gl.glBlendFunc(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA)
        self._draw(shape, faces)
        self._draw(shape, faces)
        gl.glDisable(gl.BLEND)
        gl.glDepthMask(1)

    @contextmanager
    def _textured(self, shape: Shape) -> Iterator[None]:
        gl, texture = self.gl, shape.texture
        if texture is None:
            yield
            return
        gl.glActiveTexture(gl.TEXTURE0)
        gl.glEnable(gl.TEXTURE_2D)
        gl.glBindTexture(gl.TEXTURE_2D, texture)
        gl.glEnableClientState(gl.TEXTURE_COORD_ARRAY)
        gl.glBindBuffer(gl.ARRAY_BUFFER, shape.buffer)
        gl.glTexCoordPointer(2, gl.FLOAT, 0, shape.mesh.points.nbytes + shape.mesh.normals.nbytes)
        yield
        gl.glDisableClientState(gl.TEXTURE_COORD_ARRAY)
        gl.glDisable(gl.TEXTURE_2D)

    def _draw(self, shape: Shape, faces: np.ndarray) -> None:
        gl, turn = self.gl, np.eye(4, dtype=np.float32)
        turn[:3, :3] = shape.geom.mat.T  # OpenGL's matrices go column by column
        gl.glPushMatrix()
        gl.glTranslatef(*shape.geom.pos)
        gl.glMultMatrixf(turn.tobytes())
        gl.glBindBuffer(gl.ARRAY_BUFFER, shape.buffer)
        gl.glVertexPointer(3, gl.FLOAT, 0, 0)
        gl.glNormalPointer(gl.FLOAT, 0, shape.mesh.points.nbytes)
        gl.glDrawElements(gl.TRIANGLES, faces.size, gl.UNSIGNED_INT, faces.ctypes.data)
        gl.glPopMatrix()
