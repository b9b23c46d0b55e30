"""Live: the S2V denoiser as a stream. Frames come while the sound is still being heard, for as long as it is heard, in constant memory.

The weights are those of S2V-14B with the LoRA of Live Avatar merged into them; no layer is new. What is new is the order of work:

    blocks     the video is made 3 latent frames (12 pixel frames) at a time, each block from its own noise in 4 steps, without guidance
    rings      a block attends to itself, to the condition tokens and to the up to 9 latent frames before it, as cached keys and values.
               There is one ring per step: step i of a block sees what step i of the blocks before it saw of themselves, noise included
    sink pass  the condition tokens (reference picture, FramePack motion) run through the network once, alone, at diffusion time 0
    reference  positions count up for ever, so the reference moves along: it stands some frames ahead of the block, how many is drawn anew
               in every forward. The motion tokens, those of a still picture, stay where they are
    sound      each block's 12 audio frames are encoded alone, behind copies of the first
    decoding   one VAE stream for the whole video: no seams, nothing is encoded again

The ring plugs into the one seam of model.py, `attend(q, k, v, layer)`. Weights are shared; rings are the state of one viewer.

    live = Live(nets, vae, text, picture, seed=42)
    for audio in sound:                  # (1, audio_states, audio_dim, 12) per block
        frames = live.block(audio)       # (1, 3, 12, height, width), of the first block 9

Axes    B batch (1)   T latent frames   P pixel frames   H W latent size   h w patch grid   n tokens of a latent frame   K heads   D head width
        S condition tokens: reference n, motion 1.5 n
Source  Alibaba-Quark/LiveAvatar@9c2c38d liveavatar/models/wan/{causal_s2v_pipeline,causal_s2v_pipeline_tpp,causal_model_s2v}.py: what it
        computes, not how. docs/live.md says what is different and why.
"""
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch

from model import PATCH, REF_TIME, LayerCond, Rotary, Segment, attention, grid_positions, rope_table
from vae import new_cache

FPS = 25                     # that the LoRA was trained for; base S2V has 16
STEPS, SHIFT = 4, 3.0
BLOCK = 3                    # latent frames made at once: 12 pixel frames, 0.48 s
WINDOW = 12                  # latent frames that a ring holds, a multiple of BLOCK
AHEAD = (4, 30)              # the reference stands between so many latent frames ahead of the block
REF_FRAMES = 5               # the reference is the second latent of the picture shown for so many frames
STILL_FRAMES = 113           # of a still picture, until its latents change no more: the encoder looks back 112 frames
LEAD_LATENTS = 7             # of the still picture are decoded first, so that the first frames are none of a video that begins
WARM_UP = 3                  # pixel frames of the first block that are not shown: the mouth leads the sound by so many

rotate = Rotary()


def schedule(steps=STEPS, shift=SHIFT):
    """-> sigmas (steps + 1,) float32, the last is 0; timesteps (steps,) float32, not whole numbers

    The shift acts twice: levels are evenly spaced between already shifted ends, then shifted again (diffusers' FlowMatchEulerDiscreteScheduler
    does so, and the LoRA was trained with it). With 4 steps the last begins at 0.0089, almost without noise: what it leaves in its ring is
    almost clean, in place of the extra pass with which other causal models fill their cache.
    """
    if not (1 <= steps <= 1000 and steps == int(steps)):
        raise ValueError(f"steps must be a whole number from 1 to 1000, got {steps}: the LoRA was trained for {STEPS}")
    def shifted(u):
        return shift * u / (1 + (shift - 1) * u)
    sigmas = shifted(np.linspace(1, shifted(0.001), int(steps)))     # float64
    sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
    return sigmas, sigmas[:-1] * 1000


def check_window(window):
    if window < BLOCK or window % BLOCK:
        raise ValueError(f"window must be a multiple of {BLOCK}, got {window}: {WINDOW} is what the LoRA was trained with")


def rounded(rope):
    """A RoPE table with cos and sin rounded to float16, as those that the LoRA was trained with (moves a velocity by 5e-6)."""
    return rope.half().float()


