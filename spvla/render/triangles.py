"""Which triangles of a mesh can touch a sample of the picture.

The Panda's meshes have 100,000 triangles, in pictures of 256 x 256 most of them smaller than the distance between two
samples. Those that lie between samples, and those that face away, leave no trace, but a software renderer learns so
one by one and at a price. Here every test errs on the side of keeping.
"""

import numpy as np

from spvla.compiler import numba

# Renderers move corners by up to half of 1/256 of a pixel; float32 adds less than a tenth of that.
SLACK = 2 / 256  # pixels
SMALL = 3  # pixels wide and high: larger triangles are kept without looking further
LEFT, RIGHT, BELOW, ABOVE, UNSURE = 1, 2, 4, 8, 16  # of the picture; unsure on its edge and where it has no depth


@numba.njit(cache=True)
def project(points, rotation, shift, slope, size, near, far, pixels, sides):
    """`points` (V, 3) in a mesh's frame to `pixels` (V, 2) of a picture `size` wide, and on which `sides` (V,) of it.

    rotation (3, 3) @ p + shift (3,) is in the camera's frame, which looks along -z; `slope` pixels are one metre wide
    at a distance of one metre; what is drawn lies between `near` and `far` metres away. Returns whether all points lie
    within the picture, which is side 0.
    """
    outside = 0
    for i in range(len(points)):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        depth = -(rotation[2, 0] * x + rotation[2, 1] * y + rotation[2, 2] * z + shift[2])
        side = UNSURE
        if near * 1.001 < depth < far * 0.999:
            metre = slope / depth
            across = (rotation[0, 0] * x + rotation[0, 1] * y + rotation[0, 2] * z + shift[0]) * metre + size / 2
            up = (rotation[1, 0] * x + rotation[1, 1] * y + rotation[1, 2] * z + shift[1]) * metre + size / 2
            pixels[i, 0], pixels[i, 1] = across, up
            side = LEFT * (across < -SLACK) | RIGHT * (across > size + SLACK)
            side |= BELOW * (up < -SLACK) | ABOVE * (up > size + SLACK)
            inside = SLACK < across < size - SLACK and SLACK < up < size - SLACK
            if side == 0 and not inside:
                side = UNSURE
        sides[i] = side
        outside |= side
    return outside == 0


@numba.njit(cache=True)
def select(triangles, pixels, samples, faces, kept):
    """Copies to `kept` those `faces` (F, 3) that may touch a sample, in order, and returns how many.

    `triangles` (F, 3) are the same faces, whose corners index into `pixels` (V, 2), all within the picture; `samples`
    (S, 2) are places within a pixel.
    """
    count = 0
    for i in range(len(triangles)):
        if _touches(triangles[i, 0], triangles[i, 1], triangles[i, 2], pixels, samples):
            for k in range(3):
                kept[count, k] = faces[i, k]
            count += 1
    return count


@numba.njit(cache=True)
def blank(triangles, pixels, sides, samples, faces, kept):
    """Like `select` where corners may lie on other `sides` (V,) of the picture, but keeps every face's place: what
    touches no sample becomes one point, within the picture or outside of it as the face was.

    Mesa draws so many triangles at a time, and if one of their corners is outside, it treats all of them in another
    way, down to the choice of those that it sees edge-on. This keeps such company together.
    """
    within, outside = -1, -1  # corners to be such points: always the same ones, which Mesa then computes once
    for i in range(len(triangles)):
        a, b, c = triangles[i, 0], triangles[i, 1], triangles[i, 2]
        either = sides[a] | sides[b] | sides[c]
        if either == 0 and not _touches(a, b, c, pixels, samples):
            within = faces[i, 0] if within < 0 else within
            kept[i, 0] = kept[i, 1] = kept[i, 2] = within
        elif sides[a] & sides[b] & sides[c] and either < UNSURE:
            outside = faces[i, 0] if outside < 0 else outside
            kept[i, 0] = kept[i, 1] = kept[i, 2] = outside
        else:
            for k in range(3):
                kept[i, k] = faces[i, k]


@numba.njit(cache=True)
def reach(faces, points, rotation, shift, half, found):
    """Sets `found` (F,) where one of `faces` (F, 3) may reach into the box from -half to half (3,).

    `faces` index into `points` (V, 3), which rotation (3, 3) @ p + shift (3,) brings into the box's frame.
    """
    for i in range(len(faces)):
        near = True
        for k in range(3):
            low, high = np.inf, -np.inf
            for c in range(3):
                corner = faces[i, c]
                x, y, z = points[corner, 0], points[corner, 1], points[corner, 2]
                along = rotation[k, 0] * x + rotation[k, 1] * y + rotation[k, 2] * z + shift[k]
                low, high = min(low, along), max(high, along)
            if low > half[k] or high < -half[k]:
                near = False
                break
        found[i] |= near


@numba.njit(cache=True)
def _touches(a, b, c, pixels, samples):
    x0, y0, x1, y1, x2, y2 = pixels[a, 0], pixels[a, 1], pixels[b, 0], pixels[b, 1], pixels[c, 0], pixels[c, 1]
    ux, uy, vx, vy, wx, wy = x1 - x0, y1 - y0, x2 - x1, y2 - y1, x0 - x2, y0 - y2  # edges
    turned = uy * wx - ux * wy  # twice the area
    if turned < -SLACK * (abs(ux) + abs(uy) + abs(wx) + abs(wy)):
        return False  # faces away, even if its corners move
    left, right = min(x0, x1, x2) - SLACK, max(x0, x1, x2) + SLACK
    low, high = min(y0, y1, y2) - SLACK, max(y0, y1, y2) + SLACK
    if right - left >= SMALL or high - low >= SMALL:
        return True
    # A sample touches if it lies to the left of every edge, or next to it.
    more = max(0.0, -turned)
    u = uy * x0 - ux * y0 + SLACK * (abs(ux) + abs(uy)) + more
    v = vy * x1 - vx * y1 + SLACK * (abs(vx) + abs(vy)) + more
    w = wy * x2 - wx * y2 + SLACK * (abs(wx) + abs(wy)) + more
    for column in range(int(np.floor(left)), int(np.floor(right)) + 1):
        for row in range(int(np.floor(low)), int(np.floor(high)) + 1):
            for s in range(len(samples)):
                x, y = column + samples[s, 0], row + samples[s, 1]
                if (ux * y - uy * x + u >= 0) & (vx * y - vy * x + v >= 0) & (wx * y - wy * x + w >= 0):
                    return True
    return False
