"""Train the tiny model's other networks on the drawn world, and export a checkpoint folder.

    python -m tiny.speech data/speech                   training sound
    python -m tiny.stages audio                         wav2vec2: what the mouth does, and what the sound is like
    python -m tiny.stages vae                           pictures <-> latents
    python train.py dit ...                             the denoisers
    python -m tiny.stages export --to weights/mine      a checkpoint folder for sample.py
    torchrun --nproc-per-node 2 -m tiny.stages vae      the same on several GPUs: each adds a batch

Axes    B batch   T audio frames, 50 a second   h w size of a crop
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import convert_weights
from fast.probe import any_terminal
from media.sound import RATE
from fast import fp8
from formats import checkpoints
from tiny import faces, networks, speech
from tiny.clips import standardise
from tiny.optimise import Stage, add_loop_options, autocast, between, generator, run, save_weights, world
from train import as_part, train
from vae import new_cache
from wan_s2v import FPS

SAMPLING = dict(size=[128, 128], steps=12, guidance=[1.5, 1.5], negative_prompt="", picture_db=25.0)
NOTE = "trained on drawn faces: it knows faces as tiny/faces.py draws them and nothing else"

BANDS = 20                   # of the spectrum that wav2vec2 is asked for
PHASES = (                   # of the VAE: share of the steps, frames, pixels of the crop, videos in a batch relative to o.batch
    (0.15, 1, 64, 24),       # pictures first, then time; long clips too: on longer ones than it was trained on it breaks
    (0.30, 17, 64, 4),
    (0.30, 81, 64, 1),
    (0.25, 49, 128, 0.5),
)
LONG = 49                    # frames from which on half of the videos are the VAE's own decodings


# ---------------------------------------------------------------------------------------------------------------------- audio

def filterbank(n_fft=512):
    """Triangles evenly spaced in log frequency, 100 to 7000 Hz -> (n_fft/2 + 1, BANDS)"""
    edges = torch.logspace(2, math.log10(7000), BANDS + 2)
    f = torch.linspace(0, RATE / 2, n_fft // 2 + 1)[:, None]
    return torch.minimum((f - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - f) / (edges[2:] - edges[1:-1])).clamp(min=0)


def audio_targets(wav, T):
    """Opening and width of the mouth and BANDS log band energies, at the times of wav2vec2's frames.  wav (B, samples) -> (B, T, 2 + BANDS)"""
    config = networks.AUDIO_CONFIG
    times = (torch.arange(T, device=wav.device) * config.hop + config.field / 2) / RATE
    # Window j of the STFT is centred on sample 320 j, wav2vec2's frame j on 320 j + 200.
    spectrum = torch.stft(F.pad(standardise(wav), (256, 512)), 512, config.hop, 400, torch.hann_window(400, device=wav.device), center=False,
                          return_complex=True).abs().square()
    bands = (spectrum.transpose(1, 2) @ filterbank().to(wav.device) + 1e-3).log10()
    return torch.cat([faces.articulation(wav, times) * 2 - 1, bands[:, :T] / 2], dim=2)


def audio_stage(o, device):
    """Every hidden state predicts `audio_targets` through a linear head, which is thrown away afterwards."""
    encoder, config = networks.new_audio().to(device), networks.AUDIO_CONFIG
    heads = nn.ModuleList(nn.Linear(config.dim, 2 + BANDS) for _ in range(config.n_layer + 1)).to(device)
    sound = speech.load_folder(o.speech, device)

    def batch(step):
        g = generator(device, o.seed, step, world()[0])
        wav = speech.augment(speech.crops(sound, o.batch, 5.0, g), g)
        return None, standardise(wav), audio_targets(wav, config.frames(wav.shape[1]))

    def loss(_, wave, target):
        states = encoder(wave)                                       # (states, B, T, C)
        return sum(F.smooth_l1_loss(head(x).float(), target, beta=0.2) for head, x in zip(heads, states)) / len(heads)
    return Stage(nn.ModuleDict({"audio": encoder, "heads": heads}), batch, loss)


def train_audio(o, device):
    stage = audio_stage(o, device)
    train("audio", stage, o, device)
    save_weights(o, "audio", stage.nets)


# ------------------------------------------------------------------------------------------------------------------------ vae

def phase(step, o):
    """frames, pixels of the crop, relative batch size of a step"""
    done = 0.0
    for share, *sizes in PHASES:
        done += share
        if step < done * o.steps:
            break
    return sizes


def causal(net, x):
    """A causal network over whole videos: the first frame alone, then the rest, as in streaming.  x (B, C, frames, h, w)"""
    cache = new_cache(net)
    parts = [net(x[:, :, :1], cache)]
    return torch.cat(parts + ([net(x[:, :, 1:], cache)] if x.shape[2] > 1 else []), dim=2)


def drawn_videos(n, frames, g, sound, size=faces.SIZE):
    """Random crops of drawn videos for the VAE (n, 3, frames, size, size), and loss weights of their pixels (n, 1, frames, size, size).

    Half of them begin with a still of another pose, hair and background, as a first clip begins with the reference picture.
    """
    device = g.device
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
    return [torch.cat([paint(*part) for part in parts], dim=2) for paint in (faces.draw, faces.importance)]


