"""Whether the installed `libero` is LIBERO, by what its task list and files hold.

LIBERO-plus and LIBERO-PRO install a package of the same name, with tasks of their own under LIBERO's suite names, and
LIBERO's repository reads its objects from its own folder, whatever assets were asked for. A version string tells none
of them apart, so the tasks' names, BDDL files and init states are compared with LIBERO's by digest: six megabytes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from spvla.errors import UserError

# sha256 of each suite's tasks as `suite_digest` takes it. hf-libero 0.1.4 and LIBERO's repository hold the same.
SUITE_DIGESTS = {
    "libero_spatial": "aed8ad86655c1973a5f7d773393367f742d5e830bfe0692190665adf9474691b",
    "libero_object": "02e6f080a44bdc4581a6f07a59e3b7018cabeedc1d2eb8f10df0026fc3730378",
    "libero_goal": "13f9ed54d2398d14686b29b7915b4dc64801eca9e9813929236718eb4b851493",
    "libero_10": "24ebbdb1726e3da7e1234624ca876b708a8ebd909f3fca8ecee80161d2a9e2ec",
    "libero_90": "df6181fd698c6932d961397845315156f7ba25ac4a0f530385a78a751dec14fb",
}
SUITE_SIZES = {suite: 90 if suite == "libero_90" else 10 for suite in SUITE_DIGESTS}
TASKS_DIGEST = hashlib.sha256("".join(SUITE_DIGESTS.values()).encode()).hexdigest()  # of all five, for the protocol


def require_libero(root: Path, task_map: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where the folder `root` (libero/libero) is another benchmark's, or not as LIBERO left it.

    task_map: suite -> names of its tasks, as `root` has it.
    """
    for suite, size in SUITE_SIZES.items():
        if (count := len(task_map.get(suite, ()))) != size:
            raise _foreign(root, f"its {suite} has {count} tasks instead of {size} (LIBERO-plus has thousands)")
    if more := sorted(task_map.keys() - SUITE_SIZES):
        raise _foreign(root, f"it has suites that LIBERO has not, such as {more[0]} (LIBERO-PRO adds its own)")
    code = root / "__init__.py"
    if not code.is_file() or "def get_assets_path" not in code.read_text():
        raise _foreign(root, "it can read objects from its own folder only (as the repository and its forks do)")
    for suite, digest in SUITE_DIGESTS.items():
        try:
            theirs = suite_digest(root, suite, task_map[suite])
        except OSError as e:
            raise _foreign(root, f"{e.filename} cannot be read ({e.strerror})") from e
        if theirs != digest:
            raise _foreign(root, f"the names, BDDL files or init states of its {suite} are not LIBERO's")


def suite_digest(root: Path, suite: str, names: Sequence[str]) -> str:
    """sha256 over each task's name, BDDL file and init states, in the suite's order. OSError for a missing file."""
    total = hashlib.sha256()
    for name in names:
        total.update(name.encode())
        for file in (f"bddl_files/{suite}/{name}.bddl", f"init_files/{suite}/{name}.pruned_init"):
            total.update(hashlib.sha256((root / file).read_bytes()).digest())
    return total.hexdigest()


def _foreign(root: Path, why: str) -> UserError:
    return UserError(
        f"the package in {root.parent} is not LIBERO as published: {why}",
        expected="hf-libero 0.1.4, the only `libero` on Python's path",
        remedy="Keep others in an environment of their own; here, uninstall what owns that folder, and run"
        " `pip install --no-deps --force-reinstall hf-libero==0.1.4`.",
    )
