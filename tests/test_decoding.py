"""A request's tokens do not depend on who shares its batch, and equal the original's greedy ones."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from policy_parts import observations, reference_image, reference_model, reference_numbers, requests, write_adapter
from torch._dynamo.utils import counters

import spvla
from spvla.errors import UserError
from spvla.model.kernels.compiled import decoding_kernels
from spvla.model.llama import adding_in_place
from spvla.model.openvla import OpenVLA, with_patches
from spvla.model.sampling import choose
from spvla.policies.openvla.actions import ActionStats, decode
from spvla.policies.openvla.decoding import Decoder
from spvla.policies.openvla.images import to_pixel_values
from spvla.policies.openvla.policy import OpenVLAPolicy
from spvla.policies.openvla.prompt import build_tiny_tokenizer, prompt_ids
from spvla.types import Observation


@pytest.fixture(scope="module")
def model() -> OpenVLA:
    """The reference model: its seven tokens differ from image to image and step to step."""
    return reference_model().requires_grad_(False)


@pytest.fixture(scope="module")
def policy(model: OpenVLA) -> OpenVLAPolicy:
    return OpenVLAPolicy(model=model, tokenizer=build_tiny_tokenizer(), norm_stats={}, name="reference")


@pytest.fixture(scope="module")
def alone(policy: OpenVLAPolicy) -> tuple[np.ndarray, np.ndarray]:
    """Sixteen requests, one at a time: ids (16, 7) and logits (16, 7, V)."""
    images, instructions = requests(16)
    parts = [policy.decode([i], [t], logits=True) for i, t in zip(images, instructions, strict=True)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@pytest.mark.parametrize("sample", [0, 1])
def test_greedy_ids_and_actions_equal_the_originals(model: OpenVLA, sample: int) -> None:
    numbers = reference_numbers()
    expected = numbers["samples"][sample]
    prompt = expected["input_ids"]
    out = Decoder(model, batch_size=1, max_prompt=len(prompt)).decode(
        to_pixel_values(reference_image(sample)[None]), [prompt], logits=True
    )
    assert out.ids[0].tolist() == expected["ids"]
    scale = np.abs(expected["logits"]).max()
    assert np.abs(out.logits[0, :, numbers["vocabulary_ids"]].numpy() - expected["logits"]).max() <= 1e-4 * scale
    stats = ActionStats.from_json(numbers["statistics"])
    assert stats.unnormalise(decode(out.ids[0].numpy())).tolist() == expected["action"]


def test_requests_are_told_apart(alone) -> None:
    assert len({tuple(row) for row in alone[0]}) > 8  # else equality below would show nothing


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_ragged_batches_give_each_row_its_own_tokens(policy: OpenVLAPolicy, alone, batch: int) -> None:
    images, instructions = requests(batch)
    ids, logits = policy.decode(images, instructions, logits=True)
    assert np.array_equal(ids, alone[0][:batch])
    assert np.allclose(logits, alone[1][:batch], atol=1e-4)


def test_cached_steps_equal_one_pass_over_the_whole_sequence(model: OpenVLA, policy: OpenVLAPolicy, alone) -> None:
    images, instructions = requests(2)
    for i in range(2):
        ids = torch.tensor([prompt_ids(policy.tokenizer, instructions[i]) + alone[0][i].tolist()])
        x = with_patches(model.embed(ids), model.patches(to_pixel_values(images[i][None])))
        logits = model.logits(model.hidden(x))[0, -8:-1]
        assert np.allclose(logits.numpy(), alone[1][i], atol=1e-4)


def test_prompts_are_packed_without_padding_but_what_a_graph_asks_for(model: OpenVLA) -> None:
    decoder = Decoder(model, batch_size=3, max_prompt=20)
    for extra, sizes in ((0, [266, 260, 276]), (12, [276, 262, 276]), (26, [276, 276, 276])):
        tokens = decoder._place([10, 4, 20], 802 + extra)
        assert decoder.inputs.starts.diff().tolist() == sizes and sum(sizes) == tokens
        rows, at = decoder.inputs.places[:tokens] // decoder.cache.slots, decoder.inputs.places[:tokens] % 282
        assert rows.bincount().tolist() == sizes and decoder.cache.slots == 282
        assert at.tolist() == [t for size in sizes for t in range(size)]


def test_a_fixed_bucket_fills_up_and_splits(model: OpenVLA, alone) -> None:
    policy = OpenVLAPolicy(
        model=model, tokenizer=build_tiny_tokenizer(), norm_stats={}, name="reference", decode_batch_size=4
    )
    images, instructions = requests(16)
    for count in (3, 6):  # filled up, and split
        assert np.array_equal(policy.decode(images[:count], instructions[:count]), alone[0][:count])


def test_two_threads_may_share_a_policy(model: OpenVLA, alone) -> None:
    policy = OpenVLAPolicy(
        model=model, tokenizer=build_tiny_tokenizer(), norm_stats={}, name="reference", decode_batch_size=4
    )
    images, instructions = requests(16)
    parts = [slice(start, start + 4) for start in range(0, 16, 4)]
    with ThreadPoolExecutor(2) as threads:
        ids = list(threads.map(lambda part: policy.decode(images[part], instructions[part]), parts))
    assert np.array_equal(np.concatenate(ids), alone[0])


def test_a_bucket_prepared_for_the_longest_instruction_serves_all(model: OpenVLA, alone) -> None:
    policy = OpenVLAPolicy(
        model=model, tokenizer=build_tiny_tokenizer(), norm_stats={}, name="reference", decode_batch_size=2
    )
    images, instructions = requests(6)
    policy.prepare(instructions)
    prepared = policy._decoder
    for i in (0, 2):  # each alone in its bucket, each at the longest one's length
        assert np.array_equal(policy.decode(images[i : i + 1], instructions[i : i + 1])[0], alone[0][i])
    assert policy._decoder is prepared
    policy.decode(images[:1], ["put the plate on the stove and then " * 4])  # longer than was prepared for
    assert policy._decoder is not prepared
    assert np.array_equal(policy.decode(images[:3], instructions[:3]), alone[0][:3])


def test_sampling_follows_the_seed_not_the_batch(policy: OpenVLAPolicy) -> None:
    images, instructions = requests(5)
    seeds = [3, 1, 4, 1, 5]
    together = policy.decode(images, instructions, temperature=2.0, seeds=seeds)
    for i, seed in enumerate(seeds):
        own = policy.decode(images[i : i + 1], instructions[i : i + 1], temperature=2.0, seeds=[seed])
        assert np.array_equal(own[0], together[i])
    other = policy.decode(images, instructions, temperature=2.0, seeds=[s + 10 for s in seeds])
    assert not np.array_equal(other, together)


def test_each_row_has_its_own_temperature(policy: OpenVLAPolicy, alone) -> None:
    images, instructions = requests(2)
    mixed = policy.decode(images, instructions, temperature=[0.0, 5.0], seeds=[0, 0])
    assert np.array_equal(mixed[0], alone[0][0]) and not np.array_equal(mixed[1], alone[0][1])


def test_drawn_tokens_have_the_distribution_of_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    n, temperature = 4000, 0.5
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # evenly spread: no luck involved
    drawn = choose(logits.expand(n, -1), torch.full((n,), temperature), uniforms)
    shares = torch.bincount(drawn, minlength=4) / n
    assert torch.allclose(shares, (logits[0] / temperature).softmax(0), atol=1e-3) and shares[2] == 0


def test_every_request_names_its_adapter_and_gets_it(tmp_path) -> None:
    policy = spvla.load_policy("tiny")
    paths = {f"v{i}": write_adapter(tmp_path / f"v{i}", rank=2 + 2 * i, seed=i) for i in range(2)}
    images, instructions = requests(3)
    base = policy.decode(images, instructions, logits=True)[1]
    for name, path in paths.items():
        policy.add_adapter(name, path)
    names = ["v1", None, "v0"]
    mixed = policy.decode(images, instructions, logits=True, adapters=names)[1]
    for i, name in enumerate(names):
        single = spvla.load_policy(paths[name]) if name else policy
        own = single.decode(images[i : i + 1], instructions[i : i + 1], logits=True)[1][0]
        assert np.allclose(mixed[i], own, atol=1e-4)
        assert name is None or np.abs(mixed[i] - base[i]).max() > 1e-2  # the adapter does something
    policy.remove_adapter("v1")
    policy.add_adapter("again", paths["v1"])  # takes the free slot
    again = policy.decode(images, instructions, logits=True, adapters=["again", None, "v0"])[1]
    assert np.allclose(again, mixed, atol=1e-5)
    for name in ("v0", "again"):
        policy.remove_adapter(name)
    assert np.array_equal(policy.decode(images, instructions, logits=True)[1], base)


def test_a_requests_bits_do_not_depend_on_what_else_is_resident(tmp_path, one_thread: None) -> None:
    policy = spvla.load_policy("tiny")
    images, instructions = requests(3)
    base = policy.decode(images, instructions, logits=True)[1]
    own = []
    for i, rank in enumerate((4, 4, 40, 200, 4)):  # the fourth and fifth make the stacks grow
        policy.add_adapter(f"v{i}", write_adapter(tmp_path / f"v{i}", rank=rank, seed=i))
        own.append(policy.decode(images, instructions, logits=True, adapters=["v0"] * 3)[1])
        assert np.array_equal(policy.decode(images, instructions, logits=True)[1], base)
    policy.remove_adapter("v0")
    policy.add_adapter("v3", write_adapter(tmp_path / "v3", seed=3))
    policy.add_adapter("again", tmp_path / "v0")  # in another slot than before
    own.append(policy.decode(images, instructions, logits=True, adapters=["again"] * 3)[1])
    assert all(np.array_equal(logits, own[0]) for logits in own) and not np.array_equal(own[0], base)


def test_swapping_a_version_in_moves_no_weight_of_the_base(tmp_path) -> None:
    policy = spvla.load_policy("tiny")
    places = {n: p.data_ptr() for n, p in policy.model.named_parameters()}
    policy.add_adapter("a", write_adapter(tmp_path / "a"))
    stacks = [m.lora.blocks[0].a[0].data_ptr() for m in policy.model.modules() if getattr(m, "lora", None)]
    policy.add_adapter("a", write_adapter(tmp_path / "b", seed=1))  # replaced in place
    assert places == {n: p.data_ptr() for n, p in policy.model.named_parameters()}
    assert stacks == [m.lora.blocks[0].a[0].data_ptr() for m in policy.model.modules() if getattr(m, "lora", None)]


def test_steps_are_compiled_once_for_all_layers(model: OpenVLA, policy: OpenVLAPolicy, alone) -> None:
    images, instructions = requests(2)
    prompts = [prompt_ids(policy.tokenizer, text) for text in instructions]
    decoder = Decoder(model, batch_size=2, max_prompt=max(map(len, prompts)))
    decoder.kernels = adding_in_place(decoding_kernels("eager"))  # traced as for a GPU, run as it stands
    before = counters["stats"]["unique_graphs"]
    out = decoder.decode(to_pixel_values(np.stack(images)), prompts)
    assert np.array_equal(out.ids.numpy(), alone[0][:2])
    # blocks of two towers; heads for prompts, with queries and without, qkv for single tokens, gate_up for either
    assert counters["stats"]["unique_graphs"] - before == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [np.zeros((224, 224), np.uint8)]}, r"images\[0\]"),
        ({"images": [np.zeros((224, 224, 3), np.float32)]}, r"images\[0\]"),
        ({"images": [np.zeros((256, 256, 3), np.uint8)]}, r"images\[0\]"),
        ({"images": []}, "no images"),
        ({"instructions": [""]}, "instruction"),
        ({"instructions": ["a", "b"]}, "instructions: 2 for 1"),
        ({"temperature": 1.0}, "seeds"),
        ({"adapters": ["nobody"]}, "nobody"),
    ],
)
def test_bad_requests_get_one_clear_error(policy: OpenVLAPolicy, change: dict, message: str) -> None:
    images, instructions = requests(1)
    with pytest.raises(UserError, match=message):
        policy.decode(**{"images": images, "instructions": instructions, **change})


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (Observation(images=(), instruction="a"), r"observations\[0\] with 0 images; expected 1: agentview"),
        (Observation(images=(np.zeros((256, 256, 3), np.uint8),), instruction="a"), r"observations\[0\].images\[0\]"),
    ],
)
def test_an_observation_that_lacks_what_the_policy_needs_is_refused(
    policy: OpenVLAPolicy, observation: Observation, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        policy.act([observation], unnorm_key="libero_goal")


def test_an_unknown_unnorm_key_lists_the_known_ones(model: OpenVLA) -> None:
    stats = {"libero_goal": {"action": reference_numbers()["statistics"]}}
    policy = OpenVLAPolicy(model=model, tokenizer=build_tiny_tokenizer(), norm_stats=stats, name="reference")
    with pytest.raises(UserError, match="libero_goal"):
        policy.act(observations(1), unnorm_key="libero_spatial")
    actions = policy.act(observations(1), unnorm_key="libero_goal")
    assert actions.shape == (1, 1, 7) and actions.dtype == np.float64
