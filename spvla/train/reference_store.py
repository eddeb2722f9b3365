"""What the opponent answered, kept for later epochs: one memory-mapped record a sample.

A frozen opponent answers a sample alike in every epoch, provided that the image is the same, that is, without
augmentation. Each worker has a file of its own; a record counts once its flag is set, which is written last.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spvla.errors import UserError
from spvla.files import write_json
from spvla.reading import read_json
from spvla.train.scoring import ReferenceOutput
from spvla.types import ACTION_DIM

FIELDS = ("generated", "real_logps", "generated_logps")


def record(tokens: int) -> np.dtype:
    """One sample's output of so many action tokens."""
    numbers = [("generated", "<i4", tokens), ("real_logps", "<f4", tokens), ("generated_logps", "<f4", tokens)]
    return np.dtype([("known", "u1"), *numbers])


def _read(note: Path) -> Any:
    """None where it is missing or damaged: the answers are then asked for again."""
    with suppress(UserError):
        return read_json(note, remedy="")
    return None


class ReferenceStore:
    """Answers by sample number. A file made for another `key` (opponent, flags, data) is emptied."""

    def __init__(self, path: Path, *, num_samples: int, key: str, tokens: int = ACTION_DIM) -> None:
        self.path, note = path, path.with_suffix(".json")
        meaning = {"key": key, "num_samples": num_samples, "tokens": tokens}
        fresh = not path.exists() or _read(note) != meaning
        if fresh:
            note.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.memmap(path, record(tokens), mode="w+", shape=(num_samples,)).flush()
            write_json(note, meaning)
        self.records = np.memmap(path, record(tokens), mode="r+", shape=(num_samples,))

    def get(self, samples: np.ndarray, device: torch.device | str) -> ReferenceOutput | None:
        """The answers to all of `samples` (B,), or None if one is missing."""
        rows = self.records[samples]
        if not rows["known"].all():
            return None
        return ReferenceOutput(
            generated=torch.from_numpy(rows["generated"].astype(np.int64)).to(device),
            real_logps=torch.from_numpy(rows["real_logps"].copy()).to(device),
            generated_logps=torch.from_numpy(rows["generated_logps"].copy()).to(device),
        )

    def first(self, samples: np.ndarray, output: ReferenceOutput) -> ReferenceOutput:
        """`output`, but what is known of `samples` (B,) as it was answered first.

        In another batch it may round otherwise, and a run that goes on knows answers that it had not needed yet.
        """
        rows = self.records[samples]
        if not rows["known"].any():
            return output
        known = torch.from_numpy(rows["known"].astype(bool))[:, None].to(output.generated.device)
        fields = {}
        for field in FIELDS:
            new = getattr(output, field)
            fields[field] = torch.where(known, torch.from_numpy(rows[field].copy()).to(new), new)
        return ReferenceOutput(**fields)

    def put(self, samples: np.ndarray, output: ReferenceOutput) -> None:
        """Keeps the answers to those of `samples` (B,) that are not known."""
        new = self.records["known"][samples] == 0
        rows = np.zeros(len(samples), self.records.dtype)
        for field in FIELDS:
            rows[field] = getattr(output, field).cpu().numpy()
        self.records[samples[new]] = rows[new]
        self.records["known"][samples] = 1
