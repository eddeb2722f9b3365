"""Drawing fewer triangles: which are left out, and that no pixel shows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import mujoco
import numpy as np
import pytest
from picture_parts import fewest_shapes

from spvla.benchmarks.libero.assets import resolve
from spvla.benchmarks.libero.env import LiberoEnv
from spvla.render.corners import read_mesh
from spvla.render.rendering import Renderer
from spvla.render.triangles import ABOVE, LEFT, RIGHT, UNSURE, blank, project, select

SAMPLES = np.array([[0.375, 0.125], [0.875, 0.375], [0.125, 0.625], [0.625, 0.875]])

# A cube as a mesh, seen from above at a slant, and room for a later shape.
WORLD = """
<mujoco>
  <asset>
    <texture name="squares" type="2d" builtin="checker" rgb1="1 0 0" rgb2=".9 .5 0" width="64" height="64"/>
    <material name="squared" texture="squares"/>
    <material name="glass" reflectance=".8" rgba=".2 .2 .4 1"/>
    <mesh name="cube" vertex="-1 -1 -1  1 -1 -1  -1 1 -1  1 1 -1  -1 -1 1  1 -1 1  -1 1 1  1 1 1" scale=".3 .3 .3"
          texcoord="0 0  2 0  0 2  2 2  1 1  3 1  1 3  3 3"/>
    <mesh name="panes" vertex="-1 0 -1  1 0 -1  0 0 1  -1 -1 -1  1 -1 -1  0 -1 1" face="3 4 5  0 1 2" inertia="shell"
          scale=".3 .3 .3"/>
  </asset>
  <worldbody>
    <light pos="0 0 5" castshadow="false"/>
    <camera name="eye" pos="0 -3 2" xyaxes="1 0 0 0 .555 .832" fovy="40"/>
    <geom name="floor" type="plane" size="3 3 .1" pos="0 0 -.5" group="1"/>
    <geom name="cube" type="mesh" mesh="cube" group="1" {cube}/>
    {later}
  </worldbody>
