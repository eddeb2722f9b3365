"""What is left out of a picture: never anything that could show."""

from collections.abc import Iterator
from unittest.mock import patch

import mujoco
import numpy as np
import pytest
from picture_parts import fewest_shapes

from spvla.benchmarks.libero.assets import resolve
from spvla.benchmarks.libero.env import LiberoEnv
from spvla.render.rendering import Renderer
from spvla.render.visibility import Visibility, in_view, through

EYE, AXES = np.zeros(3), np.eye(3)  # looking along -z, a right angle wide: slope 1

# The eye looks 30 degrees down and sees 10 to 50: what stands 9 degrees up shows in the floor only, 27 degrees down.
WORLD = """
<mujoco>
  <asset><material name="glass" reflectance="0.8"/></asset>
  <worldbody>
    <light pos="0 0 5" castshadow="{shadow}"/>
    <camera name="eye" pos="0 0 0" xyaxes="1 0 0 0 .5 .866" fovy="40"/>
    <geom name="floor" type="box" size="1 1 .1" pos="0 2 -1.1" group="1" material="{floor}"/>
    <geom name="ahead" size=".1" pos=".5 2 -.8" group="1"/>
    <geom name="behind" size=".2" pos="0 -4 0" group="1"/>
    <geom name="above" size=".2" pos="0 6 1" group="1" rgba="1 0 0 1"/>
    <geom name="aside" size=".2" pos="9 6 -2" group="1"/>
  </worldbody>
</mujoco>"""


def world(floor: str = "glass", shadow: str = "false") -> tuple[mujoco.MjModel, mujoco.MjData]:
    model = mujoco.MjModel.from_xml_string(WORLD.format(floor=floor, shadow=shadow).replace('material=""', ""))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def names_seen(model: mujoco.MjModel, data: mujoco.MjData) -> set[str]:
    visibility = Visibility(model)
    seen = visibility.seen(data, model.camera("eye").id)
    return {model.geom(int(g)).name for g in visibility.geoms[seen]}


@pytest.mark.parametrize(
    ("centre", "radius", "expected"),
    [
        ((0, 0, -5), 0.1, True),
        ((0, 0, 5), 0.1, False),  # behind
        ((4.9, 0, -5), 0.1, True),
        ((6, 0, -5), 0.1, False),
        ((6, 0, -5), 0.72, True),  # its distance to the pyramid's side is 1 / sqrt 2
        ((6, 0, -5), 0.70, False),
        ((0, -6, -5), 0.70, False),
    ],
)
def test_a_sphere_shows_if_it_reaches_into_the_pyramid(centre: tuple, radius: float, expected: bool) -> None:
    assert in_view(np.array([centre], float), np.array([radius]), EYE, AXES, 1.0).tolist() == [expected]


def test_a_mirror_shows_what_lies_behind_its_edges_for_the_eyes_image() -> None:
    """By brute force: points within boxes, whose lines to the eye's mirror image cross the mirror or not."""
    rng = np.random.default_rng(0)
    eye, mirror, count = np.array([0.5, -0.8, 1.2]), np.array([0.2, 0.1]), 2000
    centres, halves = rng.uniform(-2, 2, (count, 3)), rng.uniform(0.01, 0.3, (count, 3))
    turns = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    inside = rng.uniform(-1, 1, (count, 500, 3)) * halves[:, None]
    points = centres[:, None] + np.einsum("gij,gpj->gpi", turns, inside)
    height = points[..., 2]
    share = (1.2 / (height + 1.2))[..., None]  # of the way, where it crosses
    crossing = eye[:2] + share * (points[..., :2] - eye[:2])
    truly = ((height > 0) & (np.abs(crossing) < mirror).all(-1)).any(1)
    found = through(eye, mirror, centres, turns, halves)
    assert truly.sum() > 50 and not (truly & ~found).any() and found.sum() < 2 * truly.sum()


def test_from_behind_a_mirror_shows_nothing_and_along_it_perhaps_all() -> None:
    box = np.array([[0, 0, 1.0]]), np.eye(3)[None], np.full((1, 3), 0.1)
    shown = [through(np.array([0, 0, h]), np.array([0.2, 0.2]), *box).tolist() for h in (1.0, 0.0, -1.0)]
    assert shown == [[True], [True], [False]]


def test_only_a_mirror_brings_back_what_is_above_the_picture() -> None:
    assert names_seen(*world(floor="")) == {"floor", "ahead"}
    assert names_seen(*world()) == {"floor", "ahead", "above"}


def test_the_mirror_image_really_is_in_the_picture() -> None:
    """MuJoCo's own word on what mirrors: drawing with and without hiding gives the same red spot."""
    model, data = world()
    renderer = Renderer(model)
    hidden = renderer.render(data, "eye")
    renderer.visibility.all_drawn = True
    assert np.array_equal(renderer.render(data, "eye"), hidden)
    model.geom("above").rgba[:] = (0, 1, 0, 1)
    assert not np.array_equal(renderer.render(data, "eye"), hidden)
    renderer.close()


def test_where_shadows_fall_everything_is_drawn() -> None:
    assert Visibility(world(shadow="true")[0]).all_drawn and not Visibility(world()[0]).all_drawn


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    with LiberoEnv("libero_spatial", 0, resolve()) as env:
        yield env


@pytest.mark.parametrize("camera", ["agentview", "robot0_eye_in_hand"])
def test_leaving_out_changes_no_pixel_and_nothing_in_the_model(env: LiberoEnv, camera: str) -> None:
    groups = env.model.geom_group.copy(), env.model.site_group.copy()
    actions = np.array([[0.8, -0.5, z, 0, 0.5, 0, -1] for z in [0.9] * 12 + [-0.9] * 12])
    share = fewest_shapes(env, camera, actions, lambda r: patch.object(r.visibility, "all_drawn", True), every=6)
    assert share < 0.95, "nothing was left out"
    assert np.array_equal(env.model.geom_group, groups[0]) and np.array_equal(env.model.site_group, groups[1])
