"""Attention's kernels for a GPU, in Triton: one program reads what a tile of queries of one row and head attends to.

What they compute is said in model/attention.py. The softmax is taken on the way (arxiv.org/abs/1805.02867). On an H200,
a new token for each of 64 rows, with 32 heads and 293 slots of 128, takes 79 us; reading that much at the rate of a
plain copy would take 74. 64 prompts of 282 tokens take 281 us, where cuDNN takes 233 for 64 of 289 and leaves rotating
the queries and packing its output to others.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# The quickest of those tried on an H200, or near it, for 16 to 64 rows.
BLOCK, WARPS = 32, 1  # slots at a time, for a new token
TILE, TILE_SLOTS, TILE_WARPS, TILE_STAGES = 64, 32, 4, 3  # queries, slots at a time, for prompts
TOKEN_WARPS = 4

LOG2_E = math.log2(math.e)  # exp(x) = exp2(x LOG2_E), which is what the card computes


@triton.jit
def _attend_new(
    q, k, v, keys, values, at, out,
    q_row, q_head, k_row, k_head, v_row, v_head, cache_row, cache_head, cache_slot,
    scale, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) // HEADS
    head = tl.program_id(0) % HEADS
    dims = tl.arange(0, WIDTH)
    query = tl.load(q + row * q_row + head * q_head + dims).to(tl.float32) * scale
    key = tl.load(k + row * k_row + head * k_head + dims)
    value = tl.load(v + row * v_row + head * v_head + dims)
    cache = row * cache_row + head * cache_head
    new = tl.load(at + row)
    tl.store(keys + cache + new * cache_slot + dims, key)
    tl.store(values + cache + new * cache_slot + dims, value)
    best = tl.sum(query * key.to(tl.float32), 0)
    total = 1.0
    sums = value.to(tl.float32)
    for start in range(0, new, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        there = slots < new
        where = cache + slots[:, None] * cache_slot + dims[None, :]
        old_keys = tl.load(keys + where, mask=there[:, None], other=0.0).to(tl.float32)
        old_values = tl.load(values + where, mask=there[:, None], other=0.0).to(tl.float32)
        scores = tl.where(there, tl.sum(query[None, :] * old_keys, 1), -float("inf"))
        highest = tl.maximum(best, tl.max(scores, 0))
        weights = tl.exp(scores - highest)
        shrink = tl.exp(best - highest)
        total = total * shrink + tl.sum(weights, 0)
        sums = sums * shrink + tl.sum(weights[:, None] * old_values, 0)
        best = highest
    tl.store(out + tl.program_id(0) * WIDTH + dims, (sums / total).to(out.dtype.element_ty))


def attend_new(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """As attention.attend_new, on a GPU. Head widths are powers of two; the last dimension of everything is dense."""
    batch, heads, _, width = q.shape
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    out = torch.empty(batch, heads, 1, width, dtype=q.dtype, device=q.device)
    strides = [s for t in (q, k, v) for s in t.stride()[:2]] + [*keys.stride()[:3]]
    _attend_new[(batch * heads,)](
        q, k, v, keys, values, at, out, *strides, width**-0.5, heads, width, BLOCK, num_warps=WARPS
    )
    return out


@triton.jit
def _keep(
    k, v, cos, sin, places, keys, values,
    k_token, v_token, cache_row, cache_head, cache_slot, slots,
    HEADS: tl.constexpr, MANY: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token's key, rotated, and value to their slot of the cache; MANY: HEADS or the next power of two."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places + token)
    at = place % slots
    heads = tl.arange(0, MANY)[:, None]
    dims = tl.arange(0, HALF)[None, :]
    there = heads < HEADS
    c = tl.load(cos + at * 2 * HALF + dims).to(tl.float32)
    s = tl.load(sin + at * 2 * HALF + dims).to(tl.float32)
    here = heads * 2 * HALF + dims
    left = tl.load(k + token * k_token + here, mask=there).to(tl.float32)
    right = tl.load(k + token * k_token + here + HALF, mask=there).to(tl.float32)
    slot = place // slots * cache_row + at * cache_slot + heads * cache_head + dims
    kind = keys.dtype.element_ty
    tl.store(keys + slot, (left * c - right * s).to(kind), mask=there)
    tl.store(keys + slot + HALF, (right * c + left * s).to(kind), mask=there)
    tl.store(values + slot, tl.load(v + token * v_token + here, mask=there), mask=there)
    tl.store(values + slot + HALF, tl.load(v + token * v_token + here + HALF, mask=there), mask=there)


@triton.jit
def _take_in(
    left, right, keys, values, cache, cache_slot, at, slot, tokens, best, total, sums,
    scale, MASKED: tl.constexpr, HALF: tl.constexpr, TILE_SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax of a tile of queries at positions `at`, over TILE_SLOTS more slots from `slot` on."""
    slots = slot + tl.arange(0, TILE_SLOTS)
    half = tl.arange(0, HALF)
    where = cache + slots[:, None] * cache_slot + half[None, :]
    whole = cache + slots[:, None] * cache_slot + tl.arange(0, 2 * HALF)[None, :]
    if MASKED:
        there = (slots < tokens)[:, None]
        k_left = tl.load(keys + where, mask=there, other=0.0)
        k_right = tl.load(keys + where + HALF, mask=there, other=0.0)
        v = tl.load(values + whole, mask=there, other=0.0)
    else:
        k_left = tl.load(keys + where)
        k_right = tl.load(keys + where + HALF)
        v = tl.load(values + whole)
    scores = tl.dot(left, tl.trans(k_left), input_precision=PRECISION)
    scores = tl.dot(right, tl.trans(k_right), scores, input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where(slots[None, :] <= at[:, None], scores, -float("inf"))
    highest = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - highest[:, None])
    shrink = tl.exp2(best - highest)
    total = total * shrink + tl.sum(weights, 1)
    sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision=PRECISION)
    return highest, total, sums


