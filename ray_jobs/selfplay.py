"""`spvla selfplay` as a Ray job: `ray job submit --working-dir . -- python ray_jobs/selfplay.py --flags ...`."""

import sys

from spvla import cli

if __name__ == "__main__":
    sys.exit(cli.run(["selfplay", *sys.argv[1:]]))
