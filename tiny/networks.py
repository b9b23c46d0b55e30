"""The tiny model's networks: their sizes, how training starts, and how trained weights come back.

Two experts, VAE, wav2vec2 and umT5 together stay under 16 MB with the denoisers' matrices in float8.

Axes    B batch   S text tokens   C width
"""
import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from audio import AudioConfig, Wav2Vec2
from model import Config, Denoiser
from text import TextConfig, TextEncoder, Tokenizer
from tiny import random_weights
from tiny.optimise import load_state, world
from vae import VAE, CausalConv, Downsample, ResBlock, Upsample, VAEConfig

DENOISER_CONFIG = Config(dim=160, ffn_dim=384, n_head=5, n_layer=7, text_dim=64, text_len=32, freq_dim=64, audio_dim=64, audio_states=5,
                         audio_layers=(0, 2, 4, 6))
VAE_CONFIG = VAEConfig(dim=16, dec_dim=16, dim_mult=(1, 2, 3, 4), num_res_blocks=1)
TEXT_CONFIG = TextConfig(vocab=1024, dim=64, dim_attn=64, ffn=128, n_head=4, n_layer=2)
AUDIO_CONFIG = AudioConfig(dim=64, ffn_dim=128, n_head=4, n_layer=4, conv_dim=(32,) * 7, pos_kernel=32, pos_groups=4)


# ------------------------------------------------------------------------------------------------------------ initial weights

def new_audio():
    encoder = Wav2Vec2(AUDIO_CONFIG)
    nn.init.normal_(encoder.pos_conv.v, std=0.05)
    nn.init.zeros_(encoder.pos_conv.bias)
    with torch.no_grad():
        encoder.pos_conv.g.copy_(encoder.pos_conv.v.norm(dim=(0, 1), keepdim=True))
    return encoder


def new_vae():
    """A VAE that starts as one for single pictures: convolutions look at the newest frame only, changes of the frame rate copy."""
    vae, z = VAE(VAE_CONFIG), VAE_CONFIG.z_dim
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, CausalConv):
                layer.weight[:, :, :-1] = 0
            if isinstance(layer, Downsample) and layer.time:
                nn.init.eye_(layer.time.weight[:, :, -1, 0, 0])
            if isinstance(layer, Upsample) and layer.time:
                for half in layer.time.weight[:, :, -1, 0, 0].chunk(2):
                    nn.init.eye_(half)
            if isinstance(layer, ResBlock):
                layer.conv2.weight *= 0.3
        for layer in (vae.encoder.to_latent, vae.decoder.from_latent):
            nn.init.eye_(layer.weight[:, :, 0, 0, 0])
            layer.bias.zero_()
        vae.encoder.to_latent.weight[z:] *= 0.1
        vae.encoder.to_latent.bias[z:] = -6                          # log variance
    return vae


def new_denoiser():
    """A denoiser whose audio attention adds nothing and whose output is zero at first."""
    net = Denoiser(DENOISER_CONFIG)
    with torch.no_grad():
        nn.init.ones_(net.audio.mix)
        nn.init.normal_(net.token_kind.weight, std=0.02)
        for layer in (net.head.linear, *(layer for block in net.blocks if block.inject for layer in (block.inject.o, block.inject.adain))):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for part in (*net.blocks, net.head):
            part.modulation.normal_(std=net.cfg.dim ** -0.5)
    return net


def new_text():
    encoder = TextEncoder(TEXT_CONFIG)
    nn.init.normal_(encoder.embed.weight, std=1.0)
    for block in encoder.blocks:
        nn.init.normal_(block.attn.position.weight, std=0.1)
    return encoder


# ------------------------------------------------------------------------------------------------------------ trained weights

def trained(out, device, denoiser=None):
    """The networks of finished stages, with averaged weights and without gradients.

    out      folder of the stages        denoiser  "both", "high" or "low": this one and its text encoder as well
    returns  {kind: net} on the device, {kind: config}
    raises   ValueError naming the command of a stage that has not been run
    """
    out, state = Path(out), load_state(Path(out) / "vae.weights.pt", "python -m tiny.stages vae")
    configs = {"denoiser": DENOISER_CONFIG, "text": TEXT_CONFIG, "audio": AUDIO_CONFIG,
               "vae": dataclasses.replace(VAE_CONFIG, mean=tuple(state["mean"]), std=tuple(state["std"]))}
    nets = {"vae": VAE(configs["vae"]), "audio": Wav2Vec2(AUDIO_CONFIG)}
    state |= load_state(out / "audio.weights.pt", "python -m tiny.stages audio")
    if denoiser:
        nets |= {"denoiser": Denoiser(DENOISER_CONFIG), "text": TextEncoder(TEXT_CONFIG)}
        state |= load_state(out / f"dit_{denoiser}.weights.pt", "python train.py dit")
    for kind, net in nets.items():
        net.load_state_dict(state[kind])
        net.to(device).requires_grad_(False).eval()
    return nets, configs


# -------------------------------------------------------------------------------------------------------------------- captions

def shared_tokenizer(out):
    """The byte-level tokenizer of the tiny model, written into the folder `out` by the first of several processes."""
    path = Path(out) / "tokenizer.json"
    if world()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        random_weights.make_tokenizer(path)
    if world()[1] > 1:
        dist.barrier()
    return Tokenizer(path, TEXT_CONFIG.vocab)


def token_ids(tokenizer, captions, device):
    """[caption] -> (B, S) token ids, 0 behind the end of each"""
    rows = [tokenizer(caption)[0] for caption in captions]
    return torch.stack([F.pad(row, (0, DENOISER_CONFIG.text_len - len(row))) for row in rows]).to(device)


def encode_ids(encoder, ids):
    """umT5 rows of token ids.  ids (B, S) with zeros behind each caption -> (B, S, C), zeros there too, as the denoiser pads"""
    mask = ids != 0
    return encoder(ids, mask).float() * mask[..., None]
