"""Acting in chunks: any mixture of instructions and adapters in one batch, repeatable, and clear about bad input."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oft_parts import create_oft, observations, write_oft_adapter

from spvla.errors import UserError
from spvla.policies.checkpoint import norm_stats
from spvla.policies.oft.checkpoint import open_model
from spvla.policies.oft.folder import form_of
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.policy import OpenVLAOFTPolicy
from spvla.policies.openvla.prompt import load_tokenizer

FORMS = [
    OftForm(cameras=2, proprio=True, action_tokens_only=True, learned_slots=True),
    OftForm(cameras=2, proprio=True, head="l1"),
]


def open_policy(folder: Path, **options: int) -> OpenVLAOFTPolicy:
    model = open_model(folder, form_of(folder))
    stats, tokenizer = norm_stats(folder), load_tokenizer(folder)
    return OpenVLAOFTPolicy(model=model, tokenizer=tokenizer, norm_stats=stats, name=str(folder), **options)


@pytest.fixture(scope="module", params=FORMS, ids=["discrete", "l1"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_oft(tmp_path_factory.mktemp("oft") / "base", request.param)


def test_a_batch_of_any_mixture_answers_as_each_alone(folder: Path) -> None:
    policy, asked = open_policy(folder), observations(5)
    together = policy.act(asked, unnorm_key="suite")
    alone = np.concatenate([policy.act([o], unnorm_key="suite") for o in asked])
    assert together.shape == (5, 8, 7) and np.allclose(together, alone, atol=1e-4)
    assert len({chunk.tobytes() for chunk in together}) == 5  # images, states and instructions matter


def test_in_a_fixed_bucket_no_chunk_depends_on_who_shares_its_batch(folder: Path, one_thread: None) -> None:
    policy, asked = open_policy(folder, decode_batch_size=3), observations(5)
    policy.prepare([o.instruction for o in asked])
    together = policy.act(asked, unnorm_key="suite")
    shuffled = policy.act([asked[i] for i in (4, 2, 0, 1, 3)], unnorm_key="suite")
    alone = np.concatenate([policy.act([o], unnorm_key="suite") for o in asked])
    assert np.array_equal(together, alone) and np.array_equal(shuffled, together[[4, 2, 0, 1, 3]])


def test_the_state_and_the_wrist_matter(tmp_path: Path) -> None:
    """Seen in regressed numbers; random weights seldom change a token over one of 570 positions."""
    policy = open_policy(create_oft(tmp_path / "base", OftForm(cameras=2, proprio=True, head="l1")))
    seen, other = observations(2)
    base = policy.act([seen], unnorm_key="suite")
    for name, value in (("proprio", other.proprio), ("images", (seen.images[0], other.images[1]))):
        assert not np.allclose(policy.act([replace(seen, **{name: value})], unnorm_key="suite"), base, atol=1e-6)


def test_adapters_share_a_batch_and_act_as_they_do_alone(folder: Path, tmp_path: Path) -> None:
    """Each with its own LoRA, projector and head."""
    policy, asked = open_policy(folder, decode_batch_size=4), observations(4)
    base = policy.act(asked, unnorm_key="suite")
    for i in (1, 2):
        policy.add_adapter(f"a{i}", write_oft_adapter(tmp_path / f"a{i}", folder, seed=i))
    names = ["a1", None, "a2", "a1"]
    mixed = policy.act(asked, unnorm_key="suite", adapters=names)
    for i, name in enumerate(names):
        assert np.allclose(mixed[i], policy.act(asked, unnorm_key="suite", adapters=[name] * 4)[i], atol=1e-5)
    assert np.allclose(mixed[1], base[1], atol=1e-5)
    assert not np.allclose(mixed[0], base[0], atol=1e-2) and not np.allclose(mixed[3], base[3], atol=1e-2)
    policy.remove_adapter("a1")
    policy.remove_adapter("a2")
    assert np.array_equal(policy.act(asked, unnorm_key="suite"), base)


def test_a_slot_that_is_given_on_keeps_its_memory(folder: Path, tmp_path: Path) -> None:
    """A recorded pass goes on reading there: what it reads is the newer adapter's."""
    policy, asked = open_policy(folder, decode_batch_size=2), observations(2)
    adapters = [write_oft_adapter(tmp_path / f"a{i}", folder, seed=i) for i in range(3)]
    policy.add_adapter("stays", adapters[0])
    policy.add_adapter("old", adapters[1])
    place = policy.model.versions[policy.bank.resident["old"]]["proprio_projector"].fc1.weight.data_ptr()
    policy.remove_adapter("old")
    policy.add_adapter("new", adapters[2])
    assert policy.model.versions[policy.bank.resident["new"]]["proprio_projector"].fc1.weight.data_ptr() == place
    alone = open_policy(folder, decode_batch_size=2)
    alone.add_adapter("new", adapters[2])
    new = [policy_.act(asked, unnorm_key="suite", adapters=["new"] * 2) for policy_ in (policy, alone)]
    assert np.allclose(*new, atol=1e-5)


def test_what_an_observation_lacks_is_told(folder: Path) -> None:
    policy, (seen,) = open_policy(folder), observations(1)
    with pytest.raises(UserError, match="1 images; expected 2"):
        policy.act([replace(seen, images=seen.images[:1])], unnorm_key="suite")
    with pytest.raises(UserError, match="proprio"):
        policy.act([replace(seen, proprio=None)], unnorm_key="suite")


def test_statistics_without_proprio_are_told(folder: Path) -> None:
    policy = open_policy(folder)
    policy.norm_stats = {"suite": {"action": policy.norm_stats["suite"]["action"]}}
    policy._stats = {}
    with pytest.raises(UserError, match="statistics of suite without proprio"):
        policy.act(observations(1), unnorm_key="suite")


def test_only_action_tokens_compete_where_the_form_says_so(tmp_path: Path) -> None:
    folder = create_oft(tmp_path / "base", OftForm(action_tokens_only=True))
    ids = open_policy(folder).decode(
        [type(o)(images=o.images[:1], instruction=o.instruction) for o in observations(2)], unnorm_key="suite"
    )
    assert ids.shape == (2, 56) and ids.min() >= 31744 and ids.max() <= 31999
