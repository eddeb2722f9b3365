"""Augmentation on the device: what the exact one gives, up to a level or two."""

import numpy as np
import pytest
import torch

from spvla.policies.openvla.augmentation import augment_on_device, plain
from spvla.policies.openvla.images import Augmentation, augment, draw_augmentation

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(count: int) -> np.ndarray:
    """(N, 224, 224, 3) uint8: waves, noise, grey, saturated colours and black by turns."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:224, :224]
    waves = np.stack([127 + 120 * np.sin(x / a + y / b) for a, b in ((7, 31), (23, 11), (40, 5))], -1)
    kinds = [
        waves,
        rng.integers(0, 256, (224, 224, 3)),
        np.repeat((x + y)[..., None] // 2, 3, -1),
        rng.integers(0, 2, (28, 28, 3)).repeat(8, 0).repeat(8, 1) * 255,
        np.zeros((224, 224, 3)),
    ]
    return np.stack([kinds[i % len(kinds)] for i in range(count)]).astype(np.uint8)


@pytest.mark.parametrize("diagonal", [True, False])
def test_the_device_gives_what_the_host_gives_within_two_levels(diagonal: bool) -> None:
    images = pictures(20)
    drawn = [draw_augmentation(np.random.default_rng(i), diagonal=diagonal) for i in range(20)]
    there = augment_on_device(torch.from_numpy(images), torch.from_numpy(np.stack([d.row() for d in drawn])))
    here = np.stack([augment(image, d) for image, d in zip(images, drawn, strict=True)])
    apart = np.abs(there.numpy().astype(int) - here)
    assert there.dtype == torch.uint8
    assert apart.max() <= 2 and (apart > 0).mean() < 0.01


def test_each_operation_by_hand() -> None:
    """One colour all over, so that a crop changes nothing and contrast finds its own mean."""
    image = torch.tensor([51, 102, 204], dtype=torch.uint8).expand(1, 224, 224, 3)  # 0.2, 0.4, 0.8

    def after(**changes: float) -> list[float]:
        still = {"top": 0.0, "left": 0.0, "brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
        row = torch.from_numpy(Augmentation(**(still | changes)).row())[None]
        return (augment_on_device(image, row)[0, 100, 100] / 255.5).tolist()

    assert after() == pytest.approx([0.2, 0.4, 0.8], abs=0.004)
    assert after(brightness=0.3) == pytest.approx([0.5, 0.7, 1.0], abs=0.004)
    assert after(contrast=0.5) == pytest.approx([0.2, 0.4, 0.8], abs=0.004)
    assert after(saturation=0.5) == pytest.approx([0.5, 0.6, 0.8], abs=0.004)  # S 0.75 -> 0.375
    assert after(saturation=0.0) == pytest.approx([0.8, 0.8, 0.8], abs=0.004)
    assert after(hue=1 / 3) == pytest.approx([0.8, 0.2, 0.4], abs=0.004)
    assert after(hue=-1 / 3) == pytest.approx([0.4, 0.8, 0.2], abs=0.004)


def test_cameras_are_a_leading_dimension_like_any_other() -> None:
    images = torch.from_numpy(pictures(4))
    rows = torch.from_numpy(np.stack([draw_augmentation(np.random.default_rng(i)).row() for i in range(4)]))
    flat = augment_on_device(images, rows)
    paired = augment_on_device(images.reshape(2, 2, 224, 224, 3), rows.reshape(2, 2, 6))
    assert torch.equal(paired.reshape(flat.shape), flat)


def test_it_compiles_as_one_graph() -> None:
    images = torch.from_numpy(pictures(2))
    rows = torch.from_numpy(np.stack([draw_augmentation(np.random.default_rng(i)).row() for i in range(2)]))
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images, rows), augment_on_device(images, rows))