def still(vae, picture):
    """The two condition latents of a picture (1, 3, 1, height, width): reference (1, z, 1, H, W); the latent of its being still, the same size."""
    return vae.with_fp32_fallback(lambda: torch.cat([list(vae.encode_stream([picture] * frames))[-1][:, :, -1:]
                                                     for frames in (REF_FRAMES, STILL_FRAMES)], dim=2)).split(1, dim=2)


# ------------------------------------------------------------------------------------------------------------------- the denoiser

@dataclass
class Expert:
    """A network of the stream, after its sink pass."""
    net: object                  # as model.Denoiser is called
    cond: object                 # Cond of a block without its sound and position: text keys and values, video bias
    ref_keys: list               # per layer the reference's keys before rotation (1, n, K, D): they are turned anew in every forward

    @property
    def denoiser(self):
        return getattr(self.net, "net", self.net)                    # FastDenoiser holds one

    def condition(self, audio, pose, rope):
        """Cond of one block: its sound and its place."""
        net, cond = self.denoiser, self.cond
        audio_global, audio_local = net.audio_latents(audio)         # (1, 3, 1, C), (1, 3, A, C); of these 12 audio frames alone
        layers = tuple(LayerCond(layer.text, *block.hear(audio_local, audio_global)) for layer, block in zip(cond.layers, net.blocks))
        bias = cond.video_bias if pose is None else net.token_kind.weight[:1] + net.tokens(net.pose, pose)
        return replace(cond, rope=rope, layers=layers, video_bias=bias)


