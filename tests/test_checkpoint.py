"""Checkpoints: found by path or name, refused when broken, written whole, read back bit for bit."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from policy_parts import observations, requests, write_adapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import spvla
from spvla.errors import CheckpointError, UserError
from spvla.model.convert import convert
from spvla.model.lora_file import ADAPTER_WEIGHTS, fresh_lora, read_lora
from spvla.model.openvla import OpenVLA
from spvla.model.weights import INDEX, SINGLE, open_weights, write_weights
from spvla.policies.checkpoint import (
    base_of,
    load_model,
    norm_stats,
    note_base,
    policy_digest,
    resolve,
    save_merged,
    save_model,
)
from spvla.policies.openvla.presets import create_preset, preset

STATS = {"suite": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_preset(tmp_path_factory.mktemp("tiny") / "base", "tiny")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a", base=tiny, norm_stats=STATS)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(open_weights(path))


def logits_of(path: str | Path) -> np.ndarray:
    images, instructions = requests(2)
    return spvla.load_policy(path).decode(images, instructions, logits=True)[1]


def reshard(folder: Path, max_shard_bytes: int) -> None:
    tensors = state_of(folder)
    (folder / SINGLE).unlink()
    write_weights([(n, lambda t=t: t, t.nbytes) for n, t in tensors.items()], folder, max_shard_bytes)


def test_tiny_is_a_few_million_parameters_and_the_same_for_equal_seeds(tiny: Path, tmp_path: Path) -> None:
    assert sum(t.numel() for t in state_of(tiny).values()) < 10_000_000
    assert (create_preset(tmp_path / "again", "tiny") / SINGLE).read_bytes() == (tiny / SINGLE).read_bytes()
    assert (create_preset(tmp_path / "other", "tiny", seed=1) / SINGLE).read_bytes() != (tiny / SINGLE).read_bytes()


def test_what_libero_uses_of_small_fits_23_and_a_half_mib_in_bfloat16() -> None:
    """Without what never runs in the towers, and with 400 rows of the vocabulary going in, 256 coming out."""
    with torch.device("meta"):
        model = OpenVLA(preset("small"))
    never_run = re.compile(r"vision_backbone\.\w+\.(blocks\.5\.|norm\.|attn_pool\.)")
    sizes = {name: p.numel() for name, p in model.named_parameters() if not never_run.match(name)}
    vocabulary = [name for name in sizes if "embed_tokens" in name or "lm_head" in name]
    used = sum(sizes.values()) - sum(sizes[name] for name in vocabulary) + (400 + 256) * 256
    assert used == 12_108_544 and 2 * used < 23.5 * 2**20


def test_the_name_tiny_makes_its_checkpoint_in_the_cache(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPVLA_CACHE", str(tmp_path))
    assert resolve("tiny").is_relative_to(tmp_path)
    assert np.array_equal(logits_of("tiny"), logits_of(resolve("tiny")))


def test_a_saved_model_reads_back_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny)
    save_model(model, tmp_path / "saved", source=tiny, norm_stats=STATS)
    before, after = state_of(tiny), state_of(tmp_path / "saved")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert norm_stats(tmp_path / "saved") == STATS
    assert json.loads((tmp_path / "saved/config.json").read_text())["norm_stats"] == STATS
    assert {p.name for p in tiny.iterdir()} <= {p.name for p in (tmp_path / "saved").iterdir()}  # tokenizer, processor
    assert np.array_equal(logits_of(tiny), logits_of(tmp_path / "saved"))


def test_shards_and_a_single_file_read_alike_and_keep_their_size(tiny: Path, copy: Path) -> None:
    reshard(copy, 13_000_000)  # an embedding is 12.3 MB
    shards = sorted(copy.glob("model-*-of-*.safetensors"))
    assert len(shards) >= 3 and not (copy / SINGLE).exists()
    assert all(s.stat().st_size < 13_100_000 for s in shards)
    index = json.loads((copy / INDEX).read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state_of(copy).values())
    assert np.array_equal(logits_of(tiny), logits_of(copy))


def test_bfloat16_keeps_its_bits_through_a_round_trip(tiny: Path, tmp_path: Path) -> None:
    save_model(load_model(tiny, dtype="bfloat16"), tmp_path / "half", source=tiny)
    save_model(load_model(tmp_path / "half", dtype="bfloat16"), tmp_path / "again", source=tmp_path / "half")
    assert (tmp_path / "half" / SINGLE).read_bytes() == (tmp_path / "again" / SINGLE).read_bytes()
    assert {t.dtype for t in state_of(tmp_path / "again").values()} == {torch.bfloat16}


def test_joined_weights_are_saved_apart_under_the_checkpoints_names(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    policy = spvla.load_policy(tiny)
    policy.add_adapter("a", adapter)  # which is no part of the model's own weights
    attention = policy.model.language_model.model.layers[0].self_attn
    q, k = (policy.model.state_dict()[f"language_model.model.layers.0.self_attn.{n}_proj.weight"] for n in "qk")
    assert q.data_ptr() == attention.qkv_proj.weight.data_ptr()  # no second copy
    assert torch.equal(torch.cat((q, k)), attention.qkv_proj.weight[: len(q) + len(k)])
    save_model(policy.model, tmp_path / "saved", source=tiny)
    before, after = state_of(tiny), state_of(tmp_path / "saved")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    again = load_model(tiny)
    again.load_state_dict({n: 2 * t for n, t in before.items()})
    assert torch.equal(again.language_model.model.layers[0].self_attn.qkv_proj.weight, 2 * attention.qkv_proj.weight)
    with pytest.raises(RuntimeError, match="qkv_proj"):
        again.load_state_dict({n: t for n, t in before.items() if "layers.0.self_attn.k_proj" not in n})


def test_a_merged_checkpoint_acts_as_its_adapter(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    save_merged(adapter, tmp_path / "merged")
    assert np.allclose(logits_of(tmp_path / "merged"), logits_of(adapter), atol=1e-4)
    assert np.abs(logits_of(adapter) - logits_of(tiny)).max() > 1e-2
    assert norm_stats(tmp_path / "merged") == STATS
    changed = [n for n, t in state_of(tmp_path / "merged").items() if not torch.equal(t, state_of(tiny)[n])]
    assert len(changed) == len(read_lora(adapter).factors)


class Skeleton(torch.nn.Module):
    """A base's linear maps alone, each a module of its own, as peft expects them."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            parent = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            out, *inputs = weight.shape
            kind = torch.nn.Linear(*inputs, out) if len(inputs) == 1 else torch.nn.Conv2d(inputs[0], out, 14, 14)
            kind.weight.data = weight.clone()
            parent.add_module(leaf, kind)


