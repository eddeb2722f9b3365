"""Who plays what next: tasks are kept, others helped out, faults tried elsewhere; and when a comparison may stop."""

import random

import pytest
from farm_parts import trials

from spvla.eval.scheduler import Scheduler
from spvla.eval.settle import e_value, verdict
from spvla.eval.sizing import decode_batch_size, sizes
from spvla.types import Trial

STEPS = {"libero_object": 280, "libero_10": 520}


def scheduler(wanted: list[Trial], max_retries: int = 3) -> Scheduler:
    s = Scheduler(steps_limit=STEPS, max_retries=max_retries)
    s.add(wanted)
    return s


def test_a_worker_keeps_its_task_while_that_has_work() -> None:
    s = scheduler(trials(tasks=2, init_states=3))
    played = []
    for _ in range(3):
        played.append(s.next("a", ["a"]).task)
        s.done("a")
    assert len(set(played)) == 1


def test_workers_spread_over_tasks_first() -> None:
    s = scheduler(trials(tasks=3, init_states=5))
    assert {s.next(w, ["a", "b", "c"]).task for w in "abc"} == {0, 1, 2}


def test_the_longest_task_comes_first() -> None:
    long = [Trial(policy="p0", suite="libero_10", task=7, init_state=i) for i in range(4)]
    s = scheduler(trials(tasks=1, init_states=4) + long)
    assert s.next("a", ["a"]).suite == "libero_10"


def test_a_worker_without_work_takes_over_anothers() -> None:
    s = scheduler(trials(tasks=1, init_states=4))
    workers = ["a", "b"]
    assert s.next("a", workers).task == s.next("b", workers).task == 0


def test_a_fault_goes_back_and_is_tried_on_another_worker() -> None:
    s = scheduler(trials(tasks=1, init_states=1))
    workers = ["a", "b"]
    trial = s.next("a", workers)
    assert s.failed("a", died=True)
    assert s.next("a", workers) is None
    assert s.next("b", workers) == trial


def test_the_last_living_worker_may_try_again() -> None:
    s = scheduler(trials(tasks=1, init_states=1))
    trial = s.next("a", ["a"])
    s.failed("a", died=False)
    assert s.next("a", ["a"]) == trial


def test_a_trial_is_given_up_after_its_retries() -> None:
    s = scheduler(trials(tasks=1, init_states=1), max_retries=2)
    for again in (True, True, False):
        trial = s.next("a", ["a"])
        assert s.failed("a", died=True) is again
    assert s.given_up == [trial] and s.finished


def test_every_trial_is_played_once_whatever_order_things_end_in() -> None:
    rng = random.Random(0)
    wanted = trials(tasks=5, init_states=7)
    s, workers, ended = scheduler(wanted, max_retries=100), ["a", "b", "c"], []
    while not s.finished:
        for w in rng.sample(workers, 3):
            if w not in s.running:
                s.next(w, workers)
            elif rng.random() < 0.3:
                s.failed(w, died=rng.random() < 0.5)
            else:
                ended.append(s.done(w))
    assert sorted(ended) == sorted(wanted)


def test_dropped_trials_are_not_begun() -> None:
    s = scheduler(trials(tasks=2, init_states=3))
    first = s.next("a", ["a"])
    assert s.drop(trials(tasks=2, init_states=3)) == 5
    assert s.done("a") == first and s.finished


def neediest(left: dict[int, int], at: dict[int, int]) -> int:
    """The rule in its plainest form: most pending trials for each worker that would be there; then the first task."""
    return min((t for t in left if left[t]), key=lambda t: (-left[t] / (at[t] + 1), t))


