"""The arithmetic on pixels, compiled by numba: float32 in the same order as TensorFlow's kernels, so equal to the bit.

H, W height and width; images are (H, W, 3). All functions release the GIL, so that threads share the work.
No `fastmath`: fused or reordered operations would change the last bit.
"""

import math
from functools import cache

import numba
import numpy as np

jit = numba.njit(nogil=True, cache=True)
F = np.float32
LANCZOS_RADIUS = 3.0


@cache
def lanczos_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """First input pixel (size_out,) and weights (size_out, K) of each output pixel; antialiased when shrinking."""
    inverse = F(1.0 / F(F(size_out) / F(size_in)))
    stretch = max(inverse, F(1))
    reach = F(F(LANCZOS_RADIUS) * stretch)
    taps = 2 * int(np.ceil(reach)) + 1
    starts, weights = np.zeros(size_out, np.int64), np.zeros((size_out, taps), F)
    for x in range(size_out):
        centre = F(F(F(x) + F(0.5)) * inverse)
        first = max(0, int(np.ceil(F(F(centre - reach) - F(0.5)))))
        last = min(size_in - 1, int(np.floor(F(F(centre + reach) - F(0.5)))))
        offsets = (np.arange(first, last + 1, dtype=F) + F(0.5)) - centre
        w = lanczos(np.abs(offsets * F(F(1) / stretch)))
        total = F(0)
        for value in w:  # one by one: numpy's pairwise sum would round differently
            total = F(total + value)
        starts[x], weights[x, : len(w)] = first, w * F(F(1) / total)
    return starts, weights


@numba.vectorize(["float32(float32)"], cache=True)
def sinf(x):  # type: ignore[no-untyped-def]
    """The C library's float32 sine, which TensorFlow calls; numpy's own may differ in the last bit."""
    return math.sin(x)


def lanczos(x: np.ndarray) -> np.ndarray:
    """sinc(x) sinc(x / 3) for x >= 0, float32."""
    radius, pi = F(LANCZOS_RADIUS), F(3.14159265359)
    with np.errstate(invalid="ignore", divide="ignore"):
        y = radius * sinf(pi * x) * sinf(pi * x / radius) / (pi * pi * x * x)
    return np.where(x > radius, F(0), np.where(x <= F(1e-3), F(1), y)).astype(F)


@jit
def resample(image, row_starts, row_weights, col_starts, col_weights):  # type: ignore[no-untyped-def]
    """Separable filter, rows first: (H, W, 3) uint8 -> (H', W', 3) uint8, rounded half to even."""
    wide = filter_rows(image.reshape(image.shape[0], -1), row_starts, row_weights, 1)  # (H', W 3)
    tall = filter_rows(wide.T.copy(), col_starts, col_weights, 3)  # (W' 3, H'): turned, so that both run along memory
    out = np.empty(tall.shape, np.uint8)
    for i in range(tall.shape[0]):
        for j in range(tall.shape[1]):
            out[i, j] = np.uint8(min(max(np.rint(tall[i, j]), np.float32(0)), np.float32(255)))
    return out.T.copy().reshape(len(row_starts), len(col_starts), 3)