</mujoco>"""


def kept(*triangles: list) -> list[int]:
    """Which triangles, of three (x, y) in pixels each, may touch a sample."""
    pixels = np.array(triangles, float).reshape(-1, 2)
    faces = np.arange(len(pixels), dtype=np.uint32).reshape(-1, 3)
    out = np.empty_like(faces)
    return (out[: select(faces, pixels, SAMPLES, faces, out), 0] // 3).tolist()


def test_what_lies_between_samples_or_faces_away_is_left_out() -> None:
    between = [(5.4, 5.4), (5.6, 5.4), (5.5, 5.6)]
    around = [(5.3, 5.0), (5.5, 5.1), (5.3, 5.3)]
    large = [(2, 2), (90, 3), (40, 60)]
    assert kept(between, around, large, around[::-1], large[::-1]) == [1, 2]


def test_what_the_driver_draws_is_never_left_out() -> None:
    """By brute force: corners move to the nearest 1/256 of a pixel, and a sample on an edge may count."""
    rng = np.random.default_rng(0)
    sizes = rng.choice([0.02, 0.2, 0.8], (4000, 1, 1))
    corners = rng.uniform(20, 24, (4000, 1, 2)) + rng.normal(0, sizes, (4000, 3, 2))
    corners[:1000, 2] = corners[:1000, :2].mean(1) + rng.normal(0, 1e-3, (1000, 2))  # slivers
    a, b, c = np.moveaxis(np.round(corners * 256) / 256, 1, 0)
    places = (np.stack(np.meshgrid(np.arange(12, 33), np.arange(12, 33)), -1)[..., None, :] + SAMPLES).reshape(-1, 2)

    def left_of(p: np.ndarray, q: np.ndarray) -> np.ndarray:  # (T, places)
        edge, way = (q - p)[:, None], places - p[:, None]
        return edge[..., 0] * way[..., 1] - edge[..., 1] * way[..., 0] >= 0

    front = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0] > 0
    drawn = front & (left_of(a, b) & left_of(b, c) & left_of(c, a)).any(1)
    chosen = np.zeros(len(corners), bool)
    chosen[kept(*corners)] = True
    assert drawn.sum() > 400 and not (drawn & ~chosen).any()
    assert chosen.sum() < 2 * drawn.sum()


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        ((0, 0, -2), [0, 0]),
        ((1.9, 0, -2), [0, RIGHT]),
        ((-2.4, 2.4, -2), [LEFT | ABOVE, LEFT | ABOVE]),
        ((1.8, 0, -2), [0, UNSURE]),  # on the edge
        ((0, 0, -0.05), [UNSURE, UNSURE]),  # before the near plane
        ((0, 0, 2), [UNSURE, UNSURE]),  # behind
        ((0, 0, -60), [UNSURE, UNSURE]),  # beyond the far plane
    ],
)
def test_a_point_lies_within_the_picture_or_to_a_side_of_it(shift: tuple, expected: list[int]) -> None:
    points = np.array([[-0.2, -0.2, 0], [0.2, 0.2, 0]], np.float32)
    pixels, sides = np.empty((2, 2)), np.empty(2, np.uint8)
    within = project(points, np.eye(3), np.array(shift, float), 128.0, 256, 0.1, 50.0, pixels, sides)
    assert sides.tolist() == expected and within == (expected == [0, 0])
    if within:
        assert np.allclose(pixels, [[115.2, 115.2], [140.8, 140.8]])


def test_over_the_pictures_edge_every_face_keeps_its_place() -> None:
    between, tilted = [(5.4, 5.4), (5.6, 5.4), (5.5, 5.6)], [(7.4, 5.4), (7.6, 5.4), (7.5, 5.6)]
    large, across = [(2, 2), (90, 3), (40, 60)], [(-9, 5), (9, 5), (9, 9)]
    left, farther, corner = [(-9, 5), (-5, 5), (-5, 9)], [(-9, 1), (-5, 1), (-5, 5)], [(-9, 5), (5, 300), (5, 310)]
    pixels = np.array([between, tilted, large, across, left, farther, corner], float).reshape(-1, 2)
    sides = (LEFT * (pixels[:, 0] < 0) | ABOVE * (pixels[:, 1] > 256)).astype(np.uint8)
    faces = np.arange(len(pixels), dtype=np.uint32).reshape(-1, 3)
    out = np.empty_like(faces)
    blank(faces, pixels, sides, SAMPLES, faces, out)
    assert np.array_equal(out[[2, 3, 6]], faces[[2, 3, 6]])
    assert (out[[0, 1]] == faces[0, 0]).all() and (out[[4, 5]] == faces[4, 0]).all()


RED = 'rgba="1 0 0 1"'


@contextmanager
def renderer_of(later: str, cube: str) -> Iterator[tuple[Renderer, mujoco.MjData]]:
    model = mujoco.MjModel.from_xml_string(WORLD.format(later=later, cube=cube))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = Renderer(model, spare_gpu=True)
    yield renderer, data
    renderer.close()


def pictures(later: str, cube: str = RED) -> tuple[np.ndarray, np.ndarray, int]:
    """A world's picture by MuJoCo alone, that with its meshes drawn afterwards, and how often the latter was drawn."""
    with renderer_of(later, cube) as (renderer, data):
        draws = []
        ours, pixels = renderer.render(data, "eye"), renderer._pixels
        renderer._pixels = lambda: draws.append(1) or pixels()
        assert np.array_equal(renderer.render(data, "eye"), ours)
        renderer.fine, renderer.visibility.all_drawn = None, True
        alone = renderer.render(data, "eye")
    assert (alone[..., 0] > alone[..., 1]).sum() > 1000  # a red cube
    return alone, ours, len(draws) - 1


