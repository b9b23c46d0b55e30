"""Prompt -> text features: cleaning, tokenizing, and the encoder of umT5-XXL.

umT5 is a pre-norm transformer without biases. Word order enters only as a relative position bias: a learned number per attention head
and distance bucket, added to the attention scores. Unlike in T5 every layer has its own table. Scores are not divided by sqrt(D).

Axes    B batch   S text tokens   C width   K heads   D head width
Source  Wan-Video/Wan2.2@42bf4cf wan/modules/t5.py, cited below as "official L245", and wan/modules/tokenizers.py.
"""
import html
import math
import re
import sys
from dataclasses import dataclass

import ftfy
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class TextConfig:             # umT5-XXL as shipped with every Wan2.x checkpoint
    vocab: int = 256384
    dim: int = 4096           # C
    dim_attn: int = 4096      # K * D
    ffn: int = 10240
    n_head: int = 64          # K, so D = 64
    n_layer: int = 24
    n_bucket: int = 32        # distance buckets: half for keys up to the query, half for keys after it
    max_distance: int = 128   # from here on all distances share the last bucket
    eps: float = 1e-6


def position_buckets(S, n_bucket, max_distance):
    """Distance bucket of every (query, key) pair: short distances have one each, longer ones share in logarithmic steps (official L245-264).

    returns  (S, S) int64, computed on the CPU: distances 16, 32, 64 lie on bucket edges, and another device may round them differently
    """
    half = n_bucket // 2
    near = half // 2                                                           # 8: distances 0..7 have a bucket each
    d = torch.arange(S)
    far = (d.clamp(min=near) / near).log() / math.log(max_distance / near)     # 0 at `near`, 1 at `max_distance`
    far = (near + (far * (half - near)).long()).clamp(max=half - 1)
    bucket = torch.where(d < near, d, far)                                     # (S,)     by absolute distance
    offset = d[None, :] - d[:, None]                                           # (S, S)   key minus query
    return bucket[offset.abs()] + half * (offset > 0)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32; the result has the weight's dtype, that of the next linear layer."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        x = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return x.to(self.weight.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.q = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.k = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.v = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)
        self.position = nn.Embedding(config.n_bucket, config.n_head)

    def forward(self, x, bucket, mask):
        q = self.q(x).unflatten(2, (self.n_head, -1)).transpose(1, 2)          # (B, K, S, D)
        k = self.k(x).unflatten(2, (self.n_head, -1)).transpose(1, 2)          # (B, K, S, D)
        v = self.v(x).unflatten(2, (self.n_head, -1)).transpose(1, 2)          # (B, K, S, D)
        bias = self.position(bucket).permute(2, 0, 1)[None].contiguous()       # (1, K, S, S)
        if mask is not None:                                                   # finite, as official L109, so a row without keys is not NaN
            bias = bias.masked_fill(mask[:, None, None, :] == 0, torch.finfo(bias.dtype).min)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, K, S, D)
        return self.o(y.transpose(1, 2).flatten(2))                            # (B, S, C)


class FeedForward(nn.Module):
    """GELU-gated: x (B, S, C) -> (B, S, C)"""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn, bias=False)
        self.up = nn.Linear(config.dim, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.dim, bias=False)

    def forward(self, x):
        return self.down(self.up(x) * F.gelu(self.gate(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: x (B, S, C) float32, bucket (S, S) int64, mask (B, S) or None -> (B, S, C) float32"""

    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)

    def forward(self, x, bucket, mask):
        x = x + self.attn(self.norm1(x), bucket, mask)    # float32 residual stream: umT5 overflows in float16
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.eps)

    def forward(self, ids, mask=None):
        """Features of every token.

        ids      (B, S) int64        mask  (B, S), 0 where a token is padding; None: no padding
        returns  (B, S, C) in the weights' dtype, padding rows included
        source   official L267-312
        """
        bucket = position_buckets(ids.shape[1], self.config.n_bucket, self.config.max_distance).to(ids.device)   # (S, S)
        x = self.embed(ids).float()                       # (B, S, C)
        for block in self.blocks:
            x = block(x, bucket, mask)
        return self.norm(x)


def clean_prompt(prompt):
    """Repair broken Unicode, resolve HTML entities (twice, for "&amp;lt;"), collapse white space."""
    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", prompt).strip()


class Tokenizer:
    """Prompt -> token ids, through the tokenizer.json that came with the text encoder.

    path     tokenizer.json        length  most tokens of a prompt, the closing </s> included
    raises   ValueError if the file is missing, damaged, or has no </s>
    """

    def __init__(self, path, length=512):
        from formats.tokenizer_file import read_tokenizer  # here: importing `sample` does not need it
        try:
            self.model = read_tokenizer(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read the tokenizer {path}: {error}; wanted the tokenizer.json of the text encoder") from None
        self.end = self.model.token_to_id("</s>")
        self.length = length
        if self.end is None:
            raise ValueError(f"{path} has no </s> token: wanted the tokenizer.json of umT5, this belongs to another model")

    def __call__(self, prompt):
        """str -> (1, S) int64, S <= length: the cleaned prompt, cut with a warning if it is too long, then </s>. No padding."""
        ids = self.model.encode(clean_prompt(prompt), add_special_tokens=False).ids
        if len(ids) >= self.length:
            print(f"warning: the prompt has {len(ids) + 1} tokens, the model reads {self.length}: the end is cut off", file=sys.stderr)
        return torch.tensor([ids[:self.length - 1] + [self.end]])


@torch.no_grad()
def encode_prompt(encoder, tokenizer, prompt):
    """Text features of one prompt.

    returns  (S, C) float32 on the encoder's device, S <= 512. The official code pads to 512 tokens, masks the padding and drops its rows;
             without padding the rows are the same. The denoiser pads with zero rows, and does attend to those.
    raises   ValueError if the tokenizer belongs to another encoder
    """
    ids = tokenizer(prompt)
    vocab = encoder.embed.num_embeddings
    if ids.max() >= vocab:
        raise ValueError(f"the tokenizer gave token {ids.max()}, the text encoder knows {vocab}: take both from one checkpoint")
    return encoder(ids.to(encoder.embed.weight.device))[0].float()
