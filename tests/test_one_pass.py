"""Training and decoding compute one function: the log-probs of a step are those of the actions as they were decoded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from policy_parts import random_lora, reference_model, requests, write_adapter
from selfplay_parts import PAD, ragged_batch
from torch._dynamo.utils import counters

import spvla
from spvla.config import StepConfig
from spvla.files import write_json
from spvla.model.kernels.compiled import training_kernels
from spvla.model.llama import EAGER
from spvla.model.lora_file import read_lora
from spvla.model.openvla import OpenVLA
from spvla.policies.checkpoint import load_model
from spvla.policies.openvla.presets import TOWER_FILE, towers_json, write_model
from spvla.policies.openvla.prompt import EOS, prompt_ids
from spvla.train.flat import FlatLora
from spvla.train.losses import token_logps
from spvla.train.network import Network
from spvla.train.scoring import score_pair, to_inputs
from spvla.train.step import Learner
from spvla.types import Batch

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PLACES = [
    pytest.param("cpu", "float32", 1e-6, id="cpu"),
    pytest.param("cpu", "bfloat16", 0.01, id="cpu in bfloat16"),
    pytest.param("cuda", "bfloat16", 0.01, id="gpu", marks=[pytest.mark.gpu, on_gpu]),
]


@pytest.mark.parametrize(("device", "dtype", "close"), PLACES)
def test_a_steps_log_probs_are_those_of_decoding(
    device: str, dtype: str, close: float, tmp_path: Path, one_thread: None
) -> None:
    """Five prompts of different lengths, decoded together with a served adapter; then scored with it as it is trained,
    as the real action and as the opponent's. The difference is told in parts of the largest logit, whose rounding it
    is: float32 has 24 bits, bfloat16 eight (0.3% on a CPU)."""
    base = write_checkpoint(reference_model(), tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base=base, rank=16)
    images, instructions = requests(5)
    policy = spvla.load_policy(base, device=device, dtype=dtype)
    policy.add_adapter("a", adapter)
    ids, logits = policy.decode(images, instructions, logits=True, adapters=["a"] * 5)
    decoded, size = token_logps(torch.from_numpy(logits), torch.from_numpy(ids)), np.abs(logits).max()  # (5, 7)
    prompts = [prompt_ids(policy.tokenizer, text) for text in instructions]
    assert len({len(p) for p in prompts}) > 3

    lora, model = read_lora(adapter), load_model(base, device=device, dtype=dtype)
    learner = Learner(model, StepConfig(beta=0.5), policy=lora, opponent=lora)
    ((batch,),) = learner.prepare([[batch_of(np.stack(images), prompts, ids)]])
    assert torch.equal(batch.reference.generated.cpu(), torch.from_numpy(ids))  # the opponent decodes them too
    with torch.no_grad(), learner.policy.attached():
        patches = learner.encoder(batch.inputs.pixels)
        real, generated = learner.objective.score(learner.family, batch.inputs, batch.reference, patches)
    scored = learner.objective.sampler.logps(real[:, :7], batch.inputs.real)
    for ours in (scored, generated, batch.reference.real_logps, batch.reference.generated_logps):
        assert (ours.cpu() - decoded).abs().max() <= close * size


def write_checkpoint(model: OpenVLA, folder: Path) -> Path:
    """In the layout that OpenVLA's checkpoints have."""
    folder.mkdir()
    write_model(model, folder)
    write_json(folder / TOWER_FILE, towers_json(model.config))
    return folder


def batch_of(images: np.ndarray, prompts: list[list[int]], actions: np.ndarray) -> Batch:
    rows = [[*prompt, *action, EOS] for prompt, action in zip(prompts, actions.tolist(), strict=True)]
    width = max(map(len, rows))
    ids = np.array([row + [PAD] * (width - len(row)) for row in rows])
    return Batch(
        images=images[:, None],
        input_ids=ids,
        lengths=np.array([len(row) for row in rows]),
        actions=np.zeros((len(rows), 1, 7), np.float32),
        samples=np.arange(len(rows)),
    )


def test_halves_of_layers_are_compiled_once_for_all_layers_and_compute_the_same(one_thread: None) -> None:
    """Traced as for a GPU, run as they stand; forward and backward, an adapter attached."""
    model = reference_model().requires_grad_(False)
    inputs = to_inputs(ragged_batch(2), "cpu")
    results = []
    for kernels in (EAGER, training_kernels("aot_eager")):
        before = counters["stats"]["unique_graphs"]
        policy = FlatLora(model, random_lora(model, rank=16), trainable=True)
        gradient = torch.zeros_like(policy.master)
        with policy.attached():
            pair = score_pair(Network(model=model, kernels=kernels), inputs, inputs.real.flip(0))
        policy.add_gradient(token_logps(pair.generated, inputs.real).mean(), gradient)
        results.append((pair.generated.detach(), gradient))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
    # blocks of two towers, the projector, attention; finish, once for all rows and once for those with logits
    assert counters["stats"]["unique_graphs"] - before == 6