@pytest.mark.parametrize(("software", "spare_gpu", "chosen"), [(1, 0, True), (0, 1, True), (0, 0, False)])
def test_triangles_are_chosen_in_software_and_to_spare_a_gpu(software: int, spare_gpu: int, chosen: bool) -> None:
    model = mujoco.MjModel.from_xml_string(WORLD.format(later="", cube=RED))
    with patch("spvla.render.rendering.draws_in_software", lambda: bool(software)):
        renderer = Renderer(model, spare_gpu=bool(spare_gpu))
    assert (renderer.fine is not None) == chosen
    renderer.close()


def drawn_afterwards(later: str, cube: str = RED) -> list[str]:
    """The names of the meshes that MuJoCo does not draw."""
    with renderer_of(later, cube) as (renderer, data):
        drawn = []
        painter = renderer.fine.painter
        with patch.object(painter, "paint", lambda shapes, _: drawn.extend(s.geom.objid for s in shapes) or bool):
            renderer.render(data, "eye")
        return [renderer.model.geom(g).name for g in drawn]


def test_a_mesh_drawn_afterwards_looks_the_same() -> None:
    alone, ours, draws = pictures('<geom name="ball" size=".2" pos=".5 -.2 .1" group="1"/>')
    assert np.array_equal(alone, ours) and draws == 1


def test_a_mesh_with_a_texture_looks_the_same() -> None:
    squared = 'material="squared"'
    alone, ours, draws = pictures('<geom name="ball" size=".2" pos=".5 -.2 .1" group="1"/>', squared)
    assert np.array_equal(alone, ours) and draws == 1 and drawn_afterwards("", squared) == ["cube"]
    orange = (alone[..., 1] > 60) & (alone[..., 0] > 1.5 * alone[..., 1])
    assert 0.2 < orange.sum() / (alone[..., 0] > 2 * alone[..., 2] + 1).sum() < 0.8


def test_one_translucent_mesh_is_drawn_last_as_mujoco_does() -> None:
    pale, ball = 'rgba="1 0 0 .4"', '<geom name="ball" size=".2" pos=".2 .6 .1" rgba="0 1 0 1" group="1"/>'
    other = '<geom name="other" type="mesh" mesh="cube" pos=".3 1 .2" group="1"/>'
    alone, ours, draws = pictures(ball + other, pale)
    assert np.array_equal(alone, ours) and draws == 1 and drawn_afterwards(ball + other, pale) == ["other", "cube"]
    assert not np.array_equal(alone, pictures(ball + other)[0])


def test_through_the_front_of_a_translucent_mesh_shows_what_else_of_it_lies_behind() -> None:
    panes = '<geom name="panes" type="mesh" mesh="panes" pos="0 -.6 .2" rgba="0 0 1 .4" group="1"/>'
    alone, ours, _ = pictures(panes)
    assert np.array_equal(alone, ours) and drawn_afterwards(panes) == ["cube", "panes"]


def test_two_translucent_meshes_are_left_to_mujoco() -> None:
    other = '<geom name="other" type="mesh" mesh="cube" pos=".3 1 .2" rgba="0 1 0 .5" group="1"/>'
    pale = 'rgba="1 0 0 .4"'
    alone, ours, _ = pictures(other, pale)
    assert np.array_equal(alone, ours) and drawn_afterwards(other, pale) == []


def test_a_mesh_that_a_mirror_shows_is_left_to_mujoco() -> None:
    """The mirror lies before the cube, and shows it but not the other cube."""
    mirror = '<geom name="mirror" type="box" size=".3 .2 .02" pos="0 -.6 -.3" material="glass" group="1"/>'
    other = '<geom name="other" type="mesh" mesh="cube" pos="1 0 0" group="1"/>'
    alone, ours, draws = pictures(mirror + other)
    assert np.array_equal(alone, ours) and draws == 1 and drawn_afterwards(mirror + other) == ["other"]
    dull = mirror.replace('material="glass"', 'rgba=".2 .2 .4 1"')
    assert not np.array_equal(alone, pictures(dull + other)[0]) and len(drawn_afterwards(dull + other)) == 2


