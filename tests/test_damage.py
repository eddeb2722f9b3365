"""Files damaged at random are read as before, or refused in one line that names them: never a traceback."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_parts
import numpy as np
import pytest
import torch
from data_parts import store_of
from test_ledger import P, planned

from spvla import runs, status
from spvla.data.layout import find
from spvla.data.store import FrameStore
from spvla.errors import UserError
from spvla.eval.ledger import Ledger
from spvla.eval.plan import describe
from spvla.files import write_json
from spvla.model.lora_file import fresh_lora, read_lora
from spvla.model.openvla import OpenVLAConfig
from spvla.model.weights import open_weights
from spvla.policies.checkpoint import load_model, read_config
from spvla.policies.presets import create_preset
from spvla.report.story import history, sweep_section
from spvla.sweep.folder import judged
from spvla.train.resume import load_state, save_state
from spvla.train.selfplay import read_history
from spvla.train.worker import FAILURE, failure_of
from spvla.types import Outcome, Status

ENTRY = {"action": {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 7}, "proprio": {"mean": [0.0] * 7}}
ROW = {
    **{"name": "start", "checkpoint": "/c", "policy": "0", "opponent": "", "successes": 1, "trials": 2},
    **{"verdict": "baseline", "best": "start"},
}
STRANGE = (None, [], {}, -1, 0, 1e309, "x" * 5000, 10**30, True, "\ud800", [[1], 2], "../..", 0.5)


@dataclass(frozen=True)
class Kind:
    """Something on disk: how it is made in a folder, and all that reads it."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    cases: int


def make_checkpoint(folder: Path) -> None:
    create_preset(folder / "tiny", "tiny")
    write_json(folder / "tiny/dataset_statistics.json", {"suite": ENTRY})


def read_checkpoint(folder: Path) -> None:
    describe(str(folder / "tiny"))
    OpenVLAConfig.from_json(read_config(folder / "tiny"), open_weights(folder / "tiny").shapes)


def make_adapter(folder: Path) -> None:
    make_checkpoint(folder)
    lora = fresh_lora(load_model(folder / "tiny"), rank=2, seed=0)
    lora.write(folder / "adapter", base="../tiny", norm_stats={"suite": ENTRY})
    (folder / "tiny").rename(folder / ".tiny")
    write_json(folder / "adapter/adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2.0, "bias": "none"})


def read_adapter(folder: Path) -> None:
    read_lora(folder / "adapter")


def make_index(folder: Path) -> None:
    store_of(folder, [data_parts.episode(number) for number in range(3)], name="toy")


def read_index(folder: Path) -> None:
    store = FrameStore.open(folder / "toy/index")
    assert len(store.episodes) == len(store.actions) == len(store)
    store.split("train"), store.instructions, store.action_stats, store[len(store) - 1]


def make_dataset(folder: Path) -> None:
    data_parts.write(folder, [data_parts.episode(number) for number in range(2)])


def read_dataset(folder: Path) -> None:
    find(folder, data_parts.NAME)


def make_ledger(folder: Path) -> None:
    with planned(folder) as ledger:
        for i, trial in enumerate(t.trial for t in ledger.trials()):
            ledger.claim(P, trial)
            if i % 3 == 0:
                ledger.record_error(P, trial, kind="hang", message="no step for 120 s", worker="env-2")
            else:
                ledger.record(P, trial, Outcome(status=Status.SUCCESS, steps=80, seconds=1.5, state_digest="0" * 64))


def read_ledger(folder: Path) -> None:
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        ledger.protocols(), ledger.errors(), ledger.policies(), ledger.outcomes()
    list(status.evaluation_lines(folder / "ledger.sqlite"))


def make_run(folder: Path) -> None:
    write_json(folder / runs.CONFIG, {"command": "train", "config": {"max_steps": 3}})
    lines = [{"step": step, "total_loss": 0.5, "margin": None} for step in range(1, 4)]
    (folder / runs.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / runs.HISTORY).write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "p_value": 0.5}) + "\n")
    trial = {"name": "a", "parameters": {"lr": 1e-4}, "status": "done", "objective": 0.5, "step": 3}
    write_json(folder / runs.SWEEP, {"metric": "m", "trials": [{**trial, "checkpoint": "/c", "error": ""}]})
    (folder / "judged.jsonl").write_text(json.dumps({"step": 3, "objective": 0.5, "checkpoint_path": "/c"}) + "\n")
    write_json(folder / FAILURE, {"message": "no", "parts": ["got", "expected", "remedy"]})
    save_state(folder, {"a": (1, 2.5, [torch.ones(3)]), 7: np.arange(3), "generator": {"text": "x"}})


