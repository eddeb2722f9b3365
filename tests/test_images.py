"""The image path: by hand where that is possible, and equal to TensorFlow to the last bit everywhere."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spvla.errors import UserError
from spvla.policies.openvla import pixels
from spvla.policies.openvla.images import (
    CROP_SIDE,
    Augmentation,
    augment,
    crop_center,
    decode_jpeg,
    draw_augmentation,
    encode_jpeg,
    evaluation_image,
    resize_lanczos,
    to_pixel_values,
)

STILL = Augmentation(top=0.0, left=0.0, brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0)


def waves(size: int) -> np.ndarray:
    """A picture of smooth and sharp parts, the same on every machine."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    channels = (127.5 + 127.5 * np.sin(x / 9 + y / 31), (x * 3 + y * 5) % 256, 127.5 + 127.5 * np.cos(x * y / 500))
    return np.stack(channels, -1).astype(np.uint8)


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "rlds/golden.npz"))


# The digests below are of TensorFlow 2.21's own results: tf.image.resize(lanczos3, antialias), encode_jpeg,
# decode_image, crop_and_resize and adjust_* on the picture above.


def test_resizing_equals_tensorflow() -> None:
    assert digest(waves(256)) == "d83fe6b982c8653a"
    assert digest(resize_lanczos(waves(256))) == "a216eaf082a987c8"


def test_the_evaluation_image_equals_tensorflow() -> None:
    assert digest(evaluation_image(waves(256), center_crop=False)) == "9927427a150e07d0"


def test_augmentation_equals_tensorflow() -> None:
    drawn = Augmentation(top=0.03, left=0.03, brightness=0.1, contrast=1.1, saturation=0.85, hue=-0.04)
    assert digest(augment(resize_lanczos(waves(256)), drawn)) == "f76586919129aa50"


def tensorflow_steps(image: np.ndarray, drawn: Augmentation) -> Iterator[np.ndarray]:
    """The image after each operation, by TensorFlow itself: float32, and the last one uint8."""
    import tensorflow as tf

    start = np.float32(drawn.top)
    box = [[start, start, start + CROP_SIDE, start + CROP_SIDE]]
    x = tf.image.convert_image_dtype(image, tf.float32)
    for step in (
        lambda x: tf.image.crop_and_resize(x[None], box, [0], image.shape[:2])[0],
        lambda x: tf.image.adjust_brightness(x, np.float32(drawn.brightness)),
        lambda x: tf.image.adjust_contrast(x, np.float32(drawn.contrast)),
        lambda x: tf.image.adjust_saturation(x, np.float32(drawn.saturation)),
        lambda x: tf.image.adjust_hue(x, np.float32(drawn.hue)),
    ):
        x = tf.clip_by_value(step(x), 0, 1)
        yield x.numpy()
    yield tf.image.convert_image_dtype(x, tf.uint8, saturate=True).numpy()


@pytest.mark.parametrize("seed", range(8))
def test_every_operation_equals_tensorflows_in_every_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) if seed % 2 else resize_lanczos(waves(256))
    drawn = draw_augmentation(rng)
    *floats, final = tensorflow_steps(image, drawn)
    start = np.float32(drawn.top)
    planes = pixels.crop(pixels.to_planes(image), start, start, start + CROP_SIDE, start + CROP_SIDE)
    for name, theirs in zip(("crop", "brightness", "contrast", "saturation", "hue"), floats, strict=True):
        if name != "crop":
            getattr(pixels, name)(planes, np.float32(getattr(drawn, name)))
        assert np.array_equal(np.moveaxis(planes, 0, -1), theirs), name
    assert np.array_equal(augment(image, drawn), final)


@pytest.mark.parametrize("i", [0, 1])
def test_frames_decode_and_resize_as_in_the_original(reference: dict[str, np.ndarray], i: int) -> None:
    frame = decode_jpeg(reference[f"jpeg{i}"].tobytes())
    assert np.array_equal(frame, reference[f"decoded{i}"])
    assert np.array_equal(resize_lanczos(frame), reference[f"resized{i}"])


@pytest.mark.parametrize("i", [0, 1])
def test_observations_reach_the_policy_as_in_the_originals_evaluation(reference: dict[str, np.ndarray], i: int) -> None:
    observation = reference[f"eval_obs{i}"]
    assert np.array_equal(evaluation_image(observation, center_crop=False), reference[f"eval_resized{i}"])
    assert np.array_equal(evaluation_image(observation, center_crop=True), reference[f"eval_cropped{i}"])


@pytest.mark.parametrize("key", ["aug0_0_0", "aug0_1_2"])
def test_augmentation_equals_the_original_after_every_operation(reference: dict[str, np.ndarray], key: str) -> None:
    top, left, side = reference[f"{key}_crop"]
    assert top == left and side == CROP_SIDE
    image = pixels.crop(pixels.to_planes(reference["resized0"]), top, left, top + side, left + side)
    same_as(image, reference[f"{key}_after_random_resized_crop"])
    for operation in ("brightness", "contrast", "saturation", "hue"):
        getattr(pixels, operation)(image, reference[f"{key}_{operation}"])
        same_as(image, reference[f"{key}_after_random_{operation}"])
    assert np.array_equal(pixels.to_uint8(image), reference[f"{key}_out"])


