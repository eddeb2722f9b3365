"""Plain shapes -> MJCF text in the form that LIBERO's object classes read.

Lengths in metres, half sizes as MuJoCo takes them, quaternions (w, x, y, z). A solid part becomes a collision geom
(group 0, hidden), a seen part a visual geom (group 1, no mass); most parts are both. Round solids are made of boxes,
since MuJoCo gives a box resting on a box four contacts and a cylinder only one.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

Vec = tuple[float, ...]
UPRIGHT: Vec = (1.0, 0.0, 0.0, 0.0)
CONTACT = 'friction="0.95 0.3 0.1" solref="0.001 1" solimp="0.998 0.998 0.001"'


@dataclass(frozen=True, kw_only=True)
class Part:
    """One shape: `solid` is felt, `seen` is drawn."""

    shape: str
    size: Vec
    pos: Vec
    colour: Vec
    quat: Vec = UPRIGHT
    solid: bool = True
    seen: bool = True
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A named place that LIBERO's predicates ask about; invisible unless `rgba` says otherwise."""

    name: str
    pos: Vec
    size: Vec
    quat: Vec = UPRIGHT
    shape: str = "box"
    rgba: Vec = (0.8, 0.8, 0.8, 0.0)


@dataclass(frozen=True, kw_only=True)
class Joint:
    name: str
    kind: str
    axis: Vec
    range: Vec
    damping: float


@dataclass(frozen=True, kw_only=True)
class Body:
    """`mass` (kg) is spread evenly over the solid parts, or sits in the origin with `inertia` (kg m2)."""

    name: str
    parts: tuple[Part, ...] = ()
    mass: float = 0.0
    inertia: float | None = None
    pos: Vec = (0.0, 0.0, 0.0)
    quat: Vec = UPRIGHT
    sites: tuple[Site, ...] = ()
    joint: Joint | None = None
    children: tuple["Body", ...] = ()


@dataclass(frozen=True, kw_only=True)
class Asset:
    """An object: where LIBERO looks for it, its tree, and the extents that its placement samplers use."""

    path: str
    body: Body
    bottom: float = -0.06
    top: float = 0.04
    radius: float = 0.025


def box(pos: Vec, half: Vec, colour: Vec, **rest: Any) -> Part:
    return Part(shape="box", size=half, pos=pos, colour=colour, **rest)


def cylinder(pos: Vec, radius: float, half: float, colour: Vec, **rest: Any) -> Part:
    return Part(shape="cylinder", size=(radius, half), pos=pos, colour=colour, **rest)


def round_bar(pos: Vec, radius: float, half: float, colour: Vec, *, sides: int = 8) -> tuple[Part, ...]:
    """An upright cylinder to see and a prism of `sides`/2 crossing boxes to feel."""
    crossing = sides // 2
    wide, narrow = radius * math.cos(math.pi / sides), radius * math.sin(math.pi / sides)
    prism = (
        box(pos, (wide, narrow, half), colour, quat=about("z", math.pi * k / crossing), seen=False)
        for k in range(crossing)
    )
    return (*prism, cylinder(pos, radius, half, colour, solid=False))


def ring(
    low: Vec, high: Vec, thickness: float, colour: Vec, *, centre: Vec = (0.0, 0.0), count: int = 16
) -> tuple[Part, ...]:
    """A wall of slats from (radius, z) `low` to `high`, outer faces on those radii: bowls, mugs, pans."""
    (r0, z0), (r1, z1) = low, high
    tilt, length = math.atan2(r1 - r0, z1 - z0), math.hypot(r1 - r0, z1 - z0)
    half = (thickness / 2, max(r0, r1) * math.tan(math.pi / count), length / 2)
    radius = (r0 + r1) / 2 - thickness / 2
    slats = []
    for k in range(count):
        angle = 2 * math.pi * k / count
        pos = (centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle), (z0 + z1) / 2)
        slats.append(box(pos, half, colour, quat=multiply(about("z", angle), about("y", tilt))))
    return tuple(slats)


