"""Does memory stay flat with the data set's size? Writing, indexing and loading 10 and 1,000 episodes.

    python bench/index.py [--episodes 10 1000] [--steps 30] [--folder /tmp]

Each step runs in a process of its own, which reports its peak of private memory (RssAnon; mapped files are the page
cache's) above what it held after its imports and a small piece of the same work. Frames are real 256 x 256 JPEGs,
two cameras; 1,000 episodes of 30 steps are 1.6 GB and need 3.3 GB of disk beside. Prints a table last.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from loader import BATCH, NAME, episodes, index_all

from spvla.data.loader import Loader
from spvla.data.store import FrameStore
from spvla.policies.openvla.prompt import build_tiny_tokenizer

STEPS = ("write", "index", "load")


def private_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def growth_of(work: Callable[[], None]) -> tuple[float, float]:
    """Peak growth of private memory in MiB while `work` runs, and its seconds."""
    before, peak, done = private_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], private_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return max(0.0, peak[0] - before), seconds


def write(root: Path, count: int, steps: int) -> None:
    from spvla.data.rlds import write_dataset

    write_dataset(episodes(count, steps), root, NAME)


def index(root: Path, count: int, steps: int) -> None:
    index_all(root, NAME)


def load(root: Path, count: int, steps: int) -> None:
    store = FrameStore.open(root / NAME / "index")
    loader = Loader([store], build_tiny_tokenizer(), batch_size=BATCH, seed=0, image_aug=True, workers=2)
    for _ in islice(loader, 60):
        pass


def measure(step: str, root: Path, count: int, steps: int) -> None:
    """In a fresh process: warm up on two episodes, then print what the real work took."""
    work = {"write": write, "index": index, "load": load}[step]
    with tempfile.TemporaryDirectory(dir=root.parent) as small:
        for warm in STEPS[: STEPS.index(step) + 1]:
            {"write": write, "index": index, "load": load}[warm](Path(small), 20, 5)
    print(json.dumps(growth_of(lambda: work(root, count, steps))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.step:
        measure(args.step, args.folder, args.episodes[0], args.steps)
        return
    result: dict[str, dict[str, tuple[float, float]]] = {}
    for count in args.episodes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            root = Path(folder) / "data"
            root.mkdir()
            for step in STEPS:
                flags = ["--step", step, "--folder", str(root), "--episodes", str(count), "--steps", str(args.steps)]
                done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, check=True)
                result.setdefault(step, {})[str(count)] = json.loads(done.stdout.splitlines()[-1])
    print(f"peak growth of private memory, {args.steps} steps an episode")
    print("        " + "".join(f"{count:>8} episodes    " for count in args.episodes))
    for step, sizes in result.items():
        print(f"{step:8}" + "".join(f"{mib:8.0f} MiB {s:6.1f} s " for mib, s in sizes.values()))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
