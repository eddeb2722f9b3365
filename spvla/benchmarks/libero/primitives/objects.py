"""The movable objects: groceries, dishes, mugs, bottles, book and caddy, in the originals' extents and masses.

Groceries that LIBERO keeps with y up are drawn standing (z up) and turned by `y_up`.
"""

import math
from typing import Any

from spvla.benchmarks.libero.primitives.mjcf import (
    Asset,
    Body,
    Part,
    Site,
    Vec,
    about,
    box,
    cylinder,
    ring,
    round_bar,
    y_up,
)

HOPE, SCANNED, TURBO = "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects"
SILVER, WHITE, BLACK, RED = (0.75, 0.76, 0.78), (0.93, 0.92, 0.88), (0.10, 0.10, 0.11), (0.75, 0.10, 0.08)
BLUE, GREEN, YELLOW, ORANGE = (0.15, 0.25, 0.62), (0.12, 0.45, 0.18), (0.95, 0.80, 0.15), (0.92, 0.45, 0.08)
BROWN, CREAM, WOOD = (0.30, 0.14, 0.07), (0.90, 0.85, 0.70), (0.66, 0.47, 0.28)
CREAM_CHEESE, PORCELAIN = (0.80, 0.86, 0.95), (0.92, 0.90, 0.85)


def item(
    folder: str, name: str, mass: float, parts: tuple[Part, ...], sites: tuple[Site, ...] = (), **ends: Any
) -> Asset:
    body = Body(name="object", mass=mass, parts=parts, sites=sites)
    return Asset(path=f"{folder}/{name}/{name}.xml", body=body, **ends)


def decoration(part_pos: Vec, half: Vec, colour: Vec) -> Part:
    return box(part_pos, half, colour, solid=False)


