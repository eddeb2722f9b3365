"""`spvla evaluate` as a Ray job: `ray job submit --working-dir . -- python ray_jobs/evaluate.py --flags ...`."""

import sys

from spvla import cli

if __name__ == "__main__":
    sys.exit(cli.run(["evaluate", *sys.argv[1:]]))
