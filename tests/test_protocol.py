"""The manifest: its digest moves with every field, and a difference is named."""

import json
from dataclasses import fields, replace

import pytest
from farm_parts import PROTOCOL

from spvla.eval.protocol import Protocol, differences

OTHER = {
    "center_crop": False,
    "num_steps_wait": 11,
    "max_steps": 5,
    "seed": 8,
    "decode_batch_size": 8,
    "version": 9,
    "num_images_in_input": 2,
}


@pytest.mark.parametrize("name", [f.name for f in fields(Protocol) if f.name != "world"])
def test_every_field_is_part_of_the_digest(name: str) -> None:
    changed = replace(PROTOCOL, **{name: OTHER.get(name, "another")})
    assert changed.digest != PROTOCOL.digest
    assert [d.split(":")[0] for d in differences(PROTOCOL, changed)] == [name]


@pytest.mark.parametrize("name", ["assets", "renderer", "mujoco", "benchmark"])
def test_all_that_the_benchmark_says_of_itself_is_part_of_the_digest(name: str) -> None:
    changed = replace(PROTOCOL, world={**PROTOCOL.world, name: "another"})
    assert changed.digest != PROTOCOL.digest
    assert differences(PROTOCOL, changed) == [f"{name}: {PROTOCOL.world.get(name)} -> another"]


def test_the_manifest_has_the_worlds_facts_among_its_own_fields() -> None:
    manifest = json.loads(PROTOCOL.to_json())
    assert (manifest["renderer"], manifest["seed"]) == ("llvmpipe", 7) and "world" not in manifest


def test_a_field_that_says_nothing_leaves_the_digests_of_older_ledgers_as_they_are() -> None:
    assert not {"num_images_in_input", "num_open_loop_steps"} & json.loads(PROTOCOL.to_json()).keys()
    assert replace(PROTOCOL, num_open_loop_steps=8).digest != PROTOCOL.digest


def test_a_manifest_survives_json() -> None:
    again = Protocol.from_json(PROTOCOL.to_json())
    assert again == PROTOCOL and again.digest == PROTOCOL.digest
