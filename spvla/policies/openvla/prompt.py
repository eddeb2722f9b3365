"""An instruction on its way into token ids, as OpenVLA's training and evaluation write it.

    "In: What action should the robot take to {instruction, lower case}?\nOut:" -> BOS ... 29901
    then the blank 29871, the seven action ids, EOS

Only `tokenizer.json` is read, by the `tokenizers` library: no code comes with a checkpoint.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from spvla.errors import CheckpointError, UserError
from spvla.files import write_json, write_text
from spvla.policies.openvla.actions import VOCAB_SIZE

BOS, EOS, PAD = 1, 2, 32_000
BLANK = 29_871  # '▁': what a space before the first action character becomes
TOKENIZER_FILE = "tokenizer.json"

# Ids that Llama's vocabulary gives to the prompt's own words; the tiny tokenizer keeps them.
_LLAMA_IDS = {
    **{"▁In": 512, ":": 29901, "▁What": 1724, "▁action": 3158, "▁should": 881, "▁the": 278, "▁robot": 19964},
    **{"▁take": 2125, "▁to": 304, "?": 29973, "Out": 3744, "▁": BLANK},
}
_PROMPT_BEGIN = [BOS, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304]  # In: What action should the robot take to
_PROMPT_END = [29973, 13, 3744, 29901]  # ?, a line's end, Out:
# The words of LIBERO's instructions. Others are spelt in bytes, which costs length, not meaning.
_WORDS = """
a akita alphabet and at back basket bbq between black book both bottle bottom bowl box butter cabinet caddy chocolate
close compartment cookie cookies cream cheese door dressing drawer frame front full in inside it juice ketchup knob
layer left mat microwave middle milk moka mug next of off on open orange pan pick place plate pot pots porcelain
pudding push put rack ramekin red right salad sauce shelf side soup stove table tomato top tray turn under up white
wine with wooden yellow
"""
_WORDS_BEGIN = 20_000
_FIRST_ACTION_CHARACTER = 0x3400  # any block of 256 letters that no instruction holds


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises CheckpointError if there is none, or one without Llama's blank and OpenVLA's padding where they belong."""
    path = Path(folder) / TOKENIZER_FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder} holds no {TOKENIZER_FILE}",
            expected="the tokenizer that OpenVLA's checkpoints carry",
            remedy="Copy tokenizer.json from the base checkpoint (openvla/openvla-7b).",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception on any bad file
        raise CheckpointError(
            f"{path} cannot be read ({e})", expected="a tokenizers file", remedy="Copy it again from its source."
        ) from e
    if tokenizer.token_to_id("▁") != BLANK or tokenizer.get_vocab_size(with_added_tokens=False) < VOCAB_SIZE:
        raise CheckpointError(
            f"{path} is not Llama 2's vocabulary",
            expected=f"{VOCAB_SIZE} ids with '▁' at {BLANK}",
            remedy="Copy tokenizer.json from the base checkpoint (openvla/openvla-7b).",
        )
    tokenizer.no_truncation()  # a tokenizer that was used is saved with the lengths that its last call asked for
    tokenizer.no_padding()
    _require_prompt(tokenizer, path)
    return tokenizer


def _require_prompt(tokenizer: Tokenizer, path: Path) -> None:
    """Raises CheckpointError where the file's other parts (normaliser, post-processor, added tokens) give the prompt
    other ids than Llama 2's: the policy would run, and read something else."""
    ids = tokenizer.encode(_prompt("")).ids
    first, last = ids[: len(_PROMPT_BEGIN)], [i for i in ids if i != BLANK][-len(_PROMPT_END) :]
    if (first, last) != (_PROMPT_BEGIN, _PROMPT_END):
        raise CheckpointError(
            f"{path} reads OpenVLA's prompt as {ids}",
            expected=f"ids that begin with {_PROMPT_BEGIN} and end with {_PROMPT_END}",
            remedy="Its normaliser or post-processor is not Llama 2's: copy tokenizer.json from the base checkpoint.",
        )
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if i not in (0, BOS, EOS)}
    words = set(tokenizer.encode(_WORDS).ids)
    shadowing = {i: content for i, content in added.items() if i < VOCAB_SIZE or i in words}
    if shadowing:
        raise CheckpointError(
            f"{path} adds tokens in place of Llama 2's: {shadowing}",
            expected="added tokens with ids from 32000 on, which no instruction holds",
            remedy="Copy tokenizer.json from the base checkpoint (openvla/openvla-7b).",
        )


def _prompt(instruction: str) -> str:
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


def prompt_ids(tokenizer: Tokenizer, instruction: str) -> list[int]:
    """BOS, prompt, 29901, 29871: the next token is the first action. Raises UserError on an empty instruction."""
    if not isinstance(instruction, str) or not instruction.strip():
        raise UserError(
            f"instruction {instruction!r}",
            expected="a sentence, such as 'pick up the milk and place it in the basket'",
            remedy="Give each image its instruction.",
        )
    ids = tokenizer.encode(_prompt(instruction)).ids
    return ids if ids[-1] == BLANK else [*ids, BLANK]


def build_tiny_tokenizer() -> Tokenizer:
    """A stand-in for Llama's tokenizer that needs no download: same size, same special ids, LIBERO's words."""
    vocab = [(f"<fill{i}>", -30.0) for i in range(VOCAB_SIZE)]
    vocab[:3] = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocab[3:259] = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    for i, word in enumerate(_WORDS.split()):
        vocab[_WORDS_BEGIN + i] = (f"▁{word}", -3.0)
    for piece, i in _LLAMA_IDS.items():
        vocab[i] = (piece, -3.0)
    for i in range(256):
        vocab[VOCAB_SIZE - 256 + i] = (chr(_FIRST_ACTION_CHARACTER + i), -10.0)
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", "<PAD>")])
    return tokenizer


def known_ids() -> list[int]:
    """Sorted ids that prompts in LIBERO's words, their answers and padding are made of, with `build_tiny_tokenizer`."""
    words = range(_WORDS_BEGIN, _WORDS_BEGIN + len(_WORDS.split()))
    actions = range(VOCAB_SIZE - 256, VOCAB_SIZE)
    return sorted({0, BOS, EOS, PAD, 13, *_LLAMA_IDS.values(), *words, *actions})  # 13: a line's end


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, and the two files that transformers reads beside it."""
    write_text(folder / TOKENIZER_FILE, tokenizer.to_str())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "padding_side": "right"}
    write_json(folder / "tokenizer_config.json", {**settings, **special, "add_bos_token": True, "add_eos_token": False})