def read_run(folder: Path) -> None:
    for read in (status.describe, runs.read_metrics, judged, read_history, history):
        list(read(folder))
    failure_of(folder)
    load_state(folder)


KINDS = {
    "checkpoint": Kind(make_checkpoint, read_checkpoint, 100),
    "adapter": Kind(make_adapter, read_adapter, 80),
    "index": Kind(make_index, read_index, 150),
    "data set": Kind(make_dataset, read_dataset, 60),
    "ledger": Kind(make_ledger, read_ledger, 150),
    "run": Kind(make_run, read_run, 300),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_damaged_is_read_as_before_or_refused_by_name(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    (whole := tmp_path / "whole").mkdir()
    kind.make(whole)
    kind.read(whole)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.parts[-2][0] != ".")
    refused, wrong = 0, []
    for case in range(kind.cases):
        rng = np.random.default_rng([case, len(name)])
        with damaged(whole, files[case % len(files)], rng) as (folder, what):
            try:
                kind.read(folder)
            except UserError as e:
                refused += 1
                wrong += [] if str(folder) in e.got and e.expected and e.remedy else [f"{what}: {e}"]
            except BaseException as e:
                wrong.append(f"{what}: {type(e).__name__} {e}")
    assert not wrong, "\n".join(wrong)
    assert refused > kind.cases / 8


class damaged:
    """A copy of a folder with one file that is not what it was."""

    def __init__(self, whole: Path, file: Path, rng: np.random.Generator) -> None:
        self.whole, self.file, self.rng = whole, file, rng

    def __enter__(self) -> tuple[Path, str]:
        self.folder = self.whole.with_name("damaged")
        shutil.copytree(self.whole, self.folder, copy_function=os.link)
        path = self.folder / self.file
        ways = [flipped, cut, stuffed] + [replaced] * 3 * (path.suffix in (".json", ".jsonl"))
        way = ways[self.rng.integers(len(ways))]
        data = way(path.read_bytes(), self.rng)
        path.unlink()  # a link
        path.write_bytes(data)
        return self.folder, f"{self.file} {way.__name__}"

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    for _ in range(rng.integers(1, 20)):
        out[rng.integers(min(len(out), 5000))] = rng.integers(256)
    return bytes(out)


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def stuffed(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + rng.bytes(int(rng.integers(1, 50))) + data[at:]


def replaced(data: bytes, rng: np.random.Generator) -> bytes:
    """One value of JSON becomes another; of lines, one line's."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    line = int(rng.integers(max(1, len(lines) - 1)))
    value = json.loads(lines[line])
    places = list(places_in(value))
    inside, key = places[rng.integers(len(places))]
    inside[key] = STRANGE[rng.integers(len(STRANGE))]
    lines[line] = json.dumps(value).encode()
    return b"\n".join(lines)


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places_in(inner)


def test_a_line_cut_short_by_a_kill_is_no_damage(tmp_path: Path) -> None:
    make_run(tmp_path)
    for file, read in ((runs.METRICS, runs.read_metrics), (runs.HISTORY, read_history), ("judged.jsonl", judged)):
        before = list(read(tmp_path))
        with (tmp_path / file).open("a") as f:
            f.write('{"step": 9, "obj')
        assert list(read(tmp_path)) == before


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        (runs.METRICS, b'{"step": 1}\n\xff\xfe{}\n', "metrics.jsonl, line 2 cannot be read"),
        (runs.METRICS, b'{"step": "1"}\n', "metrics.jsonl, line 1 holds '1' at step"),
        (runs.METRICS, b'{"loss": 1}\n', "metrics.jsonl has no step"),
        (runs.HISTORY, b"[1]\n", r"history.jsonl, line 1 holds \[1\]"),
        (runs.SWEEP, b'{"metric": "m", "trials": [{}]}', r"trials.json has no trials\.0\.name"),
        (runs.CONFIG, b'{"command": 1, "config": {}}', "config.json holds 1 at command; expected a valid string"),
    ],
)
def test_the_place_is_named(file: str, text: bytes, says: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / file).write_bytes(text)
    with pytest.raises(UserError, match=says):
        list(status.describe(tmp_path))


def test_a_sweeps_table_is_drawn_or_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert sweep_section(tmp_path) is not None
    (tmp_path / runs.SWEEP).write_bytes(b"[]")
    with pytest.raises(UserError, match=r"trials\.json holds \[\]"):
        sweep_section(tmp_path)
