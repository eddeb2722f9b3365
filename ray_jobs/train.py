"""`spvla train` as a Ray job: `ray job submit --working-dir . -- python ray_jobs/train.py --flags ...`."""

import sys

from spvla import cli

if __name__ == "__main__":
    sys.exit(cli.run(["train", *sys.argv[1:]]))
