"""Joining a Ray cluster, or starting a quiet one on this machine. The only place that calls `ray.init`."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Set before Ray is imported. Health checks at 0.2 s: at Ray's default of 2 s every third report blocks for 1.9 s.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "RAY_max_direct_call_object_size": "400000",  # a 256 x 256 frame (196 KB) travels inline: twice the rate
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def connection(*, num_cpus: int | None = None) -> Iterator[None]:
    """A Ray connection for the length of a command.

    Joins the cluster that RAY_ADDRESS names or that the job runs on; otherwise starts one on this machine
    (`num_cpus` logical CPUs, all by default) and stops it at the end. Within an open connection it does nothing.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"):
        ray.init(**quiet)
    else:
        print("ray  starting a cluster on this machine", file=sys.stderr)
        ray.init(address="local", num_cpus=num_cpus, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
