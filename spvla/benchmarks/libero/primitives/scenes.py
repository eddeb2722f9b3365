"""The arenas: floor, walls, tables, lights, cameras, and some furniture in the background.

Names and places that LIBERO's arena classes and init states rely on (floor, table, table_top, cameras, table heights)
are LIBERO's; what stands behind the table is only there to be seen.
"""

from spvla.benchmarks.libero.primitives.mjcf import Body, Part, body_xml, box, cylinder, part_xml

WOOD, DARK_WOOD = (0.72, 0.56, 0.40), (0.36, 0.25, 0.18)
WHITE, STEEL, BLACK, LEAF = (0.90, 0.90, 0.88), (0.62, 0.63, 0.65), (0.12, 0.12, 0.13), (0.18, 0.42, 0.20)
WALLS = (
    ("leftcorner", "-1.25 2.25 1.5", "0.6532815 0.6532815 0.2705981 0.2705981", "1.06 1.5 0.01"),
    ("rightcorner", "-1.25 -2.25 1.5", "0.6532815 0.6532815 -0.2705981 -0.2705981", "1.06 1.5 0.01"),
    ("left", "1.25 3 1.5", "0.7071 0.7071 0 0", "1.75 1.5 0.01"),
    ("right", "1.25 -3 1.5", "0.7071 -0.7071 0 0", "1.75 1.5 0.01"),
    ("rear", "-2 0 1.5", "0.5 0.5 0.5 0.5", "1.5 1.5 0.01"),
    ("front", "3 0 1.5", "0.5 0.5 -0.5 -0.5", "3 1.5 0.01"),
)
CAMERAS = (
    ("frontview", "1.0 0 1.45", "0.56 0.43 0.43 0.56"),
    ("birdview", "-0.2 0 3.0", "0.7071 0 0 0.7071"),
    ("agentview", "0.5 0 1.35", "0.653 0.271 0.271 0.653"),
    ("sideview", "-0.0565 1.2761 1.4880", "0.009905 0.006878 0.591223 0.806418"),
)
FLOOR = '<geom condim="3" group="1" material="floorplane" name="floor" pos="0 0 0" size="3 3 .125" type="plane"/>'
FLOOR_BODY = f'<body name="floor" pos="0 0 0">{FLOOR}</body>'
ASSETS = """<asset>
<texture builtin="gradient" height="256" rgb1=".9 .9 1." rgb2=".2 .3 .4" type="skybox" width="256"/>
<texture file="../textures/light-gray-floor-tile.png" type="2d" name="texplane"/>
<material name="floorplane" reflectance="0" shininess="0" specular="0" texrepeat="3 3" texture="texplane"
 texuniform="true"/>
<texture file="../textures/martin_novak_wood_table.png" type="cube" name="tex-table"/>
<material name="table_texture" reflectance="0" shininess="0" specular="0.2" texture="tex-table"/>
<texture file="../textures/light-gray-plaster.png" type="2d" name="tex-wall"/>
<material name="walls_mat" reflectance="0" shininess="0.1" specular="0.8" texrepeat="3 3" texture="tex-wall"
 texuniform="true"/>
</asset>"""
LIGHTS = "\n".join(
    f'<light name="{name}" diffuse=".8 .8 .8" dir="0 -.15 -1" directional="false" pos="{pos}" specular="0.3 0.3 0.3"'
    ' castshadow="false"/>'
    for name, pos in (("light1", "1 1 4.0"), ("light2", "-3. -3. 4.0"))
)
# LIBERO sets the table's place, size and legs; the figures here are only starting values.
LEGS = "\n".join(
    f'<geom name="table_leg{k}_visual" type="cylinder" size="0.05 0.1" contype="0" conaffinity="0" group="1"'
    ' material="table_texture"/>'
    for k in (1, 2, 3, 4)
)
TABLE = f"""<body name="table" pos="0 0 0.4">
<geom name="table_collision" type="box" size="0.4 0.4 0.4" group="0" friction="1 0.005 0.0001"/>
<geom name="table_visual" type="box" size="0.4 0.4 0.4" contype="0" conaffinity="0" group="1"
 material="table_texture"/>
<site name="table_top" pos="0 0 0.4" size="0.001" rgba="0 0 0 0"/>
{LEGS}
</body>"""

