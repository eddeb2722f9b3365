"""An evaluation under way: its ledger, its console and, once anything is missing, its farm.

One session evaluates one checkpoint after another, or several together, on workers that are started once.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from spvla import runs
from spvla.cluster.connect import connection
from spvla.config import EvaluateConfig
from spvla.errors import UserError
from spvla.eval.actors import open_base
from spvla.eval.console import EvaluationConsole
from spvla.eval.driver import Driver, EvaluationJob
from spvla.eval.exports import export, log_results, open_wandb
from spvla.eval.farm import Farm, cluster_sizes
from spvla.eval.ledger import Ledger, TrialRow
from spvla.eval.logfile import name_part, refuse_note, write_log
from spvla.eval.messages import ELSEWHERE, ServerFacts, ServerSettings, WorkerFacts, WorkerSettings, differing
from spvla.eval.plan import Plan, benchmark_of, make_plan
from spvla.eval.progress import Progress, ProgressWatcher
from spvla.eval.protocol import UNKNOWN, Protocol, require_same
from spvla.eval.sizing import Sizes, decode_batch_size
from spvla.eval.summary import Summary, summarise
from spvla.files import require_writable, writing_to
from spvla.tracking import WandbRun
from spvla.types import Benchmark, Trial

WORKER_LOGS = "workers"
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


@contextmanager
def session(config: EvaluateConfig) -> Iterator["EvaluationSession"]:
    """Opens the ledger in --local_log_dir. Raises UserError if it cannot be used."""
    benchmark = benchmark_of(config)
    refuse_note(config.run_id_note, config.task_suite_name.split(","))  # now, not when hours of trials are done
    folder = require_writable(config.local_log_dir, flag="--local_log_dir")
    with Ledger.create(folder / runs.LEDGER) as ledger, EvaluationConsole() as console, ExitStack() as stack:
        yield EvaluationSession(config, benchmark, ledger, console, stack)


class EvaluationSession:
    def __init__(
        self, config: EvaluateConfig, benchmark: Benchmark, ledger: Ledger, console: EvaluationConsole, stack: ExitStack
    ) -> None:
        self.config, self.benchmark, self.ledger = config, benchmark, ledger
        self.console, self.stack = console, stack
        self.farm: Farm | None = None
        self.wandb: WandbRun | None = None
        self.began = datetime.now()

    @property
    def folder(self) -> Path:
        return self.ledger.path.parent

    def run(self, checkpoints: Sequence[str | Path], *, step: int | None = None) -> list[Summary]:
        """Plays every trial of these checkpoints that has no outcome yet; returns their summaries.

        step: of the training run that a checkpoint is from.
        """
        plan = make_plan(self.config, self.benchmark, checkpoints)
        self._require_known_protocol()
        self._keep_config()
        progress = Progress(plan, self.ledger)
        progress.refresh()
        missing = progress.missing
        if idle := self._nothing_to_play(progress, missing):
            self.console.say(f"evaluate  {idle}")
        if self.config.use_wandb and self.wandb is None:
            self.wandb = self._open_wandb()
        try:
            if not idle:
                self._play(plan, missing, progress)
        finally:
            with writing_to(self.folder):
                self._write(plan, step)
        return summarise(self._rows(plan))

    def _keep_config(self) -> None:
        """The flags of the latest evaluation, for reports; another command's folder keeps its own."""
        there = (self.folder / runs.CONFIG).exists()
        if not there or runs.read_config(self.folder)["command"] == "evaluate":
            runs.write_config(self.folder, "evaluate", self.config)

    def _nothing_to_play(self, progress: Progress, missing: Sequence[Trial]) -> str:
        """Why no farm is needed, or nothing."""
        if not missing:
            return f"nothing is missing: {len(progress.trials)} trials are in {self.ledger.path}"
        if self.config.stop_when_settled and (words := progress.settled):
            return f"{words}; {len(missing)} trials stay left out"
        return ""

    def _require_known_protocol(self) -> None:
        """Refuses at once what the flags alone show to be another protocol than the ledger's."""
        if (old := self.ledger.protocol()) is None:
            return
        world = {**old.world, **self.benchmark.facts()}
        known = replace(old, **self._known(), world=world, decode_batch_size=self._batch_size(1))
        require_same(old, known, where=str(self.ledger.path))

    def _known(self) -> dict[str, Any]:
        """Fields of the protocol that the flags and this machine decide."""
        c = self.config
        return {
            "num_steps_wait": c.num_steps_wait,
            "max_steps": c.max_steps,
            "center_crop": c.center_crop,
            "unnorm_key": c.unnorm_key,
            "seed": c.seed,
            "num_images_in_input": c.num_images_in_input,
            "num_open_loop_steps": c.num_open_loop_steps,
            "quantization": "8bit" if c.load_in_8bit else "4bit" if c.load_in_4bit else "none",
        }

    def _batch_size(self, default: int) -> int:
        """Of every decoded batch: the flag's, the ledger's, or the default; 0 if batches may have any size."""
        if not self.config.repeatable or self.config.policy_server or self.config.policy:
            return 0
        old = self.ledger.protocol()
        return self.config.decode_batch_size or (old.decode_batch_size if old else 0) or default

    def _play(self, plan: Plan, missing: Sequence[Trial], progress: Progress) -> None:
        """Brings the farm up, settles what the protocol is, and plays."""
        if self.farm is None:
            self.farm = self._open_farm()
        self.farm.trials_left = len(missing)
        protocol = self._protocol(*self.farm.start(plan.versions))
        self._register(plan, protocol)
        job = EvaluationJob(
            protocol=protocol.digest,
            trials=missing,
            needs={v.digest: v.needs for v in plan.versions},
            unnorm_keys=plan.unnorm_keys,
            instructions=plan.instructions,
            steps_limit={suite: self._max_steps(suite) for suite in plan.suites},
        )
        watcher = ProgressWatcher(
            progress,
            self.console,
            batch_size=self.farm.serving.max_batch,
            stop_when_settled=self.config.stop_when_settled,
        )
        Driver(self.farm, job, self.ledger).play(watcher.tick)

    def _max_steps(self, suite: str) -> int:
        limit = self.benchmark.max_steps(suite)
        return min(limit, self.config.max_steps or limit)

    def _open_farm(self) -> Farm:
        c = self.config
        if "RAY_ADDRESS" not in os.environ:  # environments run on this machine: better told now than by each of them
            self.benchmark.require_drawing()
        self.console.say(f"evaluate  world: {self.benchmark.describe(self.benchmark.facts())}")
        if c.policy_server:  # an actor for each server, which asks it
            c = replace(c, num_decoders=c.policy_server.count(",") + 1)
        self.stack.enter_context(connection())
        sizes = cluster_sizes(c, ELSEWHERE if c.policy_server else None)
        logs = str(self.folder / WORKER_LOGS)
        serving = self._serving(sizes, logs)
        self.console.say(
            f"evaluate  {sizes.envs} environments, {sizes.decoders} policy actors on {serving.device}; logs in {logs}"
        )
        working = WorkerSettings(
            benchmark=self.benchmark,
            spare_gpu=sizes.device == "cuda",
            num_steps_wait=c.num_steps_wait,
            center_crop=c.center_crop,
            call_timeout_s=c.call_timeout_s,
            log_folder=logs,
        )
        return self.stack.enter_context(Farm(c, working=working, serving=serving, say=self.console.say))

    def _serving(self, sizes: Sizes, logs: str) -> ServerSettings:
        c = self.config
        batch_size = self._batch_size(decode_batch_size(sizes))
        settings = ServerSettings(
            device=sizes.device,
            dtype=DTYPES[sizes.device],
            load_in_8bit=c.load_in_8bit,
            load_in_4bit=c.load_in_4bit,
            decode_batch_size=batch_size,
            instructions=tuple(i for suite in self.benchmark.suites for i in self.benchmark.instructions(suite)),
            max_batch=batch_size or sizes.envs,
            under_way=2 if sizes.device == "cuda" else 1,
            wait_ms=c.wait_ms,
            log_folder=logs,
            load=open_base,
        )
        if c.policy:
            return replace(settings, dtype=UNKNOWN, under_way=1)
        if c.policy_server:  # it batches by itself, if at all: each request goes when it comes
            return replace(settings, device=ELSEWHERE, dtype=UNKNOWN, max_batch=1, under_way=sizes.envs)
        return settings

    def _protocol(self, worker: WorkerFacts, server: ServerFacts) -> Protocol:
        serving = self.farm.serving
        here = self.benchmark.facts()
        if others := differing(here, {name: worker.world.get(name, "") for name in here}):
            raise UserError(
                f"another world where environments run ({'; '.join(others)})",
                expected="the same packages and files on all machines, the driver's included",
                remedy="Install the same on each; for assets, give a folder that every machine sees with"
                " --libero_assets, or set LIBERO_ASSETS on each.",
            )
        return Protocol(
            **self._known(),
            world=worker.world,
            device=server.device,
            dtype=serving.dtype,
            decode_batch_size=serving.decode_batch_size,
        )

    def _register(self, plan: Plan, protocol: Protocol) -> None:
        self.ledger.add_protocol(protocol)
        for v in plan.versions:
            self.ledger.add_policy(v.digest, name=v.name, path=v.path)
        self.ledger.add_tasks(plan.instructions)
        self.ledger.add_trials(protocol.digest, plan.trials)

    def _rows(self, plan: Plan) -> list[TrialRow]:
        trials = set(plan.trials)
        return [row for row in self.ledger.trials() if row.trial in trials]

    def _open_wandb(self) -> WandbRun:
        suites = self.config.task_suite_name.replace(",", "+")
        name = f"EVAL-{suites}-openvla-{self.began:%Y_%m_%d-%H_%M_%S}"
        opened = open_wandb(self.config, folder=self.folder, name=name)
        self.stack.callback(opened.close)
        return opened

    def _write(self, plan: Plan, step: int | None) -> None:
        """OpenVLA's log for each policy and suite, the exports, and W&B's table: of what is done, finished or not."""
        rows = [row for row in self._rows(plan) if row.status is not None]
        if not rows:
            return
        for (_, _, name), of_one in groupby(rows, key=lambda r: (r.policy, r.suite, r.policy_name)):
            note = [self.config.run_id_note] if self.config.run_id_note else []
            note += [name_part(name)] if len(plan.versions) > 1 or step is not None else []
            path = write_log(self.folder, list(of_one), at=self.began, note="--".join(note) or None)
            self.console.say(f"evaluate  log: {path}")
        for path in export(self.ledger):
            self.console.say(f"evaluate  export: {path}")
        if self.wandb is not None:
            log_results(self.wandb, summarise(self._rows(plan)), step=step)