@triton.jit
def _attend_prompts(
    q, cos, sin, starts, keys, values, out,
    q_token, cache_row, cache_head, cache_slot, scale,
    HEADS: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr, TILE_SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) // HEADS
    head = tl.program_id(1) % HEADS
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE  # the longest sums begin first
    start = tl.load(starts + row).to(tl.int64)
    tokens = (tl.load(starts + row + 1) - start).to(tl.int32)
    if first < tokens:
        at = first + tl.arange(0, TILE)
        there = (at < tokens)[:, None]
        half = tl.arange(0, HALF)
        angle = at[:, None] * 2 * HALF + half[None, :]
        c = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)
        here = (start + at)[:, None] * q_token + head * 2 * HALF + half[None, :]
        x = tl.load(q + here, mask=there, other=0.0).to(tl.float32)
        y = tl.load(q + here + HALF, mask=there, other=0.0).to(tl.float32)
        kind = keys.dtype.element_ty
        left, right = (x * c - y * s).to(kind), (y * c + x * s).to(kind)
        cache = row * cache_row + head * cache_head
        best = tl.full((TILE,), -float("inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        sums = tl.zeros((TILE, 2 * HALF), tl.float32)
        for slot in range(0, first, TILE_SLOTS):
            best, total, sums = _take_in(
                left, right, keys, values, cache, cache_slot, at, slot, tokens, best, total, sums,
                scale, False, HALF, TILE_SLOTS, PRECISION,
            )  # fmt: skip
        for slot in range(first, tl.minimum(first + TILE, tokens), TILE_SLOTS):
            best, total, sums = _take_in(
                left, right, keys, values, cache, cache_slot, at, slot, tokens, best, total, sums,
                scale, True, HALF, TILE_SLOTS, PRECISION,
            )  # fmt: skip
        dims = tl.arange(0, 2 * HALF)
        done = ((start + at) * HEADS + head)[:, None] * 2 * HALF + dims[None, :]
        tl.store(out + done, (sums / total[:, None]).to(out.dtype.element_ty), mask=there)


def attend_prompts(q: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """As attention.attend_prompts once keys and values are kept. Head widths are powers of two, from 32 on."""
    tokens, heads, width = q.shape
    slots = keys.shape[2]
    assert q.stride()[1:] == (width, 1)
    _check_cache(rope, keys, values)
    out = torch.empty(tokens, heads, width, dtype=q.dtype, device=q.device)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    _attend_prompts[(triton.cdiv(slots, TILE), len(keys) * heads)](
        q, *rope, starts, keys, values, out, q.stride(0), *keys.stride()[:3], width**-0.5 * LOG2_E,
        heads, width // 2, TILE, TILE_SLOTS, precision, num_warps=TILE_WARPS, num_stages=TILE_STAGES,
    )  # fmt: skip
    return out


def keep_prompts(
    k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, places: Tensor
) -> None:
    """As attention.keep_prompts, on a GPU. A token's heads lie together."""
    tokens, heads, width = k.shape
    slots = keys.shape[2]
    assert all(t.stride()[1:] == (width, 1) for t in (k, v))
    _check_cache(rope, keys, values)
    _keep[(tokens,)](
        k, v, *rope, places, keys, values, k.stride(0), v.stride(0), *keys.stride()[:3], slots,
        heads, triton.next_power_of_2(heads), width // 2, num_warps=TOKEN_WARPS,
    )  # fmt: skip


def _check_cache(rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    assert all(t.is_contiguous() and t.shape == keys.shape[2:] for t in rope)