def about(axis: str, angle: float) -> Vec:
    """Quaternion of a turn by `angle` (radians) about x, y or z."""
    return (math.cos(angle / 2), *(math.sin(angle / 2) * (axis == a) for a in "xyz"))


def multiply(a: Vec, b: Vec) -> Vec:
    return (
        a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
        a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
        a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
        a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
    )


def y_up(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Parts drawn with z up, for the objects whose own frame has y up (LIBERO stands them up again)."""
    turn = about("x", -math.pi / 2)
    return tuple(replace(p, pos=(p.pos[0], p.pos[2], -p.pos[1]), quat=multiply(turn, p.quat)) for p in parts)


def object_xml(asset: Asset) -> str:
    """The whole file: LIBERO takes the body named `object` and the three sites around it."""
    ends = (("bottom", (0, 0, asset.bottom)), ("top", (0, 0, asset.top)), ("horizontal_radius", (asset.radius,) * 2))
    sites = "\n".join(
        f'<site name="{name}_site" pos="{numbers((*pos, 0)[:3])}" size="0.005" rgba="0 0 0 0"/>' for name, pos in ends
    )
    name = asset.path.rsplit("/", 1)[-1].removesuffix(".xml")
    body = body_xml(asset.body)
    return (
        f'<mujoco model="{name}">\n<asset/>\n<worldbody>\n<body>\n{body}\n{sites}\n</body>\n</worldbody>\n</mujoco>\n'
    )


def body_xml(body: Body) -> str:
    lines = [f'<body name="{body.name}" pos="{numbers(body.pos)}" quat="{numbers(body.quat)}">']
    if body.inertia is not None:
        inertia = numbers((body.inertia,) * 3)
        lines.append(f'<inertial pos="0 0 0" mass="{body.mass:g}" diaginertia="{inertia}"/>')
    if body.joint:
        lines.append(joint_xml(body.joint))
    lines += [site_xml(site) for site in body.sites]
    density = body.mass / max(sum(volume(p) for p in body.parts if p.solid), 1e-9)
    for part in body.parts:
        lines += part_xml(part, density)
    lines += [body_xml(child) for child in body.children]
    return "\n".join([*lines, "</body>"])


def part_xml(part: Part, density: float = 0.0) -> list[str]:
    shape = f'type="{part.shape}" pos="{numbers(part.pos)}" quat="{numbers(part.quat)}" size="{numbers(part.size)}"'
    name = f'name="{part.name}" ' if part.name else ""
    seen_name = f'name="{part.name}_seen" ' if part.name else ""
    geoms = []
    if part.solid:
        geoms.append(f'<geom {name}{shape} group="0" density="{density:.6g}" {CONTACT} rgba="0.8 0.8 0.8 0.3"/>')
    if part.seen:
        rgba = numbers((*part.colour, 1)[:4])
        geoms.append(f'<geom {seen_name}{shape} group="1" contype="0" conaffinity="0" mass="0" rgba="{rgba}"/>')
    return geoms


def site_xml(site: Site) -> str:
    return (
        f'<site name="{site.name}" type="{site.shape}" pos="{numbers(site.pos)}" quat="{numbers(site.quat)}" '
        f'size="{numbers(site.size)}" group="0" rgba="{numbers(site.rgba)}"/>'
    )


def joint_xml(joint: Joint) -> str:
    return (
        f'<joint name="{joint.name}" type="{joint.kind}" axis="{numbers(joint.axis)}" limited="true" '
        f'range="{numbers(joint.range)}" damping="{joint.damping:g}"/>'
    )


def volume(part: Part) -> float:
    if part.shape == "box":
        return 8.0 * part.size[0] * part.size[1] * part.size[2]
    return 2 * math.pi * part.size[0] ** 2 * part.size[1]


def numbers(values: Vec) -> str:
    """Rounded to a micrometre, so that every machine writes the same bytes."""
    return " ".join(f"{round(value, 6) + 0.0:g}" for value in values)
