"""OpenVLA-OFT's numbers equal the original's: hidden states, logits, actions, loss and the norm of every gradient."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oft_parts import enlarge, oft_inputs, reference_oft, reference_oft_model, statistics
from policy_parts import gradients_of, reference_image

from spvla.model.kernels.compiled import decoding_kernels
from spvla.model.llama import EAGER, Kernels
from spvla.model.openvla import IGNORED
from spvla.policies.oft.chunks import decode_chunk, unnormalise
from spvla.policies.oft.decoding import acting_kernels
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.network import OftInputs, OpenVLAOFT, reads, visible_keys
from spvla.policies.oft.proprio import ProprioStats
from spvla.policies.openvla.actions import ActionStats
from spvla.policies.openvla.images import to_pixel_values
from spvla.policies.openvla.prompt import load_tokenizer, prompt_ids

RELATIVE = 1e-4
FIRST = 31744  # the golden logits' first column


@pytest.fixture(scope="module")
def regressing() -> OpenVLAOFT:
    return reference_oft_model(OftForm(cameras=2, proprio=True, head="l1"))


def close(actual: torch.Tensor | np.ndarray, expected: np.ndarray) -> bool:
    """Within 1e-4 of the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return np.abs(actual - expected).max() <= RELATIVE * np.abs(expected).max()


def action_stats(golden: Path) -> ActionStats:
    return ActionStats.from_json(statistics(golden)["action"])


@pytest.mark.parametrize("case", ["s0", "s1", "s2", "s3", "w0"])
def test_the_discrete_form_gives_the_originals_tokens(golden: Path, case: str) -> None:
    data = np.load(golden / "oft/discrete.npz")
    images = [data[f"image{case[1]}"]] + ([data["wrist_image_w"]] if case == "w0" else [])
    network = reference_oft_model(OftForm(cameras=len(images)))
    ids = data[f"{case}_input_ids"].tolist()
    tokenizer = load_tokenizer(golden / "model")
    assert prompt_ids(tokenizer, str(data["instructions"][int(case[1])])) == ids
    inputs = oft_inputs([enlarge(image) for image in images], ids)
    pixels = inputs.pixels.flatten(1, 2).numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == str(data[f"{case}_pixels_sha256"])
    with torch.no_grad():
        hidden = network.predict(inputs)[0, :-1]
        logits = network.logits(hidden)
    assert close(hidden, data[f"{case}_hidden"])
    assert close(logits[:, FIRST:], data[f"{case}_logits"]) and close(logits.logsumexp(-1), data[f"{case}_lse"])
    tokens = logits.argmax(-1).numpy()
    assert np.array_equal(tokens, data[f"{case}_tokens"])
    normalised = decode_chunk(tokens)
    assert np.array_equal(normalised, data[f"{case}_normalized"])
    assert np.array_equal(unnormalise(normalised, action_stats(golden)), data[f"{case}_actions"])


@pytest.mark.parametrize("case", range(4))
def test_the_regressed_chunk_equals_the_originals(golden: Path, regressing: OpenVLAOFT, case: int) -> None:
    data = np.load(golden / "oft/l1.npz")
    proprio = ProprioStats.from_json(statistics(golden)["proprio"], name="libero").for_evaluation(data[f"state{case}"])
    assert np.array_equal(proprio, data[f"s{case}_state_normalized"])
    images = [enlarge(data[f"{name}{case}"]) for name in ("image", "wrist")]
    inputs = oft_inputs(images, data[f"s{case}_input_ids"].tolist(), proprio=proprio)
    with torch.no_grad():
        inserted = regressing.sequence(inputs)[0, [1, 256, 257, 512, 513]]
        hidden = regressing.predict(inputs)[:, :-1]
        normalised = regressing.action_head(hidden)[0].numpy()
    assert close(inserted, data[f"s{case}_patches_proprio"]) and close(hidden[0], data[f"s{case}_hidden"])
    assert close(normalised, data[f"s{case}_normalized"])
    assert close(unnormalise(normalised, action_stats(golden)), data[f"s{case}_actions"])


def test_normalisation_equals_the_originals_on_edges(golden: Path) -> None:
    data = np.load(golden / "oft/l1.npz")
    stats = {key: data[f"grid_{key}"] for key in ("q01", "q99", "min", "max")}
    proprio = ProprioStats.from_json(stats, name="grid")
    assert np.array_equal(proprio.for_evaluation(data["grid_in"]), data["grid_eval"], equal_nan=True)
    assert np.array_equal(proprio.for_training(data["grid_train_in"]), data["grid_train"], equal_nan=True)
    assert np.array_equal(unnormalise(data["unnorm_in"], action_stats(golden)), data["unnorm_out"])


