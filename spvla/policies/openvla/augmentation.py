"""`images.augment` on the device: the same crop, brightness, contrast, saturation and hue, as plain torch over a batch.

The same formulas in the same order, clipped after each, in float32; only the order of additions differs, so that a
value may fall on the other side of a cut: at most a level or two in 255. One thing is not copied: TensorFlow's
saturation makes a pixel grey whose red hue rounds to a full circle, two of 2 million random pixels. No branches and no
host in between, so that torch.compile makes few kernels of it.

N pictures, H = W = 224.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from spvla.policies.openvla.images import CROP_SIDE


def augment_on_device(images: Tensor, parameters: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 and `Augmentation.row`s (..., 6) float32 -> (..., H, W, 3) uint8, on the images' device.

    Compiled on a GPU: as plain torch it would read and write a batch some sixty times.
    """
    return (compiled() if images.is_cuda else plain)(images, parameters)


@cache
def compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(plain, fullgraph=True)


def plain(images: Tensor, parameters: Tensor) -> Tensor:
    flat = images.flatten(0, -4)
    top, left, *others = parameters.to(flat.device).flatten(0, -2).unbind(-1)
    x = crop(flat.permute(0, 3, 1, 2).float() / 255, top, left)
    for change, amount in zip((brightness, contrast, saturation, hue), others, strict=True):
        x = change(x, amount[:, None, None, None]).clamp(0, 1)
    return (x * 255.5).to(torch.uint8).permute(0, 2, 3, 1).reshape(images.shape)


def crop(x: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """(N, 3, H, W), the box's upper left corner as fractions (N,) -> the box, resized bilinearly to (H, W)."""
    rows, columns = (torch.linspace(0, float(CROP_SIDE), size, device=x.device) for size in x.shape[-2:])
    y, x_ = top[:, None] + rows, left[:, None] + columns  # (N, H), (N, W) fractions of the picture
    shape = (len(x), *x.shape[-2:])
    grid = 2 * torch.stack((x_[:, None].expand(shape), y[:, :, None].expand(shape)), -1) - 1
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True).clamp(0, 1)


def brightness(x: Tensor, delta: Tensor) -> Tensor:
    return x + delta


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Around each channel's mean."""
    mean = x.mean((-2, -1), keepdim=True)
    return mean + (x - mean) * factor


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """S of HSV scaled: hue and value stay, so every channel keeps its share of the way from value down to minimum."""
    value = x.amax(1, keepdim=True)
    spread = value - x.amin(1, keepdim=True)
    chroma = (spread / value.clamp(min=1e-12) * factor).clamp(0, 1) * value
    return value - (value - x) * (chroma / spread.clamp(min=1e-12))


def hue(x: Tensor, delta: Tensor) -> Tensor:
    """Turned by `delta` of a full circle."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = value - low
    red, green, blue = x.split(1, 1)
    slope = spread.clamp(min=1e-12)
    sixths = torch.where(
        value == red,
        (green - blue) / slope,
        torch.where(value == green, 2 + (blue - red) / slope, 4 + (red - green) / slope),
    )
    # each channel falls from value to low and rises again over the hexagon, a third of it apart from the next one
    k = torch.cat([n + sixths + 6 * delta for n in (5, 3, 1)], 1).remainder(6)
    return value - spread * torch.minimum(k, 4 - k).clamp(0, 1)
