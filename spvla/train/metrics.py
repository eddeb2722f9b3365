"""Where a run's numbers go: always to RUN/metrics.jsonl, from there to the console line and to W&B.

Rank 0 appends to the file; the command's own process follows it. So the W&B key stays with whoever typed the command,
and numbers that were written before a crash are not lost with the worker.
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from spvla import runs
from spvla.config import TrainConfig
from spvla.progress import Progress
from spvla.tracking import WandbRun

Row = dict[str, float]  # {"step": 10, "train_loss": 0.69, ...}

SHOWN = {"smoothed_loss": "loss", "action_accuracy": "accuracy", "margin": "margin", "samples_per_s": "samples/s"}


class Smoothed:
    """Exponential moving average that starts at the first value and leaves non-finite ones out."""

    def __init__(self, decay: float = 0.95, value: float | None = None) -> None:
        self.decay, self.value = decay, value

    def add(self, x: float) -> float:
        if math.isfinite(x):
            self.value = x if self.value is None else self.decay * self.value + (1 - self.decay) * x
        return x if self.value is None else self.value


class MetricsFile:
    """Appends one line a row, flushed, so that a kill tears at most the last; `runs.read_metrics` drops that one."""

    def __init__(self, run: Path) -> None:
        self.file = (run / runs.METRICS).open("a")
        self.file.write("\n" if _ends_torn(run / runs.METRICS) else "")

    def append(self, row: Row) -> None:
        self.file.write(json.dumps({k: _rounded(v) for k, v in row.items()}) + "\n")
        self.file.flush()


def _ends_torn(path: Path) -> bool:
    data = path.read_bytes()[-1:]
    return data not in (b"", b"\n")


def _rounded(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


class Sink(Protocol):
    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class Console:
    """One live line."""

    def __init__(self, label: str, max_steps: int) -> None:
        self.progress = Progress(label, total=max_steps, unit="steps")
        self.shown: dict[str, object] = {}

    def write(self, row: Row) -> None:
        fields = {name: f"{row[key]:.4g}" for key, name in SHOWN.items() if row.get(key) is not None}
        self.shown.update(fields)
        self.progress.update(int(row["step"]), **self.shown)

    def close(self) -> None:
        self.progress.__exit__()


class WandbCurves:
    """Weights & Biases; a resumed run continues the same curves."""

    def __init__(self, run: Path, config: TrainConfig) -> None:
        self.wandb = WandbRun(config, name=run.name, folder=run, resume=True)

    def write(self, row: Row) -> None:
        values = {k: v for k, v in row.items() if k != "step" and v is not None}
        self.wandb.log(values, step=int(row["step"]))

    def close(self) -> None:
        self.wandb.close()


class Follower:
    """Reads what was appended to RUN/metrics.jsonl since the last look and hands each new step to the sinks."""

    def __init__(self, run: Path, sinks: list[Sink]) -> None:
        self.path, self.sinks = run / runs.METRICS, sinks
        self.offset = self.path.stat().st_size if self.path.exists() else 0
        self.last: Row = {}

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.poll()
        for sink in self.sinks:
            sink.close()

    def poll(self) -> None:
        for row in self._fresh():
            self.last = row
            for sink in self.sinks:
                sink.write(row)

    def _fresh(self) -> Iterator[Row]:
        if not self.path.exists():
            return
        with self.path.open("rb") as f:
            f.seek(self.offset)
            data = f.read()
        whole = data.rfind(b"\n") + 1
        self.offset += whole
        for line in data[:whole].splitlines():
            with suppress(ValueError):  # torn by a kill
                yield json.loads(line)
