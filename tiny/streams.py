"""Make a denoiser causal: training for live.py by teacher forcing on the ring, on drawn faces at 25 frames a second.

    python train.py live --to weights/tiny-live/live          LoRAs on weights/tiny, one per expert; see docs/training.md

A stretch of several blocks goes through the network at once, all of it with the noise of one step, as the ring of that step remembers it. The
condition tokens see themselves alone, at time 0; each block sees them, the frames that its ring would hold, and itself. So one forward computes
what `live.Stream` computes block by block from the same latents: tests/test_live.py says that the two are equal.

Axes    B batch   T latent frames of the stretch   H W latent size   n tokens of a latent frame   K heads   D head width   S text tokens
"""
from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from formats import checkpoints, lora
from live import AHEAD, BLOCK, FPS, LEAD_LATENTS, WARM_UP, WINDOW, rotate, rounded, schedule
from model import PATCH, REF_TIME, LayerCond, attention, expert_index, grid_positions, rope_table, token_positions
from text import Tokenizer
from tiny import faces, networks, speech
from tiny.clips import Pool, features
from tiny.optimise import Stage, autocast, generator, world
from train import load_experts, train

BLOCKS = 6                   # of a stretch: from the fourth on rings are full
SECONDS = 5.0                # of sound around it, over which it is normalised
STILL = 1 + 4 * LEAD_LATENTS # frames of the still picture before it: the eighth latent stands for that of a picture that was always still
LOW = 0.05                   # noise level: from 0.0089, the last of four, a step moves latents by 0.9% of the velocity, and is left as it is
FAR = 20000                  # latent frames: half of the stretches begin anywhere before


class Stretches(NamedTuple):
    """A batch of beginnings of streams."""
    latents: torch.Tensor            # (B, z, T, H, W)
    ref: torch.Tensor                # (B, z, 1, H, W)
    still: torch.Tensor              # (B, z, 1, H, W): every one of the motion latents
    audio: torch.Tensor              # (B, states, C, 4T)
    weight: torch.Tensor             # (B, 1, T, H, W) of the loss
    ids: torch.Tensor                # (B, S) tokens of the caption


@torch.no_grad()
def drawn_stretches(nets, sound, tokens, n, g):
    """New streams of drawn, talking faces; nets, sound, tokens, n and g as in tiny/clips.py. Audio frame c has the mouth of (c - 3) / 25 s."""
    device, frames = g.device, 4 * BLOCK * BLOCKS
    wav = speech.augment(speech.crops(sound, n, SECONDS, g), g)
    first = int(torch.randint(int(SECONDS * FPS) - frames, (), generator=g, device=device))
    audio = features(nets["audio"], wav, int(SECONDS * FPS), FPS)[..., first:first + frames]
    person = faces.identities(n, g, device)
    shown, captions = faces.captioned(person, g)
    motion = faces.motions(n, frames, g, device, FPS)
    mouth = faces.articulation(wav, (torch.arange(first, first + frames, device=device) - WARM_UP) / FPS)
    picture, video = faces.reference(person, g)[:, :, None], faces.draw(shown, motion, mouth)
    weight = F.avg_pool3d(faces.importance(shown, motion, mouth), (4, 8, 8))
    latents = nets["vae"].encode(torch.cat([picture.expand(-1, -1, STILL, -1, -1), video], dim=2))
    still, latents = latents.split([LEAD_LATENTS + 1, latents.shape[2] - LEAD_LATENTS - 1], dim=2)
    return Stretches(latents, still[:, :, 1:2], still[:, :, -1:], audio, weight, tokens(captions))


# ------------------------------------------------------------------------------------------------------------------ teacher forcing

