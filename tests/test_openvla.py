"""The network's numbers equal the original's: features, logits, loss and the norm of every gradient."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from policy_parts import gradients_of, reference_image, reference_model, reference_numbers

from spvla.errors import CheckpointError
from spvla.model.attention import Masked
from spvla.model.lora_file import fresh_lora
from spvla.model.openvla import OpenVLA, OpenVLAConfig, with_patches
from spvla.policies.checkpoint import load_model
from spvla.policies.openvla.images import to_pixel_values
from spvla.policies.openvla.presets import preset

RELATIVE = 1e-4


@pytest.fixture(scope="module")
def model() -> OpenVLA:
    return reference_model()


def pixels(*which: int) -> torch.Tensor:
    return to_pixel_values(np.stack([reference_image(i) for i in which]))


def close(actual: torch.Tensor | np.ndarray, expected: np.ndarray) -> bool:
    """Within 1e-4 of the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return np.abs(actual - expected).max() <= RELATIVE * np.abs(expected).max()


@pytest.mark.parametrize("sample", [0, 1])
def test_features_of_both_towers_and_the_projector_equal_the_originals(model: OpenVLA, sample: int) -> None:
    expected = reference_numbers()["samples"][sample]
    with torch.no_grad():
        dino, siglip = model.vision_backbone(pixels(sample)).split([48, 40], -1)
        found = {"dino_patches": dino, "siglip_patches": siglip, "projected_patches": model.patches(pixels(sample))}
    for name, features in found.items():
        assert features.norm().item() == pytest.approx(expected[name]["norm"], rel=RELATIVE)
        for row, values in expected[name]["rows"].items():
            assert close(features[0, int(row), :8], values)


@pytest.mark.parametrize("sample", [0, 1])
def test_logits_of_the_seven_steps_equal_the_originals(model: OpenVLA, sample: int) -> None:
    numbers = reference_numbers()
    expected = numbers["samples"][sample]
    ids = torch.tensor([expected["input_ids"] + expected["ids"]])
    with torch.no_grad():
        logits = model(pixels(sample), ids).logits[0, -8:-1]
    assert close(logits[:, numbers["vocabulary_ids"]], expected["logits"])
    assert close(logits.logsumexp(-1), expected["logsumexp"])
    assert logits.argmax(-1).tolist() == expected["ids"]


def test_loss_and_every_gradient_norm_equal_the_originals(model: OpenVLA) -> None:
    train = reference_numbers()["train"]
    inputs = [torch.tensor(train[k]) for k in ("input_ids", "attention_mask", "labels")]
    loss = model(pixels(0, 1, 2, 3), *inputs).loss
    loss.backward()
    assert loss.item() == pytest.approx(train["loss"], rel=RELATIVE)
    norms = {name: -1 if g is None else g.norm().item() for name, g in gradients_of(model).items()}
    model.zero_grad()
    assert norms.keys() == train["gradient_norms"].keys()
    for name, expected in train["gradient_norms"].items():
        assert norms[name] == pytest.approx(expected, rel=RELATIVE), name


def test_the_checkpoints_own_files_give_the_originals_numbers(golden: Path) -> None:
    data, model = np.load(golden / "model/golden.npz"), load_model(golden / "model")
    with torch.no_grad():
        for s in ("s0", "s1"):
            x = torch.from_numpy(data[f"{s}_pixel_values"])
            dino, siglip = model.vision_backbone(x).split([48, 40], -1)
            assert close(dino, data[f"{s}_dino_patches"]) and close(siglip, data[f"{s}_siglip_patches"])
            assert close(model.patches(x), data[f"{s}_projected_patches"])
            logits = model(x, torch.from_numpy(data[f"{s}_full_ids"])).logits[0, -8:-1]
            assert close(logits, data[f"{s}_step_logits"])


