"""Is a trial's result the same whatever the load? The same trials with few environments and with many, and compared.

    python bench/same_result.py CHECKPOINT[,ADAPTER...] --workers 1,2,5 --max_steps 40

Runs `spvla evaluate` once for each number of environments, each in a folder of its own, with one fixed decoding bucket.
Compares outcome, steps and the digest of the simulator's final state, trial by trial; exits 1 if any differs, or if all
trials end in one state, which would show nothing.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spvla import runs
from spvla.eval.ledger import Ledger

Table = dict[tuple, tuple]  # (policy, suite, task, init state) -> (outcome, steps, digest)


def main() -> None:
    args = arguments()
    tables: dict[int, Table] = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in args.workers:
            start_s = time.monotonic()
            tables[workers] = evaluate(args, workers, Path(folder) / str(workers))
            print(f"{workers} environments: {len(tables[workers])} trials in {time.monotonic() - start_s:.0f} s")
    sys.exit(compare(tables))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", help="folders, separated by commas")
    parser.add_argument("--workers", default="1,2,5", help="numbers of environments")
    parser.add_argument("--task_suite_name", default="libero_spatial")
    parser.add_argument("--tasks", help="as for spvla evaluate; all by default")
    parser.add_argument("--num_trials_per_task", default="2")
    parser.add_argument("--max_steps", default="40")
    parser.add_argument("--decode_batch_size", default="16")
    parser.add_argument("--repeatable", default="True", help="False shows what the fixed bucket prevents")
    args = parser.parse_args()
    args.workers = [int(n) for n in args.workers.split(",")]
    return args


def evaluate(args: argparse.Namespace, workers: int, folder: Path) -> Table:
    names = ("task_suite_name", "tasks", "num_trials_per_task", "max_steps", "decode_batch_size", "repeatable")
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    flags |= {"pretrained_checkpoint": args.checkpoints, "num_envs": workers, "local_log_dir": folder}
    flags |= {"num_videos": 0, "max_failure_videos": 0}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    subprocess.run([sys.executable, "-m", "spvla.cli", "evaluate", *words], check=True, stdout=subprocess.DEVNULL)
    with Ledger.open(folder / runs.LEDGER) as ledger:
        rows = ledger.trials()
    return {(r.policy, r.suite, r.task, r.init_state): (r.status, r.steps, r.state_digest) for r in rows}


def compare(tables: dict[int, Table]) -> int:
    """The exit code, after saying what was found."""
    (fewest, first), *others = tables.items()
    differing = [
        (n, trial) for n, table in others for trial in first.keys() | table if first.get(trial) != table.get(trial)
    ]
    for n, trial in sorted(differing):
        print(f"  {trial}: {first.get(trial)} with {fewest} environments, {tables[n].get(trial)} with {n}")
    digests = {digest for _, _, digest in first.values()}
    print(f"{len(differing)} of {len(first) * len(others)} results differ; {len(digests)} different final states")
    unfinished = any(status is None for table in tables.values() for status, _, _ in table.values())
    return int(bool(differing) or unfinished or len(digests) < 2)


if __name__ == "__main__":
    main()
