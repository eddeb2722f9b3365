"""Which triangles of a mesh can touch a sample of the picture.

The Panda's meshes have 100,000 triangles, in pictures of 256 x 256 most of them smaller than the distance between two
samples. Those that lie between samples, and those that face away, leave no trace, but a software renderer learns so
one by one and at a price. Here every test errs on the side of keeping.
"""

import numba
import numpy as np

# Renderers move corners to the nearest 1/256 of a pixel; float32 adds less than a tenth of that.
SLACK = 3 / 256  # pixels
SMALL = 3  # pixels wide and high: larger triangles are kept without looking further


@numba.njit(cache=True)
def project(points, rotation, shift, slope, size, near, far, pixels):
    """`points` (V, 3) in a mesh's frame to `pixels` (V, 2) of a picture `size` wide. False if one lies outside of it.

    rotation (3, 3) @ p + shift (3,) is in the camera's frame, which looks along -z; `slope` pixels are one metre wide
    at a distance of one metre; what is drawn lies between `near` and `far` metres away.
    """
    for i in range(len(points)):
        x, y, z = points[i]
        depth = -(rotation[2, 0] * x + rotation[2, 1] * y + rotation[2, 2] * z + shift[2])
        if not near * 1.001 < depth < far * 0.999:
            return False
        metre = slope / depth
        across = (rotation[0, 0] * x + rotation[0, 1] * y + rotation[0, 2] * z + shift[0]) * metre + size / 2
        up = (rotation[1, 0] * x + rotation[1, 1] * y + rotation[1, 2] * z + shift[1]) * metre + size / 2
        if not (SLACK < across < size - SLACK and SLACK < up < size - SLACK):
            return False
        pixels[i, 0], pixels[i, 1] = across, up
    return True


@numba.njit(cache=True)
def select(faces, pixels, samples, kept):
    """Copies to `kept` those `faces` (F, 3) that may touch a sample, in order, and returns how many.

    `faces` index into `pixels` (V, 2); `samples` (S, 2) are places within a pixel.
    """
    count = 0
    for i in range(len(faces)):
        a, b, c = faces[i]
        x0, y0, x1, y1, x2, y2 = pixels[a, 0], pixels[a, 1], pixels[b, 0], pixels[b, 1], pixels[c, 0], pixels[c, 1]
        ux, uy, vx, vy, wx, wy = x1 - x0, y1 - y0, x2 - x1, y2 - y1, x0 - x2, y0 - y2  # edges
        turned = uy * wx - ux * wy  # twice the area
        length = abs(ux) + abs(uy) + abs(wx) + abs(wy)
        if turned < -SLACK * length:
            continue  # faces away, even if its corners move
        left, right = min(x0, x1, x2) - SLACK, max(x0, x1, x2) + SLACK
        low, high = min(y0, y1, y2) - SLACK, max(y0, y1, y2) + SLACK
        found = right - left >= SMALL or high - low >= SMALL
        if not found:
            # A sample touches if it lies to the left of every edge, or next to it.
            more = max(0.0, -turned)
            u = uy * x0 - ux * y0 + SLACK * (abs(ux) + abs(uy)) + more
            v = vy * x1 - vx * y1 + SLACK * (abs(vx) + abs(vy)) + more
            w = wy * x2 - wx * y2 + SLACK * (abs(wx) + abs(wy)) + more
            for column in range(int(np.floor(left)), int(np.floor(right)) + 1):
                for row in range(int(np.floor(low)), int(np.floor(high)) + 1):
                    for s in range(len(samples)):
                        x, y = column + samples[s, 0], row + samples[s, 1]
                        found |= (ux * y - uy * x + u >= 0) & (vx * y - vy * x + v >= 0) & (wx * y - wy * x + w >= 0)
        if found:
            kept[count] = faces[i]
            count += 1
    return count
