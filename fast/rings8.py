"""Rings in 8 bits, for GPUs with 8-bit tensor cores: half the memory; attention takes 0.8 of the time it takes in bfloat16. A block's keys
and values are rounded once, when they are written.

    keys     int8, one scale per head and 128 keys, after one constant key per layer is taken out, which softmax ignores: the mean of the motion
             tokens' keys. These are always there and never move, so their scores average 0, and the largest is never below it
    values   e4m3, one scale per head for the whole ring, see `value_scales`; stored channel by channel and in attention8.py's order of tokens
    queries  int8, one scale per token and head, in the place of their bf16 numbers

Reference, motion and each block have a place of whole 128s. Keys that only fill one up are zeros: each adds exp2(-top) to the sum of the
softmax and nothing else, which is taken off again.

Axes    n tokens of a latent frame   S condition tokens   N tokens of a part   W places, a multiple of 128   K heads   D head width   C = K*D
"""
from __future__ import annotations                                   # where Triton is missing, tl.constexpr below is not looked up

import torch

from fast.attention8 import KEYS, LOG2_E, QUERIES, STAGES, check, quantize_rows, tile
from fast.fp8 import E4M3, MAX, TINY
from fast.kernels import jit, on, triton
from fast.rings import turn
from live import BLOCK, Ring

if triton:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor


ROOM = 64                                                            # of values, in the condition tokens' largest of the head


@jit
def write_keys(x_ptr, mean_ptr, y_ptr, scale_ptr, first, blocks, N, C, D: tl.constexpr, ROWS: tl.constexpr):
    """ROWS keys of one head: x (N, C) bf16 less its mean (C,) -> int8 y (W, C) from row first * ROWS on, zeros behind the last;
    scale (K, blocks + 1)"""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.arange(0, ROWS)
    token, channel = block * ROWS + row, head * D + tl.arange(0, D)
    inside = token[:, None] < N
    x = tl.load(x_ptr + token[:, None].to(tl.int64) * C + channel[None, :], mask=inside, other=0).to(tl.float32)
    x = tl.where(inside, x - tl.load(mean_ptr + channel)[None, :], 0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0) / 127, 1.1754943508222875e-38)    # TINY
    place = (first + block) * ROWS + row
    tl.store(y_ptr + place[:, None].to(tl.int64) * C + channel[None, :], tl.floor(x / scale + 0.5).to(tl.int8))
    tl.store(scale_ptr + head * (blocks + 1) + first + block, scale)


@jit
def write_values(x_ptr, y_ptr, scale_ptr, first, width, N, C, D: tl.constexpr, ROWS: tl.constexpr):
    """ROWS values of one head: x (N, C) bf16 / scale (K,) -> e4m3 y (C, W) from column first * ROWS on, zeros behind the last.
    Order of tokens: attention8.quantize_columns."""
    head = tl.program_id(1)
    place, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), head * D + tl.arange(0, D)
    token = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    x = tl.load(x_ptr + token[:, None].to(tl.int64) * C + channel[None, :], mask=token[:, None] < N, other=0).to(tl.float32)
    y = (x / tl.load(scale_ptr + head)).to(tl.float8e4nv)                                 # saturates
    tl.store(y_ptr + channel[None, :].to(tl.int64) * width + first * ROWS + place[:, None], y)


