"""A packed checkpoint comes back as the same policy, in a fraction of the bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from spvla.errors import CheckpointError
from spvla.model.weights import open_weights, write_tensors
from spvla.policies import packed
from spvla.policies.checkpoint import resolve
from spvla.policies.openvla.prompt import known_ids, prompt_ids
from spvla.policies.registry import load_policy
from spvla.types import Observation


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed.pack(resolve("tiny"), tmp_path_factory.mktemp("packed") / "tiny")


def test_what_is_used_comes_back_in_bfloat16_and_the_rest_in_its_shape(packed_folder: Path, tmp_path: Path) -> None:
    packed.unpack(packed_folder, tmp_path)
    before, after = open_weights(resolve("tiny")), open_weights(tmp_path)
    assert before.shapes == after.shapes
    kept = torch.tensor(known_ids())
    for name in before.shapes:
        here, there = before.read(name).bfloat16(), after.read(name)
        if name in packed.VOCABULARY:
            assert torch.equal(here[kept], there[kept]) and torch.equal(there[5000], there[6000])
        elif ".blocks.3." in name.replace("fused_featurizer.blocks.2", "blocks.3") or ".attn_pool." in name:
            assert not there.any()
        elif not name.endswith(("featurizer.norm.weight", "featurizer.norm.bias")):
            assert torch.equal(here, there), name


def test_the_vocabulary_travels_as_the_rows_that_prompts_and_actions_use(packed_folder: Path) -> None:
    rows = dict(packed.read_headers([packed_folder / packed.PACKED]))[packed.ROWS]
    assert len(rows) == len(known_ids()) < 400
    whole = sum(f.stat().st_size for f in resolve("tiny").glob("*.safetensors"))
    assert (packed_folder / packed.PACKED).stat().st_size < whole / 8


def test_the_unpacked_policy_opens_and_its_prompts_are_made_of_kept_rows(packed_folder: Path, tmp_path: Path) -> None:
    packed.unpack(packed_folder, tmp_path)
    ids = prompt_ids(load_policy(tmp_path).tokenizer, "pick up the milk and place it in the basket")
    assert set(ids) <= set(known_ids())


def test_a_checkpoint_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_tensors({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer of its own"):
        packed.pack(tmp_path, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_the_shipped_policy_opens_by_name_and_answers_with_a_chunk() -> None:
    policy = load_policy("spvla-small")
    picture = np.full((224, 224, 3), 128, np.uint8)
    seen = Observation(
        images=(picture, picture), instruction="pick up the milk and place it in the basket", proprio=np.zeros(8, "f4")
    )
    actions = policy.act([seen], unnorm_key="libero_object_no_noops")
    assert policy.needs.cameras == ("agentview", "robot0_eye_in_hand") and actions.shape == (1, 8, 7)
    assert np.abs(actions[0, :, :6]).max() <= 1


def test_what_ships_stays_small() -> None:
    assert sum(f.stat().st_size for f in packed.shipped()["spvla-small"].iterdir()) < 24 << 20
