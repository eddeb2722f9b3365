"""What a run folder has to tell, as plain rows ready for a page: gathered from its files alone, nothing recomputed."""

import base64
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from spvla import runs
from spvla.benchmarks.registry import describe
from spvla.eval.ledger import ErrorRow, Ledger, PolicyRow, TrialRow
from spvla.eval.protocol import UNKNOWN, Protocol
from spvla.eval.summary import Summary, shorten, summarise
from spvla.report import plots
from spvla.report.exam import exams_seen
from spvla.statistics import paired
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
    evaluations: list[list[Summary]]  # one for each policy and suite, its total last
    success_plots: list[str]
    comparisons: list[Comparison]
    sweep: SweepSection | None
    curves: list[CurveSection]
    videos: list[Video]
    errors: list[ErrorEntry]
    protocol: list[tuple[str, str]]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def interval(ends: tuple[float, float]) -> str:
    low, high = ends
    return f"{100 * low:.1f} to {100 * high:.1f}%"


def points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def tell(run: Path) -> Story:
    """Gathers the story of a run folder. Raises UserError when it is not one."""
    written = runs.read_config(run)
    trials: list[TrialRow] = []
    errors: list[ErrorRow] = []
    protocols: list[Protocol] = []
    policies: list[PolicyRow] = []
    if (run / runs.LEDGER).exists():
        with Ledger.open(run / runs.LEDGER) as ledger:
            trials, errors, policies = ledger.trials(), ledger.errors(), ledger.policies()
            protocols = ledger.protocols()
    tables = tables_of(summarise(trials))
    return Story(
        title=run.resolve().name,
        subtitle=written["config"].get("dataset_name") or written["config"].get("task_suite_name") or "",
        command=written["command"],
        config=json.dumps(written["config"], indent=2),
        tiles=[*success_tiles(tables), *training_tiles(run)],
        notes=[*notes(protocols, tables, errors), *exams_seen(policies, tables)],
        history=history(run),
        evaluations=tables,
        success_plots=success_plots(tables),
        comparisons=comparisons(trials),
        sweep=sweep_section(run),
        curves=[c for folder in training_folders(run) if (c := curve_section(folder, run))],
        videos=list(videos(run, trials)),
        errors=[error_entry(e) for e in errors],
        protocol=[(k, str(v)) for protocol in protocols for k, v in protocol.manifest().items()],
    )


def tables_of(summaries: Sequence[Summary]) -> list[list[Summary]]:
    """One table for each policy and suite; its last row is the total."""
    return [list(rows) for _, rows in groupby(summaries, key=lambda s: (s.policy, s.suite))]


def task_label(summary: Summary) -> str:
    return "all tasks" if summary.task is None else f"{summary.task}  {summary.instruction}"


def error_entry(error: ErrorRow) -> ErrorEntry:
    where = f"{error.kind}: {error.suite} task {error.task}, init state {error.init_state}, {error.worker}"
    return ErrorEntry(where, error.message, error.traceback)


def success_plots(tables: Sequence[Sequence[Summary]]) -> list[str]:
    """One for each suite: a row a task, in which all policies stand together. Only what has an outcome is drawn."""
    drawn = []
    for suite in dict.fromkeys(rows[0].suite for rows in tables):
        done = [rows for rows in tables if rows[0].suite == suite and rows[-1].done]
        labels = {s.task: shorten(task_label(s), 60) for rows in done for s in rows if s.done}
        tasks = sorted(labels, key=lambda task: (task is None, task))  # the total last
        series = []
        for rows in done:
            rates = {s.task: (s.rate, *s.interval) for s in rows if s.done}
            series.append((rows[0].policy_name, [rates.get(task) for task in tasks]))
        if series:
            drawn.append(plots.intervals(f"Success by task, {suite}", [labels[task] for task in tasks], series))
    return drawn


