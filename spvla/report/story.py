"""What a run folder has to tell, as plain rows ready for a page: gathered from its files alone, nothing recomputed."""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from spvla import runs
from spvla.farm.ledger import ErrorRow, Ledger, TrialRow
from spvla.report import plots
from spvla.statistics import paired, wilson
from spvla.types import Status

MAX_VIDEOS = 24
MAX_VIDEO_BYTES = 24 * 2**20  # of all films together: the page must open quickly and pass by mail

HEAT_MAP = ("beta", "learning_rate")  # its axes where a sweep varies them; its first two parameters otherwise

# chart -> metrics drawn in it, where a run logged them
CHARTS: dict[str, tuple[str, ...]] = {
    "Loss": ("total_loss", "selfplay_loss", "train_loss", "smoothed_loss"),
    "Gradient norm": ("grad_norm",),
    "Log-probabilities of actions": (
        "policy_real_logps",
        "policy_generated_logps",
        "opponent_real_logps",
        "opponent_generated_logps",
    ),
    "Rewards": ("real_rewards", "generated_rewards", "margin"),
    "Action accuracy": ("action_accuracy", "val_action_accuracy"),
    "Generated equals demonstrated": ("collision_rate",),
    "Action logits": ("action_logit_max", "action_logit_min"),
    "Samples per second": ("samples_per_s",),
}


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class TaskRow:
    task: str
    successes: int
    trials: int
    errors: int

    @property
    def rate(self) -> str:
        return percent(self.successes / self.trials) if self.trials else "-"

    @property
    def interval(self) -> str:
        return interval(*wilson(self.successes, self.trials)) if self.trials else "-"


@dataclass(frozen=True)
class EvaluationTable:
    """One policy on one suite; the last row sums up."""

    policy: str
    suite: str
    rows: list[TaskRow]


@dataclass(frozen=True)
class Comparison:
    first: str
    second: str
    suite: str
    pairs: int
    difference: str
    interval: str
    only_first: int
    only_second: int
    p_value: str


@dataclass(frozen=True)
class IterationRow:
    name: str
    success: str
    difference: str
    p_value: str
    verdict: str


@dataclass(frozen=True)
class CurveSection:
    title: str
    plots: list[str]


@dataclass(frozen=True)
class SweepSection:
    header: list[str]
    rows: list[list[str]]
    plots: list[str]


@dataclass(frozen=True)
class Video:
    data: str  # base64
    status: str
    task: str
    init_state: int
    steps: int
    note: str


@dataclass(frozen=True)
class ErrorEntry:
    where: str
    summary: str
    traceback: str


@dataclass(frozen=True, kw_only=True)
class Story:
    """Everything on the page, in its order."""

    title: str
    subtitle: str
    command: str
    config: str
    tiles: list[Tile]
    notes: list[str]
    history: list[IterationRow]
    evaluations: list[EvaluationTable]
    success_plot: str
    comparisons: list[Comparison]
    sweep: SweepSection | None
    curves: list[CurveSection]
    videos: list[Video]
    errors: list[ErrorEntry]
    protocol: list[tuple[str, str]]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}%"


def tell(run: Path) -> Story:
    """Gathers the story of a run folder. Raises UserError when it is not one."""
    written = runs.read_config(run)
    trials: list[TrialRow] = []
    errors: list[ErrorRow] = []
    protocol: list[tuple[str, str]] = []
    if (run / runs.LEDGER).exists():
        with Ledger.open(run / runs.LEDGER) as ledger:
            trials, errors = ledger.trials(), ledger.errors()
            protocol = [(k, str(v)) for manifest in ledger.protocols() for k, v in asdict(manifest).items()]
    tables = evaluation_tables(trials)
    return Story(
        title=run.resolve().name,
        subtitle=written["config"].get("dataset_name") or written["config"].get("task_suite_name") or "",
        command=written["command"],
        config=json.dumps(written["config"], indent=2),
        tiles=[*success_tiles(tables), *training_tiles(run)],
        notes=notes(protocol, errors),
        history=history(run),
        evaluations=tables,
        success_plot=success_plot(tables),
        comparisons=comparisons(trials),
        sweep=sweep_section(run),
        curves=[c for folder in training_folders(run) if (c := curve_section(folder, run))],
        videos=list(videos(run, trials)),
        errors=[error_entry(e) for e in errors],
        protocol=protocol,
    )


