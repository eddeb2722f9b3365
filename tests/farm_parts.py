"""What several of the farm's tests stand on: a protocol, and a farm on real Ray whose worlds and policy are fakes."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import fakes
from ray import cloudpickle

from spvla.benchmarks.libero.suites import SUITES
from spvla.config import FarmConfig
from spvla.eval.driver import EvaluationJob
from spvla.eval.farm import Farm
from spvla.eval.ledger import Ledger
from spvla.eval.messages import PolicyVersion, ServerSettings, WorkerSettings
from spvla.eval.protocol import Protocol
from spvla.files import write_json
from spvla.types import Needs, Trial

cloudpickle.register_pickle_by_value(fakes)  # workers do not see the tests' folder

PROTOCOL = Protocol(
    world={"assets": "primitives", "assets_digest": "a1", "renderer": "llvmpipe", "mujoco": "3.3.2"}
    | {"robosuite": "1.4.0", "libero": "0.1.4"},
    num_steps_wait=10,
    center_crop=True,
    seed=7,
    device="cpu",
    dtype="float32",
    decode_batch_size=4,
)
VERSION = PolicyVersion(digest="p0", name="fake", path="/fake", base="/fake", is_adapter=False)
SUITE = "libero_object"


def fake_policy(version: PolicyVersion, settings: ServerSettings) -> fakes.FakePolicy:
    return fakes.FakePolicy(speed=0.2, needs=version.needs)


@contextmanager
def fake_farm(
    folder: Path,
    config: FarmConfig,
    *,
    open_env: Callable[[str, int], fakes.FakeEnv] | None = None,
    load: object = fake_policy,
    versions: Sequence[PolicyVersion] = (VERSION,),
    serving: Mapping[str, object] = MappingProxyType({}),
    start: bool = True,
) -> Iterator:
    """A farm, and what it said."""
    said: list[str] = []
    working = WorkerSettings(
        benchmark=fakes.FakeBenchmark(open_env),
        spare_gpu=False,
        num_steps_wait=0,
        center_crop=True,
        call_timeout_s=config.call_timeout_s,
        log_folder=str(folder / "workers"),
    )
    settings = ServerSettings(
        device="cpu",
        dtype="float32",
        load_in_8bit=False,
        load_in_4bit=False,
        decode_batch_size=2,
        instructions=("move beyond 1",),
        max_batch=2,
        under_way=1,
        wait_ms=None,
        log_folder=str(folder / "workers"),
        load=load,
    )
    for function in (open_env, load):
        if function is not None and not function.__module__.startswith("spvla"):
            cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    with Farm(config, working=working, serving=replace(settings, **serving), say=said.append) as farm:
        if start:
            farm.start(versions)
        yield farm, said


def tiny_with_statistics(folder: Path) -> Path:
    """A tiny checkpoint with random weights that may act in any suite."""
    from spvla.policies.openvla.presets import create_preset

    create_preset(folder, "tiny")
    low, high = [-0.9] * 6 + [0.0], [0.9] * 6 + [1.0]
    limits = {"q01": low, "q99": high, "min": low, "max": high, "mean": [0.0] * 7, "std": [1.0] * 7}
    statistics = {"action": limits | {"mask": [True] * 6 + [False]}}
    write_json(folder / "dataset_statistics.json", {f"{suite}_no_noops": statistics for suite in SUITES})
    return folder


def adapter_of(base: Path, folder: Path, *, seed: int) -> Path:
    """An adapter on a tiny checkpoint that does something: B is random too."""
    from policy_parts import random_lora

    from spvla.policies.checkpoint import load_model, norm_stats

    random_lora(load_model(base), seed=seed, strength=0.2).write(folder, base=str(base), norm_stats=norm_stats(base))
    return folder


def trials(tasks: int, init_states: int, versions: Sequence[PolicyVersion] = (VERSION,)) -> list[Trial]:
    return [
        Trial(policy=v.digest, suite=SUITE, task=t, init_state=i)
        for v in versions
        for t in range(tasks)
        for i in range(init_states)
    ]


def open_ledger(folder: Path, wanted: list[Trial], versions: Sequence[PolicyVersion] = (VERSION,)) -> Ledger:
    ledger = Ledger.create(folder / "ledger.sqlite")
    ledger.add_protocol(PROTOCOL)
    for v in versions:
        ledger.add_policy(v.digest, name=v.name, path=v.path)
    ledger.add_tasks({(t.suite, t.task): f"task {t.task}" for t in wanted})
    ledger.add_trials(PROTOCOL.digest, wanted)
    return ledger


def job(wanted: list[Trial], key: str = SUITE, needs: Needs = VERSION.needs, steps: int = 280) -> EvaluationJob:
    return EvaluationJob(
        protocol=PROTOCOL.digest,
        trials=wanted,
        needs={t.policy: needs for t in wanted},
        unnorm_keys={(t.policy, t.suite): key for t in wanted},
        instructions={(t.suite, t.task): f"task {t.task}" for t in wanted},
        steps_limit={t.suite: steps for t in wanted},
    )