def training_inputs(data: np.lib.npyio.NpzFile, cameras: int) -> tuple[OftInputs, np.ndarray]:
    """The batch of three, and its labels (3, 57)."""
    frames = np.stack([[enlarge(data[f"{name}{i}"]) for name in ("image", "wrist")[:cameras]] for i in range(3)])
    labels = data["labels"]
    start = torch.from_numpy((labels != IGNORED).argmax(1))
    pixels = to_pixel_values(frames.reshape(-1, 224, 224, 3)).unflatten(0, (3, cameras))
    proprio = torch.from_numpy(data["proprio"]) if cameras == 2 else None
    inputs = OftInputs(pixels=pixels, proprio=proprio, text=torch.from_numpy(data["input_ids"]), start=start)
    return inputs, labels[labels != IGNORED].reshape(3, 57)


def assert_same_gradients(data: np.lib.npyio.NpzFile, kind: str, network: OpenVLAOFT) -> None:
    found = {n: -1 if g is None else g.norm().item() for n, g in gradients_of(network).items()}
    for name, expected in zip(data[f"{kind}_grad_names"].tolist(), data[f"{kind}_grad_norms"], strict=True):
        assert found[name] == pytest.approx(expected, rel=RELATIVE, abs=1e-9), name


def test_the_discrete_forms_loss_and_gradients_equal_the_originals(golden: Path) -> None:
    data = np.load(golden / "oft/train.npz")
    network = reference_oft_model(OftForm())
    inputs, labels = training_inputs(data, cameras=1)
    seen = visible_keys(inputs, 56, 256)
    assert np.array_equal(seen.numpy(), data["ce_visible_keys"])
    logits = network.logits(network.predict(inputs))
    losses = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten(), reduction="none").view(3, 57)
    assert close(losses.detach(), data["ce_token_losses"]) and close(logits.logsumexp(-1).detach(), data["ce_lse"])
    assert np.array_equal(logits.argmax(-1).numpy(), data["ce_predicted"])
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(float(data["ce_loss"]), rel=RELATIVE)
    assert_same_gradients(data, "ce", network)


def test_the_regressing_forms_loss_and_gradients_equal_the_originals(golden: Path, regressing: OpenVLAOFT) -> None:
    data = np.load(golden / "oft/train.npz")
    inputs, _ = training_inputs(data, cameras=2)
    assert np.array_equal(visible_keys(inputs, 56, 513).numpy(), data["l1_visible_keys"])
    hidden = regressing.predict(inputs)[:, :-1]
    predicted = regressing.action_head(hidden)
    assert close(hidden.detach(), data["l1_hidden"]) and close(predicted.detach(), data["l1_predicted"])
    loss = (predicted - torch.from_numpy(data["actions"])).abs().mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(data["l1_loss"]), rel=RELATIVE)
    assert_same_gradients(data, "l1", regressing)
    regressing.zero_grad(set_to_none=True)


def test_outputs_are_read_one_position_before_their_slots() -> None:
    """Prompt of 5, one image: BOS at 0, patches 1..256, the prompt's last token at 260, slots 261..316, stop 317."""
    inputs = OftInputs(
        pixels=torch.zeros(1, 1, 6, 1, 1), proprio=None, text=torch.zeros(1, 70).long(), start=torch.tensor([5])
    )
    rows = reads(inputs, 56, 256)[0]
    assert rows[0] == 260 and rows[-1] == 316 and len(rows) == 57
    assert visible_keys(inputs, 56, 256)[0].sum() == 318


def test_numbers_stay_those_that_equalled_the_originals(regressing: OpenVLAOFT) -> None:
    """oft.json was written by this code while it agreed with the original's files, which not every machine has."""
    expected = reference_oft()
    ids = [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 20000, 29973, 13, 3744, 29901, 29871]
    images, proprio = [reference_image(0), reference_image(1)], np.linspace(-1, 1, 8)
    discrete = reference_oft_model(OftForm(cameras=2))
    with torch.no_grad():
        logits = discrete.logits(discrete.predict(oft_inputs(images, ids)))[0]
        actions = regressing.action_head(regressing.predict(oft_inputs(images, ids, proprio=proprio))[:, :-1])[0]
    assert logits.argmax(-1).tolist() == expected["tokens"]
    assert close(logits.logsumexp(-1), expected["logsumexp"])
    assert close(actions, expected["actions"])


@pytest.mark.parametrize("steps", [EAGER, decoding_kernels("eager")], ids=["plain", "traced"])
def test_a_decoders_steps_answer_as_the_plain_pass(regressing: OpenVLAOFT, steps: Kernels) -> None:
    ids = [1, 512, 29901, 1724, 3158, 29871]
    inputs = oft_inputs([reference_image(0), reference_image(1)], ids, proprio=np.linspace(-1, 1, 8))
    with torch.inference_mode():
        expected = regressing.predict(inputs)
        assert close(regressing.predict(inputs, acting_kernels(steps)), expected)
