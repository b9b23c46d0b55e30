"""Train a checkpoint of the family: a tiny S2V from nothing on drawn faces, or a LoRA or all weights of any S2V on a folder of videos.

    python -m tiny.speech data/speech                                 training sound
    python train.py audio                                        wav2vec2: hears what a mouth would do
    python train.py vae                                          pictures <-> latents
    python train.py dit                                          one denoiser for all noise levels, and the text encoder with it
    python train.py dit --expert high; ... --expert low          the two experts, both starting from it
    python train.py export --to weights/tiny                     a checkpoint folder for sample.py
    python train.py tune --ckpt weights/tiny --data videos --lora 8      fine-tune; --lora 0 changes all weights
    torchrun --nproc-per-node 2 train.py dit                     the same on several GPUs: each adds a batch

The networks are those of model.py, vae.py, audio.py and text.py, built from their configs; nothing here is known to them.

How lips meet sound  The sampler drops the first 3 frames of the first clip and plays the sound from its start, so the frame that heard
    audio column c (time c/16 s) is shown at (c - 3)/16 s. It is therefore drawn as the mouth is at (c - 3)/16 s.
The two kinds of clip  First: 80 frames, encoded behind the reference picture, no motion tokens. Later: 80 frames encoded behind the 73
    before them, whose 19 latents are the motion. Every other batch is of the other kind.
Resume  All randomness of step s comes from generators seeded by (seed, s), and a clip by its number, so a run that was stopped and
    resumed gives the bits of one that was not. A state is refused by a run with other options.

Axes    B batch   T latent frames   P pixel frames   H W latent size   S text tokens
"""
import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from formats import checkpoints
import convert_weights
from tiny import faces
from tiny import random_weights as fake_checkpoint
from fast import fp8
from formats import lora
from tiny import speech
from audio import AudioConfig, Wav2Vec2, align_to_fps, audio_features, resample_50_to_30
from media.sound import RATE, load_audio
from model import Config, Denoiser, attention_backend, compile_blocks
from tiny.optimise import Stage, generator, load_state, start, train, world
from media.pictures import fit_frame, fit_picture, load_image, s2v_size
from text import TextConfig, TextEncoder, Tokenizer, encode_prompt
from vae import VAE, CausalConv, Downsample, ResBlock, Upsample, VAEConfig, new_cache
from media.ffmpeg import probe
from media.video import read_frames
from wan_s2v import FPS, WARM_UP, run_dtype

CLIP = 80                    # pixel frames of a clip, 20 latent frames
PAST = 73                    # pixel frames of the motion history, 19 latent frames

# The tiny model: two experts, VAE, wav2vec2 and umT5 together stay under 16 MB with the denoisers' matrices in float8.
DENOISER = Config(dim=160, ffn_dim=384, n_head=5, n_layer=7, text_dim=64, text_len=32, freq_dim=64, audio_dim=64, audio_states=5,
                  audio_layers=(0, 2, 4, 6))
TINY_VAE = VAEConfig(dim=16, dec_dim=16, dim_mult=(1, 2, 3, 4), num_res_blocks=1)
TEXT = TextConfig(vocab=1024, dim=64, dim_attn=64, ffn=128, n_head=4, n_layer=2)
AUDIO = AudioConfig(dim=64, ffn_dim=128, n_head=4, n_layer=4, conv_dim=(32,) * 7, pos_kernel=32, pos_groups=4)
SAMPLING = dict(size=[128, 128], steps=12, guidance=[1.5, 1.5], negative_prompt="", picture_db=25.0)
NOTE = "trained on drawn faces: it knows faces as faces.py draws them and nothing else"


def option(default, help, least=-math.inf, most=math.inf):
    return field(default=default, metadata={"help": help, "range": (least, most)})


