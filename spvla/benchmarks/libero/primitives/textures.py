"""Floor, wall and table textures: (64, 64, 3) uint8 drawn by code, written as PNG without compression.

LIBERO's arenas set the texture's file by style name, so the names are LIBERO's and the pictures are ours. Stored
blocks (zlib level 0) keep the bytes equal whatever the zlib version.
"""

import struct
import zlib

import numpy as np

SIDE = 64
TILES = {
    "dark_floor_texture": (57, 53, 47),
    "rustic_floor": (162, 162, 157),
    "light-gray-floor-tile": (150, 140, 130),
    "white_marble_floor": (233, 233, 233),
    "seamless_wood_planks_floor": (205, 170, 115),
    "brown_ceramic_tile": (177, 152, 131),
    "gray_ceramic_tile": (186, 171, 155),
    "tile_grigia_caldera_porcelain_floor": (150, 140, 130),
}
PLAIN = {
    "light_blue_wall": (186, 225, 244),
    "dark_blue_wall": (102, 145, 171),
    "dark_gray_plaster": (97, 106, 113),
    "gray_plaster": (236, 238, 235),
    "dark_green_plaster_wall": (70, 100, 80),
    "light-gray-plaster": (223, 219, 212),
    "smooth_light_gray_plaster": (223, 219, 212),
    "ceramic": (249, 248, 243),
    "white_wall": (234, 236, 233),
    "yellow_linen_wall_texture": (220, 213, 180),
    "martin_novak_wood_table": (198, 180, 162),
}


def tile(colour: tuple[int, int, int]) -> np.ndarray:
    """Four planks with light joints: enough texture for a camera to see the floor by."""
    image = np.empty((SIDE, SIDE, 3), np.int16)
    for k, shade in enumerate((0, -8, 5, -3)):
        image[:, k * SIDE // 4 : (k + 1) * SIDE // 4] = np.array(colour) + shade
    image[:, :: SIDE // 4] += 30
    image[0, : SIDE // 2] += 30
    image[SIDE // 2, SIDE // 2 :] += 30
    return image.clip(0, 255).astype(np.uint8)


def plain(colour: tuple[int, int, int]) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (SIDE, SIDE, 3))


def images() -> dict[str, np.ndarray]:
    return {f"{name}.png": draw(c) for table, draw in ((TILES, tile), (PLAIN, plain)) for name, c in table.items()}


def png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> PNG bytes."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(image))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
