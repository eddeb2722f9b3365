"""Furniture with joints or regions: the two cabinets, the stove, the microwave and the wine rack.

Joint names, axes, ranges, damping and inertia are those that LIBERO's `is_open`, `turn_on` and init states expect.
"""

import math
from typing import Any

from spvla.benchmarks.libero.primitives.mjcf import (
    Asset,
    Body,
    Joint,
    Part,
    Site,
    Vec,
    about,
    box,
    cylinder,
    ring,
    round_bar,
)

STEEL, DARK, BLACK = (0.60, 0.61, 0.63), (0.25, 0.25, 0.27), (0.10, 0.10, 0.11)
ON_ITS_SIDE = (math.sqrt(0.5), 0.0, math.sqrt(0.5), 0.0)


def cabinet(name: str, wood: Vec, front: Vec) -> Asset:
    """Three drawers that slide along y by 16 cm; `top_side` is the place on top."""
    shell = (
        box((0.004, 0.1095, 0.1143), (0.1191, 0.0023, 0.1058), wood),
        box((0.004, 0.0163, 0.0069), (0.1228, 0.0896, 0.002), wood),
        box((-0.1122, 0.0163, 0.1143), (0.0052, 0.0954, 0.1058), wood),
        box((0.119, 0.0163, 0.1143), (0.0052, 0.0954, 0.1058), wood),
        *(box((0.004, 0.0187, z), (0.1117, 0.0893, 8e-4), wood) for z in (0.1494, 0.0793, 0.0093)),
        box((0.0039, 0.0158, 0.2216), (0.1273, 0.0941, 0.0014), wood),
    )
    drawers = (
        drawer("top", 0.0, 0.1839, wood, front),
        drawer("middle", -0.0697, 0.1104, wood, front),
        drawer("bottom", -0.1383, 0.0411, wood, front),
    )
    top = Site(name="top_side", pos=(0.0035, 0.0157, 0.2215), size=(0.1253, 0.0944, 0.0015))
    base = Body(name="base", mass=2.24, parts=shell, sites=(top,), children=drawers)
    return fixture(name, base)


def drawer(level: str, dz: float, handle_z: float, wood: Vec, front: Vec) -> Body:
    parts = (
        box((0.0033, -0.0752, 0.1831 + dz), (0.1093, 0.0027, 0.0343), front),
        *(box((0.0033, y, 0.1836 + dz), (0.1068, 0.0036, 0.0321), wood) for y in (-0.0684, 0.0908)),
        *(box((x, 0.0111, 0.1836 + dz), (0.0024, 0.0815, 0.0315), wood) for x in (-0.1019, 0.1089)),
        box((0.0035, 0.0105, 0.1551 + dz), (0.107, 0.0809, 0.004), wood),
        box((-0.0028, -0.1016, handle_z), (0.0445, 0.0077, 0.0082), STEEL),
        *(box((x, -0.0835, handle_z), (0.0051, 0.0106, 0.0055), STEEL) for x in (0.0292, -0.0356)),
    )
    region_z = {"top": 0.1856, "middle": 0.1169, "bottom": 0.047}[level]
    region = Site(
        name=f"{level}_region", pos=(0.0033, 0.0113, region_z), quat=ON_ITS_SIDE, size=(0.0299, 0.0756, 0.1022)
    )
    slide = Joint(name=f"{level}_level", kind="slide", axis=(0, 1, 0), range=(-0.16, 0.01), damping=50)
    return Body(name=f"cabinet_{level}", mass=3, inertia=1, parts=parts, sites=(region,), joint=slide)


def stove() -> Asset:
    """A plate to cook on and a knob that turns; LIBERO shows the red `burner` site while it is on."""
    plate = tuple(Part(**{**vars(p), "solid": False}) for p in ring((0.062, 0.0195), (0.065, 0.0254), 0.004, DARK))
    bars = tuple(
        box((0, 0, 0.0225), (0.062, 0.002, 0.0025), DARK, quat=about("z", angle), solid=False)
        for angle in (math.pi / 4, -math.pi / 4)
    )
    burner = Body(
        name="burner",
        pos=(0.15, 0, 0),
        mass=2.92,
        parts=(
            box((0, 0, 0), (0.095, 0.095, 0.02), STEEL, name="base"),
            box((0, 0, 0.025), (0.095, 0.095, 5e-4), STEEL, seen=False, name="collision_burner"),
            *plate,
            *bars,
        ),
        sites=(
            Site(name="cook_region", pos=(0, 0, 0), size=(0.075, 0.075, 0.0025)),
            Site(name="burner", pos=(0, 0, 0.022), size=(0.0625, 5e-4), shape="cylinder", rgba=(0.9, 0.05, 0.05, 1.0)),
        ),
    )
    knob = (
        *round_bar((0.0013, 0.0043, 0.0066), 0.046, 0.0062, DARK),
        box((0.0014, 0.0174, 0.0257), (0.0121, 0.0345, 0.0243), BLACK),
        box((0.0012, -0.0242, 0.0247), (0.0121, 0.012, 0.019), BLACK),
        box((0.0014, 0.045, 0.0504), (0.004, 0.006, 4e-4), (0.9, 0.9, 0.9), solid=False),
    )
    turn = Joint(name="button", kind="hinge", axis=(0, 0, 1), range=(-0.005, 2.1), damping=1)
    button = Body(name="button", quat=about("z", math.pi / 2), mass=3, inertia=1, parts=knob, joint=turn)
    return fixture("flat_stove", Body(name="base", children=(burner, button)))