COFFEE_TABLE = Body(
    name="living_room_table",
    children=(
        Body(
            name="living_room_table_col",
            pos=(-0.25, 0.25, 0.0),
            quat=(0.7071, 0.0, 0.0, 0.7071),
            mass=77.5,
            parts=(
                box((-0.2104, -0.0073, 0.4249), (0.861, 0.581, 0.0119), DARK_WOOD),
                box((0.0, 0.0, 0.204), (0.435, 0.412, 0.2088), DARK_WOOD),
            ),
        ),
    ),
)
DESK = Body(
    name="study_table",
    mass=126.5,
    parts=(
        box((0.0, 0.0, 0.8493), (0.6895, 1.3927, 0.0358), DARK_WOOD),
        *(box((x, y, 0.4), (0.02, 0.05, 0.4), BLACK) for x in (-0.5, 0.5) for y in (-0.7, 0.7)),
    ),
)


def seen(part: Part) -> str:
    """A piece of background: drawn, never touched."""
    return part_xml(part)[-1]


KITCHEN = (
    box((-1.75, 0.0, 0.44), (0.25, 1.6, 0.44), WHITE),
    box((-1.75, 0.0, 0.9), (0.27, 1.6, 0.02), DARK_WOOD),
    box((-1.65, 0.0, 0.93), (0.22, 0.35, 0.01), BLACK),
    cylinder((-1.55, 0.23, 1.0), 0.1, 0.06, STEEL),
    cylinder((-1.8, -0.85, 1.02), 0.12, 0.1, (0.75, 0.3, 0.2)),
    box((-1.7, -2.2, 0.9), (0.3, 0.4, 0.9), STEEL),
)
LIVING_ROOM = (
    box((-1.8, 0.0, 0.2), (0.18, 1.1, 0.2), WOOD),
    box((-1.82, -0.2, 0.75), (0.03, 0.5, 0.3), BLACK),
    box((-1.97, 0.75, 1.5), (0.02, 0.3, 0.2), (0.30, 0.45, 0.60)),
)
STUDY = (
    box((-1.75, -1.0, 0.8), (0.15, 0.5, 0.8), WOOD),
    *(box((-1.59, -1.3 + 0.09 * k, 1.0), (0.02, 0.03, 0.12), c) for k, c in enumerate((BLACK, LEAF, WHITE, STEEL))),
    box((-1.95, 0.5, 1.4), (0.02, 0.35, 0.25), (0.75, 0.55, 0.30)),
    cylinder((-1.8, 0.75, 0.2), 0.15, 0.2, (0.55, 0.32, 0.22)),
    Part(shape="ellipsoid", size=(0.22, 0.22, 0.35), pos=(-1.8, 0.75, 0.7), colour=LEAF),
)


def arena(model: str, floor: str, furniture: str = "") -> str:
    walls = "\n".join(
        f'<geom name="wall_{name}_visual" type="box" pos="{pos}" quat="{quat}" size="{size}" contype="0"'
        ' conaffinity="0" group="1" material="walls_mat"/>'
        for name, pos, quat, size in WALLS
    )
    cameras = "\n".join(f'<camera mode="fixed" name="{n}" pos="{p}" quat="{q}"/>' for n, p, q in CAMERAS)
    world = "\n".join(text for text in (floor, furniture, walls, LIGHTS, cameras) if text)
    return f'<mujoco model="{model}">\n{ASSETS}\n<worldbody>\n{world}\n</worldbody>\n</mujoco>\n'


def files() -> dict[str, str]:
    """File name -> MJCF of the five arenas that the four suites use."""
    kitchen, living, study = ("\n".join(map(seen, parts)) for parts in (KITCHEN, LIVING_ROOM, STUDY))
    return {
        "libero_floor_base_style.xml": arena("floor_arena", FLOOR_BODY),
        "libero_tabletop_base_style.xml": arena("table_arena", FLOOR, TABLE),
        "libero_kitchen_tabletop_base_style.xml": arena("kitchen_arena", FLOOR, f"{TABLE}\n{kitchen}"),
        "libero_living_room_tabletop_base_style.xml": arena(
            "living_room_arena", FLOOR_BODY, f"{body_xml(COFFEE_TABLE)}\n{living}"
        ),
        "libero_study_base_style.xml": arena("study_arena", FLOOR, f"{body_xml(DESK)}\n{study}"),
    }
