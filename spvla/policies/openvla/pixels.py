"""The arithmetic on pixels, compiled by numba: float32 in the same order as TensorFlow's kernels, so equal to the bit.

H, W height and width; images are (H, W, 3). All functions release the GIL, so that threads share the work.
No `fastmath`: fused or reordered operations would change the last bit.
"""

import math
from functools import cache

import numpy as np

from spvla.compiler import numba

jit = numba.njit(nogil=True, cache=True, error_model="numpy")  # 0 / 0 is NaN: a check would keep vectors from use
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


# --- augmentation: on planes (3, H, W) float32 in [0, 1], without branches, so that the compiler can use vectors ---


@jit
def to_planes(image):  # type: ignore[no-untyped-def]
    """(H, W, 3) uint8 -> planes."""
    out = np.empty((3, *image.shape[:2]), np.float32)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            for c in range(3):
                out[c, y, x] = np.float32(image[y, x, c]) * np.float32(1 / 255)
    return out


@jit
def to_uint8(planes):  # type: ignore[no-untyped-def]
    """Planes -> (H, W, 3) uint8, cut off rather than rounded: trunc(255.5 x)."""
    out = np.empty((*planes.shape[1:], 3), np.uint8)
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            for c in range(3):
                out[y, x, c] = np.uint8(planes[c, y, x] * np.float32(255.5))
    return out


@jit
def clip01(x):  # type: ignore[no-untyped-def]
    return min(max(x, np.float32(0)), np.float32(1))


@jit
def bilinear(size, start, end):  # type: ignore[no-untyped-def]
    """For each output pixel of an axis: the two input pixels around it, and how far it is from the first."""
    step = (end - start) * np.float32(size - 1) / np.float32(size - 1)
    before, after = np.empty(size, np.int64), np.empty(size, np.int64)
    share = np.empty(size, np.float32)
    for i in range(size):
        at = start * np.float32(size - 1) + np.float32(i) * step
        before[i], after[i] = int(np.floor(at)), min(int(np.ceil(at)), size - 1)  # rounding may pass the edge
        share[i] = at - np.floor(at)
    return before, after, share


@jit
def crop(planes, top, left, bottom, right):  # type: ignore[no-untyped-def]
    """The box (fractions of the image) resized bilinearly to the image's own size, no antialias. Gives new planes."""
    _, height, width = planes.shape
    x0, x1, across = bilinear(width, left, right)
    y0, y1, down = bilinear(height, top, bottom)
    wide, out = np.empty((height, width), np.float32), np.empty_like(planes)
    for c in range(3):
        for y in range(height):
            line = planes[c, y]
            for x in range(width):
                wide[y, x] = line[x0[x]] + (line[x1[x]] - line[x0[x]]) * across[x]
        for y in range(height):
            upper, lower, total = wide[y0[y]], wide[y1[y]], out[c, y]
            for x in range(width):
                total[x] = clip01(upper[x] + (lower[x] - upper[x]) * down[y])
    return out


@jit
def brightness(planes, delta):  # type: ignore[no-untyped-def]
    """In place, as all that follow: x + delta."""
    flat = planes.reshape(-1)
    for i in range(len(flat)):
        flat[i] = clip01(flat[i] + delta)


@jit
def contrast(planes, factor):  # type: ignore[no-untyped-def]
    """(x - mean) * factor + mean, with each channel's mean taken by folding the image in halves, as TensorFlow does."""
    for c in range(3):
        plane = planes[c].reshape(-1)
        sums, size = plane.copy(), len(plane)
        while size > 1:
            half = size // 2
            upper = sums[size - half : size]
            for i in range(half):
                sums[i] += upper[i]
            size -= half
        mean = sums[0] * (np.float32(1) / np.float32(len(plane)))
        for i in range(len(plane)):
            plane[i] = clip01(mean + (plane[i] - mean) * factor)


@jit
def saturation(planes, factor):  # type: ignore[no-untyped-def]
    """Scales S of HSV."""
    zero, one, two, six = np.float32(0), np.float32(1), np.float32(2), np.float32(6)
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, max(g, b))
        spread = value - min(r, min(g, b))
        norm = one / (six * spread)
        from_red = norm * (g - b)
        from_green = np.float32(norm * (b - r) + 2.0 / 6.0)  # these sums are in float64 there, too
        from_blue = np.float32(norm * (r - g) + 4.0 / 6.0)
        angle = from_red if r == value else (from_green if g == value else from_blue)
        angle = angle if spread > zero else zero
        angle = angle + one if angle < zero else angle
        old = spread / value if value > zero else zero
        chroma = min(one, max(zero, old * factor)) * value
        low = value - chroma
        sixth = angle * six
        phase = sixth - two if sixth >= two else sixth
        phase = phase - two if phase >= two else phase
        phase = phase - two if phase >= two else phase
        mid = chroma * (one - abs(phase - one)) + low
        put(red, green, blue, i, np.int32(sixth), chroma + low, mid, low)


@jit
def hue(planes, delta):  # type: ignore[no-untyped-def]
    """Turns the hue by `delta` of a full circle, at most half of one."""
    zero, one, six = np.float32(0), np.float32(1), np.float32(6)
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    turn = delta * six
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        high, low = max(r, max(g, b)), min(r, min(g, b))
        mid = max(min(r, g), min(max(r, g), b))
        # the sector of the hexagon, counted from red; odd sectors run backwards
        rising = np.int32(1) if b < r else (np.int32(3) if b > g else np.int32(2))
        falling = np.int32(0) if b < g else (np.int32(4) if b > r else np.int32(5))
        sector = rising if r < g else falling
        ratio = (mid - low) / (high - low)
        ratio = one - ratio if sector & 1 else ratio
        angle = (np.float32(sector) + ratio if high != low else zero) + turn
        angle = angle + six if angle < zero else angle
        angle = angle - six if angle >= six else angle
        sector = np.int32(angle)
        ratio = angle - np.float32(sector)
        ratio = one - ratio if sector & 1 else ratio
        put(red, green, blue, i, sector, high, low + ratio * (high - low), low)


@jit
def put(red, green, blue, i, sector, high, mid, low):  # type: ignore[no-untyped-def]
    """Writes a pixel whose hue lies in that sixth of the circle; outside the six it is grey."""
    r = high if sector == 0 or sector == 5 else (mid if sector == 1 or sector == 4 else low)
    g = high if sector == 1 or sector == 2 else (mid if sector == 0 or sector == 3 else low)
    b = high if sector == 3 or sector == 4 else (mid if sector == 2 or sector == 5 else low)
    red[i], green[i], blue[i] = clip01(r), clip01(g), clip01(b)