def test_an_adapter_folder_is_pefts_own(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    """peft reads it and merges it to the weights that this project merges it to; and writes it back alike."""
    from peft import PeftModel

    maps, base = read_lora(adapter).factors.keys(), state_of(tiny)
    model = PeftModel.from_pretrained(Skeleton({n: base[f"{n}.weight"] for n in maps}), str(adapter))
    model.save_pretrained(tmp_path / "again")
    ours, theirs = load_file(adapter / ADAPTER_WEIGHTS), load_file(tmp_path / "again" / ADAPTER_WEIGHTS)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert read_lora(tmp_path / "again").factors.keys() == maps
    save_merged(adapter, tmp_path / "merged")
    merged, peft_merged = state_of(tmp_path / "merged"), model.merge_and_unload().state_dict()
    for name in maps:
        torch.testing.assert_close(merged[f"{name}.weight"], peft_merged[f"{name}.weight"], atol=1e-6, rtol=1e-6)


# What LoraConfig of peft 0.11.1 takes, which OpenVLA pins; an unknown key is refused there.
PEFT_0_11_1 = """alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights
    layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config
    megatron_core modules_to_save peft_type r rank_pattern revision target_modules task_type use_dora use_rslora"""


def test_an_adapters_config_has_only_keys_that_old_peft_knows(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config.keys() <= set(PEFT_0_11_1.split())
    assert config["target_modules"] == sorted({n.rpartition(".")[2] for n in read_lora(adapter).factors})


def with_lm_head(adapter: Path, folder: Path, weight: torch.Tensor) -> Path:
    """As peft 0.11 saves an adapter on lm_head: the base's own weight stands beside it."""
    shutil.copytree(adapter, folder)
    name = "base_model.model.language_model.lm_head.base_layer.weight"
    save_file({**load_file(folder / ADAPTER_WEIGHTS), name: weight}, folder / ADAPTER_WEIGHTS)
    return folder


def test_the_bases_own_weight_in_an_adapter_is_left_aside(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    weight = state_of(tiny)["language_model.lm_head.weight"]
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        saved = with_lm_head(adapter, tmp_path / str(i), weight.to(dtype))
        assert np.array_equal(logits_of(saved), logits_of(adapter))
        save_merged(saved, tmp_path / f"merged-{i}")
    save_merged(adapter, tmp_path / "merged")
    ours, theirs = state_of(tmp_path / "merged-0"), state_of(tmp_path / "merged")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_an_adapter_that_holds_another_bases_weight_is_refused(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    weight = state_of(tiny)["language_model.lm_head.weight"].clone()
    weight[5, 5] += 1
    saved = with_lm_head(adapter, tmp_path / "saved", weight)
    refused(saved, "language_model.lm_head.weight", "not the base's")
    with pytest.raises(CheckpointError, match="lm_head"):
        save_merged(saved, tmp_path / "merged")


def test_a_fresh_adapter_changes_nothing_and_equal_seeds_give_equal_ones(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny)
    one, again, other = (fresh_lora(model, rank=4, seed=seed) for seed in (3, 3, 4))
    one.write(tmp_path / "fresh", base=str(tiny))
    assert np.array_equal(logits_of(tmp_path / "fresh"), logits_of(tiny))
    (a, b), (a2, _), (a3, _) = (lora.factors["projector.fc1"] for lora in (one, again, other))
    assert torch.equal(a, a2) and not torch.equal(a, a3) and not b.any()
    assert (a.std() * 4).item() == pytest.approx(1, abs=0.1)  # Gaussian, 1 / rank, as peft draws it
    assert {t.dtype for pair in one.factors.values() for t in pair} == {torch.float32}


def test_a_base_is_found_absolute_and_relative_to_a_moved_run(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    assert base_of(adapter) == (tiny, adapter) and base_of(tiny) == (tiny, None)
    run = tmp_path / "run"
    shutil.copytree(tiny, run / "base")
    step = Path(shutil.copytree(adapter, run / "checkpoints/step_000300"))
    config = json.loads((step / "adapter_config.json").read_text())
    (step / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    assert base_of(step) == ((run / "base").resolve(), step.resolve())
    assert policy_digest(step) == policy_digest(adapter)  # where the base lies is no part of the policy


def test_an_adapter_knows_its_base_wherever_that_lies(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(adapter, tmp_path / "moved/adapter"))
    note_base(moved, tiny)
    assert base_of(moved) == (tiny, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    for elsewhere in ("/home/somebody/base", "base", "x" * 5000, "~nosuch/base"):
        (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": elsewhere}))
        refused(moved, "no checkpoint at", str(moved / "adapter_config.json"))
    shutil.copytree(tiny, tmp_path / "moved/x")
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "x"}))
    assert base_of(moved) == (tmp_path / "moved/x", moved)  # a copy is the same base


def test_another_base_of_the_same_shapes_is_refused(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    note_base(moved, tiny)
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    weights = load_file(other / SINGLE)
    weights["projector.fc1.weight"][0, 0] += 1
    save_file(weights, other / SINGLE)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    refused(moved, f"{other} is another base", "adapter_config.json")


def test_a_base_from_the_hubs_cache_is_noted_by_its_name(tiny: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--openvla--openvla-7b/snapshots/0a1b"
    shutil.copytree(tiny, snapshot)
    note_base(tmp_path, snapshot)
    assert json.loads((tmp_path / "base.json").read_text())["hub_name"] == "openvla/openvla-7b"


def test_the_digest_follows_everything_that_decides_behaviour(
    monkeypatch, tiny: Path, adapter: Path, copy: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPVLA_CACHE", str(tmp_path / "cache"))
    first = policy_digest(tiny)
    assert policy_digest(copy) == first == policy_digest(tiny) != policy_digest(adapter)
    weights = load_file(copy / SINGLE)
    weights["projector.fc1.bias"][0] += 1
    save_file(weights, copy / SINGLE)
    changed = policy_digest(copy)
    assert changed != first
    (copy / "dataset_statistics.json").write_text(json.dumps(STATS))
    assert policy_digest(copy) not in (first, changed)


def test_the_optimisers_state_is_no_part_of_a_policy(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    trained = Path(shutil.copytree(adapter, tmp_path / "trained"))
    save_file({"moment": torch.ones(1)}, trained / "training_state.safetensors")
    (trained / "training_state.json").write_text("{}")
    assert policy_digest(trained) == policy_digest(adapter)
    save_merged(trained, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("training_state*"))


@pytest.mark.parametrize("path", ["./missing", "../missing", "runs/missing", "runs/missing-", "/missing"])
def test_a_path_that_is_not_there_is_no_name_to_be_looked_up(path: str) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint at {path}.* Correct the path"):
        spvla.load_policy(path)


def test_a_full_disk_is_an_error_of_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("spvla.model.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        create_preset(tmp_path / "tiny", "tiny")
    assert not list(tmp_path.iterdir())


def test_statistics_beside_a_checkpoint_come_over_those_in_its_config(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (entry,) = STATS.values()
    beside = {"suite": {**entry, "starts": "test"}}
    (copy / "config.json").write_text(json.dumps({**config, "norm_stats": {"a": entry, "suite": entry}}))
    (copy / "dataset_statistics.json").write_text(json.dumps(beside))
    assert norm_stats(copy) == {"a": entry, **beside}
    assert spvla.load_policy(copy).norm_stats == {"a": entry, **beside}


def test_old_rotary_buffers_in_a_checkpoint_are_passed_over(tiny: Path, copy: Path) -> None:
    extra = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}
    save_file({**load_file(copy / SINGLE), **extra}, copy / SINGLE)
    assert np.array_equal(logits_of(copy), logits_of(tiny))


def refused(path: str | Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as e:
        spvla.load_policy(path)
    assert "\n" not in str(e.value) and all(part in str(e.value) for part in parts), str(e.value)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    weights = load_file(copy / SINGLE)
    del weights["projector.fc2.bias"]
    save_file(weights, copy / SINGLE)
    refused(copy, "projector.fc2.bias", str(copy))


def test_a_tensor_of_another_shape_is_named(copy: Path) -> None:
    weights = load_file(copy / SINGLE)
    weights["projector.fc2.bias"] = torch.zeros(5)
    save_file(weights, copy / SINGLE)
    refused(copy, "projector.fc2.bias", "(5,)", "(96,)")


def test_an_unknown_tensor_is_named(copy: Path) -> None:
    save_file({**load_file(copy / SINGLE), "surprise": torch.zeros(1)}, copy / SINGLE)
    refused(copy, "surprise")


def test_a_truncated_file_and_a_missing_or_truncated_shard_are_named(copy: Path) -> None:
    whole = (copy / SINGLE).read_bytes()
    (copy / SINGLE).write_bytes(whole[: len(whole) // 2])
    refused(copy, SINGLE, "truncated")
    (copy / SINGLE).write_bytes(whole)
    reshard(copy, 13_000_000)
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(copy, shard.name)
    shard.unlink()
    refused(copy, shard.name, "missing")


def test_an_index_that_points_outside_its_folder_is_refused(copy: Path) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": {"a": "../copy/model.safetensors"}}))
    refused(copy, "model.safetensors")


def test_pickles_are_refused_with_the_command_that_converts_them(tiny: Path, copy: Path) -> None:
    weights = load_file(copy / SINGLE)
    (copy / SINGLE).unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    refused(copy, "pytorch_model.bin", f"python -m spvla.model.convert {copy}")
    done = subprocess.run([sys.executable, "-m", "spvla.model.convert", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(logits_of(copy), logits_of(tiny))


def test_conversion_runs_no_code_of_a_pickle(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap()}))
    with pytest.raises(CheckpointError, match="pytorch_model"):
        convert(tmp_path)
    torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model"):
        convert(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_what_is_no_checkpoint_is_refused(copy: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere")
    refused("nobody/no-such-model-here", "hf download nobody/no-such-model-here")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no weights")
    (copy / "config.json").write_text('{"model_type": "llama"}')
    refused(copy, "llama", "openvla")
    (copy / "config.json").unlink()
    refused(copy, "config.json")


def test_a_hugging_face_name_is_found_in_the_local_cache(monkeypatch, tiny: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--someone--model"
    shutil.copytree(tiny, cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve("someone/model") == cached / "snapshots/abc"
    assert np.array_equal(logits_of("someone/model"), logits_of(tiny))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said_so(tiny: Path) -> None:
    with pytest.raises(UserError, match="without a GPU"):
        spvla.load_policy(tiny, device="cuda")


def test_broken_and_foreign_adapters_are_refused_and_change_nothing(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    policy = spvla.load_policy(tiny)
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    weights = load_file(broken / "adapter_model.safetensors")
    name = "base_model.model.projector.fc1.lora_B.weight"
    save_file({**weights, name: torch.zeros(5, 4)}, broken / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"projector\.fc1"):
        policy.add_adapter("x", broken)
    save_file({n: t for n, t in weights.items() if n != name}, broken / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"projector\.fc1"):
        policy.add_adapter("x", broken)
    save_file({n: t / 0 for n, t in weights.items()}, broken / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinity in .*lora_A"):
        policy.add_adapter("x", broken)
    (broken / "adapter_model.safetensors").unlink()
    torch.save(weights, broken / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        policy.add_adapter("x", broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CheckpointError, match="plain LoRA"):
        policy.add_adapter("x", broken)
    assert policy.adapters == [] and not any(getattr(m, "lora", None) for m in policy.model.modules())


def test_quantisation_asks_for_a_gpu_or_its_extra(tiny: Path) -> None:
    for bits in ("load_in_8bit", "load_in_4bit"):
        with pytest.raises(UserError, match=bits):
            spvla.load_policy(tiny, **{bits: True})
    with pytest.raises(UserError, match="one of the two"):
        spvla.load_policy(tiny, load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(UserError, match="float8"):
        spvla.load_policy(tiny, dtype="float8")


def test_a_kill_while_saving_leaves_the_older_checkpoint_whole(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    save_model(load_model(tiny), target, source=tiny, norm_stats=STATS)
    before = policy_digest(target)
    code = f"""
import os, signal, spvla.policies.checkpoint as c, spvla.model.weights as w
inner = w.save_file
def save_file(*args, **kwargs):
    inner(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
w.save_file = save_file
c.save_model(c.load_model({str(tiny)!r}), c.Path({str(target)!r}), source={str(tiny)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert policy_digest(target) == before and norm_stats(target) == STATS
    assert logits_of(target).shape == (2, 7, 32064)


def test_statistics_of_an_adapter_serve_its_own_requests(tiny: Path, adapter: Path) -> None:
    policy = spvla.load_policy(tiny)
    policy.add_adapter("a", adapter)
    seen = observations(2)
    assert policy.act(seen, unnorm_key="suite", adapters=["a", "a"]).shape == (2, 1, 7)
    with pytest.raises(UserError, match="suite"):
        policy.act(seen, unnorm_key="suite")  # the base was trained on nothing