def evaluation_tables(trials: Sequence[TrialRow]) -> list[EvaluationTable]:
    """One table per (policy, suite), in the order in which they were first met; the last row is the total."""
    tables = []
    for policy, suite in dict.fromkeys((t.policy_name, t.suite) for t in trials):
        mine = [t for t in trials if (t.policy_name, t.suite) == (policy, suite)]
        rows = [
            task_row(f"{task}  {name}", [t for t in mine if t.task == task])
            for task, name in sorted({(t.task, t.instruction) for t in mine})
        ]
        tables.append(EvaluationTable(policy, suite, [*rows, task_row("total", mine)]))
    return tables


def task_row(label: str, trials: Sequence[TrialRow]) -> TaskRow:
    return TaskRow(
        task=label,
        successes=sum(t.status == Status.SUCCESS for t in trials),
        trials=sum(t.status is not None for t in trials),
        errors=sum(t.errors for t in trials),
    )


def error_entry(error: ErrorRow) -> ErrorEntry:
    where = f"{error.kind}: {error.suite} task {error.task}, init state {error.init_state}, {error.worker}"
    return ErrorEntry(where, error.message, error.traceback)


def success_plot(tables: Sequence[EvaluationTable]) -> str:
    rows = [
        (f"{row.task[:60]}  [{table.policy}]" if len(tables) > 1 else row.task[:64], row)
        for table in tables
        for row in table.rows
        if row.trials
    ]
    points = [(label, r.successes / r.trials, *wilson(r.successes, r.trials)) for label, r in rows]
    return plots.intervals("Success by task", points) if points else ""


def comparisons(trials: Sequence[TrialRow]) -> list[Comparison]:
    """Every two policies that ran the same init states of a suite."""
    found = []
    for suite in dict.fromkeys(t.suite for t in trials):
        won = {
            name: {
                (t.task, t.init_state): t.status == Status.SUCCESS
                for t in trials
                if (t.policy_name, t.suite) == (name, suite) and t.status is not None
            }
            for name in dict.fromkeys(t.policy_name for t in trials if t.suite == suite)
        }
        for first, second in combinations(won, 2):
            both = sorted(won[first].keys() & won[second].keys())
            if not both:
                continue
            p = paired([won[first][k] for k in both], [won[second][k] for k in both])
            found.append(
                Comparison(
                    first=first,
                    second=second,
                    suite=suite,
                    pairs=len(both),
                    difference=f"{100 * p.difference:+.1f}",
                    interval=interval(p.low, p.high),
                    only_first=p.only_a,
                    only_second=p.only_b,
                    p_value=f"{p.p_value:.3f}",
                )
            )
    return found


def success_tiles(tables: Sequence[EvaluationTable]) -> list[Tile]:
    return [
        Tile(f"{t.policy}, {t.suite}", t.rows[-1].rate, f"{t.rows[-1].successes} of {t.rows[-1].trials} trials")
        for t in tables[-3:]
    ]


def training_tiles(run: Path) -> list[Tile]:
    rows = [row for folder in training_folders(run) for row in runs.read_metrics(folder)]
    if not rows:
        return []
    last = rows[-1]
    tiles = [Tile("optimiser steps", f"{last['step']}", f"in {len(training_folders(run))} training run(s)")]
    if "action_accuracy" in last:
        tiles.append(Tile("action accuracy", percent(last["action_accuracy"]), "tokens, last logged step"))
    return tiles


