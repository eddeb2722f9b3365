"""lora.py's steps for a GPU, in Triton: one kernel each, which reads and writes every number once.

A tile is a few rows by some columns; LoRA's thin product is taken on the way, in float32, from tiles of its two
factors. Rank: a power of two, 16 or more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
ROWS, COLUMNS = 64, 64  # of a tile: the quickest on an H200 of those tried, at 6140 rows; backward, others are
BACK_ROWS, BACK_COLUMNS = 16, 128


@triton.jit
def _tile(base, rows, columns, stride, there):
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=there, other=0.0)


@triton.jit
def _put(base, rows, columns, stride, value, there):
    tl.store(base + rows[:, None].to(tl.int64) * stride + columns[None, :], value, mask=there)


@triton.jit
def _thin(narrow, b, rows, m, columns, n, part, RANK: tl.constexpr, PARTS: tl.constexpr):
    """Part `part` of narrow (m, PARTS RANK) times that part's rows of b (n, RANK), transposed."""
    ranks = tl.arange(0, RANK)
    left = tl.load(
        narrow + rows[:, None] * (PARTS * RANK) + part * RANK + ranks[None, :], mask=(rows < m)[:, None], other=0.0
    )
    right = tl.load(b + columns[None, :] * RANK + ranks[:, None], mask=(columns < n)[None, :], other=0.0)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _gate(
    y, narrow, b, out, act, m, hidden,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = (rows < m)[:, None] & (columns < hidden)[None, :]
    gate = _tile(y, rows, columns, 2 * hidden, there).to(tl.float32)
    up = _tile(y + hidden, rows, columns, 2 * hidden, there).to(tl.float32)
    kind = y.dtype.element_ty
    gate = (gate + _thin(narrow, b, rows, m, columns, hidden, 0, RANK, 2)).to(kind)
    up = (up + _thin(narrow, b + hidden * RANK, rows, m, columns, hidden, 1, RANK, 2)).to(kind)
    _put(out, rows, columns, 2 * hidden, gate, there)
    _put(out + hidden, rows, columns, 2 * hidden, up, there)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    _put(act, rows, columns, hidden, (gate * tl.sigmoid(gate) * up).to(kind), there)


@triton.jit
def _gate_back(
    d_act, narrow, a, gate_up, d_gate_up, act, m, hidden,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    there = (rows < m)[:, None] & (columns < hidden)[None, :]
    left = tl.load(narrow + rows[:, None] * RANK + ranks[None, :], mask=(rows < m)[:, None], other=0.0)
    right = tl.load(a + ranks[:, None] * hidden + columns[None, :], mask=(columns < hidden)[None, :], other=0.0)
    d = _tile(d_act, rows, columns, hidden, there).to(tl.float32) + tl.dot(left, right, input_precision="ieee")
    gate = _tile(gate_up, rows, columns, 2 * hidden, there).to(tl.float32)
    up = _tile(gate_up + hidden, rows, columns, 2 * hidden, there).to(tl.float32)
    kind = d_act.dtype.element_ty
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    _put(act, rows, columns, hidden, (silu * up).to(kind), there)
    _put(d_gate_up, rows, columns, 2 * hidden, (d * up * (sigmoid + silu * (1 - sigmoid))).to(kind), there)
    _put(d_gate_up + hidden, rows, columns, 2 * hidden, (d * silu).to(kind), there)


@triton.jit
def _rotary_qkv(
    y, narrow, b, cos, sin, q, k, v, m, tokens, table_tokens, width,
    RANK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    dims = tl.arange(0, HALF)
    there = (rows < m)[:, None] & (dims < HALF)[None, :]
    left = part * width + head * 2 * HALF + dims  # columns of y
    right = left + HALF
    n = 3 * width
    x = _tile(y, rows, left, n, there).to(tl.float32) + _thin(narrow, b, rows, m, left, n, part, RANK, 3)
    z = _tile(y, rows, right, n, there).to(tl.float32) + _thin(narrow, b, rows, m, right, n, part, RANK, 3)
    if part < 2:
        where = rows % table_tokens
        c = _tile(cos, where, dims, 2 * HALF, there)
        s = _tile(sin, where, dims, 2 * HALF, there)
        x, z = x * c - z * s, z * c + x * s
    out = q if part == 0 else (k if part == 1 else v)
    to = ((rows // tokens) * HEADS + head) * tokens + rows % tokens
    kind = y.dtype.element_ty
    _put(out, to, dims, 2 * HALF, x.to(kind), there)
    _put(out, to, dims + HALF, 2 * HALF, z.to(kind), there)


@triton.jit
def _rotary_qkv_back(
    dq, dk, dv, cos, sin, dy, m, tokens, table_tokens, width,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    dims = tl.arange(0, HALF)
    there = (rows < m)[:, None] & (dims < HALF)[None, :]
    batch, token = (rows // tokens).to(tl.int64), rows % tokens
    if part == 0:
        at = batch * q_row + head * q_head + token * q_token
        base = dq
    elif part == 1:
        at = batch * k_row + head * k_head + token * k_token
        base = dk
    else:
        at = batch * v_row + head * v_head + token * v_token
        base = dv
    x = tl.load(base + at[:, None] + dims[None, :], mask=there, other=0.0).to(tl.float32)
    z = tl.load(base + at[:, None] + HALF + dims[None, :], mask=there, other=0.0).to(tl.float32)
    if part < 2:
        where = rows % table_tokens
        c = _tile(cos, where, dims, 2 * HALF, there)
        s = _tile(sin, where, dims, 2 * HALF, there)
        x, z = x * c + z * s, z * c - x * s
    column = part * width + head * 2 * HALF
    kind = dy.dtype.element_ty
    _put(dy + column, rows, dims, 3 * width, x.to(kind), there)
    _put(dy + column + HALF, rows, dims, 3 * width, z.to(kind), there)


def gate(y: Tensor, narrow: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    m, hidden = len(y), y.shape[1] // 2
    out, act = torch.empty_like(y), y.new_empty(m, hidden)
    grid = (triton.cdiv(hidden, COLUMNS), triton.cdiv(m, ROWS))
    _gate[grid](y, narrow, b, out, act, m, hidden, b.shape[1], ROWS, COLUMNS, num_warps=WARPS)
    return out, act


def gate_back(d_act: Tensor, narrow: Tensor, a: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    m, hidden = d_act.shape
    d_gate_up, act = torch.empty_like(gate_up), torch.empty_like(d_act)
    grid = (triton.cdiv(hidden, BACK_COLUMNS), triton.cdiv(m, BACK_ROWS))
    _gate_back[grid](
        d_act, narrow, a, gate_up, d_gate_up, act, m, hidden, len(a), BACK_ROWS, BACK_COLUMNS, num_warps=WARPS
    )  # fmt: skip
    return d_gate_up, act


def rotary_qkv(
    y: Tensor, narrow: Tensor, b: Tensor, cos: Tensor, sin: Tensor, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    m, width, head = len(y), y.shape[1] // 3, cos.shape[-1]
    q, k, v = (y.new_empty(batch, width // head, m // batch, head) for _ in range(3))
    grid = (3 * (width // head), triton.cdiv(m, ROWS))
    tokens, table, heads = m // batch, cos.numel() // head, width // head
    _rotary_qkv[grid](
        y, narrow, b, cos, sin, q, k, v, m, tokens, table, width, b.shape[1], heads, head // 2, ROWS, num_warps=WARPS
    )  # fmt: skip
    return q, k, v


def rotary_qkv_back(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, head = dq.shape
    m, width = batch * tokens, heads * head
    dy = dq.new_empty(m, 3 * width)
    strides = [s for d in (dq, dk, dv) for s in d.stride()[:3]]
    grid = (3 * heads, triton.cdiv(m, ROWS))
    table = cos.numel() // head
    _rotary_qkv_back[grid](
        dq, dk, dv, cos, sin, dy, m, tokens, table, width, *strides, heads, head // 2, ROWS, num_warps=WARPS
    )
    return dy