def test_where_a_later_shape_has_the_very_same_depth_mujoco_draws_all() -> None:
    """The box's upper side lies in the cube's; MuJoCo shows the later of the two."""
    alone, ours, draws = pictures('<geom name="lid" type="box" size=".1 .1 .1" pos="0 0 .2" group="1"/>')
    assert np.array_equal(alone, ours) and draws == 2
    assert not np.array_equal(alone, pictures("")[0])


def test_what_shows_through_is_left_to_mujoco() -> None:
    glass = '<geom name="glass" type="box" size=".2 .02 .3" pos="0 -.6 .2" rgba="0 1 0 .5" group="1"/>'
    alone, ours, _ = pictures(glass)
    assert np.array_equal(alone, ours) and not np.array_equal(alone, pictures("")[0])


def test_a_site_without_colour_hides_nothing_behind_it() -> None:
    """Not even something translucent: MuJoCo draws such things without touching the depth."""
    glass = '<geom name="glass" type="box" size=".2 .02 .3" pos="0 -.6 .2" rgba="0 1 0 .5" group="1"/>'
    site = '<site name="gone" size=".1" pos="0 -.9 .4" rgba="1 0 0 -.5" group="1"/>'
    assert np.array_equal(pictures(glass + site)[1], pictures(glass)[0])


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    with LiberoEnv("libero_goal", 3, resolve(), spare_gpu=True) as env:
        yield env


@pytest.mark.parametrize("camera", ["agentview", "robot0_eye_in_hand"])
def test_leaving_triangles_out_changes_no_pixel(env: LiberoEnv, camera: str) -> None:
    env.image()
    actions = np.array([[0.8, -0.5 + 0.05 * step, -0.7, 0.2, 0.5, 0, -1] for step in range(20)])
    assert fewest_shapes(env, camera, actions, lambda renderer: patch.object(renderer, "fine", None)) == 1


def test_most_of_the_robots_triangles_are_left_out(env: LiberoEnv) -> None:
    env.reset(0)
    env.image()
    fine = env.renderer.fine
    unmirrored = np.zeros(env.model.ngeom, bool)
    with fine.left_out(env.renderer.scene, env.sample.data, env.renderer._view(env.sample.data), unmirrored) as shapes:
        left = sum((s.kept[:, 0] != s.kept[:, 1]).sum() for s in shapes)  # and not a single point
        all_of_them, contested = sum(len(s.mesh.faces) for s in shapes), sum(len(s.contested) for s in shapes)
    assert all_of_them > 100_000 and left < all_of_them / 3 and 0 < contested < left / 20
    assert any(len(s.kept) == len(s.mesh.faces) > 10_000 for s in shapes), "no mesh reaches over the edge"


def test_a_mesh_is_read_corner_by_corner(env: LiberoEnv) -> None:
    model = env.model
    number = int(np.argmax(model.mesh_facenum))
    mesh, first = read_mesh(model, number, textured=False), model.mesh_faceadr[number]
    corners = model.mesh_vertadr[number] + model.mesh_face[first : first + model.mesh_facenum[number]]
    assert np.array_equal(mesh.points[mesh.faces], model.mesh_vert[corners])
    chosen = model.mesh_normaladr[number] + model.mesh_facenormal[first : first + model.mesh_facenum[number]]
    assert model.mesh_texcoordadr[number] < 0 or np.array_equal(mesh.normals[mesh.faces], model.mesh_normal[chosen])
    assert np.array_equal(mesh.places[mesh.triangles], mesh.points[mesh.faces])
    assert len(mesh.places) == len(np.unique(mesh.places, axis=0))


def test_a_corner_has_the_place_in_the_texture_that_its_face_names() -> None:
    model = mujoco.MjModel.from_xml_string(WORLD.format(later="", cube=RED))
    mesh, chosen = read_mesh(model, 0, textured=True), model.mesh_facetexcoord[: model.mesh_facenum[0]]
    assert np.array_equal(mesh.texture[mesh.faces], model.mesh_texcoord[chosen])
    assert len(np.unique(mesh.texture, axis=0)) == 8 and not read_mesh(model, 0, textured=False).texture.any()
