"""A user who may write nothing but the temporary folder: no HOME, site-packages of another's, as in containers."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvla.errors import UserError
from spvla.files import cache_dir, remembered

NOBODY = 65534
# Root's own Python may lie where only root can read, so that right is kept; none to write is.
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *("--inh-caps=+dac_read_search",))
AS_NOBODY += ("--ambient-caps=+dac_read_search",)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder for everybody, with a name short enough for sockets."""
    can = os.getuid() == 0 and shutil.which("setpriv") is not None
    if not can or subprocess.run([*AS_NOBODY, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("needs root, to become a user who can write nowhere")
    folder = Path(tempfile.mkdtemp(prefix="spvla-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def as_nobody(temporary: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    caches = ("SPVLA_CACHE", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "MPLCONFIGDIR")  # set by tests before, perhaps
    ours = {k: v for k, v in os.environ.items() if k not in caches}
    given = {"HOME": "/", "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        [*AS_NOBODY, sys.executable, *args], env=ours | given, capture_output=True, text=True, timeout=250
    )


def test_doctor_reports_as_ever(temporary: Path) -> None:
    done = as_nobody(temporary, "-m", "spvla.cli", "doctor")
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr
    assert "cannot be looked at" not in done.stdout
    assert f"gap cache     {temporary}/spvla-{NOBODY}" in done.stdout and "SPVLA_CACHE" in done.stdout


def test_simulator_and_image_code_load_and_compile(temporary: Path) -> None:
    code = """
import numpy as np
from spvla.benchmarks.libero import stock
from spvla.policies.openvla import pixels
print(pixels.sinf(np.float32(0)))
"""
    done = as_nobody(temporary, "-c", code)
    assert done.stdout == "0.0\n", done.stderr
    assert list((temporary / f"spvla-{NOBODY}/numba").rglob("*.nbi"))


def test_a_cluster_of_this_users_own_starts_and_its_token_is_private(temporary: Path) -> None:
    code = """
import ray
from spvla.cluster.connect import connection
with connection(num_cpus=1):
    print(ray.get(ray.remote(lambda: 7).remote()))
"""
    done = as_nobody(temporary, "-c", code, RAY_TMPDIR=str(temporary))
    assert done.stdout == "7\n", done.stderr
    token = temporary / f"spvla-{NOBODY}/ray-token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and token.stat().st_size == 64


def test_the_reports_plots_are_drawn_without_a_word(temporary: Path) -> None:
    done = as_nobody(temporary, "-c", "import spvla.report.plots")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("command", ["clean", "evaluate --pretrained_checkpoint tiny --local_log_dir logs"])
def test_where_nothing_can_be_written_at_all_one_line_says_so(temporary: Path, command: str) -> None:
    (temporary / f"spvla-{NOBODY}").mkdir(mode=0o700)  # root's, who came first
    done = as_nobody(temporary, "-m", "spvla.cli", *command.split(), SPVLA_CACHE="")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "is not this user's alone" in done.stderr and "SPVLA_CACHE" in done.stderr


def test_the_fallback_is_its_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPVLA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_dir()
    assert folder == tmp_path / f"spvla-{os.getuid()}" == cache_dir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    with pytest.raises(UserError, match="not this user's alone"):
        cache_dir()
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="not this user's alone"):
        cache_dir()


def test_a_cache_that_was_asked_for_and_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPVLA_CACHE", "/proc/cache")
    with pytest.raises(UserError, match="SPVLA_CACHE /proc/cache cannot be written"):
        cache_dir()


def test_a_digest_that_cannot_be_kept_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPVLA_CACHE", str(tmp_path))
    (tmp_path / "digests").write_text("a file in its place")
    assert (remembered("kind", [], lambda: "a"), remembered("kind", [], lambda: "b")) == ("a", "b")