def tables(cfg, grid, frame, ahead):
    """RoPE of a stretch (T, h, w) that begins at latent frame `frame` -> of all tokens (2, N, 1, D/2), where the condition tokens are not turned;
    of the condition tokens (2, S, 1, D/2); of the reference for each block (T / 3, 2, n, 1, D/2), `ahead` frames before it (one number each)"""
    T, h, w = grid

    def table(positions):
        return rounded(rope_table(positions, cfg.dim // cfg.n_head))
    def frames(times):
        return table(grid_positions(times, range(h), range(w)))
    condition = table(token_positions((0, h, w), True, True))
    nowhere = torch.stack([torch.ones_like(condition[0]), torch.zeros_like(condition[1])])
    places = [REF_TIME + max(0, f - (REF_TIME - a)) for f, a in zip(range(frame, frame + T, BLOCK), ahead)]
    return torch.cat([frames(range(frame, frame + T)), nowhere], dim=1), condition, torch.stack([frames([time]) for time in places])


def taught(T, n, condition_rope, moved, window=WINDOW):
    """`attend` of a stretch of T latent frames, each of n tokens; the tables of `tables`."""
    def attend(q, k, v, layer):
        video, out = T * n, []
        still = rotate(k[:, video:], condition_rope).to(v.dtype)     # (B, S, K, D)
        for block, first in enumerate(range(0, T, BLOCK)):
            ref = rotate(k[:, video:video + n], moved[block]).to(v.dtype)
            seen = slice(max(0, first + BLOCK - window) * n, (first + BLOCK) * n)
            keys, values = torch.cat([ref, still[:, n:], k[:, seen]], dim=1), torch.cat([v[:, video:], v[:, seen]], dim=1)
            out.append(attention(q[:, first * n:(first + BLOCK) * n], keys, values))
        return torch.cat([*out, attention(rotate(q[:, video:], condition_rope).to(v.dtype), still, v[:, video:])], dim=1)
    return attend


def block_sound(net, audio):
    """Each block's audio frames encoded alone.  audio (B, states, C, 4T) -> global (B, T, 1, C), local (B, T, A, C)"""
    B, blocks = len(audio), audio.shape[-1] // (4 * BLOCK)
    alone = audio.unflatten(-1, (blocks, 4 * BLOCK)).movedim(-2, 1).flatten(0, 1)                # (B * blocks, states, C, 12)
    return [x.unflatten(0, (B, blocks)).flatten(1, 2) for x in net.audio_latents(alone)]


def velocities(net, noisy, t, text, clips, rope, condition_rope, moved, window=WINDOW):
    """What the step at time t of a stream predicts for all blocks of a stretch.  noisy (B, z, T, H, W), t (B,) -> (B, z, T, H, W)"""
    T, (h, w) = noisy.shape[2], (x // p for x, p in zip(noisy.shape[3:], PATCH[1:]))
    cond = net.prepare(noisy.shape[2:], text, clips.audio, clips.ref, clips.still.expand(-1, -1, net.cfg.motion_latents, -1, -1))
    everywhere, local = block_sound(net, clips.audio)
    layers = tuple(LayerCond(layer.text, *block.hear(local, everywhere)) for layer, block in zip(cond.layers, net.blocks))
    return net(noisy, t, replace(cond, rope=rope, layers=layers), taught(T, h * w, condition_rope, moved, window))


# ------------------------------------------------------------------------------------------------------------------------ the stage

def live_stage(o, source, device):
    """The experts learn in turn, each at the noise levels of its own steps, drawn as often as they are high; not those below LOW.

    Latents come to a step as the steps before it have left them, made from noise by the network as it is. All blocks of a stretch take them at
    once, for the ring of a step holds what that step saw; so what is trained is what a stream will do, its own mistakes included.
    """
    experts = load_experts(source, Namespace(**vars(o) | dict(expert="both")), device).to(device)         # all make what one learns from
    cfg, (sigmas, timesteps) = source.configs["denoiser"], schedule(o.levels)
    nets = {kind: source.load(kind, device, torch.float32) for kind in ("vae", "audio", "text")}
    sound, tokenizer = speech.load_folder(o.speech, device), Tokenizer(source.tokenizer, cfg.text_len)
    tokens = partial(networks.token_ids, tokenizer, device=device)

    def make(number):
        return drawn_stretches(nets, sound, tokens, o.fresh, generator(device, o.seed, number, world()[0], 1))
    pool = Pool(make, o.pool // o.fresh, o.every)
    serves = [source.experts[expert_index(t, source.boundary)] for t in timesteps.tolist()]
    levels = {name: [i for i, sigma in enumerate(sigmas[:-1].tolist()) if serves[i] == name and sigma > LOW] for name in experts}
    learns = [name for name in experts if levels[name] and name.endswith("" if o.expert == "both" else o.expert)]

    def batch(step):
        g, name = generator(device, o.seed, step, world()[0]), learns[step % len(learns)]
        clips = pool.draw(step, o.batch, g)
        level = levels[name][torch.multinomial(sigmas[levels[name]], 1, generator=generator("cpu", o.seed, step)).item()]     # the same on all ranks
        frame = int(torch.randint(FAR, (), generator=g, device=device)) * (step // len(learns) % 2)
        ahead = torch.randint(AHEAD[0], AHEAD[1] + 1, (BLOCKS,), generator=g, device=device).tolist()
        grid = clips.latents.shape[2], *(x // p for x, p in zip(clips.latents.shape[3:], PATCH[1:]))
        ropes = [x.to(device) for x in tables(cfg, grid, frame, ahead)]
        return level, *clips, torch.randn(clips.latents.shape, generator=g, device=device), *ropes

    def loss(level, *tensors):
        clips, (x, *ropes) = Stretches(*tensors[:6]), tensors[6:]
        with autocast(device):
            text = networks.encode_ids(nets["text"], clips.ids)

            def velocity(i):
                return velocities(experts[serves[i]], x, timesteps[i].expand(len(x)).to(device), text, clips, *ropes)
            with torch.no_grad():
                for i in range(level):
                    x = x + (sigmas[i + 1] - sigmas[i]).item() * velocity(i)
            error = velocity(level) - (x - clips.latents) / sigmas[level].item()
        return (clips.weight * error.square()).mean() / clips.weight.mean()
    return Stage(experts, batch, loss, record=False, options="levels pool fresh every targets")


def run(o, device):
    source = checkpoints.open_checkpoint(o.ckpt)
    stage = live_stage(o, source, device)
    train("live", stage, o, device)
    if world()[0] == 0 and not 0 < o.stop < o.steps:
        lora.write(stage.nets, source.configs["denoiser"], o.to, torch.bfloat16)