@jit
def attend_ring(q, k, v, y_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, n, C, width, q_width, seen, unused,
                D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr):
    """ROWS queries of one head against the first `seen` blocks of keys, as attention8.attend; its sums and its maximum are explained there.

    q (n, 2C) int8, see attention8.quantize_rows, k (width, C) int8, v (C, width) e4m3 -> y (n, C) bf16, which may be q's memory
    unused  places among them that hold no key
    """
    token, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    channel = head * D + tl.arange(0, D)
    q = tile(q, tl.program_id(0) * ROWS, head * 2 * D, n, 2 * C, ROWS, D, TMA)                               # (ROWS, D)
    q_scale = tl.load(q_scale_ptr + head * q_width + token)
    k_scale_ptr += head * (width // KEYS + 1)
    k_scale = tl.load(k_scale_ptr)
    top = tl.full([ROWS], float("-inf"), tl.float32)                 # the largest score so far, less 8
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for block in tl.range(0, seen, num_stages=STAGES):
        score = tl.dot(q, tile(k, block * KEYS, head * D, width, C, KEYS, D, TMA).T).to(tl.float32)
        scale = tl.minimum(q_scale * k_scale, 4)
        higher = tl.maximum(top, tl.max(score, 1) * scale - 8)
        p = tl.exp2(score * scale[:, None] - higher[:, None])        # (ROWS, KEYS)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        p = p.to(tl.float8e4nv).reshape(ROWS, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)
        acc = acc * shrink[:, None] + tl.dot(p, tile(v, head * D, block * KEYS, C, width, D, KEYS, TMA).T)
        top = higher
        k_scale = tl.load(k_scale_ptr + block + 1)                   # one more than there are
    y = acc * tl.load(v_scale_ptr + head) / (total - unused * tl.exp2(-top))[:, None]
    tl.store(y_ptr + token[:, None].to(tl.int64) * C + channel[None, :], y.to(tl.bfloat16), mask=token[:, None] < n)


def value_scales(values):
    """Values of the condition tokens (1, S, K, D), which are there first -> the scale of all values of a ring, per head (K,).

    What comes later is cut off at ROOM times their largest of its head, or ROOM / 16 times that of all heads. So much room costs nothing: e4m3 keeps
    4 bits of a number down to 1 / 28,000 of its largest.
    """
    largest = values.float().abs().amax((0, 1, 3))
    return (torch.maximum(largest, largest.max() / 16) * (ROOM / MAX)).clamp(min=TINY)


def blocks_of(tokens):
    return -(-tokens // KEYS)


class Ring8(Ring):
    """As live.Ring, for one step on a GPU; the result of `attend` takes the place of the queries."""

    def __init__(self, expert, n, window):
        rows = expert.rows[0]                                        # (2, 1, S, K, D)
        check(rows.device)
        self.n, self.S, (self.K, self.D) = n, rows.shape[2], rows.shape[3:]
        self.parts = [n, self.S - n] + [BLOCK * n] * (window // BLOCK)                            # tokens of each
        starts = torch.tensor([0, *map(blocks_of, self.parts)]).cumsum(0).tolist()
        self.starts, blocks, C = starts[:-1], starts[-1], self.K * self.D

        def empty(*shape, dtype=torch.float32):
            return torch.zeros(shape, device=rows.device, dtype=dtype)
        self.width = blocks * KEYS
        self.layers = [(empty(self.width, C, dtype=torch.int8), empty(self.K, blocks + 1), empty(C, self.width, dtype=torch.int8).view(E4M3),
                        empty(self.K), empty(C)) for _ in expert.rows]                            # keys, their scales, values, theirs, constant key
        for layer, (_, values) in zip(self.layers, expert.rows):
            layer[3].copy_(value_scales(values))
        self.begin(expert)

    def begin(self, expert):
        """As Ring.begin. With another constant key the video's keys are a little off from then on, by what the motion tokens have changed; values keep
        the scales of the first condition tokens."""
        self.ref_keys = expert.ref_keys
        for layer, (keys, values) in enumerate(expert.rows):
            self.layers[layer][4].copy_(keys[0, self.n:].float().mean(0).flatten())
            for part, rows in enumerate((slice(0, self.n), slice(self.n, None))):
                self.write(layer, part, keys[:, rows], values[:, rows])

    def write(self, layer, part, keys, values=None):
        """Put the keys and values (1, N, K, D) of a part in its place."""
        k8, k_scale, v8, v_scale, mean = self.layers[layer]
        N, C, first = keys.shape[1], self.K * self.D, self.starts[part]
        grid = blocks_of(N), self.K
        with on(keys.device):
            write_keys[grid](keys.to(torch.bfloat16).contiguous(), mean, k8, k_scale, first, self.width // KEYS, N, C, self.D, KEYS)
            if values is not None:
                write_values[grid](values.to(torch.bfloat16).contiguous(), v8, v_scale, first, self.width, N, C, self.D, KEYS, num_warps=8)

    def attend(self, q, k, v, layer, slot, seen, moved):
        ref = torch.empty_like(self.ref_keys[layer], dtype=torch.bfloat16)
        turn(self.ref_keys[layer], moved, ref)
        part, last = 2 + slot // BLOCK, 2 + seen // BLOCK            # parts 0 to last - 1 are seen
        self.write(layer, 0, ref)
        self.write(layer, part, k, v)
        seen = self.starts[last - 1] + blocks_of(self.parts[last - 1])
        return self.read(q, layer, seen, seen * KEYS - sum(self.parts[:last]))

    def read(self, q, layer, seen, unused):
        """q (1, n, K, D) against the first `seen` blocks -> (1, n, C) bf16"""
        k8, k_scale, v8, v_scale, mean = self.layers[layer]
        q, C = q.to(torch.bfloat16).flatten(2).contiguous(), self.K * self.D
        tma = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
        n, blocks = q.shape[1], blocks_of(q.shape[1])
        q8, q_scale = q[0].view(torch.int8), torch.empty(self.K * blocks * KEYS, device=q.device)
        with on(q.device):
            quantize_rows[blocks, self.K](q[0], mean, q8, q_scale, LOG2_E * self.D ** -0.5, n, C, self.D, KEYS, SHARED=False)
            if tma:
                shapes = (q8, [QUERIES, self.D]), (k8, [KEYS, self.D]), (v8, [self.D, KEYS])
                q8, k8, v8 = (TensorDescriptor.from_tensor(x, shape) for x, shape in shapes)
            attend_ring[-(-n // QUERIES), self.K](q8, k8, v8, q, q_scale, k_scale, v_scale, n, C, self.width, blocks * KEYS, seen, unused,
                                                  self.D, QUERIES, KEYS, STAGES, tma)
        return q

    def state(self):
        return dict(layers=[x for layer in self.layers for x in layer], ref_keys=self.ref_keys)

    def restore(self, state):
        for mine, theirs in zip(self.state()["layers"], state["layers"]):
            mine.copy_(theirs)
        self.ref_keys = [key.clone() for key in state["ref_keys"]]


def ring8_bytes(cfg, n, steps, window):
    """As live.ring_bytes."""
    width = KEYS * (blocks_of(n) + blocks_of(int(1.5 * n)) + window // BLOCK * blocks_of(BLOCK * n))
    return steps * cfg.n_layer * width * cfg.dim * 2