def test_a_worker_is_sent_where_a_worker_is_needed_most_however_things_went_before() -> None:
    """Against the rule applied to every task, through deaths that reopen tasks and errors that fill them again."""
    rng, sizes_of = random.Random(2), [13, 40, 7, 22, 40]
    wanted = [
        Trial(policy="p0", suite="libero_object", task=t, init_state=i) for t in range(5) for i in range(sizes_of[t])
    ]
    s, workers = scheduler(wanted, max_retries=10**6), [f"w{i}" for i in range(12)]
    left, at, holds, moves = dict(enumerate(sizes_of)), dict.fromkeys(range(5), 0), {}, 0
    while not s.finished:
        w = rng.choice(workers)
        if w in s.running:
            if rng.random() < 0.6:
                s.done(w)
            else:
                left[s.running[w].task] += 1
                if died := rng.random() < 0.5:
                    at[holds.pop(w)] -= 1
                s.failed(w, died=died)
                s.blamed.clear()  # where it may be tried is another test's concern
        elif s.num_pending:
            stays = w in holds and left[holds[w]]
            expected = holds[w] if stays else neediest(left, at)
            moves += not stays
            task = s.next(w, workers).task
            assert task == expected
            left[task] -= 1
            if not stays:
                at[task] += 1
                if w in holds:
                    at[holds[w]] -= 1
                holds[w] = task
    assert moves > 20 and s.num_pending == 0


def test_handing_out_a_hundred_thousand_trials_to_two_thousand_workers_looks_at_few_tasks() -> None:
    """Counted in looks at a task's need, which was workers x tasks for each trial."""
    wanted = [Trial(policy="p0", suite="libero_10", task=t, init_state=i) for t in range(100) for i in range(1000)]
    s, workers, looks = scheduler(wanted), {f"w{i}" for i in range(2000)}, 0
    need = s._need

    def counted(task: tuple[str, int]) -> float:
        nonlocal looks
        looks += 1
        return need(task)

    s._need = counted
    while not s.finished:
        for w in sorted(workers):
            if s.num_pending:
                s.next(w, workers)
        for w in list(s.running):
            s.done(w)
    assert looks < 3 * len(wanted)


@pytest.mark.parametrize(
    ("cpus", "gpus", "envs", "decoders", "expected"),
    [
        (2, 0, 0, 0, (2, 1, 0.99, "cpu")),
        (4, 0, 0, 0, (3, 1, 0.99, "cpu")),
        (16, 1, 0, 0, (15, 1, 0.99, "cuda")),
        (16, 1, 32, 0, (32, 1, 0.49, "cuda")),
        (128, 8, 0, 4, (124, 4, 0.99, "cuda")),
        (1, 0, 0, 0, (2, 1, 0.49, "cpu")),
    ],
)
def test_sizes_follow_the_cluster(cpus: int, gpus: int, envs: int, decoders: int, expected: tuple) -> None:
    s = sizes(cpus=cpus, gpus=gpus, num_envs=envs, num_decoders=decoders)
    assert (s.envs, s.decoders, s.env_cpus, s.device) == expected
    assert s.envs * s.env_cpus <= cpus


def test_half_of_the_environments_make_a_batch() -> None:
    assert decode_batch_size(sizes(cpus=16, gpus=1, num_envs=32, num_decoders=0)) == 16
    assert decode_batch_size(sizes(cpus=2, gpus=0, num_envs=1, num_decoders=0)) == 1
    assert decode_batch_size(sizes(cpus=4, gpus=0, num_envs=3, num_decoders=0)) == 1
    assert decode_batch_size(sizes(cpus=4, gpus=1, num_envs=3, num_decoders=0)) == 2


def test_the_evidence_worked_by_hand() -> None:
    # one pair of one: 2 B(1.5, 0.5) / B(0.5, 0.5) = 2 (pi / 2) / pi = 1
    assert e_value(1, 0) == pytest.approx(1.0)
    # two of two: 4 B(2.5, 0.5) / B(0.5, 0.5) = 4 * 3/8
    assert e_value(2, 0) == pytest.approx(1.5)


def test_a_comparison_stops_for_evidence_or_for_want_of_any() -> None:
    assert "first is better" in verdict(8, 0, pairs_left=40)
    assert "second is better" in verdict(0, 8, pairs_left=40)
    assert "tell them apart" in verdict(0, 0, pairs_left=5)  # even 5 : 0 has p = 0.0625
    assert verdict(0, 0, pairs_left=6) == ""  # 6 : 0 would have p = 0.031
    assert verdict(3, 1, pairs_left=40) == ""


def test_equal_policies_are_called_different_at_most_once_in_twenty() -> None:
    rng = random.Random(1)
    wrong = 0
    for _ in range(400):
        a = b = 0
        for left in reversed(range(100)):
            first = rng.random() < 0.5
            a, b = a + first, b + (not first)
            words = verdict(a, b, pairs_left=left)
            if words:
                wrong += "better" in words
                break
    assert wrong / 400 <= 0.05