@dataclass(frozen=True)
class Options:
    stage: str = option("dit", "audio, vae, dit, export or tune")
    out: str = option("runs/tiny", "folder of the stages' states and loss curves")
    speech: str = option("data/speech/train", "folder of training sound")
    steps: int = option(0, "optimiser steps (0: the stage's own)", 0)
    batch: int = option(0, "clips per step and GPU (0: the stage's own)", 0)
    lr: float = option(0.0, "highest learning rate (0: the stage's own)", 0)
    warmup: int = option(100, "steps until it is reached; then a cosine to 0", 1)
    decay: float = option(0.01, "AdamW's weight decay", 0)
    ema: float = option(0.999, "of the averaged weights, which are those that are used afterwards", 0, 1)
    clip: float = option(1.0, "largest norm of the gradient", 0)
    seed: int = option(0, "of everything random", 0, 2 ** 63 - 1)
    save: int = option(1000, "steps between saved states and loss curves; a run goes on from the last one by itself", 1)
    stop: int = option(0, "end this run early, after this many steps; the same command without it goes on (0: at --steps)", 0)
    device: str = option("auto", "cpu, cuda, cuda:1 (auto: a GPU if there is one)")
    # vae
    latent_noise: float = option(0.5, "most noise on the latents that the decoder sees, in deviations of each channel", 0, 10)
    own: float = option(0.4, "half of the long videos are its own decodings of latents with up to this much noise, as motion frames are", 0, 10)
    # dit
    expert: str = option("both", "both: all noise levels; high or low: this side of the boundary, starting from `both`")
    boundary: float = option(0.65, "sigma from which the high-noise expert serves", 0, 1)
    shift: float = option(3.0, "of the noise levels, as in sampling", 0.01, 100)
    drop: float = option(0.1, "share of clips whose sound and caption are taken away, for guidance", 0, 1)
    motion_noise: float = option(0.15, "most noise on the motion latents: the sampler's own are not perfect either", 0, 1)
    pool: int = option(768, "clips kept ready", 1)
    fresh: int = option(16, "clips that are replaced at once", 1)
    every: int = option(12, "steps between two replacements", 1)
    compile: bool = option(False, "torch.compile the denoiser's blocks")
    # export
    to: str = option("", "new checkpoint folder of export (weights/tiny); LoRA file, or new folder, of tune (tuned)")
    fp8: bool = option(True, "export with the denoisers' large matrices in float8")
    # tune
    ckpt: str = option("weights/tiny", "checkpoint folder to fine-tune")
    data: str = option("videos", "folder of videos with sound. Beside NAME.mp4 may lie NAME.txt, its caption, and NAME.png, its reference "
                        "picture (else its middle frame)")
    size: int = option(0, "pixels of a training frame, as in WIDTH*HEIGHT (0: the checkpoint's)", 0)
    lora: int = option(8, "rank; 0 changes all weights and writes a whole checkpoint", 0)
    targets: str = option("self_attn.q self_attn.k self_attn.v self_attn.o cross_attn.q cross_attn.k cross_attn.v cross_attn.o ffn.0 ffn.2 "
                          "inject.q inject.k inject.v inject.o", "layers of a block that get a LoRA")
    lead: int = option(WARM_UP, "frames between a picture and the audio column it is trained with; 3 makes lips and sound coincide", 0)
    recompute: bool = option(False, "compute each block again in the backward pass: much less memory, a third slower")


DEFAULTS = {                 # of the options above whose default is 0 or nothing
    "audio": dict(steps=3000, batch=32, lr=1e-3),
    "vae": dict(steps=4900, batch=10, lr=1e-3),
    "dit": dict(steps=5400, batch=64, lr=1.2e-3),
    "export": dict(to="weights/tiny"),
    "tune": dict(steps=200, batch=2, lr=1e-4, to="tuned"),
}


# -------------------------------------------------------------------------------------------------------------- stage: audio

