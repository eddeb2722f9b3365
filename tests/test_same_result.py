"""A trial's result does not depend on the load: real worlds, a real policy, on the GPU where there is one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from farm_parts import adapter_of, tiny_with_statistics

SCRIPT = Path(__file__).parents[1] / "bench/same_result.py"


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_one_two_and_five_environments_give_the_same_trials(tmp_path: Path) -> None:
    base = tiny_with_statistics(tmp_path / "tiny")
    versions = [base, *(adapter_of(base, tmp_path / f"adapter{seed}", seed=seed) for seed in (1, 2))]
    trials = ["--tasks", "[0, 4]", "--num_trials_per_task", "2", "--max_steps", "8", "--decode_batch_size", "4"]
    ran = subprocess.run(
        [sys.executable, SCRIPT, ",".join(map(str, versions)), *trials], stdout=subprocess.PIPE, text=True
    )
    assert ran.returncode == 0, ran.stdout
    differing, states = re.search(r"(\d+) of 24 results differ; (\d+) different final states", ran.stdout).groups()
    assert differing == "0" and int(states) > 4  # more than init states: so the versions do differ
