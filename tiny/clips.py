"""Training clips of drawn, talking faces: latents of picture and past, wav2vec2 states, caption, loss weights.

Lips and sound  The sampler drops the first 3 frames of the first clip but plays the sound from its start. So the frame trained with audio
    frame c (time c/16 s) is shown at (c - 3)/16 s, and it is drawn with the mouth of (c - 3)/16 s.
Two kinds  A first clip is 80 frames encoded behind the reference picture, without motion tokens. A later clip is 80 frames encoded behind the
    73 frames before them, whose 19 latents are its motion.

Axes    B batch   T latent frames   H W latent size   S text tokens   C channels of the wav2vec2 states
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from audio import align_to_fps, resample_50_to_30
from media.sound import RATE
from tiny import faces, speech
from tiny.optimise import generator
from wan_s2v import FPS, WARM_UP

CLIP = 80                    # pixel frames of a clip, 20 latent frames
PAST = 73                    # pixel frames of the motion history, 19 latent frames
SHORT = 0.15                 # share of drawn clips whose sound ends early


class Clips(NamedTuple):
    """A batch of clips of one kind: what the sampler gives to a denoiser, and what should come out."""
    latents: torch.Tensor            # (B, z, T, H, W) of the clip
    ref: torch.Tensor                # (B, z, 1, H, W)
    motion: torch.Tensor | None      # (B, z, 19, H, W); None: first clips
    audio: torch.Tensor              # (B, states, C, 4T)
    weight: torch.Tensor             # (B, 1, T, H, W) of the loss
    ids: torch.Tensor                # (B, S) tokens of the caption, 0 behind its end


def standardise(wav):
    """`audio.normalise` for every row of a batch.  wav (B, samples)"""
    var, mean = torch.var_mean(wav, dim=1, correction=0, keepdim=True)
    return (wav - mean) / torch.sqrt(var + 1e-7)


@torch.no_grad()
def features(encoder, wav, frames, fps=FPS):
    """wav2vec2 states, one audio frame per video frame.  wav (B, samples) -> (B, states, C, frames)"""
    states = encoder(standardise(wav)).float()                       # (states, B, 50 per second, C)
    channels = states.permute(0, 2, 1, 3).flatten(2)                 # (states, 50 per second, B*C)
    aligned, _ = align_to_fps(resample_50_to_30(channels), fps, frames)
    return aligned[..., :frames].unflatten(1, (len(wav), -1)).transpose(0, 1)


@torch.no_grad()
def drawn_clips(nets, sound, tokens, later, n, g):
    """New clips of drawn, talking faces.

    nets  {"vae", "audio"}         sound  speech.Speech         tokens  function captions -> (n, S)
    later  of the second kind      n      how many              g       torch.Generator on the device
    """
    device, frames = g.device, CLIP + PAST if later else CLIP
    times = torch.arange(frames, device=device) / FPS
    wav = speech.augment(speech.crops(sound, n, (frames + 1) / FPS, g), g)
    short = torch.rand(n, generator=g, device=device) < SHORT
    ends = torch.where(short, frames / FPS * (0.3 + 0.7 * torch.rand(n, generator=g, device=device)), 99)      # seconds
    wav = wav * (torch.arange(wav.shape[1], device=device) / RATE < ends[:, None])
    audio = features(nets["audio"], wav, frames) * (times < ends[:, None, None, None])    # zeros behind the end, as in sampling
    person = faces.identities(n, g, device)
    shown, captions = faces.captioned(person, g)
    motion = faces.motions(n, frames, g, device)
    mouth = faces.articulation(wav, (torch.arange(frames, device=device) - WARM_UP) / FPS)
    picture, video = faces.reference(person, g)[:, :, None], faces.draw(shown, motion, mouth)
    weight = F.avg_pool3d(faces.importance(shown, motion, mouth)[:, :, -CLIP:], (4, 8, 8))
    if later:
        weight[:, :, 0] *= 3                                         # where it joins the clip before
    latents = nets["vae"].encode(video if later else torch.cat([picture, video], dim=2), chunk=CLIP)
    past = latents[:, :, :-CLIP // 4] if later else None
    return Clips(latents[:, :, -CLIP // 4:], nets["vae"].encode(picture), past, audio[..., -CLIP:], weight, tokens(captions))


class Pool:
    """A sliding window over an endless row of groups of clips, first and later ones in turn, each made from its number alone.

    make  function number -> Clips        groups  in the window, an even number        every  steps between two new groups
    At step s the window ends before group s // every + groups. It depends on s alone, so a resumed run sees the same clips.
    """

    def __init__(self, make, groups, every):
        self.make, self.groups, self.every, self.held = make, max(groups, 2) // 2 * 2, every, {}

    def draw(self, step, n, g):
        """n clips, of the kind whose turn it is."""
        stop = step // self.every + self.groups
        for number in range(stop - self.groups, stop):
            if number not in self.held:
                self.held.pop(number - self.groups, None)
                self.held[number] = self.make(number)
        groups = [self.held[number] for number in range(stop - self.groups, stop) if number % 2 == step % 2]
        size = len(groups[0].latents)
        picks = torch.randint(len(groups) * size, (n,), generator=generator("cpu", step, g.initial_seed())).tolist()
        return Clips(*(None if values[0] is None else torch.stack([values[i // size][i % size] for i in picks]) for values in zip(*groups)))