def comparisons(trials: Sequence[TrialRow]) -> list[Comparison]:
    """Every two policies that ran the same init states of a suite: the later minus the earlier, as iterations are."""
    names = {t.policy: t.policy_name for t in trials}
    found = []
    for suite in dict.fromkeys(t.suite for t in trials):
        won: dict[str, dict[tuple[int, int], bool]] = defaultdict(dict)
        for t in trials:
            if t.suite == suite and t.status is not None:
                won[t.policy][t.task, t.init_state] = t.status == Status.SUCCESS
        for earlier, later in combinations(won, 2):
            both = sorted(won[later].keys() & won[earlier].keys())
            if not both:
                continue
            p = paired([won[later][k] for k in both], [won[earlier][k] for k in both])
            found.append(
                Comparison(
                    first=names[later],
                    second=names[earlier],
                    suite=suite,
                    pairs=len(both),
                    difference=points(p.difference),
                    interval=f"{points(p.low)} to {points(p.high)}",
                    only_first=p.only_a,
                    only_second=p.only_b,
                    p_value=f"{p.p_value:.3f}",
                )
            )
    return found


def success_tiles(tables: Sequence[Sequence[Summary]]) -> list[Tile]:
    return [success_tile(rows[-1]) for rows in tables[-3:]]


def success_tile(total: Summary) -> Tile:
    missing = f", {total.planned - total.done} missing" if total.done < total.planned else ""
    rate = percent(total.rate) if total.done else "-"
    return Tile(f"{total.policy_name}, {total.suite}", rate, f"{total.successes} of {total.done} trials{missing}")


def training_tiles(run: Path) -> list[Tile]:
    lasts = [rows[-1] for folder in training_folders(run) if (rows := list(runs.read_metrics(folder)))]
    if not lasts:
        return []
    steps = sum(last["step"] for last in lasts)
    tiles = [Tile("optimiser steps", f"{steps}", f"in {counted(len(lasts), 'training run')}")]
    if "action_accuracy" in lasts[-1]:
        tiles.append(Tile("action accuracy", percent(lasts[-1]["action_accuracy"]), "tokens, last logged step"))
    return tiles


def training_folders(run: Path) -> list[Path]:
    """The run itself, or its iterations: every folder with metrics."""
    return [f for f in (run, *runs.iterations(run)) if (f / runs.METRICS).exists()]


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
    return [
        IterationRow(
            name=row["name"],
            success=f"{row['successes']}/{row['trials']}",
            difference=points(row["difference"]) if row.get("difference") is not None else "",
            p_value=f"{row['p_value']:.3f}" if row.get("p_value") is not None else "",
            verdict=row["verdict"],
        )
        for row in runs.read_history(run)
    ]


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sweep_section(run: Path) -> SweepSection | None:
    """From {"metric": name, "trials": [{"parameters": {...}, "objective": x, "status": ..., "error": ...}]}."""
    sweep = runs.read_sweep(run)
    if sweep is None:
        return None
    trials = sorted(sweep["trials"], key=lambda t: -(t["objective"] if t["objective"] is not None else -1))
    names = [n for n in trials[0]["parameters"] if all(n in t["parameters"] for t in trials)] if trials else []
    rows = [
        [*(shown(t["parameters"][n]) for n in names), "-" if t["objective"] is None else f"{t['objective']:.4f}"]
        + [f"{t['status']}: {t['error']}" if t["error"] else t["status"], t["checkpoint"]]
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
        data = (run / str(t.video)).read_bytes()
        room -= len(data)
        if room < 0:
            return
        label = f"{t.instruction} · {t.policy_name}"
        yield Video(base64.b64encode(data).decode(), t.status or "", label, t.init_state, t.steps or 0, t.note or "")


def notes(protocols: Sequence[Protocol], tables: Sequence[Sequence[Summary]], errors: Sequence[ErrorRow]) -> list[str]:
    totals = [rows[-1] for rows in tables]
    planned, done = sum(s.planned for s in totals), sum(s.done for s in totals)
    worlds = dict.fromkeys(describe(protocol.world) for protocol in protocols)
    found = [f"Rolled out with {world}" for world in worlds if world]
    if any(protocol.dtype == UNKNOWN for protocol in protocols):
        found.append("The policy is a server's or a Python object's: its weights are not known here, only its name.")
    if done < planned:
        found.append(f"{planned - done} of {planned} trials have no outcome yet: rates are of the others.")
    if errors:
        lost = counted(sum(s.errors for s in totals), "trial")
        found.append(f"{counted(len(errors), 'error')} of the infrastructure met, {lost} lost to them.")
    return found
