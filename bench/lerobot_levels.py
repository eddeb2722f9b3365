"""How far a picture comes back from a LeRobotDataset: levels of 255 after export to video and indexing again.

    python bench/lerobot_levels.py [--data_root_dir DIR --dataset_name NAME]

By default the pictures are pieces of docs/contact_sheet.jpg (LIBERO's tasks), enlarged to 256 x 256. Beside it, what
decoding a JPEG and encoding it once more costs alone. Prints a table last.
"""

import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np
from loader import store_of

from spvla.data import index, lerobot_export
from spvla.data.store import FrameStore
from spvla.policies.openvla.images import decode_jpeg, encode_jpeg
from spvla.types import Episode

SHEET = Path(__file__).parent.parent / "docs/contact_sheet.jpg"
TILE = 192  # pixels


def sheet_episode() -> Episode:
    sheet = cv2.imread(str(SHEET))[..., ::-1]
    corners = [(y, x) for y in range(0, sheet.shape[0], TILE) for x in range(0, sheet.shape[1], TILE)]
    images = [encode_jpeg(cv2.resize(sheet[y : y + TILE, x : x + TILE], (256, 256))) for y, x in corners]
    steps = len(images)
    return Episode(
        images=images,
        wrist_images=images[::-1],
        states=np.zeros((steps, 8), np.float32),
        joint_states=np.zeros((steps, 7), np.float32),
        actions=np.full((steps, 7), -1, np.float32),
        instruction="look",
        source="contact sheet",
    )


def indexed(root: Path, name: str) -> FrameStore:
    source, folder = index.find(root, name), root / name / index.FOLDER
    folder.mkdir()
    for part in source.shards:
        index.index_shard(part, folder, skip_corrupt=False)
    index.finish(folder, source)
    return FrameStore.open(folder)


def apart(a: np.ndarray, b: np.ndarray) -> str:
    levels = np.abs(a.astype(int) - b)
    return f"{levels.mean():.2f} on average, {levels.max()} at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root_dir", type=Path)
    parser.add_argument("--dataset_name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.data_root_dir:
            store = FrameStore.open(args.data_root_dir / args.dataset_name / index.FOLDER)
        else:
            (root / "sheet").mkdir()
            store = store_of(root / "sheet", iter([sheet_episode()]))
        lerobot_export.export(store, root / "copy")
        again = indexed(root, "copy")
        chosen = np.unique(np.linspace(0, len(store) - 1, 200).astype(int)).tolist()
        pictures, back = (np.stack([decode_jpeg(s.jpeg(i, "agentview")) for i in chosen]) for s in (store, again))
    print(f"{len(chosen)} pictures  there and back  {apart(back, pictures)}")
    once_more = np.stack([decode_jpeg(encode_jpeg(picture)) for picture in pictures])
    print(f"{len(chosen)} pictures  JPEG once more  {apart(once_more, pictures)}")


if __name__ == "__main__":
    main()