def training_folders(run: Path) -> list[Path]:
    """The run itself, or its iterations: every folder with metrics."""
    return [f for f in (run, *sorted(run.glob("it-*"))) if (f / runs.METRICS).exists()]


def curve_section(folder: Path, run: Path) -> CurveSection | None:
    rows = list(runs.read_metrics(folder))
    drawn = [
        plots.curves(title, series)
        for title, names in CHARTS.items()
        if (series := {n: points for n in names if (points := series_of(rows, n))})
    ]
    title = "Training" if folder == run else f"Training, {folder.name}"
    return CurveSection(title, drawn) if drawn else None


def series_of(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def history(run: Path) -> list[IterationRow]:
    path = run / runs.HISTORY
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        IterationRow(
            name=row["name"],
            success=f"{row['successes']}/{row['trials']}",
            difference=f"{100 * row['difference']:+.1f}" if row.get("difference") is not None else "",
            p_value=f"{row['p_value']:.3f}" if row.get("p_value") is not None else "",
            verdict=row["verdict"],
        )
        for row in lines
    ]


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sweep_section(run: Path) -> SweepSection | None:
    """From RUN/trials.json: {"metric": name, "trials": [{"parameters": {...}, "objective": x, "status": ...}]}."""
    path = run / "trials.json"
    if not path.exists():
        return None
    sweep = json.loads(path.read_text())
    trials = sorted(sweep["trials"], key=lambda t: -(t["objective"] if t["objective"] is not None else -1))
    names = list(trials[0]["parameters"]) if trials else []
    rows = [
        [*(shown(t["parameters"][n]) for n in names), "-" if t["objective"] is None else f"{t['objective']:.4f}"]
        + [t["status"], t.get("checkpoint") or ""]
        for t in trials
    ]
    done = [t for t in trials if t["objective"] is not None]
    scales = {n: plots.Scale.of(n, [t["parameters"][n] for t in done]) for n in names}
    objective = [t["objective"] for t in done]
    first = sorted(names, key=lambda n: n not in HEAT_MAP)
    drawn = []
    if len(names) >= 2 and done:
        drawn.append(plots.heat_map(sweep["metric"], *(scales[n] for n in first[:2]), objective))
    if names and done:
        drawn.append(
            plots.parallel_coordinates("Every trial", [*scales.values(), plots.Scale.of(sweep["metric"], objective)])
        )
    return SweepSection([*names, sweep["metric"], "status", "checkpoint"], rows, drawn)


def videos(run: Path, trials: Sequence[TrialRow]) -> Iterator[Video]:
    """Failures and successes in turn, until the page is full."""
    filmed = [t for t in trials if t.video and (run / t.video).exists()]
    failures = [t for t in filmed if t.status == Status.FAILURE]
    successes = [t for t in filmed if t.status == Status.SUCCESS]
    order = [t for pair in zip(successes, failures, strict=False) for t in pair]
    order += successes[len(failures) :] + failures[len(successes) :]
    room = MAX_VIDEO_BYTES
    for t in order[:MAX_VIDEOS]:
        data = (run / t.video).read_bytes()
        room -= len(data)
        if room < 0:
            return
        label = f"{t.instruction} · {t.policy_name}"
        yield Video(base64.b64encode(data).decode(), t.status or "", label, t.init_state, t.steps or 0, t.note or "")


def notes(protocol: Sequence[tuple[str, str]], errors: Sequence[ErrorRow]) -> list[str]:
    found = []
    if any((name, value) == ("assets", "primitives") for name, value in protocol):
        found.append(
            "Rolled out with the embedded primitive geometry, not LIBERO's own meshes: "
            "these rates compare with each other, not with published ones."
        )
    if errors:
        found.append(f"{len(errors)} error(s) of the infrastructure were met; each trial was tried again elsewhere.")
    return found
