"""`ray job submit --working-dir . -- python ray_jobs/sweep.py --flags ...`: the flags of `spvla sweep`, on a cluster."""

import sys

from spvla import cli

if __name__ == "__main__":
    sys.exit(cli.run(["sweep", *sys.argv[1:]]))