def vae_stage(o, device):
    """Reconstruction of drawn videos, with two additions.

    Noise on the latents, for half of the videos the same in all frames, teaches the decoder to draw whole faces from latents that are a little
    wrong, as a denoiser's are. Half of the long videos are the VAE's own decodings, for those become the next clip's motion frames.
    """
    vae, sound = networks.new_vae().to(device), speech.load_folder(o.speech, device)

    def batch(step):
        frames, size, share = phase(step, o)
        n, g = max(1, round(o.batch * share)), generator(device, o.seed, step, world()[0])
        x, weight = drawn_videos(n, frames, g, sound, size)
        st, sh, sw = vae.stride
        noise = torch.randn(n, networks.VAE_CONFIG.z_dim, (frames - 1) // st + 1, size // sh, size // sw, generator=g, device=device)
        still, amount = torch.rand(2, n, 1, 1, 1, 1, generator=g, device=device)
        return frames >= LONG, x, weight, torch.where(still < 0.5, noise[:, :, :1], noise), amount

    def reconstruct(x, noise, amount):
        """-> decoded noisy latents, mean and log variance of the latents"""
        mean, log_var = causal(vae.encoder, x).float().chunk(2, dim=1)
        log_var, scale = log_var.clamp(-20, 10), mean.std(dim=(0, 2, 3, 4), keepdim=True)            # not detached: larger latents gain nothing
        return causal(vae.decoder, mean + ((0.5 * log_var).exp() + amount * scale) * noise).float(), mean, log_var

    def loss(long, x, weight, noise, amount):
        with autocast(device):
            n = len(x) // 2
            if long and o.own and n:
                with torch.no_grad():
                    own, _, _ = reconstruct(x[:n], noise[n:2 * n], o.own * amount[n:2 * n])
                x = torch.cat([own.clamp(-1, 1), x[n:]])
            y, mean, log_var = reconstruct(x, noise, o.latent_noise * amount)
        error, kl = y - x, 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
        return (weight * (error.abs() + error.square())).mean() / weight.mean() + 1e-4 * kl
    return Stage(nn.ModuleDict({"vae": vae}), batch, loss, options="latent_noise own")


@torch.no_grad()
def latent_moments(o, device, encoder):
    """Mean and standard deviation of every latent channel over drawn videos, which the VAE's config then holds."""
    g, sound = generator(device, o.seed, o.steps), speech.load_folder(o.speech, device)
    n, frames = max(1, o.batch // 2), max(frames for _, frames, _, _ in PHASES)
    z = torch.cat([causal(encoder, drawn_videos(n, frames, g, sound)[0]).chunk(2, dim=1)[0] for _ in range(4)]).float()
    return {"mean": z.mean(dim=(0, 2, 3, 4)).tolist(), "std": z.std(dim=(0, 2, 3, 4)).tolist()}


def train_vae(o, device):
    stage = vae_stage(o, device)
    train("vae", stage, o, device)
    if world()[0] == 0:
        save_weights(o, "vae", stage.nets, **latent_moments(o, device, stage.nets["vae"].encoder))


# --------------------------------------------------------------------------------------------------------------------- export

def export(o, device):
    """The trained networks -> a checkpoint folder: two experts if both were trained, else the denoiser for all noise levels."""
    out = Path(o.out)
    two = all((out / f"dit_{expert}.weights.pt").is_file() for expert in ("high", "low"))
    experts = {"denoiser_high": "high", "denoiser_low": "low"} if two else {"denoiser": "both"}
    loaded = {name: networks.trained(o.out, device, expert) for name, expert in experts.items()}
    parts = {name: as_part("denoiser", configs["denoiser"], nets["denoiser"]) for name, (nets, configs) in loaded.items()}
    nets, configs = loaded["denoiser_high" if two else "denoiser"]
    parts |= {kind: as_part(kind, configs[kind], nets[kind]) for kind in ("vae", "text", "audio")}
    whole = checkpoints.Checkpoint(out, "s2v-14B", o.boundary if two else None, checkpoints.SAMPLING["s2v-14B"] | SAMPLING,
                                   out / "tokenizer.json", parts, NOTE)
    if o.fp8:                                                        # also what `fp8.is_cast` leaves out: a few megabytes count here
        whole = convert_weights.change_denoisers(whole, lambda _, part: fp8.quantized(part.tensors, choose=fp8.uses_fp8))
    convert_weights.save(whole, o.to)
    print(f"wrote {o.to}: {sum(f.stat().st_size for f in Path(o.to).iterdir()) / 1e6:.2f} MB")


# --------------------------------------------------------------------------------------------------------------- command line

def parse(argv=None):
    parser = argparse.ArgumentParser("python -m tiny.stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = partial(commands.add_parser, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    audio, vae = command("audio", help="wav2vec2"), command("vae", help="the VAE")
    add_loop_options(audio, steps=3000, batch=32, lr=1e-3)
    add_loop_options(vae, steps=4900, batch=10, lr=1e-3)
    for p, function in ((audio, train_audio), (vae, train_vae)):
        p.add_argument("--speech", default="data/speech/train", help="folder of training sound")
        p.set_defaults(run=function)
    vae.add_argument("--latent-noise", type=between(0, 10), default=0.5,
                     help="most noise on the latents that the decoder sees, in standard deviations of each channel")
    vae.add_argument("--own", type=between(0, 10), default=0.4,
                     help="half of the long videos are the VAE's own decodings of latents with up to this much noise, as motion frames are")

    p = command("export", help="a checkpoint folder of what was trained")
    p.add_argument("--out", default="runs/tiny", help="folder of states")
    p.add_argument("--to", default="weights/tiny", help="new checkpoint folder")
    p.add_argument("--boundary", type=between(0, 1), default=0.65, help="sigma from which the high-noise expert serves")
    p.add_argument("--fp8", action=argparse.BooleanOptionalAction, default=True, help="the denoisers' large matrices in float8")
    p.set_defaults(run=export, device="cpu", seed=0)
    return parser.parse_args(argv)


def main(argv=None):
    any_terminal()
    return run(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
