"""`OpenVLAPolicy`: observations in, actions out, for any number of resident adapters on one base.

Legend: B batch, A action dims (7), V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from spvla.errors import UserError
from spvla.model.lora_bank import LoraBank
from spvla.model.lora_file import STATISTICS, read_lora
from spvla.model.openvla import OpenVLA
from spvla.model.transfer import to_device
from spvla.model.weights import read_json
from spvla.policies.observations import check_images, check_length, check_observations
from spvla.policies.openvla.actions import ActionStats, decode
from spvla.policies.openvla.decoding import Decoder
from spvla.policies.openvla.images import to_pixel_values
from spvla.policies.openvla.prompt import prompt_ids
from spvla.types import ONE_STEP, Observation

PROMPT_MULTIPLE = 8  # a fixed bucket whose prompts turn out longer grows in these steps


class OpenVLAPolicy:
    """A `Policy` of one image and one step. `norm_stats` are the base's; each adapter brings its own over them.

    Two threads may use it: on a GPU the second's batch is then ready when the first's is done.
    """

    needs = ONE_STEP

    def __init__(
        self,
        *,
        model: OpenVLA,
        tokenizer: Tokenizer,
        norm_stats: dict[str, Any],
        name: str,
        decode_batch_size: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.norm_stats, self.name = model, tokenizer, norm_stats, name
        self.decode_batch_size = decode_batch_size
        self.default_adapter: str | None = None
        self.bank = LoraBank(model)
        self._stats: dict[str | None, dict[str, Any]] = {None: norm_stats}
        self._decoder: Decoder | None = None
        self._starting = Lock()  # held while batches are enqueued, not while they are waited for
        self._version = self.bank.version

    def act(
        self,
        observations: Sequence[Observation],
        *,
        unnorm_key: str | Sequence[str],
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """B observations -> (B, 1, A) float64 actions, un-normalised, gripper 1 open.

        adapters: for each request the name of a resident adapter, or None for the base; by default all use what
        the policy was loaded as. Raises UserError.
        """
        check_observations(observations, self.needs)
        count = len(observations)
        keys = [unnorm_key] * count if isinstance(unnorm_key, str) else list(unnorm_key)
        check_length("unnorm_key", keys, count)
        names = self._adapter_names(adapters, count)
        stats = [self.action_stats(key, name) for key, name in zip(keys, names, strict=True)]
        ids = self.decode([o.images[0] for o in observations], [o.instruction for o in observations], adapters=names)
        return np.stack([s.unnormalise(decode(row))[None] for s, row in zip(stats, ids, strict=True)])

    def decode(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        *,
        logits: bool = False,
        temperature: float | Sequence[float] = 0.0,
        seeds: Sequence[int] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """B images (224, 224, 3) uint8 and instructions -> ids (B, A) int64, or with `logits` (ids, logits
        (B, A, V) float32).

        Sampling (temperature above 0) needs a seed for each request.
        """
        count = len(images)
        check_images(images)
        check_length("instructions", instructions, count)
        prompts = [prompt_ids(self.tokenizer, text) for text in instructions]
        heat = [float(temperature)] * count if isinstance(temperature, int | float) else list(temperature)
        check_length("temperature", heat, count)
        seeds = [0] * count if seeds is None and not any(heat) else seeds
        check_length("seeds", seeds or (), count)
        names = self._adapter_names(adapters, count)
        with self._starting:
            slots = self.bank.slots_of(names)
            decoder = self._decoder_for(count, max(map(len, prompts)))
            parts = [slice(start, start + decoder.batch_size) for start in range(0, count, decoder.batch_size)]
            under_way = [
                decoder.start(
                    self._pixels(images[part]),
                    prompts[part],
                    logits=logits,
                    temperature=heat[part],
                    seeds=seeds[part],
                    slots=slots[part],
                )
                for part in parts
            ]
        out = [pending.result() for pending in under_way]
        ids = np.concatenate([part.ids.numpy() for part in out])
        return (ids, np.concatenate([part.logits.numpy() for part in out])) if logits else ids

    def prepare(self, instructions: Sequence[str] = (), *, max_prompt: int = 0) -> None:
        """Makes a fixed bucket's decoder ahead of time, for the longest of these instructions or `max_prompt` tokens.

        Then no request waits for a compiler, and all run in one shape. Without a fixed bucket there is nothing to do.
        """
        if self.decode_batch_size:
            longest = max([max_prompt, *(len(prompt_ids(self.tokenizer, i)) for i in instructions)])
            with self._starting:
                self._decoder_for(self.decode_batch_size, longest)

    def _decoder_for(self, batch_size: int, longest: int) -> Decoder:
        """A fixed bucket's is kept, until a longer prompt comes or the stacks of adapters have grown."""
        if not self.decode_batch_size:
            kind = {"row_slots": self.bank.slots, "cuda_graphs": False}
            return Decoder(self.model, batch_size=batch_size, max_prompt=longest, **kind)
        kept = self._decoder
        if kept is not None and longest <= kept.max_prompt and self._version == self.bank.version:
            return kept
        max_prompt = longest if kept is None else max(kept.max_prompt, -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE)
        kept = self._decoder = None  # the old one's memory goes before the new one's comes
        self._version = self.bank.version
        self._decoder = Decoder(
            self.model, batch_size=self.decode_batch_size, max_prompt=max_prompt, row_slots=self.bank.slots
        )
        return self._decoder

    def add_adapter(self, name: str, folder: Path) -> None:
        """Makes the adapter of a folder resident under `name`; moves its weights only."""
        adapter = read_lora(Path(folder))
        with self._starting:
            self.bank.add(name, adapter)
        statistics = Path(folder) / STATISTICS
        self._stats[name] = read_json(statistics) if statistics.exists() else {}

    def remove_adapter(self, name: str) -> None:
        with self._starting:
            self.bank.remove(name)
        self._stats.pop(name, None)

    @property
    def adapters(self) -> list[str]:
        return self.bank.names

    def action_stats(self, unnorm_key: str, adapter: str | None = None) -> ActionStats:
        """Raises UserError listing the keys there are."""
        stats = {**self.norm_stats, **self._stats.get(adapter, {})}
        if unnorm_key not in stats:
            raise UserError(
                f"unnorm_key {unnorm_key!r} of {self.name}",
                expected=f"one of {', '.join(stats) or '(the checkpoint holds no action statistics)'}",
                remedy="Give the key of the data set that the policy was trained on.",
            )
        return ActionStats.from_json(stats[unnorm_key].get("action", {}))

    def _adapter_names(self, adapters: Sequence[str | None] | None, count: int) -> list[str | None]:
        names = [self.default_adapter] * count if adapters is None else list(adapters)
        check_length("adapters", names, count)
        return names

    def _pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        return to_pixel_values(to_device(torch.from_numpy(np.stack(images)), self.model.device))