def filterbank(bands=20, n_fft=512):
    """Triangles evenly spaced in log frequency, 100 to 7000 Hz -> (n_fft/2 + 1, bands)"""
    edges = torch.logspace(2, math.log10(7000), bands + 2)
    f = torch.linspace(0, RATE / 2, n_fft // 2 + 1)[:, None]
    return torch.minimum((f - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - f) / (edges[2:] - edges[1:-1])).clamp(min=0)


def heard(wav, columns):
    """What wav2vec2 is taught to hear in each of its columns: the mouth (2) and 20 log band energies.  wav (B, n) -> (B, T, 22)"""
    wave = standardise(wav)
    times = (torch.arange(columns, device=wav.device) * AUDIO.hop + AUDIO.field / 2) / RATE
    spectrum = torch.stft(F.pad(wave, (256, 512)), 512, AUDIO.hop, 400, torch.hann_window(400, device=wav.device), center=False,
                          return_complex=True).abs().square()        # column j is centred on sample 320 j, where ours is on 320 j + 200
    bands = (spectrum.transpose(1, 2) @ filterbank().to(wav.device) + 1e-3).log10()
    return torch.cat([faces.articulation(wav, times) * 2 - 1, bands[:, :columns] / 2], dim=2)


def mixed(device):
    """Matrix products and convolutions in bfloat16 on a GPU. Nothing is kept from one to the next: what is recorded must be complete."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def standardise(wav):
    """`audio.normalise` for every sound of a batch."""
    var, mean = torch.var_mean(wav, dim=1, correction=0, keepdim=True)
    return (wav - mean) / torch.sqrt(var + 1e-7)


def audio_stage(o, device):
    """Every hidden state is asked, through a linear layer that is thrown away, what the mouth does and what the sound is like."""
    encoder = initialise_audio(Wav2Vec2(AUDIO)).to(device)
    heads = nn.ModuleList(nn.Linear(AUDIO.dim, 22) for _ in range(AUDIO.n_layer + 1)).to(device)
    sound = speech.load_folder(o.speech, device)

    def batch(step):
        g = generator(device, o.seed, step, world()[0])
        wav = speech.augment(speech.crops(sound, o.batch, 5.0, g), g)
        wave = standardise(wav)
        return None, wave, heard(wav, AUDIO.frames(wave.shape[1]))

    def loss(_, wave, target):
        states = encoder(wave)                                       # (states, B, T, C)
        return sum(F.smooth_l1_loss(head(x).float(), target, beta=0.2) for head, x in zip(heads, states)) / len(heads)
    return Stage(nn.ModuleDict({"audio": encoder, "heads": heads}), batch, loss)


def initialise_audio(encoder):
    nn.init.normal_(encoder.pos_conv.v, std=0.05)
    nn.init.zeros_(encoder.pos_conv.bias)
    with torch.no_grad():
        encoder.pos_conv.g.copy_(encoder.pos_conv.v.norm(dim=(0, 1), keepdim=True))
    return encoder


# ---------------------------------------------------------------------------------------------------------------- stage: vae

PHASES = (                   # share of the steps, frames, pixels of the crop, videos in a batch relative to o.batch
    (0.15, 1, 64, 24),       # pictures first, then time; long clips, or it breaks behind the frames it was trained on
    (0.30, 17, 64, 4),
    (0.30, 81, 64, 1),
    (0.25, 49, 128, 0.5),
)

LONG = 49                    # frames from which on half of the videos are the VAE's own decodings


def phase(step, o):
    done = 0.0
    for share, *sizes in PHASES:
        done += share
        if step < done * o.steps:
            break
    return sizes


def initialise_vae(vae):
    """Start as a network for single pictures: time taps look at the newest frame only, changes of the frame rate copy."""
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
        z = vae.config.z_dim
        vae.encoder.to_latent.weight[z:] *= 0.1
        vae.encoder.to_latent.bias[z:] = -6                          # log variance
    return vae


def run_in_time(net, x):
    """A causal network over a whole video: the first frame, then the rest, as its streams do.  x (B, C, n, h, w)"""
    past = new_cache(net)
    parts = [net(x[:, :, :1], past)]
    return torch.cat(parts + ([net(x[:, :, 1:], past)] if x.shape[2] > 1 else []), dim=2)


def scenes(n, frames, g, device, sound, size=faces.SIZE):
    """Drawn videos for the VAE (n, 3, frames, size, size) and the loss weights of their pixels (n, 1, ...): random crops of that size.

    Half of them begin with a still of another pose, hair and background, as a first clip does when it is decoded behind the picture.
    """
    before = faces.identities(n, g, device)
    after, _ = faces.captioned(before, g)
    cut = torch.rand(n, 1, generator=g, device=device) < 0.5
    motion, still = (faces.motions(n, p, g, device) for p in (frames, 1))
    if frames == 1:
        mouth = torch.rand(n, frames, 2, generator=g, device=device)
    else:
        wav = speech.augment(speech.crops(sound, n, frames / FPS, g), g)
        mouth = faces.articulation(wav, torch.arange(frames, device=device) / FPS)
    corner = ((faces.SIZE - size) * torch.rand(2, n, generator=g, device=device)).long()
    window = None if size == faces.SIZE else (*corner, size, size)
    first = torch.where(cut, before, after), torch.where(cut[..., None], still, motion[:, :1]), mouth[:, :1], window
    parts = [first] + [(after, motion[:, 1:], mouth[:, 1:], window)] * (frames > 1)
    return [torch.cat([function(*part) for part in parts], dim=2) for function in (faces.draw, faces.importance)]


def vae_stage(o, device):
    """Latents with noise teach the decoder to draw whole faces from latents that are a little wrong, as a denoiser's are; wrong in the same way
    in all frames, for half of the videos. Its own decodings are to come back as they are: they are the next clip's motion frames."""
    vae = initialise_vae(VAE(TINY_VAE)).to(device)
    sound = speech.load_folder(o.speech, device)

    def batch(step):
        frames, size, share = phase(step, o)
        n, g = max(1, round(o.batch * share)), generator(device, o.seed, step, world()[0])
        x, weight = scenes(n, frames, g, device, sound, size)
        st, sh, sw = vae.stride
        noise = torch.randn(n, TINY_VAE.z_dim, (frames - 1) // st + 1, size // sh, size // sw, generator=g, device=device)
        still, amount = torch.rand(2, n, 1, 1, 1, 1, generator=g, device=device)
        return frames >= LONG, x, weight, torch.where(still < 0.5, noise[:, :, :1], noise), amount

    def coded(x, noise, amount):
        """-> decoding of noisy latents, mean and log variance of the latents"""
        mean, log_var = run_in_time(vae.encoder, x).float().chunk(2, dim=1)
        log_var, scale = log_var.clamp(-20, 10), mean.std(dim=(0, 2, 3, 4), keepdim=True)            # not detached: larger latents gain nothing
        return run_in_time(vae.decoder, mean + ((0.5 * log_var).exp() + amount * scale) * noise).float(), mean, log_var

    def loss(long, x, weight, noise, amount):
        with mixed(device):
            n = len(x) // 2
            if long and o.own and n:
                with torch.no_grad():
                    own, _, _ = coded(x[:n], noise[n:2 * n], o.own * amount[n:2 * n])
                x = torch.cat([own.clamp(-1, 1), x[n:]])
            y, mean, log_var = coded(x, noise, o.latent_noise * amount)
        d, kl = y - x, 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
        return (weight * (d.abs() + d.square())).mean() / weight.mean() + 1e-4 * kl
    return Stage(nn.ModuleDict({"vae": vae}), batch, loss, partial(latent_moments, o, device, sound), options="latent_noise own")


@torch.no_grad()
def latent_moments(o, device, sound, nets):
    """Mean and deviation of every latent channel over drawn videos, which the VAE's config then holds."""
    g = generator(device, o.seed, o.steps)
    n, frames = max(1, o.batch // 2), max(frames for _, frames, _, _ in PHASES)
    z = torch.cat([run_in_time(nets["vae"].encoder, scenes(n, frames, g, device, sound)[0]).chunk(2, dim=1)[0] for _ in range(4)]).float()
    return {"mean": z.mean(dim=(0, 2, 3, 4)).tolist(), "std": z.std(dim=(0, 2, 3, 4)).tolist()}


# ---------------------------------------------------------------------------------------------------------------- stage: dit

def trained_parts(o, device, expert=None):
    """The networks of earlier stages with averaged weights -> {kind: net}, {kind: config}.  expert: whose denoiser and text encoder"""
    state = load_state(Path(o.out) / "vae.weights.pt", "vae")
    configs = {"denoiser": DENOISER, "text": TEXT, "audio": AUDIO,
               "vae": dataclasses.replace(TINY_VAE, mean=tuple(state["mean"]), std=tuple(state["std"]))}
    nets = {"vae": VAE(configs["vae"]), "audio": Wav2Vec2(AUDIO)}
    nets["vae"].load_state_dict(state["vae"])
    nets["audio"].load_state_dict(load_state(Path(o.out) / "audio.weights.pt", "audio")["audio"])
    if expert:
        state = load_state(Path(o.out) / f"dit_{expert}.weights.pt", "dit")
        nets |= {"denoiser": Denoiser(DENOISER), "text": TextEncoder(TEXT)}
        for kind in ("denoiser", "text"):
            nets[kind].load_state_dict(state[kind])
    return {kind: net.to(device).requires_grad_(False).eval() for kind, net in nets.items()}, configs


class Clips(NamedTuple):
    """Training clips, all of one kind. Everything the sampler hands to a denoiser, and what should come of it."""
    latents: torch.Tensor                                            # (B, z, T, H, W) of the clip
    ref: torch.Tensor                                                # (B, z, 1, H, W)
    motion: torch.Tensor | None                                      # (B, z, 19, H, W); None: first clips
    audio: torch.Tensor                                              # (B, states, audio_dim, 4T)
    weight: torch.Tensor                                             # (B, 1, T, H, W) of the loss
    ids: torch.Tensor                                                # (B, S) tokens of the caption, 0 behind its end


@torch.no_grad()
def features(encoder, wav, columns):
    """wav2vec2 states of a batch of sounds.  wav (B, samples) -> (B, states, C, columns), one column per video frame"""
    states = encoder(standardise(wav)).float()                       # (states, B, T, C)
    side_by_side = states.permute(0, 2, 1, 3).flatten(2)             # (states, T, B*C)
    columns, _ = align_to_fps(resample_50_to_30(side_by_side), FPS, columns)
    return columns[..., :CLIP + PAST].unflatten(1, (len(wav), -1)).transpose(0, 1)


@torch.no_grad()
def drawn_clips(nets, sound, tokens, later, n, g, device):
    """n new clips of drawn, talking faces.  tokens  function captions -> (n, S)        later  clips with a past, or first ones"""
    frames = CLIP + PAST if later else CLIP
    wav = speech.augment(speech.crops(sound, n, (frames + 1) / FPS, g), g)
    short = torch.rand(n, generator=g, device=device) < 0.15
    ends = torch.where(short, frames / FPS * (0.3 + 0.7 * torch.rand(n, generator=g, device=device)), 99)
    wav = wav * (torch.arange(wav.shape[1], device=device) / RATE < ends[:, None])
    audio = features(nets["audio"], wav, frames)[..., :frames]
    audio = audio * (torch.arange(frames, device=device) / FPS < ends[:, None, None, None])    # behind its end the sampler has zeros
    who = faces.identities(n, g, device)
    shown, captions = faces.captioned(who, g)
    motion, mouth = faces.motions(n, frames, g, device), faces.articulation(wav, (torch.arange(frames, device=device) - WARM_UP) / FPS)
    picture, video = faces.reference(who, g)[:, :, None], faces.draw(shown, motion, mouth)
    weight = faces.importance(shown, motion, mouth)[:, :, -CLIP:]
    weight = F.avg_pool3d(weight, (4, 8, 8))
    if later:
        weight[:, :, 0] *= 3                                         # here a clip joins the one before
    latents = nets["vae"].encode(video if later else torch.cat([picture, video], dim=2), chunk=CLIP)
    past = latents[:, :, :-CLIP // 4] if later else None
    return Clips(latents[:, :, -CLIP // 4:], nets["vae"].encode(picture), past, audio[..., -CLIP:], weight, tokens(captions))


class Pool:
    """A window over an endless row of groups of clips, each made from its number alone; first and later clips in turn.

    At step s it holds the groups up to s // every + size, so it can be made again for any step.
    """

    def __init__(self, make, groups, every):
        self.make, self.groups, self.every, self.held = make, max(groups, 2) // 2 * 2, every, {}

    def draw(self, step, n, g):
        """n clips of the kind whose turn it is."""
        newest = step // self.every + self.groups
        for number in range(newest - self.groups, newest):
            if number not in self.held:
                self.held.pop(number - self.groups, None)
                self.held[number] = self.make(number)
        groups = [self.held[number] for number in range(newest - self.groups, newest) if number % 2 == step % 2]
        size = len(groups[0].latents)
        picks = torch.randint(len(groups) * size, (n,), generator=generator("cpu", step, g.initial_seed())).tolist()
        return Clips(*(None if values[0] is None else torch.stack([values[i // size][i % size] for i in picks]) for values in zip(*groups)))


def noise_levels(n, o, expert, g, device):
    """Diffusion times sigma (n,) as dense as the sampler's steps, on the expert's side of the boundary."""
    edge = o.boundary / (o.shift - (o.shift - 1) * o.boundary)       # where sigma(u) = shift u / (1 + (shift - 1) u) is the boundary
    low, high = {"both": (0, 1), "low": (0, edge), "high": (edge, 1)}[expert]
    u = low + (high - low) * torch.rand(n, generator=g, device=device)
    return o.shift * u / (1 + (o.shift - 1) * u)


def noised(clips, o, expert, g):
    """The noise of a step -> (*clips, sigma (B,), eps like the latents); that on the motion latents is added to them."""
    B, device = len(clips.latents), clips.latents.device
    sigma, eps = noise_levels(B, o, expert, g, device), torch.randn(clips.latents.shape, generator=g, device=device)
    if clips.motion is not None:
        amount = o.motion_noise * torch.rand(B, 1, 1, 1, 1, generator=g, device=device)
        clips = clips._replace(motion=clips.motion + amount * torch.randn(clips.motion.shape, generator=g, device=device))
    return *clips, sigma, eps


def flow_loss(net, clips, text, sigma, eps):
    """Flow matching: x = (1 - sigma) latents + sigma eps, and the network says eps - latents.  text (B, S, C) rows of the captions"""
    s = sigma.view(-1, 1, 1, 1, 1)
    cond = net.prepare(clips.latents.shape[2:], text, clips.audio, clips.ref, clips.motion)
    v = net((1 - s) * clips.latents + s * eps, 1000 * sigma, cond)
    return (clips.weight * (v - (eps - clips.latents)).square()).mean() / clips.weight.mean()


def without(clips, drop, g, end):
    """Some clips lose sound and caption together, as in the negative branch of guidance."""
    keep = torch.rand(len(clips.ids), generator=g, device=clips.ids.device) >= drop
    nothing = torch.zeros_like(clips.ids)
    nothing[:, 0] = end
    return clips._replace(audio=clips.audio * keep.view(-1, 1, 1, 1), ids=torch.where(keep[:, None], clips.ids, nothing))


def encode_ids(encoder, ids):
    """ids (B, S) with zeros behind each prompt -> rows (B, S, C), zeros there too, as the denoiser pads"""
    mask = ids != 0
    return encoder(ids, mask).float() * mask[..., None]


def token_ids(tokenizer, captions, length, device):
    rows = [tokenizer(caption)[0] for caption in captions]
    return torch.stack([F.pad(row, (0, length - len(row))) for row in rows]).to(device)


def dit_stage(o, device):
    nets, _ = trained_parts(o, device, None if o.expert == "both" else "both")
    net, encoder = nets.get("denoiser"), nets.get("text")
    if o.expert == "both":
        net, encoder = initialise_denoiser(Denoiser(DENOISER)).to(device), initialise_text(TextEncoder(TEXT)).to(device)
    net.requires_grad_(True)
    if o.compile:
        compile_blocks(net)
    folder = Path(o.out)
    folder.mkdir(parents=True, exist_ok=True)
    if world()[0] == 0:
        fake_checkpoint.make_tokenizer(folder / "tokenizer.json")
    if world()[1] > 1:
        dist.barrier()
    tokenizer, sound = Tokenizer(folder / "tokenizer.json", TEXT.vocab), speech.load_folder(o.speech, device)
    tokens = partial(token_ids, tokenizer, length=DENOISER.text_len, device=device)

    def make(number):
        clips = drawn_clips(nets, sound, tokens, number % 2 == 1, o.fresh, generator(device, o.seed, number, world()[0], 1), device)
        if not all(x.isfinite().all() for x in clips if x is not None):
            raise ValueError(f"a clip of group {number} holds NaN or infinity: are the earlier stages trained?")
        return clips
    pool = Pool(make, o.pool // o.fresh, o.every)

    def batch(step):
        g = generator(device, o.seed, step, world()[0])
        return None, *noised(without(pool.draw(step, o.batch, g), o.drop, g, tokenizer.end), o, o.expert, g)

    def loss(_, *tensors):
        *clips, sigma, eps = tensors
        clips = Clips(*clips)
        with mixed(device):
            return flow_loss(net, clips, encode_ids(encoder, clips.ids), sigma, eps)
    return Stage(nn.ModuleDict({"denoiser": net, "text": encoder}), batch, loss,
                 options="shift drop motion_noise pool fresh every" + " boundary" * (o.expert != "both"))


def initialise_denoiser(net):
    """Nothing is added to the residual stream by audio, and nothing comes out of the head, until training says so."""
    with torch.no_grad():
        nn.init.ones_(net.audio.mix)
        nn.init.normal_(net.token_kind.weight, std=0.02)
        for layer in (net.head.linear, *(layer for block in net.blocks if block.inject for layer in (block.inject.o, block.inject.adain))):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        for block in net.blocks:
            block.modulation.normal_(std=net.cfg.dim ** -0.5)
        net.head.modulation.normal_(std=net.cfg.dim ** -0.5)
    return net


def initialise_text(encoder):
    nn.init.normal_(encoder.embed.weight, std=1.0)
    for block in encoder.blocks:
        nn.init.normal_(block.attn.position.weight, std=0.1)
    return encoder


# -------------------------------------------------------------------------------------------------------------- stage: export

def as_part(kind, config, net):
    """A trained network -> a Part in the dtypes it is stored in: bfloat16, norms and modulation of the denoiser float32."""
    tensors = {}
    for name, value in net.state_dict().items():
        dtype = checkpoints.stored_as(kind, name, torch.bfloat16)
        tensors[name] = checkpoints.Entry(Path(kind), tuple(value.shape), dtype, partial(value.detach().to, dtype))
    return checkpoints.Part(kind, config, tensors)


def export(o):
    """The trained networks -> a checkpoint folder: two experts if both were trained, else the one for all noise levels."""
    two = all((Path(o.out) / f"dit_{expert}.weights.pt").is_file() for expert in ("high", "low"))
    nets, configs = trained_parts(o, "cpu", "high" if two else "both")
    denoisers = {"denoiser_high": nets["denoiser"], "denoiser_low": trained_parts(o, "cpu", "low")[0]["denoiser"]} if two else \
        {"denoiser": nets["denoiser"]}
    parts = {name: as_part("denoiser", configs["denoiser"], net) for name, net in denoisers.items()}
    parts |= {kind: as_part(kind, configs[kind], nets[kind]) for kind in ("vae", "text", "audio")}
    whole = checkpoints.Checkpoint(Path(o.out), "s2v-14B", o.boundary if two else None, checkpoints.SAMPLING["s2v-14B"] | SAMPLING,
                                   Path(o.out) / "tokenizer.json", parts, NOTE)
    if o.fp8:                                                        # the few megabytes that `fp8.is_cast` leaves out count here
        whole = convert_weights.change_denoisers(whole, lambda _, part: fp8.quantized(part.tensors, choose=fp8.uses_fp8))
    convert_weights.save(whole, o.to)
    print(f"wrote {o.to}: {sum(f.stat().st_size for f in Path(o.to).iterdir()) / 1e6:.2f} MB")


# ---------------------------------------------------------------------------------------------------------------- stage: tune

def forget(block):
    """Keep nothing of a block for the backward pass, which computes it again, with the same attention kernel."""
    def forward(x, *rest, once=block.forward):
        with attention_backend(x.device):
            return once(x, *rest)
    block.forward = partial(recompute, forward, use_reentrant=False)


def frames_at(path, fps, area, step):
    """All frames of a video at `fps`, the nearest in time, in an S2V size of at most `area` pixels -> (3, P, height, width) uint8"""
    info, frames, size = probe(path, count=False), [], None
    if not (info.fps and info.has_audio):
        raise ValueError(f"wanted videos with sound, got {path} without {'sound' if info.fps else 'a picture'}: take it out of the folder")
    for number, frame in enumerate(read_frames(path)):
        size = size or s2v_size(*frame.shape[:2], area, step)
        while round(len(frames) * info.fps / fps) == number:
            frames.append(((fit_frame(frame, size) + 1) * 127.5).round().byte())
    if not frames:
        raise ValueError(f"{path}: no frame could be read: take it out of the folder")
    return torch.stack(frames, dim=1)


@torch.no_grad()
def filmed_clips(path, vae, encoder, caption, area, o, device):
    """The first and the later clips that a video with sound holds -> [Clips of one], on the CPU.

    caption  its number        area  pixels of a frame
    The picture at time k/16 s is trained with audio column k + lead, as the sampler shows it `lead` frames late. See the top of the file.
    """
    video, still = frames_at(path, FPS, area, 8 * vae.stride[1]), path.with_suffix(".png")
    P = video.shape[1]
    audio, _ = audio_features(encoder, load_audio(path).to(device), FPS, CLIP)                   # (states, C, columns)
    audio = F.pad(audio, (0, P + o.lead - audio.shape[2]))[None].cpu()                           # zeros behind its end, as in sampling

    def pixels(a, b):
        return (video[None, :, a:b] / 127.5 - 1).to(device)
    picture = fit_picture(load_image(still), video.shape[2:])[None, :, None].to(device) if still.is_file() else pixels(P // 2, P // 2 + 1)
    ref, out = vae.encode(picture), []
    for past in (0, PAST):
        for a in range(past, P - CLIP - o.lead + 1, CLIP):
            latents = vae.encode(pixels(a - past, a + CLIP) if past else torch.cat([picture, pixels(a, a + CLIP)], dim=2)).cpu()
            before, clip = latents[:, :, :-CLIP // 4], latents[:, :, -CLIP // 4:]
            out.append(Clips(clip, ref.cpu(), before if past else None, audio[..., a + o.lead:a + o.lead + CLIP],
                             torch.ones_like(clip[:, :1]), torch.tensor([[caption]])))
    print(f"{path}: {len(out)} clips of {tuple(video.shape[:0:-1])[:2]} pixels", flush=True)
    return out


def filmed_folder(source, o, device):
    """All clips of a folder and the umT5 rows of their captions, of which number 0 is empty -> [Clips of one], [(S, C)], on the CPU"""
    films = sorted(path for path in Path(o.data).glob("*") if path.suffix.lower() in (".mp4", ".mov", ".webm", ".mkv", ".avi"))
    texts = [path.with_suffix(".txt") for path in films]
    texts = [path.read_text(encoding="utf8").strip() if path.is_file() else "" for path in texts]
    captions, (width, height) = list(dict.fromkeys(["", *texts])), source.sampling["size"]
    tokenizer = Tokenizer(source.tokenizer, source.configs["denoiser"].text_len)
    encoder = source.load("text", device, run_dtype(None, device))
    rows = [encode_prompt(encoder, tokenizer, caption).cpu() for caption in captions]
    del encoder                                                      # its room is needed
    vae, encoder = (source.load(kind, device, torch.float32) for kind in ("vae", "audio"))
    clips = [clip for path, text in zip(films, texts)
             for clip in filmed_clips(path, vae, encoder, captions.index(text), o.size or width * height, o, device)]
    if not clips:
        raise ValueError(f"wanted videos of {(CLIP + o.lead) / FPS:.1f} s or more in {o.data}, got {len(films)} videos: add some")
    return clips, rows


def tune_stage(o, device):
    """Every expert learns in turn, on its side of the boundary, from first clips and later ones in turn."""
    source, dtype = checkpoints.open_checkpoint(o.ckpt), run_dtype(None, device)
    if "audio" not in source.configs:
        raise ValueError(f"a speech-to-video checkpoint is wanted, got {o.ckpt} of {source.task}")
    chosen = source.experts if o.expert == "both" else [f"denoiser_{o.expert}"]
    if not set(chosen) <= set(source.experts):
        raise ValueError(f"{o.ckpt} has one denoiser for all noise levels: leave out --expert {o.expert}")
    experts = nn.ModuleDict()
    for name in chosen:                                              # on the CPU until the encoders have done their work
        net = checkpoints.materialise("denoiser", source.configs["denoiser"], fp8.multiplied_out(source.parts[name].tensors), dtype=dtype)
        experts[name] = lora.add(net, o.lora, o.targets.split()) if o.lora else net.float().requires_grad_(True)
        for block in net.blocks if o.recompute else ():
            forget(block)
    clips, rows = filmed_folder(source, o, device)
    experts.to(device)
    kinds = [[c for c in clips if (c.motion is not None) == later] for later in (False, True)]
    levels = dataclasses.replace(o, boundary=source.boundary or o.boundary, shift=source.sampling["shift"])

    def batch(step):
        g = generator(device, o.seed, step, world()[0])
        turn, expert = divmod(step, len(chosen))
        pool, picks = kinds[turn % 2] or kinds[0], torch.randint(2 ** 31, (o.batch,), generator=g, device=device).tolist()
        pool = [c for c in pool if c.latents.shape == pool[picks[0] % len(pool)].latents.shape]  # of one size
        clips = zip(*(pool[i % len(pool)] for i in picks))
        clips = without(Clips(*(None if x[0] is None else torch.cat(x).to(device) for x in clips)), o.drop, g, 0)
        text = nn.utils.rnn.pad_sequence([rows[i] for i in clips.ids[:, 0].tolist()], batch_first=True).to(device)
        return chosen[expert], text, *noised(clips, levels, chosen[expert].partition("_")[2] or "both", g)

    def loss(expert, text, *tensors):
        *clips, sigma, eps = tensors
        with mixed(device):
            return flow_loss(experts[expert], Clips(*clips), text, sigma, eps)
    return Stage(experts, batch, loss, None, record=False, options="drop motion_noise lead size targets"), source


def tune(o, device):
    if not o.lora and Path(o.to).exists():
        raise ValueError(f"{o.to} exists: give a new folder with --to")
    stage, source = tune_stage(o, device)
    train("_".join(["tune", Path(o.to).stem, o.expert]), stage, o, device)
    if world()[0] or 0 < o.stop < o.steps:
        return
    if o.lora:
        return lora.write(stage.nets, source.configs["denoiser"], o.to)
    parts = {name: as_part("denoiser", source.configs["denoiser"], net) for name, net in stage.nets.items()}
    quantize = any(entry.dtype == fp8.E4M3 for entry in source.parts[source.experts[0]].tensors.values())
    convert_weights.save(dataclasses.replace(source, parts=source.parts | parts), o.to, quantize=quantize)


# ---------------------------------------------------------------------------------------------------------------- command line

def parse(argv):
    parser = argparse.ArgumentParser(description="Train a tiny S2V from nothing, or fine-tune any S2V checkpoint.", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Options):
        name, choices = ("stage", tuple(DEFAULTS)) if f.name == "stage" else (f"--{f.name.replace('_', '-')}", None)
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else dict(type=type(f.default), choices=choices)
        parser.add_argument(name, default=f.default, help=f"{f.metadata['help']} (default: {f.default})", **kind)
    o = Options(**vars(parser.parse_args(argv)))
    for f in fields(o):
        value, (least, most) = getattr(o, f.name), f.metadata["range"]
        if not isinstance(value, str) and not least <= value <= most:          # NaN is neither
            raise ValueError(f"{f.name} must be {least} {'or more' if most == math.inf else f'to {most}'}, got {value}")
    if o.expert not in ("both", "high", "low"):
        raise ValueError(f"expert must be both, high or low, got {o.expert}")
    return dataclasses.replace(o, **{name: value for name, value in DEFAULTS.get(o.stage, {}).items() if not getattr(o, name)})


def main(argv=None):
    try:
        o = parse(argv)
        device = start(o.device)
        torch.manual_seed(o.seed)                                    # of the initial weights
        if o.stage == "export":
            export(o)
        elif o.stage == "tune":
            tune(o, device)
        else:
            make, name = {"audio": (audio_stage, "audio"), "vae": (vae_stage, "vae"), "dit": (dit_stage, f"dit_{o.expert}")}[o.stage]
            train(name, make(o, device), o, device)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped: run the same command again to go on from the last saved state", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