def unseen(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Only felt: some init states hold a bowl in a plate's rim, and walls as thin as those drawn would hook."""
    return tuple(Part(**{**vars(part), "seen": False}) for part in parts)


def can(paper: Vec, band: Vec) -> tuple[Part, ...]:
    lids = (cylinder((0, 0, z), 0.0325, 0.002, SILVER, solid=False) for z in (-0.0366, 0.0361))
    label = cylinder((0, 0, -0.008), 0.0323, 0.009, band, solid=False)
    return y_up((*round_bar((0, 0, -0.0005), 0.0318, 0.0381, paper), *lids, label))


def carton(paper: Vec, top: Vec, picture: Vec) -> tuple[Part, ...]:
    """A square carton with a gable roof of steps."""
    return y_up(
        (
            box((0, 0, -0.015), (0.0262, 0.0262, 0.0548), paper),
            box((0, 0, 0.0448), (0.0262, 0.0175, 0.005), top),
            box((0, 0, 0.0548), (0.0262, 0.0095, 0.005), top),
            decoration((0, 0, 0.065), (0.0262, 0.002, 0.0055), top),
            decoration((0, 0, -0.03), (0.0266, 0.0266, 0.02), picture),
            decoration((0, 0, 0.027), (0.0266, 0.0266, 0.006), top),
        )
    )


def bottle(glass: Vec, label: Vec, cap: Vec) -> tuple[Part, ...]:
    """A flat sauce bottle: belly, shoulder, round cap."""
    return y_up(
        (
            box((0, 0, -0.0397), (0.0265, 0.0174, 0.033), glass),
            box((0, 0, 0.002), (0.021, 0.016, 0.0088), glass),
            box((0, 0, 0.0235), (0.0155, 0.013, 0.0128), glass),
            *round_bar((0, 0, 0.0545), 0.0155, 0.0183, cap),
            decoration((0, 0, -0.038), (0.0269, 0.0178, 0.02), label),
        )
    )


def packet(half: Vec, paper: Vec, label: Vec, *, pos: Vec = (0, 0, 0)) -> tuple[Part, ...]:
    """A flat box with a coloured panel on every side."""
    x, y, z = half
    panel = decoration(pos, (0.55 * x, y + 3e-4, z + 3e-4), label)
    return (box(pos, half, paper), panel)


def groceries() -> tuple[Asset, ...]:
    bbq = (
        box((0, 0, -0.0278), (0.0235, 0.0145, 0.0268), BROWN),
        box((0, 0, 0.0123), (0.0146, 0.0143, 0.0181), BROWN),
        *round_bar((0, 0, 0.0391), 0.0138, 0.0134, RED),
        decoration((0, 0, -0.026), (0.0239, 0.0149, 0.015), YELLOW),
    )
    return (
        item(HOPE, "alphabet_soup", 0.0537, can(BLUE, YELLOW), bottom=-0.04),
        item(HOPE, "tomato_sauce", 0.0545, can(RED, GREEN)),
        item(HOPE, "salad_dressing", 0.0449, bottle(CREAM, (0.55, 0.75, 0.35), GREEN)),
        item(HOPE, "ketchup", 0.0493, bottle(RED, (0.85, 0.25, 0.15), WHITE)),
        item(HOPE, "milk", 0.0685, carton(WHITE, RED, BLUE), radius=0.03),
        item(HOPE, "orange_juice", 0.0677, carton(YELLOW, ORANGE, ORANGE)),
        item(HOPE, "bbq_sauce", 0.0241, bbq, top=0.06, radius=0.015),
        item(
            HOPE,
            "cream_cheese",
            0.0124,
            packet((0.0406, 0.0213, 0.0089), CREAM_CHEESE, BLUE),
            bottom=-0.025,
            top=0.025,
            radius=0.03,
        ),
        item(
            HOPE, "butter", 0.0103, packet((0.0381, 0.0198, 0.0087), ORANGE, RED), bottom=-0.02, top=0.02, radius=0.02
        ),
        item(
            HOPE,
            "chocolate_pudding",
            0.0216,
            packet((0.0401, 0.0232, 0.0137), BROWN, (0.55, 0.38, 0.25), pos=(-5e-4, 0, 6e-4)),
        ),
        item(
            HOPE, "cookies", 0.0191, packet((0.031, 0.0413, 0.0094), (0.62, 0.16, 0.12), CREAM), bottom=-0.02, top=0.02
        ),
    )


def basket() -> Asset:
    parts = (
        box((0, 0, 0.0131), (0.0766, 0.0724, 0.0085), WOOD),
        *(box((x, 0, 0.0755), (0.0067, 0.0724, 0.0702), WOOD) for x in (-0.075, 0.0767)),
        *(box((0, y, 0.0755), (0.0724, 0.0067, 0.0702), (0.58, 0.40, 0.22)) for y in (-0.0695, 0.0695)),
    )
    region = Site(name="contain_region", pos=(0, 0, 0.07185), quat=(0, 0, 0, 1), size=(0.06108, 0.06108, 0.06949))
    return item(SCANNED, "basket", 0.6532, parts, (region,))


def dishes() -> tuple[Asset, ...]:
    dark = (0.14, 0.14, 0.16)
    bowl = (
        *round_bar((0, 0, 0.0042), 0.027, 0.0026, dark),
        *ring((0.024, 0.0036), (0.042, 0.0155), 0.003, dark),
        *ring((0.042, 0.0155), (0.0535, 0.0521), 0.003, dark),
        *unseen(ring((0.0405, 0.013), (0.047, 0.031), 0.012, dark)),
    )
    plate = (
        *round_bar((0, 0, 0.0031), 0.034, 0.0022, PORCELAIN),
        *ring((0.031, 0.003), (0.067, 0.0155), 0.004, PORCELAIN),
        *unseen(ring((0.066, 0.001), (0.066, 0.0115), 0.008, PORCELAIN)),
        *(Part(**{**vars(p), "solid": False}) for p in ring((0.0665, 0.0150), (0.0685, 0.0166), 0.004, RED)),
    )
    glaze = (0.72, 0.74, 0.76)
    ramekin = (
        *round_bar((0, 0, 0.0041), 0.036, 0.0033, glaze),
        *ring((0.0385, 0.001), (0.0443, 0.0427), 0.005, glaze),
    )
    pan = (
        *round_bar((0.0055, 0, 0.0067), 0.078, 0.006, BLACK),
        *ring((0.078, 0.004), (0.1, 0.0435), 0.007, BLACK, centre=(0.0055, 0)),
        box((0.12, 0, 0.0265), (0.02, 0.0105, 0.007), SILVER, quat=about("y", -0.45)),
        box((0.1926, 0, 0.0441), (0.0665, 0.0127, 0.0062), (0.2, 0.2, 0.2), quat=about("y", -0.13)),
    )
    return (
        item(SCANNED, "akita_black_bowl", 0.0658, bowl),
        item(SCANNED, "plate", 0.0305, plate),
        item(SCANNED, "glazed_rim_porcelain_ramekin", 0.0381, ramekin),
        item(SCANNED, "chefmate_8_frypan", 0.2032, pan),
    )


def handle(joints: tuple[tuple[Vec, float, float], ...], colour: Vec, *, side: float = 0.0085) -> tuple[Part, ...]:
    """Bars (position, half length, lean from upright in radians) in the plane y = 0."""
    return tuple(box(pos, (0.004, side, half), colour, quat=about("y", lean)) for pos, half, lean in joints)


def mugs() -> tuple[Asset, ...]:
    red = (0.72, 0.12, 0.12)
    porcelain = (
        *round_bar((0.0155, -0.0015, 0.0076), 0.03, 0.0052, PORCELAIN),
        *ring((0.031, 0.006), (0.0435, 0.044), 0.005, PORCELAIN, centre=(0.0155, -0.0015)),
        *ring((0.0435, 0.044), (0.0435, 0.1085), 0.005, PORCELAIN, centre=(0.0155, -0.0015)),
        *handle(
            (((-0.0595, 0, 0.056), 0.02, 0), ((-0.0416, 0, 0.0286), 0.02, -1.0), ((-0.0463, 0, 0.0834), 0.02, 1.0)),
            PORCELAIN,
        ),
    )
    white_yellow = (
        *round_bar((-0.0182, 0, 0.0027), 0.032, 0.0025, YELLOW),
        *ring((0.033, 0.001), (0.0415, 0.0165), 0.006, YELLOW, centre=(-0.0182, 0)),
        *ring((0.0415, 0.0165), (0.0465, 0.1031), 0.006, WHITE, centre=(-0.0182, 0)),
        *handle(
            (
                ((0.0641, 0, 0.056), 0.0292, 0),
                ((0.0402, 0, 0.0263), 0.0249, 1.36),
                ((0.0464, 0, 0.0796), 0.0217, -1.46),
            ),
            YELLOW,
        ),
    )
    coffee = (
        *round_bar((-0.0163, -0.002, 0.0035), 0.03, 0.0035, red),
        *ring((0.031, 0.001), (0.045, 0.1308), 0.006, red, centre=(-0.0163, -0.002)),
        *handle(
            (
                ((0.0369, 0, 0.0504), 0.0343, 0.74),
                ((0.0547, 0, 0.0944), 0.0192, -0.1),
                ((0.0346, 0, 0.1116), 0.0182, 1.43),
            ),
            red,
        ),
    )
    return (
        item(TURBO, "porcelain_mug", 0.1206, porcelain),
        item(TURBO, "white_yellow_mug", 0.1209, white_yellow),
        item(TURBO, "red_coffee_mug", 0.124, coffee),
    )


def bottle_and_pot() -> tuple[Asset, ...]:
    glass = (0.05, 0.16, 0.07)
    wine = (
        *round_bar((0, 0, 0.0373), 0.0205, 0.0362, glass),
        *round_bar((0, 0, 0.0835), 0.0135, 0.01, glass),
        *round_bar((0, 0, 0.1258), 0.0085, 0.0323, glass),
        cylinder((0, 0, 0.035), 0.0209, 0.018, CREAM, solid=False),
        cylinder((0, 0, 0.147), 0.0089, 0.0115, (0.45, 0.05, 0.10), solid=False),
    )
    pot = (
        *round_bar((0, 0, 0.0004), 0.0345, 0.0665, SILVER),
        cylinder((0, 0, -0.045), 0.0375, 0.02, SILVER, solid=False),
        cylinder((0, 0, 0.055), 0.037, 0.01, SILVER, solid=False),
        box((0, -0.042, 0.046), (0.008, 0.013, 0.014), SILVER),
        box((0, 0.0583, 0.0603), (0.007, 0.025, 0.0066), BLACK),
        box((0, 0.078, 0.038), (0.007, 0.0066, 0.0288), BLACK),
        *round_bar((0, -0.0013, 0.0763), 0.007, 0.0094, BLACK),
    )
    return item(TURBO, "wine_bottle", 0.0509, wine), item(TURBO, "moka_pot", 0.1311, pot)


def study_things() -> tuple[Asset, ...]:
    book = (
        box((-5e-4, -0.0121, 0.0694), (0.0143, 0.0552, 0.0672), BLACK),
        decoration((-5e-4, -0.0118, 0.0694), (0.0115, 0.0553, 0.0674), CREAM),
    )
    base = box((0, 0, 0.0076), (0.0755, 0.2169, 0.0062), WOOD)
    low, high = (0.50, 0.34, 0.20), WOOD
    caddy = (
        base,
        *(box((0, y, 0.085), (0.0706, 0.0062, 0.0824), high) for y in (-0.068, -0.2094)),
        box((0.0668, 0, 0.0868), (0.004, 0.2098, 0.0815), high),
        box((-0.0016, 0, 0.0552), (0.004, 0.0668, 0.0434), low),
        box((-0.0669, 0, 0.0395), (0.004, 0.2098, 0.0345), low),
        box((-0.0669, -0.1398, 0.0877), (0.004, 0.0766, 0.0796), high),
        *(box((0, y, 0.0452), (0.0706, 0.0036, 0.0333), low) for y in (0.0706, 0.2086)),
        *(box((0.0345, y, 0.104), (0.03, 0.0036, 0.06), low) for y in (0.0706, 0.2086)),
    )
    back = (0.0, 0.0, 1.0, 0.0)
    sites = (
        Site(name="right_contain_region", pos=(0.0063, -0.1434, 0.0656), quat=back, size=(0.062, 0.0622, 0.0605)),
        Site(name="left_contain_region", pos=(0.0063, 0.1455, 0.0656), quat=back, size=(0.062, 0.0622, 0.0605)),
        Site(name="back_contain_region", pos=(0.0336, -0.0006, 0.0856), quat=back, size=(0.0278, 0.0622, 0.0605)),
        Site(
            name="front_contain_region",
            pos=(-0.031, -0.0006, 0.0405),
            quat=(0, 0, math.sqrt(0.5), -math.sqrt(0.5)),
            size=(0.0278, 0.036, 0.0622),
        ),
    )
    return item(TURBO, "black_book", 0.1559, book), item(TURBO, "desk_caddy", 1.642, caddy, sites)


def assets() -> tuple[Asset, ...]:
    return (*groceries(), basket(), *dishes(), *mugs(), *bottle_and_pot(), *study_things())
