"""`make demo`: the whole way once, in small and for real, on two cores without a GPU.

Two tasks of libero_object, demonstrated by the scripted expert; a tiny policy of OpenVLA's architecture, warm-started
by behaviour cloning; one iteration of self-play on two Ray Train workers; both policies rolled out by the farm; a
report. Every stage can be resumed: run again after an interruption, it goes on where it stopped.
"""

import time
from pathlib import Path

from spvla.cluster.connect import connection
from spvla.collect import collect
from spvla.config import CollectConfig, DemoConfig, ReportConfig, SelfplayConfig, TrainConfig
from spvla.files import require_writable
from spvla.progress import format_seconds
from spvla.report.html import report
from spvla.runs import REPORT, latest_checkpoint
from spvla.train.run import train
from spvla.train.selfplay import selfplay

SUITE, DATASET, TASKS = "libero_object", "libero_object_no_noops", (0, 1)


def demo(config: DemoConfig) -> None:
    """Runs all stages into `config.out` and prints where the report is, and what to run next."""
    out = require_writable(config.out, flag="--out")
    start_s = time.monotonic()
    with connection():
        stage(1, "collect: a scripted expert demonstrates two tasks")
        collect(collect_config(out))
        stage(2, "warm start: behaviour cloning of a tiny policy")
        train(warm_start_config(out))
        stage(3, "self-play: one iteration on two workers, both policies evaluated by the farm")
        selfplay(selfplay_config(out))
        stage(4, "report")
        report(ReportConfig(run=out / "runs" / "selfplay"))
    print(closing_words(out, time.monotonic() - start_s))


def stage(number: int, what: str) -> None:
    print(f"\n[{number}/4] {what}", flush=True)


def collect_config(out: Path) -> CollectConfig:
    return CollectConfig(task_suite_name=SUITE, tasks=TASKS, num_demos_per_task=6, data_root_dir=out / "data")


def warm_start_config(out: Path) -> TrainConfig:
    return TrainConfig(
        vla_path="tiny",
        data_root_dir=out / "data",
        dataset_name=DATASET,
        run_root_dir=out / "runs",
        adapter_tmp_dir=out / "adapter-tmp",
        run_id="warm-start",
        objective="sft",
        use_lora=False,
        batch_size=8,
        num_workers=2,
        learning_rate=1e-3,
        max_steps=150,
        save_steps=150,
        image_aug=False,
    )


def selfplay_config(out: Path) -> SelfplayConfig:
    return SelfplayConfig(
        vla_path=str(latest_checkpoint(out / "runs" / "warm-start")),
        data_root_dir=out / "data",
        dataset_name=DATASET,
        run_root_dir=out / "runs",
        adapter_tmp_dir=out / "adapter-tmp",
        run_id="selfplay",
        iterations=1,
        beta=0.1,
        sft_weight=1.0,
        batch_size=8,
        max_steps=20,
        save_steps=20,
        image_aug=False,
        num_workers=2,
        task_suite_name=SUITE,
        tasks=TASKS,
        num_trials_per_task=2,
    )


def closing_words(out: Path, seconds: float) -> str:
    return f"""
done in {format_seconds(seconds)}. The report: {out / "runs" / "selfplay" / REPORT}

A full run on one GPU, from OpenVLA's own checkpoint and data:
  spvla selfplay --vla_path openvla/openvla-7b-finetuned-libero-spatial --data_root_dir modified_libero_rlds \\
    --dataset_name libero_spatial_no_noops --task_suite_name libero_spatial --run_root_dir runs \\
    --lora_rank 32 --batch_size 20 --learning_rate 2e-4 --beta 0.5 --image_aug True --max_steps 10000 --iterations 2
On a GPU cluster, after `ray get-auth-token --generate` (docs/operations.md):
  ray up cluster.yaml && (ray dashboard cluster.yaml &)
  RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 ray job submit --working-dir . -- \\
    python ray_jobs/selfplay.py --vla_path openvla/openvla-7b-finetuned-libero-spatial \\
    --data_root_dir /shared/modified_libero_rlds --dataset_name libero_spatial_no_noops \\
    --task_suite_name libero_spatial --run_root_dir /shared/runs --lora_rank 32 --batch_size 20 \\
    --learning_rate 2e-4 --beta 0.5 --image_aug True --max_steps 10000 --iterations 2 --num_workers 4
"""
