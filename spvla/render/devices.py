"""Which GPU draws. EGL numbers GPUs in an order of its own, which need not be CUDA's, and lists them all whatever
CUDA_VISIBLE_DEVICES (Ray's choice, or SLURM's) leaves to this process.

A driver says which CUDA number an EGL device has (EGL_NV_device_cuda). Drivers differ in whether they count all GPUs
or the visible ones, which the numbers themselves show. Where nothing is said, as by Mesa, both orders are the same.
"""

import ctypes
from collections.abc import Sequence

EGL_CUDA_DEVICE_NV = 0x323A


def visible_gpus(text: str | None) -> list[int]:
    """The numbers of CUDA_VISIBLE_DEVICES, up to the first that is none, as CUDA reads them. Empty where it names no
    number: unset, empty, or by UUID (as with MIG), which EGL cannot follow."""
    numbers: list[int] = []
    for word in map(str.strip, (text or "").split(",")):
        if not (word.isascii() and word.isdigit()):
            break
        numbers.append(int(word))
    return numbers


def egl_index(cuda_of_egl: Sequence[int | None], wanted_cuda: int) -> int | None:
    """The EGL device with CUDA number `wanted_cuda`; None where there is none.

    cuda_of_egl: a CUDA number for each EGL device, None for one without; without any, the number itself is taken.
    """
    if any(number is not None for number in cuda_of_egl):
        return list(cuda_of_egl).index(wanted_cuda) if wanted_cuda in cuda_of_egl else None
    return wanted_cuda if wanted_cuda < len(cuda_of_egl) else None


def drawing_device(
    cuda_of_egl: Sequence[int | None], visible: Sequence[int], turn: int | None, gpus: int
) -> int | None:
    """The EGL device of a process; None leaves the choice to the driver.

    visible: as from `visible_gpus`; turn: the process's number among those that share all GPUs, None for one that takes
    the first visible; gpus: how many the machine has, counted otherwise, for a driver that names none.
    """
    said = sorted(number for number in cuda_of_egl if number is not None)
    if said and said == list(range(len(visible))):
        visible = said  # the driver counts the visible ones
    if not visible and turn is not None:
        visible = said or range(min(gpus, len(cuda_of_egl)))
        visible = visible if len(visible) > 1 else []
    return egl_index(cuda_of_egl, visible[(turn or 0) % len(visible)]) if visible else None


def cuda_numbers() -> list[int | None]:
    """For each EGL device, in EGL's order, the CUDA number that its driver says. Needs mujoco with MUJOCO_GL=egl."""
    from mujoco.egl import egl_ext
    from OpenGL import EGL

    devices = egl_ext.eglQueryDevicesEXT()
    address = EGL.eglGetProcAddress("eglQueryDeviceAttribEXT")
    if not address:
        return [None] * len(devices)
    number = ctypes.c_ssize_t()  # an EGLAttrib
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(address)
    found = [number.value if query(d, EGL_CUDA_DEVICE_NV, ctypes.byref(number)) else None for d in devices]
    EGL.eglGetError()  # of a driver that does not know the attribute: MuJoCo would take it for its own
    return found
