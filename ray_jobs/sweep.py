"""`spvla sweep` as a Ray job: `ray job submit --working-dir . -- python ray_jobs/sweep.py --flags ...`."""

import sys

from spvla import cli

if __name__ == "__main__":
    sys.exit(cli.run(["sweep", *sys.argv[1:]]))
