"""Action tokens, statistics and gripper: by hand at the edges, and equal to the original's outputs on every case."""

import json
from pathlib import Path

import numpy as np
import pytest

from spvla.errors import UserError
from spvla.policies.openvla.actions import (
    ACTION_TOKEN_BEGIN,
    ActionStats,
    decode,
    encode,
    env_to_dataset,
    gripper_to_env,
)


@pytest.fixture(scope="module")
def cases(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "actions.npz"))


def stats(**changes: list) -> ActionStats:
    d = {"q01": [-1.0, 0.0, 2.0], "q99": [1.0, 4.0, 2.0], "min": [-2.0, 0.0, 2.0], "max": [2.0, 5.0, 2.0]}
    return ActionStats.from_json(d | {"mask": [True, True, True]} | changes)


def test_the_ends_and_the_middle_have_the_ids_of_the_paper() -> None:
    assert encode(np.array([1.0, -1.0, 0.0, np.inf, -np.inf, np.nan])).tolist() == [
        *(31744, 31999, 31872),
        *(31744, 31999, 31744),
    ]


def test_every_action_id_is_above_the_mask_and_survives_a_round_trip() -> None:
    ids = np.arange(31745, 32000)  # 31744 decodes like 31745
    assert (ids > ACTION_TOKEN_BEGIN).all()
    assert np.array_equal(encode(decode(ids)), ids)
    assert decode(np.array([31744])) == decode(np.array([31745])) == 254 / 255


def test_ids_that_are_no_action_decode_to_the_nearest() -> None:
    assert decode(np.array([5, 32063])).tolist() == [254 / 255, -254 / 255]


@pytest.mark.parametrize("kind", ["f64", "f32", "special"])
def test_ids_equal_the_originals_on_grids_with_edges(cases: dict[str, np.ndarray], kind: str) -> None:
    assert np.array_equal(encode(cases[f"grid_{kind}"]), cases[f"tokens_{kind}"])
    assert np.array_equal(decode(cases[f"tokens_{kind}"]), cases[f"decoded_{kind}"])


def test_batches_and_odd_ids_equal_the_originals(cases: dict[str, np.ndarray]) -> None:
    assert np.array_equal(encode(cases["batch_in"]), cases["batch_tokens"])
    assert np.array_equal(decode(cases["decode_ids"]), cases["decode_vals"])


def test_actions_equal_the_originals_after_unnormalising(cases: dict[str, np.ndarray], golden: Path) -> None:
    d = json.loads((golden / "model/dataset_statistics.json").read_text())["libero_spatial_no_noops"]["action"]
    full = ActionStats.from_json(d)
    assert np.array_equal(full.unnormalise(decode(cases["predict_tokens"])), cases["predict_actions"])
    assert np.array_equal(full.unnormalise(decode(cases["unnorm_tokens"][:, None])), cases["unnorm_actions"])


def test_without_a_mask_every_dimension_is_scaled() -> None:
    assert ActionStats.from_json({"q01": [0.0, 0.0], "q99": [2.0, 4.0]}).unnormalise(np.array([0.0, 1.0])).tolist() == [
        *(1.0, 4.0),
    ]


def test_the_gripper_equals_the_originals(cases: dict[str, np.ndarray]) -> None:
    actions = np.zeros((len(cases["grip_in"]), 7))
    actions[:, 6] = cases["grip_in"]
    turned = gripper_to_env(actions)[:, 6]
    assert np.array_equal(turned, cases["grip_final"], equal_nan=True)
    assert np.array_equal(np.signbit(turned), np.signbit(cases["grip_final"]))  # 0.5 -> -0


def test_gripper_forms_are_each_others_inverse() -> None:
    raw = np.zeros((2, 7), np.float32)
    raw[:, 6] = [-1, 1]  # open, closed
    assert env_to_dataset(raw)[:, 6].tolist() == [1.0, 0.0]
    assert np.array_equal(gripper_to_env(env_to_dataset(raw)), raw)


def test_normalising_by_hand() -> None:
    n = stats().normalise(np.array([[0.0, 1.0, 2.0], [5.0, -3.0, 2.0]], np.float32))
    assert n.tolist() == [[0.0, -0.5, 0.0], [1.0, -1.0, 0.0]]  # the third never varies
    assert n.dtype == np.float32
    assert stats(mask=[True, False, True]).normalise(np.array([0.0, 1.0, 2.0])).tolist() == [0.0, 1.0, 0.0]


def test_normalising_is_equal_to_the_bit(golden: Path) -> None:
    z = np.load(golden / "normalise.npz")
    stats = ActionStats.from_json({key: z[key] for key in ("q01", "q99", "mask", "min", "max")})
    assert np.array_equal(stats.normalise(z["raw"]), z["normalised"])


def test_the_width_of_a_dimension_is_rounded_once() -> None:
    """0.3 - 0.1 + 1e-8 is 0.20000002 in float32; with each term rounded first, 0.20000003."""
    found = stats(q01=[0.1] * 3, q99=[0.3] * 3).normalise(np.full(3, 0.15, np.float32))
    x, width = np.float32(0.15) - np.float32(0.1), np.float32(0.3 - 0.1 + 1e-8)
    assert found[0] == np.float32(2) * x / width - np.float32(1)


def test_normalised_actions_equal_the_originals(golden: Path) -> None:
    d = json.loads((golden / "rlds/dataset_statistics.json").read_text())["libero_spatial_no_noops"]["action"]
    z = np.load(golden / "rlds/golden.npz")
    trajectories = [k.removesuffix("_raw_action") for k in z.files if k.endswith("_raw_action")]
    assert len(trajectories) == 19
    for t in trajectories:
        normalised = ActionStats.from_json(d).normalise(env_to_dataset(z[f"{t}_raw_action"]))
        assert np.array_equal(normalised, z[f"{t}_action"]), t


def test_statistics_without_quantiles_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="without q99"):
        ActionStats.from_json({"q01": [0.0]})
