"""`OpenVLAOFTPolicy`: observations in, chunks of actions out, for any number of resident adapters on one base.

Legend: B batch, C cameras, K chunk, A action dims (7), S slots (K A).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import nn

from spvla.errors import CheckpointError, UserError
from spvla.model.lora_bank import LoraBank
from spvla.model.lora_file import STATISTICS, read_lora
from spvla.model.weights import read_json
from spvla.policies.observations import check_length, check_observations
from spvla.policies.oft.chunks import decode_chunk, unnormalise
from spvla.policies.oft.decoding import ChunkDecoder, probabilities
from spvla.policies.oft.folder import form_of
from spvla.policies.oft.heads import make_added
from spvla.policies.oft.network import FIRST_ACTION, OpenVLAOFT
from spvla.policies.oft.parts import read_added
from spvla.policies.oft.proprio import ProprioStats
from spvla.policies.openvla.actions import NUM_BINS, ActionStats
from spvla.policies.openvla.prompt import prompt_ids
from spvla.types import ACTION_DIM, Needs, Observation

PROMPT_MULTIPLE = 8  # a fixed bucket whose prompts turn out longer grows in these steps


class OpenVLAOFTPolicy:
    """A `Policy` of chunks. `norm_stats` are the base's; each adapter brings its own over them.

    Two threads may use it: on a GPU the second's batch is then ready when the first's is done.
    """

    def __init__(
        self,
        *,
        model: OpenVLAOFT,
        tokenizer: Tokenizer,
        norm_stats: dict[str, Any],
        name: str,
        execute: int | None = None,
        decode_batch_size: int = 0,
    ) -> None:
        """execute: actions of a chunk that are executed before the policy is asked again; by default all."""
        self.model, self.tokenizer, self.norm_stats, self.name = model, tokenizer, norm_stats, name
        self.needs: Needs = model.form.needs(execute)
        self.decode_batch_size = decode_batch_size
        self.default_adapter: str | None = None
        self.bank = LoraBank(model)
        model.row_slots = self.bank.slots
        self._stats: dict[str | None, dict[str, Any]] = {None: norm_stats}
        self._decoder: ChunkDecoder | None = None
        self._starting = Lock()  # held while batches are enqueued, not while they are waited for
        self._recorded: tuple[int, tuple[int, ...]] | None = None  # what was resident when the decoder was made

    def act(
        self,
        observations: Sequence[Observation],
        *,
        unnorm_key: str | Sequence[str],
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """B observations -> (B, K, A) float64 actions, un-normalised, gripper 1 open.

        adapters: for each request the name of a resident adapter, or None for the base; by default all use what
        the policy was loaded as. Raises UserError.
        """
        check_observations(observations, self.needs)
        count = len(observations)
        keys = [unnorm_key] * count if isinstance(unnorm_key, str) else list(unnorm_key)
        check_length("unnorm_key", keys, count)
        names = self._adapter_names(adapters, count)
        stats = [self.action_stats(key, name) for key, name in zip(keys, names, strict=True)]
        normalised = self.decode(observations, unnorm_key=keys, adapters=names)
        if self.model.action_head is None:
            normalised = decode_chunk(normalised)
        return np.stack([unnormalise(chunk, s) for s, chunk in zip(stats, normalised, strict=True)])

    def decode(
        self,
        observations: Sequence[Observation],
        *,
        unnorm_key: str | Sequence[str],
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """As `act`, giving what the network answers: ids (B, S) int64, or normalised actions (B, K, A) float32."""
        count = len(observations)
        check_observations(observations, self.needs)
        keys = [unnorm_key] * count if isinstance(unnorm_key, str) else list(unnorm_key)
        return self._passes(observations, keys, self._adapter_names(adapters, count), self._decoder_for)

    def probabilities(self, observations: Sequence[Observation], *, unnorm_key: str) -> np.ndarray:
        """(B, K, A, 256) float32: how likely each bin of each action dimension is, from +1 down to -1.

        For looking at; `act` takes the most likely. Raises UserError where actions are regressed.
        """
        check_observations(observations, self.needs)
        if self.model.action_head is not None:
            raise UserError("a policy that regresses its actions", expected="a discrete one", remedy="Use act.")
        names = self._adapter_names(None, len(observations))
        make = partial(self._make, cuda_graphs=False, answer=probabilities)
        found = self._passes(observations, [unnorm_key] * len(observations), names, make)
        columns = slice(FIRST_ACTION - self.model.first_token, FIRST_ACTION - self.model.first_token + NUM_BINS)
        return found[..., columns].reshape(len(found), self.needs.chunk, ACTION_DIM, NUM_BINS)

    def _passes(
        self,
        observations: Sequence[Observation],
        keys: Sequence[str],
        names: Sequence[str | None],
        decoder_for: Callable[[int, int], ChunkDecoder],
    ) -> np.ndarray:
        """What `decoder_for(rows, longest prompt)` answers, in as many passes as its bucket needs."""
        count = len(observations)
        prompts = [prompt_ids(self.tokenizer, o.instruction) for o in observations]
        images = np.stack([np.stack(o.images) for o in observations])
        proprio = self._proprio(observations, keys, names) if self.needs.proprio else None
        with self._starting:
            slots = self.bank.slots_of(names)
            decoder = decoder_for(count, max(map(len, prompts)))
            parts = [slice(start, start + decoder.batch_size) for start in range(0, count, decoder.batch_size)]
            under_way = [
                decoder.start(
                    images[part],
                    prompts[part],
                    proprio=None if proprio is None else proprio[part],
                    slots=slots[part],
                )
                for part in parts
            ]
        return np.concatenate([copy.read()[0].numpy() for copy in under_way])

    def prepare(self, instructions: Sequence[str] = (), *, max_prompt: int = 0) -> None:
        """Makes a fixed bucket's decoder ahead of time, for the longest of these instructions or `max_prompt` tokens.

        Then no request waits, and all run in one shape. Without a fixed bucket there is nothing to do.
        """
        if self.decode_batch_size:
            longest = max([max_prompt, *(len(prompt_ids(self.tokenizer, i)) for i in instructions)])
            with self._starting:
                self._decoder_for(self.decode_batch_size, longest)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Makes the adapter of a folder resident under `name`, with its own head and projector. Raises UserError."""
        adapter, form = read_lora(Path(folder)), form_of(Path(folder))
        if form != self.model.form:
            raise CheckpointError(
                f"{folder} of {form or 'a plain OpenVLA policy'}",
                expected=f"{self.model.form}, as its base here",
                remedy="Give an adapter of the same form.",
            )
        own = nn.ModuleDict(make_added(form, self.model.config.llm.width, seed=0))
        read_added(own, Path(folder))
        with self._starting:
            self.bank.add(name, adapter)
            self.model.keep_version(self.bank.resident[name], own)
        statistics = Path(folder) / STATISTICS
        self._stats[name] = read_json(statistics) if statistics.exists() else {}

    def remove_adapter(self, name: str) -> None:
        with self._starting:
            self.bank.remove(name)
            if not self.bank.resident:
                self.model.versions.clear()
        self._stats.pop(name, None)

    @property
    def adapters(self) -> list[str]:
        return self.bank.names

    def action_stats(self, unnorm_key: str, adapter: str | None = None) -> ActionStats:
        """Raises UserError listing the keys there are."""
        return ActionStats.from_json(self._entry(unnorm_key, adapter).get("action", {}))

    def proprio_stats(self, unnorm_key: str, adapter: str | None = None) -> ProprioStats:
        """Raises UserError where there are none."""
        return ProprioStats.from_json(self._entry(unnorm_key, adapter).get("proprio", {}), name=unnorm_key)

    def _entry(self, unnorm_key: str, adapter: str | None) -> dict[str, Any]:
        stats = {**self.norm_stats, **self._stats.get(adapter, {})}
        if unnorm_key not in stats:
            raise UserError(
                f"unnorm_key {unnorm_key!r} of {self.name}",
                expected=f"one of {', '.join(stats) or '(the checkpoint holds no action statistics)'}",
                remedy="Give the key of the data set that the policy was trained on.",
            )
        return stats[unnorm_key]

    def _proprio(
        self, observations: Sequence[Observation], keys: Sequence[str], names: Sequence[str | None]
    ) -> np.ndarray:
        """(B, 8) float32."""
        stats = [self.proprio_stats(key, name) for key, name in zip(keys, names, strict=True)]
        return np.stack(
            [s.for_evaluation(o.proprio).astype(np.float32) for s, o in zip(stats, observations, strict=True)]
        )

    def _decoder_for(self, count: int, longest: int) -> ChunkDecoder:
        """A fixed bucket's is kept, until a longer prompt comes or what is resident has changed its shapes."""
        if not self.decode_batch_size:
            return self._make(count, longest, cuda_graphs=False)
        resident = (self.bank.version, tuple(self.model.versions))
        kept = self._decoder
        if kept is not None and longest <= kept.max_prompt and resident == self._recorded:
            return kept
        max_prompt = longest if kept is None else max(kept.max_prompt, -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE)
        kept = self._decoder = None  # the old one's memory goes before the new one's comes
        self._decoder, self._recorded = self._make(self.decode_batch_size, max_prompt), resident
        return self._decoder

    def _make(self, batch_size: int, max_prompt: int, **options: Any) -> ChunkDecoder:
        return ChunkDecoder(
            self.model, batch_size=batch_size, max_prompt=max_prompt, row_slots=self.bank.slots, **options
        )

    def _adapter_names(self, adapters: Sequence[str | None] | None, count: int) -> list[str | None]:
        names = [self.default_adapter] * count if adapters is None else list(adapters)
        check_length("adapters", names, count)
        return names