def microwave() -> Asset:
    """An open box with a door on a hinge at its left; `heating_region` is the inside."""
    shell = (
        box((-0.158, 0.0115, 0.0935), (0.0145, 0.0995, 0.0935), STEEL),
        box((0.118, 0.0115, 0.0935), (0.0545, 0.0995, 0.0935), STEEL),
        box((-0.0405, 0.0955, 0.0935), (0.1035, 0.015, 0.0935), STEEL),
        box((-0.04, -0.0035, 0.1775), (0.1035, 0.0845, 0.0095), STEEL),
        box((-0.04, -0.004, 0.012), (0.1035, 0.084, 0.012), STEEL),
        box((0.13, -0.0985, 0.0935), (0.0425, 0.012, 0.0935), BLACK),
        *(
            cylinder((0.13, -0.1115, z), 0.014, 0.002, STEEL, quat=about("x", math.pi / 2), solid=False)
            for z in (0.06, 0.11)
        ),
    )
    bar: dict[str, Any] = {"shape": "capsule", "colour": STEEL}
    across = about("x", math.pi / 2)
    door = (
        box((0.1295, -0.013, 0), (0.1295, 0.012, 0.0925), DARK),
        box((0.115, -0.0255, 0), (0.09, 5e-4, 0.065), (0.05, 0.07, 0.10), solid=False),
        Part(size=(0.01, 0.065), pos=(0.2375, -0.054, 0), **bar),
        *(Part(size=(0.01, 0.015), pos=(0.2375, -0.0375, z), quat=across, **bar) for z in (0.065, -0.065)),
    )
    hinge = Joint(name="microjoint", kind="hinge", axis=(0, 0, 1), range=(-2.094, 0), damping=0.5)
    leaf = Body(name="microdoorroot", pos=(-0.1725, -0.088, 0.096), mass=0.26, parts=door, joint=hinge)
    sites = (
        Site(name="top_side", pos=(0, 0.01, 0.2), size=(0.12, 0.0835, 0.005)),
        Site(name="heating_region", pos=(0, 0.01, 0.096), size=(0.12, 0.0835, 0.08)),
    )
    body = Body(name="object", mass=3, parts=shell, sites=sites, children=(leaf,))
    return Asset(path="articulated_objects/microwave.xml", body=body, top=0.06, radius=0.015)


def wine_rack() -> Asset:
    """Two shelves that lean back by 31 degrees, each with a lip that holds a bottle lying across."""
    wood, dark = (0.80, 0.62, 0.42), (0.45, 0.28, 0.15)
    lean, lip = about("x", 0.546), about("x", -1.06)
    parts = (
        box((0, -0.0061, 0.2512), (0.1344, 0.0789, 0.0045), wood, quat=lean),
        box((0, -0.0427, 0.1273), (0.1344, 0.0789, 0.0045), wood, quat=lean),
        box((0, -0.0748, 0.2207), (0.1322, 0.0087, 0.0011), dark, quat=lip),
        box((0, -0.1091, 0.0974), (0.1322, 0.0087, 0.0011), dark, quat=lip),
        box((0, 0, 0.0066), (0.093, 0.0665, 0.0045), dark),
        box((0, 0.0693, 0.0101), (0.09, 0.06, 0.0045), dark, quat=about("x", -0.131)),
        box((0, -0.0643, 0.0126), (0.09, 0.06, 0.0045), dark, quat=about("x", 0.141)),
        box((0, 0.0089, 0.1703), (0.0076, 0.0091, 0.1616), dark, quat=about("x", -0.2765)),
    )
    region = Site(name="top_region", pos=(0, -0.08, 0.2175), quat=(0.8549, -0.5188, 0, 0), size=(0.1009, 0.022, 0.0025))
    body = Body(name="object", mass=0.616, parts=parts, sites=(region,))
    return Asset(path="turbosquid_objects/wine_rack/wine_rack.xml", body=body)


def fixture(name: str, base: Body) -> Asset:
    body = Body(name="object", children=(base,))
    return Asset(path=f"articulated_objects/{name}.xml", body=body, bottom=-0.045, top=0.045, radius=0.045)


def assets() -> tuple[Asset, ...]:
    brown, white = (0.36, 0.23, 0.14), (0.88, 0.87, 0.85)
    return (
        cabinet("wooden_cabinet", brown, (0.45, 0.29, 0.17)),
        cabinet("white_cabinet", white, (0.94, 0.93, 0.91)),
        stove(),
        microwave(),
        wine_rack(),
    )
