"""`make demo`: the whole way once, in small and for real, on two cores without a GPU.

The policy that ships with the package plays two tasks of libero_object; the scripted expert demonstrates them; one
iteration of self-play runs on two Ray Train workers, and the farm rolls both policies out from the same starts; a
report shows it. Every stage can be resumed: run again after an interruption, it goes on where it stopped.
"""

import time
from pathlib import Path

from spvla.cluster.connect import connection
from spvla.collect import collect
from spvla.config import CollectConfig, DemoConfig, ReportConfig, SelfplayConfig
from spvla.files import require_writable
from spvla.progress import format_seconds
from spvla.report.html import report
from spvla.runs import REPORT
from spvla.train.selfplay import selfplay

SUITE, DATASET = "libero_object", "libero_object_no_noops"
TASKS = (0, 8)  # the alphabet soup, which the policy mostly solves, and the chocolate pudding, its weakest


def demo(config: DemoConfig) -> None:
    """Runs all stages into `config.out` and prints where the report is, and what to run next."""
    out = require_writable(config.out, flag="--out")
    start_s = time.monotonic()
    with connection():
        stage(1, "collect: a scripted expert demonstrates two tasks")
        collect(collect_config(out))
        stage(2, "self-play: the shipped policy plays, trains against itself on two workers, and plays again")
        selfplay(selfplay_config(out))
        stage(3, "report")
        report(ReportConfig(run=out / "runs" / "selfplay"))
    print(closing_words(out, time.monotonic() - start_s))


def stage(number: int, what: str) -> None:
    print(f"\n[{number}/3] {what}", flush=True)


def collect_config(out: Path) -> CollectConfig:
    return CollectConfig(task_suite_name=SUITE, tasks=TASKS, num_demos_per_task=4, data_root_dir=out / "data")


def selfplay_config(out: Path) -> SelfplayConfig:
    return SelfplayConfig(
        vla_path="spvla-small",
        data_root_dir=out / "data",
        dataset_name=DATASET,
        run_root_dir=out / "runs",
        adapter_tmp_dir=out / "adapter-tmp",
        run_id="selfplay",
        iterations=1,
        beta=0.1,
        sft_weight=1.0,
        lora_rank=16,
        learning_rate=1e-4,
        batch_size=4,
        max_steps=10,
        save_steps=10,
        num_workers=2,
        task_suite_name=SUITE,
        tasks=TASKS,
        num_trials_per_task=3,
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
