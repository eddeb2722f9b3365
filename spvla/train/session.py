"""One worker's training as a plain object: model, data, learner, and where it stands. No Ray.

session = Session(job, place)
session.load(checkpoint)          # exactly where that run stood
rows = session.advance()          # one optimiser step; on a GPU the row of the one before
rows += session.settle()          # all rows so far
session.write(folder)             # a checkpoint that load_policy reads by itself
"""

import hashlib
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from spvla.cluster.machines import usable_cpus
from spvla.config import TrainConfig
from spvla.data.frames import Frames, open_frames
from spvla.data.loader import Loader, Split
from spvla.data.store import FrameStore, without_proprio
from spvla.errors import DatasetError
from spvla.model.lora_file import LoraFile, fresh_lora, read_lora
from spvla.model.openvla import OpenVLA
from spvla.policies.checkpoint import base_of, norm_stats, note_base
from spvla.policies.networks import load_network, save_beside_adapter, save_network
from spvla.policies.openvla.prompt import load_tokenizer
from spvla.policies.registry import flags_of
from spvla.train.family import needs_of
from spvla.train.flat import FlatLora
from spvla.train.metrics import Row, Smoothed
from spvla.train.objectives import objective_of
from spvla.train.prepare import Job
from spvla.train.reference import ScoredBatch, together
from spvla.train.reference_store import ReferenceStore
from spvla.train.resume import load_state, save_state
from spvla.train.step import Learner, Pending
from spvla.types import ACTION_DIM

