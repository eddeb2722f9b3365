"""The house: a module imports lower floors only, lazy imports included, and heavy packages stay in their rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in ROOT.glob("spvla/**/*.py")
}

FLOORS = {
    # what everything stands on
    "spvla.types": 0,
    "spvla.errors": 0,
    "spvla.config": 1,
    "spvla.files": 1,
    "spvla.progress": 1,
    "spvla.machines": 2,
    "spvla.cluster": 3,
    "spvla.runs": 2,
    "spvla.tracking": 2,
    # image + instruction -> action
    "spvla.policy.pixels": 0,
    "spvla.policy.actions": 1,
    "spvla.policy.images": 1,
    "spvla.policy.attend": 1,
    "spvla.policy.attend_gpu": 0,
    "spvla.policy.graphs": 0,
    "spvla.policy.transfer": 0,
    "spvla.policy.linear": 0,
    "spvla.policy.prompt": 2,
    "spvla.policy.vision": 1,
    "spvla.policy.llama": 2,
    "spvla.policy.weights": 2,
    "spvla.policy.convert": 3,
    "spvla.policy.hopper": 3,
    "spvla.policy.kernels": 4,
    "spvla.policy.openvla": 3,
    "spvla.policy.quantised": 3,
    "spvla.policy.adapters": 4,
    "spvla.policy.decoding": 5,
    "spvla.policy.presets": 4,
    "spvla.policy.resident": 5,
    "spvla.policy.policy": 6,
    "spvla.policy.checkpoint": 7,
    # RLDS -> batches
    "spvla.data.store": 2,
    "spvla.data.layout": 2,
    "spvla.data.rlds": 3,
    "spvla.data.spool": 2,
    "spvla.data.demos": 4,
    "spvla.data.loader": 3,
    "spvla.data.index": 4,
    # LIBERO
    "spvla.sim.primitives": 1,
    "spvla.sim.assets": 2,
    "spvla.sim.suites": 1,
    "spvla.sim.init_states": 2,
    "spvla.sim.stock": 2,
    "spvla.sim.visibility": 1,
    "spvla.sim.triangles": 0,
    "spvla.sim.opengl": 0,
    "spvla.sim.corners": 0,
    "spvla.sim.painting": 1,
    "spvla.sim.meshes": 2,
    "spvla.sim.rendering": 3,
    "spvla.sim.sampling": 2,
    "spvla.sim.controller": 3,
    "spvla.sim.placements": 3,
    "spvla.sim.libero": 4,
    "spvla.sim.episode": 2,
    "spvla.sim.expert": 8,
    "spvla.sim.recorders": 9,
    # self-play
    "spvla.selfplay.objective": 1,
    "spvla.selfplay.clock": 1,
    "spvla.selfplay.adapters": 1,
    "spvla.selfplay.update": 2,
    "spvla.selfplay.settings": 2,
    "spvla.selfplay.fused_gpu": 0,
    "spvla.selfplay.fused": 2,
    "spvla.selfplay.blocks": 3,
    "spvla.selfplay.network": 4,
    "spvla.selfplay.towers": 5,
    "spvla.selfplay.scoring": 5,
    "spvla.selfplay.opponent": 6,
    "spvla.selfplay.measures": 8,
    "spvla.selfplay.replies": 8,
    "spvla.selfplay.questions": 9,
    "spvla.selfplay.step": 10,
    "spvla.selfplay.metrics": 3,
    "spvla.selfplay.resume": 3,
    "spvla.selfplay.thread": 1,
    "spvla.selfplay.prepare": 8,
    "spvla.selfplay.merge": 8,
    "spvla.selfplay.session": 11,
    "spvla.selfplay.worker": 12,
    "spvla.selfplay.train": 13,
    "spvla.selfplay.iterate": 15,
    # the farm
    "spvla.statistics": 1,
    "spvla.farm.protocol": 1,
    "spvla.farm.ledger": 2,
    "spvla.farm.batcher": 1,
    "spvla.farm.videos": 1,
    "spvla.farm.scheduler": 1,
    "spvla.farm.messages": 3,
    "spvla.farm.actors": 8,
    "spvla.farm.pool": 1,
    "spvla.farm.summary": 3,
    "spvla.farm.logfile": 4,
    "spvla.farm.exports": 4,
    "spvla.farm.console": 4,
    "spvla.farm.sizing": 1,
    "spvla.farm.plan": 9,
    "spvla.farm.farm": 10,
    "spvla.farm.run": 11,
    "spvla.farm.settle": 3,
    "spvla.farm.session": 12,
    "spvla.farm.follow": 13,
    "spvla.farm.evaluate": 14,
    # the edge
    "spvla.report": 4,
    "spvla.status": 4,
    "spvla.doctor": 4,
    "spvla.collect": 10,
    "spvla.sweep": 15,
    "spvla.demo": 16,
    "spvla.cli": 17,
    "spvla": 18,
}

# package -> the only modules (or rooms) that may import it
ROOMS = {
    "tensorflow": ("spvla.data.rlds",),
    "tensorflow_datasets": ("spvla.data.rlds",),
    "mujoco": ("spvla.sim", "spvla.doctor"),
    "robosuite": ("spvla.sim",),
    "libero": ("spvla.sim",),
    "h5py": ("spvla.data.demos",),
    "sqlite3": ("spvla.farm.ledger",),
    "peft": ("spvla.policy",),
    "ray": (
        "spvla.machines",
        "spvla.cluster",
        "spvla.collect",
        "spvla.data.index",
        "spvla.selfplay.worker",
        "spvla.selfplay.train",
        "spvla.selfplay.iterate",
        "spvla.farm",
        "spvla.sweep",
        "spvla.doctor",
    ),
}
BANNED = ("torchvision", "timm", "robomimic", "tensorflow_graphics", "dlimp")
PLAIN = (
    "spvla.farm.batcher",
    "spvla.farm.ledger",
    "spvla.farm.protocol",
    "spvla.statistics",
    "spvla.selfplay.objective",
)


def imports_of(path: Path) -> list[str]:
    """Every module named in an import statement of a file, at any depth of nesting but TYPE_CHECKING blocks."""
    found: list[str] = []
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = [f"{node.module}.{a.name}" for a in node.names]
            found += [s if s in MODULES else str(node.module) for s in submodules]
        nodes.extend(ast.iter_child_nodes(node))
    return found


def room_of(module: str) -> str:
    """The longest entry of FLOORS that is the module or a package around it."""
    fits = [name for name in FLOORS if name != "spvla" and (module == name or module.startswith(name + "."))]
    return max(fits, key=len, default=module)


def within(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == r or module.startswith(r + ".") for r in rooms)


def is_empty(path: Path) -> bool:
    return not path.read_text().strip()


SOURCES = sorted(m for m, p in MODULES.items() if not is_empty(p))


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_stands_on_lower_floors_only(module: str) -> None:
    room = room_of(module)
    assert room in FLOORS, f"{module} has no floor: add it to FLOORS"
    for imported in imports_of(MODULES[module]):
        other = room_of(imported)
        if imported.startswith("spvla.") and other != room:
            assert FLOORS[other] < FLOORS[room], f"{module} (floor {FLOORS[room]}) imports {imported} ({FLOORS[other]})"


@pytest.mark.parametrize("module", SOURCES)
def test_heavy_packages_stay_in_their_rooms(module: str) -> None:
    for imported in imports_of(MODULES[module]):
        package = imported.split(".")[0]
        assert package not in BANNED, f"{module} imports {package}"
        assert within(module, ROOMS.get(package, (module,))), f"{module} imports {package}"


@pytest.mark.parametrize("module", sorted(set(PLAIN) & set(MODULES)))
def test_the_plain_core_knows_no_cluster(module: str) -> None:
    packages = {i.split(".")[0] for i in imports_of(MODULES[module])}
    assert not packages & {"ray", "mujoco", "libero", "robosuite", "transformers"}


def test_every_floor_has_its_module() -> None:
    assert not [name for name in FLOORS if name not in MODULES]
