"""The latents of a picture that stands still, in three passes of the encoder; live.still makes passes until the latents change no more: 17, say.

Where no frame ever changed, all that a causal convolution sees in time is the same, and so are all its outputs: it is a convolution of one frame, by
its weight summed over time.
"""
import copy

import torch
from torch import nn

from live import REF_LATENT
from vae import CausalConv, convolve


class StillConv(nn.Conv3d):
    """A CausalConv of frames that do not change, and never did."""

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, (1, *conv.kernel_size[1:]), padding=conv.padding, device="meta")
        self.every = conv.stride[0]
        self.weight = nn.Parameter(conv.weight.float().sum(2, keepdim=True).to(conv.weight), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x, cache):
        return convolve(x[:, ::self.every], self)                    # (B, n or n/2, h, w, c_out)


def still_encoder(encoder):
    """A copy of a vae.Encoder for one latent of a picture shown for ever. It takes all frames of that latent, and leaves its cache alone."""
    still = copy.deepcopy(encoder)
    for module in [*still.modules()]:
        for name, layer in module.named_children():
            if isinstance(layer, CausalConv):
                module.add_module(name, StillConv(layer))
    return still


@torch.no_grad()
def still(vae, picture):
    """As live.still, but for rounding: picture (1, 3, 1, height, width) -> reference, still latent, each (1, z, 1, H, W)"""
    def encode():
        (mean, std), frames = vae.latent_statistics(), vae.stride[0]
        begun = torch.cat(list(vae.encode_stream([picture] * (1 + frames * REF_LATENT), 1)), dim=2)           # (1, z, 1 + REF_LATENT, H, W)
        going_on = [0]                                               # what is not None: a stream that has begun
        mu, _ = still_encoder(vae.encoder)(picture.expand(-1, -1, frames, -1, -1), going_on).float().chunk(2, dim=1)
        return torch.cat([begun[:, :, REF_LATENT:], (mu - mean) / std], dim=2)
    return vae.with_fp32_fallback(encode).split(1, dim=2)