class Stream:
    """Blocks of latents, each from noise, sound and what the blocks before it left in the rings. Inference only.

    nets    one network per step (all the same, or of two experts), with `prepare` and the call of model.Denoiser; shared by all streams
    text    umT5 rows of the prompt (1, S, text_dim)        window  latent frames in a ring: a multiple of 3
    """

    def __init__(self, nets, text, window=WINDOW, shift=SHIFT):
        check_window(window)
        self.nets, self.text, self.window, self.cfg = nets, text, window, getattr(nets[0], "net", nets[0]).cfg
        self.sigmas, self.timesteps = schedule(len(nets), shift)
        self.frame = 0                                               # latent frames made so far; the number of the next
        self.rings = [[] for _ in nets]                              # per step, per layer: (2, 1, S + window*n, K, D) rotated keys, and values

    @torch.no_grad()
    def sink(self, ref, motion):
        """The pass of the condition tokens; again when the reference changes. What the rings hold of the video stays.

        ref (1, z, 1, H, W), motion (1, z, 19, H, W). It is an ordinary forward at time 0, of one blank frame whose result nobody reads: `attend`
        lets the condition tokens see themselves alone. They come unrotated, as the reference's keys are wanted so.
        """
        cfg, (H, W) = self.cfg, ref.shape[3:]
        self.grid = BLOCK, H // PATCH[1], W // PATCH[2]
        blank = torch.zeros_like(ref)
        silence = torch.zeros(1, cfg.audio_states, cfg.audio_dim, 4, device=ref.device)
        experts = {}
        for net in self.nets:
            if id(net) not in experts:
                cond = net.prepare(shape=blank.shape[2:], text=self.text, audio=silence, ref=ref, motion=motion)
                experts[id(net)] = expert = Expert(net, None, [])
                rope = rounded(cond.rope)[:, self.n:]
                turned_nowhere = torch.stack([torch.ones_like(cond.rope[0]), torch.zeros_like(cond.rope[1])])
                net(blank, torch.zeros(1, device=ref.device), replace(cond, rope=turned_nowhere), self.sink_attend(expert, rope))
                expert.cond = replace(cond, grid=self.grid, segments=(Segment(BLOCK * self.n, 0),), context=None)
        self.experts = [experts[id(net)] for net in self.nets]       # per step

    def sink_attend(self, expert, rope):
        """`attend` of the sink pass: condition tokens see each other; every ring of the network takes their keys and values."""
        rings = [ring for net, ring in zip(self.nets, self.rings) if net is expert.net]

        def attend(q, k, v, layer):
            video, condition = self.n, k[:, self.n:]
            expert.ref_keys.append(condition[:, :self.n].clone())
            turned, v = rotate(condition, rope).to(v.dtype), v[:, video:]                                # (1, S, K, D)
            for ring in rings:
                if layer == len(ring):
                    ring.append(v.new_zeros(2, 1, v.shape[1] + self.window * self.n, *v.shape[2:]))
                ring[layer][0, :, :v.shape[1]], ring[layer][1, :, :v.shape[1]] = turned, v
            y = attention(rotate(q[:, video:], rope).to(v.dtype), turned, v)                             # (1, S, C)
            return torch.cat([y.new_zeros(1, video, y.shape[2]), y], dim=1)
        return attend

    @property
    def n(self):
        return self.grid[1] * self.grid[2]

    def rope(self, times, device):
        """The table of whole latent frames. Angles come from the frame's number in float64: there is no longest video."""
        return rounded(rope_table(grid_positions(times, *map(range, self.grid[1:])), self.cfg.dim // self.cfg.n_head)).to(device)

    def conditions(self, audio, pose=None):
        """Cond of the block to come, per step.  audio (1, audio_states, audio_dim, 12), pose (1, pose_dim, 3, H, W) latents or None"""
        rope = self.rope(range(self.frame, self.frame + BLOCK), audio.device)
        made = {id(expert): expert.condition(audio, pose, rope) for expert in {id(e): e for e in self.experts}.values()}
        return [made[id(expert)] for expert in self.experts]

    def place(self, ahead):
        """Of the block to come -> the ring's frame at which it is written, how many frames it sees with itself, the reference's time."""
        f = self.frame
        return f % self.window, min(f + BLOCK, self.window), REF_TIME + max(0, f - (REF_TIME - ahead))

    def attend(self, step, ahead):
        """`attend` of a step of the block to come, whose reference stands `ahead` latent frames before it, see AHEAD."""
        expert, ring, n, (slot, seen, time) = self.experts[step], self.rings[step], self.n, self.place(ahead)
        S, moved = ring[0].shape[2] - self.window * n, self.rope([time], ring[0].device)
        own, seen = slice(S + slot * n, S + (slot + BLOCK) * n), S + seen * n

        def attend(q, k, v, layer):
            """The block's own keys and values are written first, in the place of the oldest: it sees all of itself. Order does not matter."""
            memory = ring[layer]
            memory[0, :, :n] = rotate(expert.ref_keys[layer], moved)
            memory[0, :, own], memory[1, :, own] = k, v
            return attention(q, *memory[:, :, :seen])
        return attend

    def velocity(self, step, latents, cond, ahead):
        """One forward of the block to come.  latents (1, z, 3, H, W), cond of `conditions`, ahead as `attend` -> (1, z, 3, H, W) float32"""
        t = torch.full((1,), self.timesteps[step].item(), device=latents.device)
        return self.experts[step].net(latents, t, cond, self.attend(step, ahead))

    @torch.no_grad()
    def block(self, noise, audio, draw, pose=None):
        """The next three latent frames.  noise (1, z, 3, H, W), audio and pose as `conditions`, draw() -> `ahead` of a forward -> (1, z, 3, H, W)"""
        x = noise.float()
        for step, cond in enumerate(self.conditions(audio, pose)):
            x = x + (self.sigmas[step + 1] - self.sigmas[step]).item() * self.velocity(step, x, cond, draw())
        self.frame += BLOCK
        return x


# --------------------------------------------------------------------------------------------------------------------- one viewer

def decode(vae, latents, cache):
    """The next latents of a stream (1, z, any, H, W) -> frames (1, 3, P, height, width).  cache  new_cache(vae.decoder) at the stream's start"""
    (mean, std), begun, frames = vae.latent_statistics(), cache[0] is not None, []
    for piece in (latents,) if begun else (latents[:, :, :1], latents[:, :, 1:]):            # a stream begins with one frame
        for z in piece.split(vae.chunk(None), dim=2) if piece.shape[2] else ():
            frames.append(vae.decoder((z * std + mean).to(vae.decoder.conv_in.weight), cache).to(mean).clamp(-1, 1))
    return torch.cat(frames, dim=2)


class Live:
    """The stream of one viewer: a picture, then sound block by block -> frames block by block. All that it remembers is in `state`.

    nets, text, window, shift  as Stream        vae  as vae.VAE        picture  (1, 3, 1, height, width) in [-1, 1]
    seed         of noise and of the reference's distances: the same seed gives the same video
    replace_ref  when a ring is full for the first time, the first latent that was made takes the picture's place as reference (as the
                 original does on several GPUs; on one it does not)
    """

    def __init__(self, nets, vae, text, picture, seed=42, window=WINDOW, shift=SHIFT, replace_ref=False):
        self.vae, self.replace_ref = vae, replace_ref
        self.generator = torch.Generator().manual_seed(seed)         # on the CPU, so that a seed means the same on every machine
        self.stream, self.cache = Stream(nets, text, window, shift), new_cache(vae.decoder)
        ref, latent = still(vae, picture)
        self.motion = latent.expand(-1, -1, self.stream.cfg.motion_latents, -1, -1)
        self.stream.sink(ref, self.motion)
        decode(vae, latent.expand(-1, -1, LEAD_LATENTS, -1, -1), self.cache)
        self.shape, self.first = (1, vae.config.z_dim, BLOCK, *ref.shape[3:]), None

    def draw(self):
        return int(torch.randint(AHEAD[0], AHEAD[1] + 1, (), generator=self.generator))

    @torch.no_grad()
    def block(self, audio, pose=None):
        """audio (1, audio_states, audio_dim, 12), pose (1, pose_dim, 3, H, W) latents or None -> frames (1, 3, 12 or 9, height, width)"""
        stream = self.stream
        if self.replace_ref and stream.frame == stream.window:
            stream.sink(self.first, self.motion)
        begins = stream.frame == 0
        latents = stream.block(torch.randn(self.shape, generator=self.generator).to(audio.device), audio, self.draw, pose)
        if begins:
            self.first = latents[:, :, :1].clone()
        return decode(self.vae, latents, self.cache)[:, :, WARM_UP if begins else 0:]

    def state(self):
        """Everything that the blocks to come depend on, but weights, picture and prompt: for torch.save. Tensors are not copied."""
        stream = self.stream
        return dict(frame=stream.frame, rings=stream.rings, ref_keys=[expert.ref_keys for expert in stream.experts], first=self.first,
                    cache=list(self.cache), generator=self.generator.get_state())

    def restore(self, state):
        """Go on where the state of another Live of the same weights, picture, prompt and options was taken.  ValueError if it was of others"""
        stream = self.stream
        shapes, wanted = ([[tuple(layer.shape) for layer in ring] for ring in rings] for rings in (state["rings"], stream.rings))
        if shapes != wanted:
            raise ValueError(f"wanted the state of {len(wanted)} steps with rings of {wanted[0][0]}, got {len(shapes)} steps and {shapes[0][0]}: "
                             "go on with the size, steps, window and checkpoint that it was saved with")
        for mine, theirs in zip(stream.rings, state["rings"]):
            for ring, other in zip(mine, theirs):
                ring.copy_(other)
        for expert, keys in zip(stream.experts, state["ref_keys"]):
            expert.ref_keys = [key.clone() for key in keys]
        stream.frame, self.first = state["frame"], state["first"]
        self.cache = deque(x if x is None else x.clone() for x in state["cache"])
        self.generator.set_state(state["generator"])
        return self


def ring_bytes(cfg, n, steps=STEPS, window=WINDOW, itemsize=2):
    """Of the rings of one viewer, with their condition rows: what a stream takes beside weights, whatever its length."""
    return steps * cfg.n_layer * 2 * int((window + 2.5) * n) * cfg.dim * itemsize