CPU = torch.device("cpu")
VALIDATION_SAMPLES = 1024  # at most, over all workers


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a worker stands among its fellows."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    def agree(self, mine: str | None) -> str | None:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return mine
        box = [mine]
        dist.broadcast_object_list(box, src=0, device=CPU)
        return box[0]

    def any(self, mine: bool) -> bool:
        """Whether it is true on any rank. By gloo, so the device is not waited for."""
        if self.world == 1:
            return mine
        flag = torch.tensor(int(mine))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def add(self, mine: list[float]) -> list[float]:
        """Sums over all ranks."""
        total = torch.tensor(mine, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()


class Session:
    def __init__(self, job: Job, place: Place) -> None:
        """Loads everything, at step 0. Raises UserError."""
        self.job, self.place, self.config = job, place, job.config
        self.ahead, self.behind = steps_ahead(job.config, place.device), steps_behind(place.device)
        self.stores = [FrameStore.open(path) for _, path, _ in job.stores]
        self.data = digest([store.digest for store in self.stores], [weight for _, _, weight in job.stores])
        self.base, self.adapter = base_of(job.start)
        self._adopt_statistics()
        self.tokenizer = load_tokenizer(self.base)
        options = {"device": str(place.device), "dtype": dtype_of(self.config, place.device)}
        flags, seed = flags_of(self.config), self.config.seed
        self.model = load_network(self.base, self.adapter, flags=flags, seed=seed, **options)
        policy, opponent = start_adapters(self.config, self.model, self.adapter)
        self.learner = Learner(self.model, self.config, policy=policy, opponent=opponent, answers=self._answers())
        self.smoothed = Smoothed()
        self.samples = 0  # stepped so far, over all workers
        self.under_way: deque[tuple[Pending, float]] = deque()  # steps not yet read, and their wait for data in seconds
        self.seconds: deque[float] = deque(maxlen=self.ahead)  # a step; of as many as one pass of the opponent serves
        self.waited_s = self.read_s = 0.0  # a step's wait for data; the moment when the last row was read
        self.frames = self._open_frames()
        self._feed()
        if self.config.val_steps:
            self._loader("val")  # an empty split is told now, not after hours

    @property
    def step(self) -> int:
        return self.learner.steps

    @property
    def samples_per_step(self) -> int:
        """The effective batch."""
        return self.config.batch_size * self.config.grad_accumulation_steps * self.place.world

    def advance(self) -> list[Row]:
        """One optimiser step. Gives the rows that are known by now: on a GPU the host runs one step behind.

        Raises TrainingError as the flags say.
        """
        if not self.under_way:
            self.read_s = time.perf_counter()  # a pause ends here: saving, validation
        if not self.coming:
            self._prepare()
        self.under_way.append((self.learner.step(self.coming.popleft()), self.waited_s))
        self.samples += self.samples_per_step
        return self._rows(self.behind)

    def settle(self) -> list[Row]:
        """Waits for the device, and gives the rows of all steps so far."""
        return self._rows(0)

    def _rows(self, left: int) -> list[Row]:
        """Reads all steps but the last `left`."""
        return [self._row(*self.under_way.popleft()) for _ in range(len(self.under_way) - left)]

    def _row(self, pending: Pending, waited_s: float) -> Row:
        row: Row = {"step": pending.step, **pending.read()}
        row["data_s"] += waited_s
        row["smoothed_loss"] = self.smoothed.add(row["total_loss"])
        now_s = time.perf_counter()
        self.seconds.append(now_s - self.read_s)
        self.read_s = now_s
        step_s = sum(self.seconds) / len(self.seconds)
        return row | {"step_s": step_s, "samples_per_s": self.samples_per_step / step_s}

    def validate(self) -> Row:
        """Teacher-forced means over the validation split, its first 1024 samples at most; each worker takes a share."""
        batches = -(-VALIDATION_SAMPLES // (self.config.batch_size * self.place.world))
        sums, count = dict.fromkeys(("train_loss", "action_accuracy", "l1_loss"), 0.0), 0
        for batch in islice(self._loader("val"), batches):
            count += len(batch.samples)
            means = self.learner.evaluate(batch)
            sums = {name: total + means[name] * len(batch.samples) for name, total in sums.items()}
        *totals, samples = self.place.add([*sums.values(), count])
        return {f"val_{name}": total / samples for name, total in zip(sums, totals, strict=True)}

    def _adopt_statistics(self) -> None:
        """Of a data set that the start policy was trained on already, its own go on."""
        held = norm_stats(self.base) | (norm_stats(self.adapter) if self.adapter else {})
        for store in self.stores:
            if "action" in held.get(store.name, {}):
                store.adopt_statistics(held[store.name])

    def write(self, folder: Path) -> None:
        """A checkpoint: adapter (or whole model), action statistics, and everything that the next step depends on."""
        assert not self.under_way, "settle first: a step's numbers are missing"
        keep = dict if self.learner.family.needs.proprio else without_proprio
        stats = {store.name: keep(store.statistics[store.name]) for store in self.stores}
        if isinstance(self.learner.policy, FlatLora):
            self.learner.policy.to_file().write(folder, base=str(self.base), norm_stats=stats)
            note_base(folder, self.base)
            with self.learner.policy.exact():
                save_beside_adapter(self.model, folder)
        else:
            save_network(self.model, folder, source=self.base, norm_stats=stats)
        state = {"learner": self.learner.state_dict(), "smoothed": self.smoothed.value}
        save_state(folder, state | {"samples": self.samples, "data": self.data})

    def load(self, checkpoint: Path) -> None:
        """Goes to exactly where the run stood. Raises CheckpointError, DatasetError."""
        state = load_state(checkpoint)
        if state["data"] != self.data:
            raise DatasetError(
                f"the data of {self.job.run} have changed since it began",
                expected="the same episodes, so that no sample is seen twice or missed",
                remedy="Start a new run with another --run_id.",
            )
        self.learner.load_state_dict(state["learner"])
        self.smoothed, self.samples = Smoothed(value=state["smoothed"]), state["samples"]
        self._feed()

    def _feed(self) -> None:
        """Batches from the very next sample: which one that is follows from the seed and the count so far alone."""
        self.batches = iter(self._loader("train", start_sample=self.samples))
        self.coming: deque[list[ScoredBatch]] = deque()  # steps that are prepared

    def _prepare(self) -> None:
        """Has the opponent answer the coming steps, none of them beyond the run's end."""
        start_s = time.perf_counter()
        count = max(1, min(self.ahead, self.config.max_steps - self.step))
        coming = [list(islice(self.batches, self.config.grad_accumulation_steps)) for _ in range(count)]
        self.waited_s = (time.perf_counter() - start_s) / count
        self.coming.extend(self.learner.prepare(coming))

    def _loader(self, split: Split, start_sample: int = 0) -> Loader:
        config = self.config
        return Loader(
            self.stores,
            self.tokenizer,
            weights=[weight for _, _, weight in self.job.stores],
            batch_size=config.batch_size,
            seed=config.seed,
            rank=self.place.rank,
            world_size=self.place.world,
            needs=self.learner.family.needs,
            image_aug=config.image_aug,
            crop_offsets=config.crop_offsets,
            on_device=config.augment_on == "device" or (config.augment_on == "auto" and self.place.device != CPU),
            frames=self.frames,
            split=split,
            val_split_from_train=config.val_split_from_train,
            start_sample=start_sample,
            workers=2 if self.place.device == CPU else 8,
            prefetch=max(4, self.ahead * config.grad_accumulation_steps),  # batches taken at once
            pinned=self.place.device.type == "cuda",
        )

    def _open_frames(self) -> list[Frames]:
        """Decoded once where that pays: not for a run that sees less than every frame."""
        mode = self.config.frames
        if mode == "auto" and self.config.max_steps * self.samples_per_step < sum(map(len, self.stores)):
            mode = "stored"
        return open_frames(self.stores, self.learner.family.needs.cameras, mode, threads=usable_cpus())

    def _answers(self) -> ReferenceStore | None:
        """The opponent's of earlier epochs, where they hold: a fixed opponent that sees fixed images."""
        config, objective = self.config, objective_of(self.config)
        if not objective.has_reference or config.image_aug or config.opponent_update == "ema":
            return None
        return ReferenceStore(
            self.job.run / "answers" / f"rank_{self.place.rank}.bin",
            num_samples=sum(len(store) for store in self.stores),
            key=digest(self.job.start_digest, self.data, objective.answer_key()),
            tokens=needs_of(self.model).chunk * ACTION_DIM,
        )


def start_adapters(
    config: TrainConfig, model: OpenVLA, adapter: Path | None
) -> tuple[LoraFile | None, LoraFile | None]:
    """The adapter to train, and the opponent's: both the start policy's, if that is one, else a fresh one and none.

    Where the start policy has no adapter, the bare base is the opponent. Raises CheckpointError.
    """
    if not config.use_lora:
        return None, None
    if adapter is None:
        return fresh_lora(model, rank=config.lora_rank, seed=config.seed), None
    start = read_lora(adapter)
    return start, start if objective_of(config).has_reference else None


def steps_ahead(config: TrainConfig, device: torch.device) -> int:
    """Steps that the opponent answers at once; on a CPU one, so that a resumed run's arithmetic is the same to the bit.

    An opponent that moves answers each step anew.
    """
    if device == CPU or not objective_of(config).has_reference or config.opponent_update == "ema":
        return 1
    return max(1, together(config.batch_size) // config.grad_accumulation_steps)


def steps_behind(device: torch.device) -> int:
    """Steps whose numbers the host leaves unread, so that the device need not wait for it between two steps."""
    return 0 if device == CPU else 1


def dtype_of(config: TrainConfig, device: torch.device) -> str:
    auto = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": "bfloat16", "fp32": "float32"}[auto if config.precision == "auto" else config.precision]


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
