"""Joining a Ray cluster, or starting a quiet one on this machine. The only place that calls `ray.init`."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spvla.cluster.machines import grows, usable_cpus
from spvla.errors import ClusterError
from spvla.files import cache_dir, can_be_written, write_text

_GROWING = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900"}  # a machine that must boot first
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # at Ray's default of 2 s every third report blocks for 1.9 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "RAY_max_direct_call_object_size": "400000",  # a 256 x 256 frame (196 KB) travels inline: twice the rate
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

ANSWER_S = 5.0


@contextmanager
def connection(*, num_cpus: int | None = None) -> Iterator[None]:
    """A Ray connection for the length of a command.

    Joins the cluster that RAY_ADDRESS names or that the job runs on; otherwise starts one on this machine
    (`num_cpus` logical CPUs, by default all that this process may use) and stops it at the end. Within an open
    connection it does nothing. `ray job stop` (SIGTERM) ends the command as Ctrl-C does. Raises ClusterError.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    _set_environment()
    _start(num_cpus)
    try:
        with _sigterm_interrupts():
            yield
    finally:
        ray.shutdown()


def _set_environment() -> None:
    from ray._private import auto_init_hook
    from ray._raylet import Config

    auto_init_hook.enable_auto_connect = False  # or a thread that outlives its connection starts a cluster of its own

    for name, value in (_ENVIRONMENT | (_GROWING if grows() else {})).items():
        os.environ.setdefault(name, value)
    Config.initialize("")  # Ray reads these when it is imported, which may be long ago: let it read them again


def _start(num_cpus: int | None) -> None:
    import ray

    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _require_answer(address)
    try:
        if address or os.environ.get("RAY_JOB_ID"):
            ray.init(**quiet)
            return
        print("ray  starting a cluster on this machine", file=sys.stderr)
        _keep_token_private()
        ray.init(address="local", num_cpus=num_cpus or usable_cpus(), **quiet)
    except Exception as e:  # Ray raises what its parts raise: OSError, RuntimeError, its own, and bare Exception
        raise explained(e, address) from e


def _require_answer(address: str) -> None:
    """Raises ClusterError where nobody listens at RAY_ADDRESS: Ray itself would try for minutes."""
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme in ("http", "https"):
        raise ClusterError(
            f"RAY_ADDRESS={address} is a job server's address",
            expected="a cluster's, such as 10.0.0.1:6379 or auto",
            remedy="Unset RAY_ADDRESS; `ray job submit` takes that address from RAY_API_SERVER_ADDRESS.",
        )
    if not port.isdigit() or scheme not in ("", "ray"):
        return  # "auto", or what Ray will have an opinion on
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as e:
        raise ClusterError(
            f"nobody answers at RAY_ADDRESS={address} ({e.strerror or e})",
            expected="a running Ray cluster",
            remedy="Start it (`ray start --head`), correct RAY_ADDRESS, or unset it for a cluster on this machine.",
        ) from e


def explained(e: Exception, address: str | None) -> ClusterError:
    """What kept Ray from starting, or from joining the cluster at `address`, with its remedy."""
    text = " ".join(str(e).split())
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if "path length" in text:
        expected = "a folder whose sockets have names of at most 107 bytes"
        remedy = f"Give Ray a shorter folder than {folder} in RAY_TMPDIR."
    elif "ersion mismatch" in text or "was started with" in text:
        expected = "one version of Ray and Python everywhere"
        remedy = "Install on this machine what the cluster has, or run on one of its machines."
    elif "token" in text.lower() or "Authentication" in type(e).__name__ or "UNAUTHENTICATED" in text:
        expected = "the cluster's own token"
        remedy = "Copy its ~/.ray/auth_token (mode 600) here, or unset RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH."
    elif isinstance(e, OSError):
        expected = "a folder for Ray's session, writable and with room"
        remedy = f"Free {folder}, or give Ray a folder of this user's own in RAY_TMPDIR."
    elif address:
        expected = "a running cluster that accepts this user's token"
        remedy = "Correct or unset RAY_ADDRESS; `ray status` shows whether a cluster answers."
    else:
        expected = "a local cluster within a minute"
        remedy = f"Its logs are in {folder}/ray/session_latest/logs; free memory and try again."
    got = f"no Ray cluster at RAY_ADDRESS={address} ({text})" if address else f"Ray does not start here ({text})"
    return ClusterError(got, expected=expected, remedy=remedy)


def _keep_token_private() -> None:
    """Ray writes its authentication token into ~/.ray at first use, readable by all: here by this user alone.

    Where ~/.ray cannot be written the token lies in the cache folder, of which Ray's processes hear by a variable.
    """
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled

    logging.getLogger("ray").setLevel(logging.ERROR)  # it would announce the file
    mask = os.umask(0o077)
    try:
        given = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
        if not given and not can_be_written(Path(os.path.expanduser("~/.ray"))):
            token = cache_dir() / "ray-token"
            if not token.exists():
                write_text(token, generate_new_authentication_token())
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        ensure_token_if_auth_enabled(create_token_if_missing=True)
    finally:
        os.umask(mask)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt. Ray's own handler would exit at once, and only the main thread may set one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
