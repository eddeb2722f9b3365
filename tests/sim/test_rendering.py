"""Which device draws."""

import os
import subprocess
import sys

import pytest

from spvla.errors import UserError
from spvla.render.context import choose_device, renderer_name, try_drawing

pytest.importorskip("mujoco.egl")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "unset")  # so that it is restored afterwards
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID")


def chosen(monkeypatch: pytest.MonkeyPatch, visible: str | None, devices: int) -> str | None:
    from mujoco.egl import egl_ext

    monkeypatch.setattr(egl_ext, "eglQueryDevicesEXT", lambda: [object()] * devices)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    choose_device()
    return os.environ.get("MUJOCO_EGL_DEVICE_ID")


def test_pictures_come_from_the_gpu_that_ray_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "3", devices=8) == "3"


def test_the_first_of_several_gpus_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "5,6", devices=8) == "5"


@pytest.mark.parametrize("visible", [None, "", "MIG-1c2f", "4"])
def test_without_a_usable_number_the_driver_chooses(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    assert chosen(monkeypatch, visible, devices=2) is None


def test_a_device_named_by_hand_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "1")
    assert chosen(monkeypatch, "0", devices=2) == "1"


def test_the_renderer_has_a_name() -> None:
    assert len(renderer_name().split()) >= 2


def test_a_machine_that_cannot_draw_is_no_failure_of_the_policy() -> None:
    script = """
import os; os.environ["MUJOCO_GL"] = "egl"; os.environ["MUJOCO_EGL_DEVICE_ID"] = "99"
from spvla.errors import InfrastructureError
from spvla.render.context import open_context
try:
    open_context()
except InfrastructureError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MuJoCo cannot draw with MUJOCO_GL=egl") and "spvla doctor" in done.stdout


def test_a_machine_that_draws_is_found_out_without_importing_mujoco_here() -> None:
    script = "import sys; from spvla.render.context import try_drawing; print('mujoco' in sys.modules, try_drawing())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"False {renderer_name()}"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("glfw", "MUJOCO_GL=glfw; expected egl or osmesa"),
        ("nonsense", "MUJOCO_GL=nonsense; expected egl or osmesa"),
        ("egl", "MuJoCo draws nothing with MUJOCO_GL=egl \\(.*MUJOCO_EGL_DEVICE_ID.*\\); expected a driver that works"),
    ],
)
def test_a_renderer_that_does_not_work_is_one_line(asked: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", asked)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    with pytest.raises(UserError, match=says) as raised:
        try_drawing()
    assert "\n" not in str(raised.value)