def same_as(image: np.ndarray, stored: np.ndarray) -> None:
    """The reference keeps 16 bits of each value."""
    assert np.array_equal(np.round(np.moveaxis(image, 0, -1) * 65535).astype(np.uint16), stored)


def test_pixel_values_equal_the_originals(golden: Path) -> None:
    z = np.load(golden / "model/golden.npz")
    batch = np.stack([z[f"train_image{i}"] for i in range(4)])
    assert np.array_equal(to_pixel_values(batch).numpy(), z["train_pixel_values"])


def test_pixel_values_are_normalised_for_each_tower() -> None:
    values = to_pixel_values(np.full((1, 224, 224, 3), 255, np.uint8))[0, :, 0, 0]
    assert values.tolist() == pytest.approx([2.2564, 2.4367, 2.6435, 1, 1, 1], abs=1e-4)  # (1 - mean) / std


def test_an_even_picture_stays_even() -> None:
    grey = np.full((256, 256, 3), 77, np.uint8)
    assert (resize_lanczos(grey) == 77).all()
    assert (evaluation_image(grey, center_crop=True) == 77).all()
    assert (augment(grey[:224, :224], STILL) == 77).all()


def test_the_evaluation_image_is_turned_by_180_degrees() -> None:
    corner = np.zeros((256, 256, 3), np.uint8)
    corner[:64, :64] = 255
    seen = evaluation_image(corner, center_crop=False)
    assert seen[-30:, -30:].min() > 240 and seen[:60, :60].max() < 15


def test_the_crop_keeps_the_middle_90_percent() -> None:
    ramp = np.broadcast_to(np.arange(224, dtype=np.uint8)[:, None, None], (224, 224, 3))
    rows = crop_center(np.ascontiguousarray(ramp))[:, 0, 0]
    assert (rows[0], rows[112], rows[-1]) == (5, 112, 217)  # 0.02566 x 223 = 5.7 and 217.3, cut off


def colour(*rgb: float) -> np.ndarray:
    """Planes of one pixel."""
    return np.array(rgb, np.float32).reshape(3, 1, 1)


def test_a_third_of_a_turn_makes_red_green() -> None:
    image = colour(0.75, 0.25, 0.25)
    pixels.hue(image, np.float32(1 / 3))
    assert image[:, 0, 0].tolist() == pytest.approx([0.25, 0.75, 0.25], abs=1e-6)


def test_saturation_zero_leaves_the_brightest_channel_thrice() -> None:
    image = colour(0.75, 0.25, 0.5)
    pixels.saturation(image, np.float32(0))
    assert image[:, 0, 0].tolist() == [0.75] * 3


def test_contrast_pulls_towards_each_channels_mean() -> None:
    image = np.concatenate([colour(0.25, 0.5, 0), colour(0.75, 0.5, 1)], axis=2)
    pixels.contrast(image, np.float32(0.5))
    assert image[:, 0].tolist() == [[0.375, 0.625], [0.5, 0.5], [0.25, 0.75]]


def test_every_operation_is_clipped() -> None:
    image = colour(0.9, 0.05, 0.5)
    pixels.brightness(image, np.float32(0.2))
    assert image[:, 0, 0].tolist() == pytest.approx([1.0, 0.25, 0.7])
    pixels.brightness(image, np.float32(-0.5))
    assert image[:, 0, 0].tolist() == pytest.approx([0.5, 0.0, 0.2], abs=1e-6)


def test_bytes_are_cut_off_rather_than_rounded() -> None:
    assert pixels.to_uint8(colour(0.99, 0.4999, 1.0))[0, 0].tolist() == [252, 127, 255]  # 252.9, 127.7, 255.5


def test_a_crop_up_to_the_very_edge_stays_inside() -> None:
    image = np.full((224, 224, 3), 200, np.uint8)
    for offset in np.nextafter(np.float32(1) - CROP_SIDE, [0, 1], dtype=np.float32):
        drawn = Augmentation(
            top=float(offset), left=float(offset), brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0
        )
        assert (augment(image, drawn) == 200).all()


def test_the_same_seed_draws_the_same_augmentation_within_the_originals_ranges() -> None:
    drawn = [draw_augmentation(np.random.default_rng(i)) for i in range(200)]
    assert drawn[3] == draw_augmentation(np.random.default_rng(3)) != drawn[4]
    for name, low, high in [
        ("top", 0, 1 - CROP_SIDE),
        ("brightness", -0.2, 0.2),
        ("contrast", 0.8, 1.2),
        ("saturation", 0.8, 1.2),
        ("hue", -0.05, 0.05),
    ]:
        values = [getattr(d, name) for d in drawn]
        assert low <= min(values) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(values) < high


def test_a_torn_jpeg_is_refused() -> None:
    with pytest.raises(UserError, match="no JPEG"):
        decode_jpeg(encode_jpeg(waves(64))[:-300])
    with pytest.raises(UserError, match="no JPEG"):
        decode_jpeg(b"not an image")


def test_without_simplejpeg_decoding_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_jpeg(waves(64))
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UserError, match="pip install simplejpeg"):
        decode_jpeg(data)
