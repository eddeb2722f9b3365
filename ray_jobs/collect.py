"""`spvla collect` as a Ray job: `ray job submit --working-dir . -- python ray_jobs/collect.py --flags ...`."""

import sys

from spvla import cli

if __name__ == "__main__":
    sys.exit(cli.run(["collect", *sys.argv[1:]]))
