"""Which device draws."""

import os
import subprocess
import sys

import pytest

from spvla.errors import UserError
from spvla.render.context import choose_device, device_named, renderer_name, try_drawing
from spvla.render.devices import cuda_numbers, drawing_device, egl_index, visible_gpus
from spvla.types import ENV_NUMBER

pytest.importorskip("mujoco.egl")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "unset")  # so that it is restored afterwards
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID")
    monkeypatch.delenv(ENV_NUMBER, raising=False)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (None, []),
        ("", []),
        ("3", [3]),
        (" 5, 6", [5, 6]),
        ("2,-1,0", [2]),  # CUDA sees nothing after the first that is none
        ("-1", []),
        ("GPU-8932f937,1", []),
        ("MIG-1c2f", []),
    ],
)
def test_visible_gpus_are_read_as_cuda_reads_them(text: str | None, numbers: list[int]) -> None:
    assert visible_gpus(text) == numbers


def test_egl_counts_gpus_in_an_order_of_its_own() -> None:
    reversed_order = [3, 2, 1, 0, None]  # the last draws in software
    assert [egl_index(reversed_order, n) for n in range(5)] == [3, 2, 1, 0, None]
    assert [egl_index([None, None], n) for n in range(3)] == [0, 1, None]  # a driver that does not say


@pytest.mark.parametrize(
    ("cuda_of_egl", "visible", "turn", "device"),
    [
        ([3, 2, 1, 0], [1], None, 2),  # the GPU that Ray gave
        ([3, 2, 1, 0], [2, 3], None, 1),  # the first of several
        ([3, 2, 1, 0], [2, 3], 5, 0),  # an environment takes its turn among those it may see
        ([None, 1, None, 0], [2, 3], 0, 3),  # a driver that counts the visible ones: CUDA's 2 is its 0
        ([None, 1, None, 0], [2, 3], 1, 1),
        ([1, 0, None], [], 4, 1),  # none named: all of them, in CUDA's order
        ([1, 0, None], [], None, None),
        ([0, None], [], 4, None),  # one GPU: the driver finds it
        ([None] * 8, [3], None, 3),
        ([None] * 8, [2, 3], 1, 3),
        ([None] * 3, [], 3, 1),  # two GPUs and software after them
        ([None, None], [4], None, None),  # a machine may list GPUs without being able to draw with them
        ([None], [0], 7, 0),
        ([], [0], 7, None),
    ],
)
def test_a_process_draws_on_a_gpu_that_it_may_see(
    cuda_of_egl: list[int | None], visible: list[int], turn: int | None, device: int | None
) -> None:
    assert drawing_device(cuda_of_egl, visible, turn, gpus=2) == device


def test_software_has_no_cuda_number_and_the_query_leaves_no_error() -> None:
    from OpenGL import EGL

    if "llvmpipe" not in renderer_name():
        pytest.skip(f"asks Mesa's software renderer, not {renderer_name()}")
    assert set(cuda_numbers()) == {None} and EGL.eglGetError() == EGL.EGL_SUCCESS


def test_a_device_named_by_hand_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert choose_device() == 0
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "1")
    assert choose_device() is None


def test_a_device_that_robosuite_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")
    with pytest.raises(UserError, match="MUJOCO_EGL_DEVICE_ID=0 with CUDA_VISIBLE_DEVICES=2,3"):
        try_drawing()


def test_the_device_is_named_to_mujoco_alone() -> None:
    with device_named(1):
        assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "1"
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ


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
