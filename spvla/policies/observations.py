"""Observations: how a frame becomes an image, and what every family asks of them, in one clear error each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from spvla.errors import UserError
from spvla.policies.openvla.images import evaluation_image
from spvla.types import IMAGE_SIZE, PROPRIO_DIM, Needs, Observation


def image_of(frame: np.ndarray, *, preprocessing: str, center_crop: bool) -> np.ndarray:
    """A camera's frame (256, 256, 3) uint8, not rotated -> (224, 224, 3) uint8, upright.

    preprocessing: "openvla" as OpenVLA's evaluation does it (JPEG, Lanczos, a crop if its training cropped), "resized"
    as openpi's clients do it (bilinear).
    """
    if preprocessing == "openvla":
        return evaluation_image(frame, center_crop=center_crop)
    upright = Image.fromarray(np.ascontiguousarray(frame[::-1, ::-1]))
    return np.asarray(upright.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))


def check_observations(observations: Sequence[Observation], needs: Needs) -> None:
    """Raises UserError unless each observation holds what `needs` names, in its shape and type."""
    if not len(observations):
        raise UserError("no observations", expected="at least one", remedy="Give what the policy is to act on.")
    for i, observation in enumerate(observations):
        if len(observation.images) != len(needs.cameras):
            raise UserError(
                f"observations[{i}] with {len(observation.images)} images",
                expected=f"{len(needs.cameras)}: {', '.join(needs.cameras)}",
                remedy="Give one image for each camera in `policy.needs.cameras`, in that order.",
            )
        for k, image in enumerate(observation.images):
            check_image(f"observations[{i}].images[{k}]", image)
        if needs.proprio:
            check_proprio(f"observations[{i}].proprio", observation.proprio)


def check_images(images: Sequence[Any]) -> None:
    """Raises UserError unless there is an image, and each is (224, 224, 3) uint8."""
    if not len(images):
        raise UserError("no images", expected="at least one", remedy="Give images and instructions.")
    for i, image in enumerate(images):
        check_image(f"images[{i}]", image)


def check_image(name: str, image: Any) -> None:
    """Raises UserError unless `image` is (224, 224, 3) uint8."""
    wanted = (IMAGE_SIZE, IMAGE_SIZE, 3)
    shape, dtype = getattr(image, "shape", type(image).__name__), getattr(image, "dtype", None)
    if shape != wanted or dtype != np.uint8:
        raise UserError(
            f"{name} of shape {shape} and type {dtype}",
            expected=f"{wanted} uint8",
            remedy="Use spvla.policies.openvla.images.evaluation_image for camera frames, or resize_lanczos.",
        )


def check_proprio(name: str, proprio: Any) -> None:
    """Raises UserError unless `proprio` is (8,) of numbers; NaN is let through, as the original does."""
    shape = getattr(proprio, "shape", type(proprio).__name__)
    if shape != (PROPRIO_DIM,):
        raise UserError(
            f"{name} of shape {shape}",
            expected=f"({PROPRIO_DIM},): end-effector position, axis-angle and two fingers",
            remedy="This policy needs proprio: give what `Env.proprio()` gives.",
        )


def check_length(name: str, values: Sequence[Any], count: int) -> None:
    """Raises UserError unless there is one of `values` for each of `count` observations."""
    if len(values) != count or isinstance(values, str):
        raise UserError(
            f"{name}: {len(values)} for {count} images", expected="one for each image", remedy=f"Correct {name}."
        )
