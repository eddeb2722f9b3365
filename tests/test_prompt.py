"""Instructions become the ids that the original's prompt gives."""

import json
from pathlib import Path

import numpy as np
import pytest

from spvla.errors import CheckpointError, UserError
from spvla.policies.openvla.prompt import (
    build_tiny_tokenizer,
    load_tokenizer,
    prompt_ids,
    save_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer()


def test_a_prompt_begins_with_bos_and_ends_ready_for_the_first_action(tokenizer) -> None:
    ids = prompt_ids(tokenizer, "open the drawer")
    assert ids[:10] == [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304]  # In : What action should the robot take
    assert ids[-5:] == [29973, 13, 3744, 29901, 29871]  # ? newline Out : blank


def test_case_does_not_matter(tokenizer) -> None:
    assert prompt_ids(tokenizer, "Turn ON the stove") == prompt_ids(tokenizer, "turn on the stove")


def test_a_word_outside_the_vocabulary_is_spelt_in_bytes_and_comes_back(tokenizer) -> None:
    ids = prompt_ids(tokenizer, "grab the zébra")
    assert "grab the zébra?" in tokenizer.decode(ids)


@pytest.mark.parametrize("instruction", ["", "  \n", None])
def test_an_empty_instruction_is_refused(tokenizer, instruction) -> None:
    with pytest.raises(UserError, match="instruction"):
        prompt_ids(tokenizer, instruction)


def test_a_saved_tokenizer_reads_back_alike(tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    text = "put both the cream cheese box and the butter in the basket"
    assert prompt_ids(load_tokenizer(tmp_path), text) == prompt_ids(tokenizer, text)


def test_the_last_256_ids_are_single_characters_as_actions_need(tokenizer) -> None:
    for i in (31744, 31900, 31999):
        assert len(tokenizer.id_to_token(i)) == 1


def test_a_folder_without_a_tokenizer_and_a_foreign_one_are_refused(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)
    foreign = json.loads(tokenizer.to_str())
    foreign["model"]["vocab"][29871] = ["x", -3.0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(foreign))
    with pytest.raises(CheckpointError, match="Llama 2"):
        load_tokenizer(tmp_path)


def used(tokenizer, **changes) -> str:
    """tokenizer.json with parts of it replaced."""
    return json.dumps(json.loads(tokenizer.to_str()) | changes)


TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    **{"direction": "Right", "pad_to_multiple_of": None, "pad_id": 32000, "pad_type_id": 0, "pad_token": "<PAD>"},
}


@pytest.mark.parametrize("saved", [{"truncation": TRUNCATION}, {"padding": PADDING}])
def test_lengths_that_a_used_tokenizer_was_saved_with_do_not_count(tokenizer, tmp_path: Path, saved: dict) -> None:
    text = "put both the cream cheese box and the butter in the basket"
    (tmp_path / "tokenizer.json").write_text(used(tokenizer, **saved))
    assert prompt_ids(load_tokenizer(tmp_path), text) == prompt_ids(tokenizer, text)


END_TOO = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {
        "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
        "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]},
    },
}
LOWER = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"}]}


@pytest.mark.parametrize("saved", [{"post_processor": None}, {"post_processor": END_TOO}, {"normalizer": LOWER}])
def test_another_post_processor_or_normaliser_is_refused(tokenizer, tmp_path: Path, saved: dict) -> None:
    (tmp_path / "tokenizer.json").write_text(used(tokenizer, **saved))
    with pytest.raises(CheckpointError, match="reads OpenVLA's prompt as"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("content", "i"), [("basket", 32001), (chr(0x3400), 31744)])
def test_added_tokens_in_place_of_words_or_actions_are_refused(tokenizer, tmp_path: Path, content: str, i: int) -> None:
    added = {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
    tokens = [*json.loads(tokenizer.to_str())["added_tokens"], added | {"normalized": False, "special": False}]
    (tmp_path / "tokenizer.json").write_text(used(tokenizer, added_tokens=tokens))
    with pytest.raises(CheckpointError, match="adds tokens in place"):
        load_tokenizer(tmp_path)


def test_ids_equal_the_originals(golden: Path) -> None:
    data, tokenizer = np.load(golden / "model/golden.npz"), load_tokenizer(golden / "model")
    for i in range(2):
        expected = data[f"s{i}_full_ids"][0, :-7]  # the prompt as decoding sees it, 29871 appended
        assert prompt_ids(tokenizer, str(data["instructions"][i])) == expected.tolist()
    for i in range(4):
        wanted = data["train_input_ids"][i][data["train_attention_mask"][i]]
        assert prompt_ids(tokenizer, str(data["instructions"][i])) == wanted[:-8].tolist()  # seven actions and EOS
