"""Which device draws."""

import os
import subprocess
import sys

import pytest

from spvla.render.rendering import choose_device, renderer_name

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
from spvla.render.rendering import open_context
try:
    open_context()
except InfrastructureError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MuJoCo cannot draw with MUJOCO_GL=egl") and "spvla doctor" in done.stdout