@jit
def filter_rows(lines, starts, weights, channels):  # type: ignore[no-untyped-def]
    """Each output pixel's lines as the weighted sum of input lines; a pixel is `channels` consecutive lines."""
    out = np.zeros((len(starts) * channels, lines.shape[1]), np.float32)
    for y in range(len(starts)):
        for c in range(channels):
            total = out[y * channels + c]
            for k in range(min(weights.shape[1], lines.shape[0] // channels - starts[y])):
                w, line = weights[y, k], lines[(starts[y] + k) * channels + c]
                for x in range(len(line)):
                    total[x] += w * np.float32(line[x])
    return out


@jit
def to_float(image):  # type: ignore[no-untyped-def]
    """uint8 -> float32 in [0, 1]."""
    out = np.empty(image.shape, np.float32)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            for c in range(3):
                out[y, x, c] = np.float32(image[y, x, c]) * np.float32(1 / 255)
    return out


@jit
def to_uint8(image):  # type: ignore[no-untyped-def]
    """float32 in [0, 1] -> uint8, cut off rather than rounded: trunc(255.5 x)."""
    out = np.empty(image.shape, np.uint8)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            for c in range(3):
                out[y, x, c] = np.uint8(image[y, x, c] * np.float32(255.5))
    return out


@jit
def clip01(x):  # type: ignore[no-untyped-def]
    return min(max(x, np.float32(0)), np.float32(1))


@jit
def crop(image, top, left, bottom, right):  # type: ignore[no-untyped-def]
    """The box (fractions of the image, float32) resized bilinearly to the image's own size; no antialias."""
    height, width = image.shape[0], image.shape[1]
    step_y = (bottom - top) * np.float32(height - 1) / np.float32(height - 1)
    step_x = (right - left) * np.float32(width - 1) / np.float32(width - 1)
    out = np.empty((height, width, 3), np.float32)
    for y in range(height):
        in_y = top * np.float32(height - 1) + np.float32(y) * step_y
        y0, y1 = int(np.floor(in_y)), int(np.ceil(in_y))
        down = in_y - np.float32(y0)
        for x in range(width):
            in_x = left * np.float32(width - 1) + np.float32(x) * step_x
            x0, x1 = int(np.floor(in_x)), int(np.ceil(in_x))
            across = in_x - np.float32(x0)
            for c in range(3):
                upper = image[y0, x0, c] + (image[y0, x1, c] - image[y0, x0, c]) * across
                lower = image[y1, x0, c] + (image[y1, x1, c] - image[y1, x0, c]) * across
                out[y, x, c] = clip01(upper + (lower - upper) * down)
    return out


@jit
def brightness(image, delta):  # type: ignore[no-untyped-def]
    """In place, as all that follow: x + delta."""
    flat = image.reshape(-1)
    for i in range(len(flat)):
        flat[i] = clip01(flat[i] + delta)


@jit
def contrast(image, factor):  # type: ignore[no-untyped-def]
    """(x - mean) * factor + mean, with each channel's mean taken by folding the image in halves, as TensorFlow does."""
    pixels = image.reshape(-1, 3)
    sums, size = pixels.copy(), len(pixels)
    while size > 1:
        half = size // 2
        upper = size - half
        for i in range(half):
            for c in range(3):
                sums[i, c] += sums[upper + i, c]
        size = upper
    mean = sums[0] * (np.float32(1) / np.float32(len(pixels)))
    for i in range(len(pixels)):
        for c in range(3):
            pixels[i, c] = clip01(mean[c] + (pixels[i, c] - mean[c]) * factor)


@jit
def saturation(image, factor):  # type: ignore[no-untyped-def]
    """Scales S of HSV."""
    zero, one, two, six = np.float32(0), np.float32(1), np.float32(2), np.float32(6)
    pixels = image.reshape(-1, 3)
    for i in range(len(pixels)):
        r, g, b = pixels[i, 0], pixels[i, 1], pixels[i, 2]
        value = max(r, max(g, b))
        spread = value - min(r, min(g, b))
        hue = zero
        if spread > zero:
            norm = one / (six * spread)
            if r == value:
                hue = norm * (g - b)
            elif g == value:
                hue = np.float32(norm * (b - r) + 2.0 / 6.0)  # this sum is in float64 there, too
            else:
                hue = np.float32(norm * (r - g) + 4.0 / 6.0)
            if hue < zero:
                hue += one
        s = spread / value if value > zero else zero
        chroma = min(one, max(zero, s * factor)) * value
        base = value - chroma
        sixth = hue * six
        phase = sixth
        while phase <= zero:
            phase += two
        while phase >= two:
            phase -= two
        middle = chroma * (one - abs(phase - one)) + base
        high, sector = chroma + base, int(sixth)
        low = base
        if sector == 0:
            r, g, b = high, middle, low
        elif sector == 1:
            r, g, b = middle, high, low
        elif sector == 2:
            r, g, b = low, high, middle
        elif sector == 3:
            r, g, b = low, middle, high
        elif sector == 4:
            r, g, b = middle, low, high
        elif sector == 5:
            r, g, b = high, low, middle
        else:
            r, g, b = low, low, low
        pixels[i, 0], pixels[i, 1], pixels[i, 2] = clip01(r), clip01(g), clip01(b)


@jit
def hue(image, delta):  # type: ignore[no-untyped-def]
    """Turns the hue by `delta` of a full circle."""
    zero, one, six = np.float32(0), np.float32(1), np.float32(6)
    turn = delta * six
    pixels = image.reshape(-1, 3)
    for i in range(len(pixels)):
        r, g, b = pixels[i, 0], pixels[i, 1], pixels[i, 2]
        # the sector of the hexagon, counted from red; odd sectors run backwards
        if r < g:
            if b < r:
                high, mid, low, sector = g, r, b, 1
            elif b > g:
                high, mid, low, sector = b, g, r, 3
            else:
                high, mid, low, sector = g, b, r, 2
        elif b < g:
            high, mid, low, sector = r, g, b, 0
        elif b > r:
            high, mid, low, sector = b, r, g, 4
        else:
            high, mid, low, sector = r, b, g, 5
        angle = zero
        if high != low:
            ratio = (mid - low) / (high - low)
            angle = np.float32(sector) + (ratio if sector % 2 == 0 else one - ratio)
        angle += turn
        while angle < zero:
            angle += six
        while angle >= six:
            angle -= six
        sector = int(angle)
        ratio = angle - np.float32(sector)
        if sector % 2 == 1:
            ratio = one - ratio
        mid = low + ratio * (high - low)
        if sector == 0:
            r, g, b = high, mid, low
        elif sector == 1:
            r, g, b = mid, high, low
        elif sector == 2:
            r, g, b = low, high, mid
        elif sector == 3:
            r, g, b = low, mid, high
        elif sector == 4:
            r, g, b = mid, low, high
        else:
            r, g, b = high, low, mid
        pixels[i, 0], pixels[i, 1], pixels[i, 2] = clip01(r), clip01(g), clip01(b)