def test_a_given_mask_and_positions_score_two_continuations_of_one_prefix(model: OpenVLA) -> None:
    """[prefix, real, generated] in one pass, generated blind to real, equals two passes."""
    prompt, real, other = torch.tensor([[1, 512, 278, 29871]]), torch.arange(31800, 31807), torch.arange(31900, 31907)
    with torch.no_grad():
        x = with_patches(model.embed(torch.cat((prompt[0], real, other))[None]), model.patches(pixels(0)))
        prefix, n = 256 + 4, x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        mask[prefix + 7 :, prefix : prefix + 7] = False
        positions = torch.cat((torch.arange(prefix + 7), torch.arange(prefix, prefix + 7)))[None]
        both = model.logits(model.hidden(x, Masked(mask[None, None]), positions=positions))
        for ids, rows in ((real, slice(prefix, prefix + 7)), (other, slice(prefix + 7, n))):
            alone = model(pixels(0), torch.cat((prompt[0], ids))[None]).logits[:, -7:]
            assert torch.allclose(both[:, rows], alone, atol=1e-4)
        additive = torch.zeros(n, n).masked_fill(~mask, -torch.inf)[None, None]
        again = model.logits(model.hidden(x, Masked(additive), positions=positions))
        assert torch.allclose(again, both, atol=1e-5)


def test_right_padding_changes_nothing_before_it(model: OpenVLA) -> None:
    ids = torch.tensor([[1, 512, 278, 29871, 31800]])
    padded = torch.tensor([[1, 512, 278, 29871, 31800, 32000, 32000]])
    with torch.no_grad():
        plain = model(pixels(0), ids).logits
        for mask in (None, (padded != 32000).long()):
            assert torch.allclose(model(pixels(0), padded, mask).logits[:, :-2], plain, atol=1e-5)


def test_the_7b_preset_has_the_real_checkpoints_tensors() -> None:
    with torch.device("meta"):
        state = OpenVLA(preset("7b")).state_dict()
    assert len(state) == 982 and sum(t.numel() for t in state.values()) == 7_541_237_184


def test_names_and_shapes_of_the_real_checkpoint_and_its_lora(golden: Path) -> None:
    with torch.device("meta"):
        model = OpenVLA(preset("7b"))
    lines = (golden / "openvla7b_keys.txt").read_text().splitlines()
    assert {n: str(tuple(t.shape)) for n, t in model.state_dict().items()} == dict(line.split("\t") for line in lines)
    with torch.device("meta"):
        factors = fresh_lora(model, rank=32).factors
    lora = {
        f"base_model.model.{name}.lora_{part}.default.weight": f"{tuple(t.shape)}\t{t.dtype}"
        for name, pair in factors.items()
        for part, t in zip("AB", pair, strict=True)
    }
    lines = (golden / "openvla7b_lora_keys.txt").read_text().splitlines()
    assert lora == dict(line.split("\t", 1) for line in lines)


def test_sizes_are_read_off_a_checkpoints_tensors() -> None:
    config = preset("7b")
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in OpenVLA(config).state_dict().items()}
    text = {"model_type": "llama", "vocab_size": 32064}  # all that the real config.json says
    assert OpenVLAConfig.from_json({"text_config": text}, shapes) == config
    with pytest.raises(CheckpointError, match="pos_embed"):
        OpenVLAConfig.from_json({}, {n: s for n, s in shapes.items() if "featurizer.pos_embed" not in n})
    with pytest.raises(CheckpointError, match="key heads"):
        OpenVLAConfig.from_json({"text_config": {**text, "num_key_value_heads": 8}}, shapes)


def test_the_reference_model_is_the_one_that_the_original_ran(golden: Path, model: OpenVLA) -> None:
    stored = load_model(golden / "model").state_dict()
    assert all(torch.equal(t, stored[n]) for n, t in model.state_dict().items())
    heads = json.loads((golden / "model/tiny_vision.json").read_text())
    assert [t["num_heads"] for t in heads.values()] == [model.config.dino.num_heads, model.config.siglip.num_heads]
