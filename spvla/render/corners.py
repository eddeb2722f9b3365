"""A mesh's corners, as MuJoCo gives them to OpenGL."""

from dataclasses import dataclass

import mujoco
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The corners of `faces` (F, 3) index into `points` and `normals`, both (V, 3) float32, and `texture` (V, 2), where
    in its texture they lie. Corners at one place differ in these: those of `triangles` (F, 3), the same faces, index
    into `places` (U, 3)."""

    points: np.ndarray
    normals: np.ndarray
    texture: np.ndarray
    faces: np.ndarray
    places: np.ndarray
    triangles: np.ndarray


def read_mesh(model: mujoco.MjModel, number: int, *, textured: bool) -> Mesh:
    """A mesh as MuJoCo's `mjr_uploadMesh` gives it to OpenGL. Without texture coordinates, a corner whose normal is far
    from its triangle's has the triangle's. A mesh that is drawn without a texture has fewer corners."""
    point, normal = model.mesh_vertadr[number], model.mesh_normaladr[number]
    places = model.mesh_vert[point : point + model.mesh_vertnum[number]]
    normals = model.mesh_normal[normal : normal + model.mesh_normalnum[number]]
    where = slice(model.mesh_faceadr[number], model.mesh_faceadr[number] + model.mesh_facenum[number])
    faces, chosen = model.mesh_face[where].astype(np.int64), model.mesh_facenormal[where].astype(np.int64)
    if model.mesh_texcoordadr[number] < 0:
        flat = face_normals(places[faces])
        a, b = normals[chosen], flat[:, None]
        far = a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2] < 0.8  # (F, 3)
        chosen = np.where(far, len(normals) + np.arange(len(faces))[:, None], chosen)
        normals = np.concatenate([normals, flat])
    coordinates, used = np.zeros((1, 2), np.float32), np.zeros_like(faces)
    if textured:
        first = model.mesh_texcoordadr[number]
        coordinates = model.mesh_texcoord[first : first + model.mesh_texcoordnum[number]]
        used = model.mesh_facetexcoord[where].astype(np.int64)
    counts = len(places), len(normals), len(coordinates)
    combined, corners = np.unique(np.ravel_multi_index((faces, chosen, used), counts), return_inverse=True)
    point, normal, coordinate = np.unravel_index(combined, counts)
    # A model repeats a place for every texture coordinate or normal there.
    _, first, same = np.unique(places.view("V12").ravel(), return_index=True, return_inverse=True)
    return Mesh(
        points=places[point].copy(),
        normals=normals[normal].copy(),
        texture=coordinates[coordinate].copy(),
        faces=corners.reshape(-1, 3).astype(np.uint32),
        places=places[first].copy(),
        triangles=same[faces].astype(np.uint32),
    )


def face_normals(triangles: np.ndarray) -> np.ndarray:
    """(F, 3 corners, 3) to (F, 3), in MuJoCo's float32 operations and their order."""
    a, b = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    x, y, z = (a[:, i] * b[:, j] - a[:, j] * b[:, i] for i, j in ((1, 2), (2, 0), (0, 1)))
    length = np.sqrt(x * x + y * y + z * z)
    thin = length < np.float32(1e-10)
    scale = np.float32(1) / np.where(thin, np.float32(1), length)
    return np.where(thin[:, None], np.array([0, 0, 1], np.float32), np.stack([x * scale, y * scale, z * scale], axis=1))
