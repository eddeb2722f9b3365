"""The house: a module imports its own room and those below, lazy imports too; heavy packages stay in their rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in ROOT.glob("spvla/**/*.py")
}

# The rooms, from the ground up: a module imports its own room and those below it.
FLOORS = (
    (
        *(
            "spvla.types",
            "spvla.errors",
            "spvla.config",
            "spvla.files",
            "spvla.reading",
            "spvla.progress",
            "spvla.statistics",
        ),
        *("spvla.runs", "spvla.tracking", "spvla.compiler"),
    ),
    ("spvla.cluster",),
    ("spvla.model",),
    ("spvla.policies",),
    ("spvla.data",),
    ("spvla.render",),
    ("spvla.benchmarks",),
    ("spvla.eval",),
    ("spvla.train",),
    ("spvla.sweep", "spvla.report"),
    ("spvla.serve", "spvla.collect", "spvla.takes", "spvla.status", "spvla.doctor", "spvla.demo"),
    ("spvla.cli", "spvla"),
)

# package -> the only rooms (or modules) that may import it
HEAVY = {
    "tensorflow": ("spvla.data.rlds",),
    "tensorflow_datasets": ("spvla.data.rlds",),
    "mujoco": ("spvla.render", "spvla.benchmarks", "spvla.doctor"),
    "robosuite": ("spvla.benchmarks.libero",),
    "libero": ("spvla.benchmarks.libero",),
    "numba": ("spvla.compiler",),
    "h5py": ("spvla.data.demos",),
    "sqlite3": ("spvla.eval.ledger", "spvla.eval.ledger_file"),
    "websockets": ("spvla.policies.remote", "spvla.serve"),
    "msgpack": ("spvla.policies.wire",),
    "peft": (),  # only its file format is used
    "ray": (
        "spvla.cluster",
        "spvla.takes",
        "spvla.data.index",
        "spvla.train.worker",
        "spvla.train.run",
        "spvla.train.selfplay",
        "spvla.eval",
        "spvla.sweep",
        "spvla.doctor",
    ),
}
BANNED = ("torchvision", "timm", "robomimic", "tensorflow_graphics", "dlimp")
PLAIN = (
    "spvla.eval.batcher",
    "spvla.eval.ledger",
    "spvla.eval.ledger_file",
    "spvla.eval.protocol",
    "spvla.statistics",
    "spvla.train.losses",
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


def floor_of(module: str) -> int:
    """The floor of the longest entry of FLOORS that is the module or a package around it."""
    fits = [(len(name), floor) for floor, names in enumerate(FLOORS) for name in names if within(module, (name,))]
    fits = [fit for fit in fits if fit[0] > len("spvla")] or [(0, len(FLOORS) - 1)] * (module == "spvla")
    assert fits, f"{module} is in no room: add it to FLOORS"
    return max(fits)[1]


def within(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == r or module.startswith(r + ".") for r in rooms)


def is_empty(path: Path) -> bool:
    return not path.read_text().strip()


SOURCES = sorted(m for m, p in MODULES.items() if not is_empty(p))


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_its_own_room_and_those_below(module: str) -> None:
    for imported in imports_of(MODULES[module]):
        if imported.startswith("spvla."):
            assert floor_of(imported) <= floor_of(module), f"{module} imports {imported}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    waiting = {m: {i for i in imports_of(MODULES[m]) if i in SOURCES and i not in ("spvla", m)} for m in SOURCES}
    while free := [m for m, imports in waiting.items() if not imports & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting


@pytest.mark.parametrize("module", SOURCES)
def test_heavy_packages_stay_in_their_rooms(module: str) -> None:
    for imported in imports_of(MODULES[module]):
        package = imported.split(".")[0]
        assert package not in BANNED, f"{module} imports {package}"
        assert within(module, HEAVY.get(package, (module,))), f"{module} imports {package}"


@pytest.mark.parametrize("module", [m for m in SOURCES if within(m, ("spvla.eval",))])
def test_the_evaluation_knows_benchmarks_by_the_registry_alone(module: str) -> None:
    benchmarks = [i for i in imports_of(MODULES[module]) if within(i, ("spvla.benchmarks", "spvla.render"))]
    assert set(benchmarks) <= {"spvla.benchmarks.registry"}


@pytest.mark.parametrize("module", sorted(set(PLAIN) & set(MODULES)))
def test_the_plain_core_knows_no_cluster(module: str) -> None:
    packages = {i.split(".")[0] for i in imports_of(MODULES[module])}
    assert not packages & {"ray", "mujoco", "libero", "robosuite", "transformers"}


def test_every_room_exists() -> None:
    assert not [name for names in FLOORS for name in names if name not in MODULES]
