"""A camera's frame on its way into the policy, bit for bit as in OpenVLA's TensorFlow pipeline but without TensorFlow.

    training    JPEG -> decode -> lanczos 224 -> augment
    evaluation  observation -> rotate 180 -> JPEG round trip -> decode -> lanczos 224 -> center crop
    both        (224, 224, 3) uint8 -> two normalisations -> pixel values (6, 224, 224)

JPEG decoders differ by up to 10 levels in 255. TensorFlow's uses the fast DCT without fancy upsampling; simplejpeg does
the same when asked, PIL and OpenCV cannot. Encoding is the other way about: TensorFlow, PIL and OpenCV use the accurate
DCT, and simplejpeg always the fast one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import TYPE_CHECKING

import cv2
import numpy as np

from spvla.errors import UserError
from spvla.policies.openvla import pixels
from spvla.types import IMAGE_SIZE

if TYPE_CHECKING:
    import torch

_JPEG_FLAGS = (
    *(cv2.IMWRITE_JPEG_QUALITY, 95),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
)
CROP_AREA = 0.9  # of the frame: drawn at random in training, centred in evaluation
CROP_SIDE = np.sqrt(np.float32(CROP_AREA))
# In the order of drawing: crop offset, brightness, contrast, saturation, hue.
_AUGMENTATION_RANGES = ((0.0, 1.0 - CROP_SIDE), (-0.2, 0.2), (0.8, 1.2), (0.8, 1.2), (-0.05, 0.05))

# Channel means and deviations as the checkpoints' processor stores them (bfloat16-rounded for DINOv2).
DINO_MEAN, DINO_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def encode_jpeg(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> JPEG, quality 95, chroma halved both ways (4:2:0): TensorFlow's to the last coefficient."""
    return cv2.imencode(".jpg", image[..., ::-1], _JPEG_FLAGS)[1].tobytes()


def decode_jpeg(data: bytes | memoryview) -> np.ndarray:
    """JPEG -> (H, W, 3) uint8. Raises UserError if `data` is no whole JPEG."""
    simplejpeg = _simplejpeg()
    try:
        return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=False)
    except ValueError as e:
        raise UserError(
            f"bytes that are no JPEG ({e})", expected="a whole JPEG image", remedy="Make the data set again."
        ) from e


def resize_lanczos(image: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8: Lanczos with three lobes, antialiased."""
    height, width = image.shape[:2]
    rows, columns = pixels.lanczos_taps(height, size), pixels.lanczos_taps(width, size)
    return pixels.resample(np.ascontiguousarray(image), *rows, *columns)


def crop_center(image: np.ndarray) -> np.ndarray:
    """The middle 90% of the area, resized back: (H, W, 3) uint8 -> (H, W, 3) uint8. For policies trained on crops."""
    offset = (np.float32(1) - CROP_SIDE) / np.float32(2)
    end = offset + CROP_SIDE
    return pixels.to_uint8(pixels.crop(pixels.to_planes(image), offset, offset, end, end))


def evaluation_image(observation: np.ndarray, *, center_crop: bool) -> np.ndarray:
    """(256, 256, 3) uint8 as LIBERO gives it -> (224, 224, 3) uint8 as OpenVLA's evaluation shows it to the policy."""
    image = resize_lanczos(decode_jpeg(encode_jpeg(observation[::-1, ::-1])))
    return crop_center(image) if center_crop else image


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What was drawn for one frame."""

    top: float  # offset of the crop, [0, 1 - CROP_SIDE) of the height
    left: float  # and of the width
    brightness: float  # added, [-0.2, 0.2)
    contrast: float  # factor, [0.8, 1.2)
    saturation: float  # factor, [0.8, 1.2)
    hue: float  # of a full circle, [-0.05, 0.05)

    def row(self) -> np.ndarray:
        """(6,) float32, the fields in their order."""
        return np.array([getattr(self, f.name) for f in fields(self)], np.float32)


def draw_augmentation(rng: np.random.Generator, *, diagonal: bool = True) -> Augmentation:
    """Horizontal and vertical offset are one draw in the original, so that crops lie on the diagonal."""
    top, *others = (rng.uniform(low, high) for low, high in _AUGMENTATION_RANGES)
    left = top if diagonal else rng.uniform(0.0, 1.0 - CROP_SIDE)
    brightness, contrast, saturation, hue = others
    return Augmentation(top=top, left=left, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


def augment(image: np.ndarray, drawn: Augmentation) -> np.ndarray:
    """(224, 224, 3) uint8 -> (224, 224, 3) uint8: crop, brightness, contrast, saturation, hue, clipped after each."""
    top, left = np.float32(drawn.top), np.float32(drawn.left)
    out = pixels.crop(pixels.to_planes(np.ascontiguousarray(image)), top, left, top + CROP_SIDE, left + CROP_SIDE)
    pixels.brightness(out, np.float32(drawn.brightness))
    pixels.contrast(out, np.float32(drawn.contrast))
    pixels.saturation(out, np.float32(drawn.saturation))
    pixels.hue(out, np.float32(drawn.hue))
    return pixels.to_uint8(out)


def to_pixel_values(images: "np.ndarray | torch.Tensor") -> "torch.Tensor":
    """(B, 224, 224, 3) uint8 -> (B, 6, 224, 224) float32, same device; channels 0-2 for DINOv2, 3-5 for SigLIP."""
    import torch  # here, because environment workers use the rest of this file and need no torch: 370 MB each

    x = torch.as_tensor(images).permute(0, 3, 1, 2).contiguous().float().div_(255)
    out = x.new_empty(len(x), 6, *x.shape[2:])

    def channels(values: Sequence[float]) -> torch.Tensor:
        """Filled in on the device: a copy from the host would wait for all that the device still has to do."""
        return torch.stack([x.new_full((1, 1), value) for value in values])

    for half, mean, std in ((out[:, :3], DINO_MEAN, DINO_STD), (out[:, 3:], SIGLIP_MEAN, SIGLIP_STD)):
        torch.sub(x, channels(mean), out=half)
        half.div_(channels(std))
    return out


def _simplejpeg() -> ModuleType:
    """Only decoding needs it: a machine that merely runs the model may lack it."""
    try:
        import simplejpeg
    except ImportError as e:
        raise UserError(
            "simplejpeg is not installed",
            expected="the JPEG decoder that equals TensorFlow's",
            remedy="Run: pip install simplejpeg",
        ) from e
    return simplejpeg
