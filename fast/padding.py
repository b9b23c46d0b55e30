"""The rows that pad a prompt to 512 are alike, and so are their keys and values: one of them stands for all.

A key that counts as many is the same as many keys: the exponential of its score is multiplied, or a logarithm added to the score. With a prompt of
60 tokens text attention has 61 keys for 512, and takes 0.033 ms for 0.068 (H200, 3,168 queries of 40 heads).

Axes    n queries   S keys of which the last counts as `pads`   K heads   D head width
"""
from __future__ import annotations                                   # where Triton is missing, tl.constexpr below is not looked up

import math
from dataclasses import dataclass

import torch

from fast.kernels import jit, on, triton
from model import Cond, attention

if triton:
    import triton.language as tl

MOST = 256                   # keys up to which the kernel below is no slower than cuDNN with all 512
ALIKE = 1e-3                 # relative L2 up to which rows are: products may round them differently


@dataclass(frozen=True)
class Trimmed(Cond):
    """A Cond for FastDenoiser alone: the last of each layer's text keys stands for `pads` alike."""
    pads: int = 1


def trim(cond, words):
    """The Cond of a prompt of so many tokens with one key for its padding, where that is faster; the same Cond where it is not, or of a fork whose
    padding is not alike, or whose Cond is another."""
    texts = [layer.text for layer in cond.layers]                    # (2, B, S, K, D) each
    pads = texts[0].shape[2] - words
    if pads < 2 or words >= MOST or type(cond) is not Cond:
        return cond
    gaps = [(text[:, :, words:] - text[:, :, -1:]).norm() / text[:, :, words:].norm() for text in texts]
    if not torch.stack(gaps).max() < ALIKE:
        return cond
    layers = tuple(layer._replace(text=layer.text[:, :, :words + 1].clone(memory_format=torch.contiguous_format)) for layer in cond.layers)
    return Trimmed(**vars(cond) | dict(layers=layers), pads=pads)


def pads_of(cond):
    return getattr(cond, "pads", 1)


def whole(text, pads):
    """All keys and values (2, B, S, K, D) of those of which the last counts as `pads`."""
    return torch.cat([text, text[:, :, -1:].expand(-1, -1, pads - 1, -1, -1)], dim=2) if pads > 1 else text


@jit
def attend_row(q_ptr, k_ptr, v_ptr, y_ptr, scale, more, n, N, C, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """ROWS queries of one head: attention of q (n, C) to k v (N, C) -> y (n, C). A weight is 2 to the power of a score * scale, of the last
    key + more."""
    head, token = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = head * D + tl.arange(0, D)[None, :]
    place, inside = token[:, None].to(tl.int64) * C + column, token[:, None] < n
    q = tl.load(q_ptr + place, mask=inside, other=0)
    top, total, y = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for first in range(0, N, KEYS):
        key = first + tl.arange(0, KEYS)
        there, known = key[:, None] * C + column, key[:, None] < N
        k, v = tl.load(k_ptr + there, mask=known, other=0), tl.load(v_ptr + there, mask=known, other=0)
        score = tl.dot(q, tl.trans(k)) * scale + tl.where(key == N - 1, more, 0)[None, :]            # (ROWS, KEYS)
        score = tl.where(key[None, :] < N, score, float("-inf"))
        before, top = top, tl.maximum(top, tl.max(score, 1))
        p, old = tl.exp2(score - top[:, None]), tl.exp2(before - top)
        total = total * old + tl.sum(p, 1)
        y = y * old[:, None] + tl.dot(p.to(v.dtype), v)
    tl.store(y_ptr + place, (y / total[:, None]).to(y_ptr.dtype.element_ty), mask=inside)


def attend(q, text, pads):
    """`model.attention` of q (1, n, K, D) to text (2, 1, S, K, D), contiguous, the last key of which counts as `pads` -> (1, n, K*D)"""
    (_, n, K, D), S = q.shape, text.shape[2]
    if pads > 1 and not q.is_cuda:                                   # what the kernel computes, whatever a fork's attention is
        k, v = text.transpose(2, 3)                                  # (1, K, S, D)
        more = math.log(pads) * (torch.arange(S, device=q.device) == S - 1)
        return (torch.softmax(q.transpose(1, 2) @ k.mT / D ** 0.5 + more, dim=-1) @ v).transpose(1, 2).flatten(2)
    if pads == 1 or D not in (16, 32, 64, 128):                      # the kernel's widths
        return attention(q, *whole(text, pads))
    y = torch.empty_like(q)
    with on(q.device):
        attend_row[K, triton.cdiv(n, 64)](q, *text, y, math.log2(math.e) / D ** 0.5, math.log2(pads), n, S, K * D, D, 64, 64)
    return y.flatten(2)
