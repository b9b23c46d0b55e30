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

    picture = prepare(nets, vae, text, pixels)       # once; then any number of viewers
    live = Live(picture, seed=42)
    for audio in sound:                  # (1, audio_states, audio_dim, 12) per block
        frames = live.block(audio)       # (1, 3, 12, height, width), of the first block 9

Axes    B batch (1)   T latent frames   P pixel frames   H W latent size   h w patch grid   n tokens of a latent frame   K heads   D head width
        S condition tokens: reference n, motion 1.5 n
Source  Alibaba-Quark/LiveAvatar@9c2c38d liveavatar/models/wan/{causal_s2v_pipeline,causal_s2v_pipeline_tpp,causal_model_s2v}.py: what it
        computes, not how. docs/live.md says what is different and why.
"""
from collections import deque
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from model import PATCH, REF_TIME, LayerCond, Rotary, Segment, attention, grid_positions, rope_table
from vae import new_cache

FPS = 25                     # that the LoRA was trained for; base S2V has 16
STEPS, SHIFT = 4, 3.0
BLOCK = 3                    # latent frames made at once: 12 pixel frames, 0.48 s
WINDOW = 12                  # latent frames that a ring holds, a multiple of BLOCK
AHEAD = (4, 30)              # the reference stands between so many latent frames ahead of the block
REF_LATENT = 1               # the reference is the second latent of a still picture
STILL_FRAMES = 113           # of a still picture, at most, until its latents change no more: the encoder looks back 112 frames
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
    def encode():
        latents = [torch.zeros(())]
        for z in vae.encode_stream([picture] * STILL_FRAMES):
            latents += z.split(1, dim=2)
            if (latents[-1] - latents[-2]).abs().max() <= 1e-6 * latents[-1].abs().max():        # it changes no more
                break
        return torch.cat([latents[1 + REF_LATENT], latents[-1]], dim=2)
    return vae.with_fp32_fallback(encode).split(1, dim=2)


# ------------------------------------------------------------------------------------------------------------------- the denoiser

@dataclass
class Expert:
    """A network of the stream and what its sink pass left: shared by all viewers of a picture."""
    net: object                  # as model.Denoiser is called
    cond: object                 # Cond of a block without its sound and position: text keys and values, video bias
    rows: list                   # per layer the condition tokens' rotated keys, and values (2, 1, S, K, D)
    ref_keys: list               # per layer the reference's keys before rotation (1, n, K, D): they are turned anew in every forward

    def condition(self, audio, pose, rope):
        """Cond of one block: its sound and its place."""
        net, cond = denoiser(self.net), self.cond
        audio_global, audio_local = net.audio_latents(audio)         # (1, 3, 1, C), (1, 3, A, C); of these 12 audio frames alone
        layers = tuple(LayerCond(layer.text, *block.hear(audio_local, audio_global)) for layer, block in zip(cond.layers, net.blocks))
        bias = cond.video_bias if pose is None else net.token_kind.weight[:1] + net.tokens(net.pose, pose)
        return replace(cond, rope=rope, layers=layers, video_bias=bias)


def denoiser(net):
    return getattr(net, "net", net)                                  # FastDenoiser holds one


@torch.no_grad()
def sink(net, text, ref, motion):
    """The pass of the condition tokens, which see themselves alone.  ref (1, z, 1, H, W), motion (1, z, 19, H, W) -> Expert

    It is an ordinary forward at time 0, of one blank frame whose result nobody reads. Keys come unrotated, as the reference's are wanted so.
    """
    cfg, (h, w), blank = denoiser(net).cfg, (x // p for x, p in zip(ref.shape[3:], PATCH[1:])), torch.zeros_like(ref)
    silence = torch.zeros(1, cfg.audio_states, cfg.audio_dim, 4, device=ref.device)
    cond = net.prepare(shape=blank.shape[2:], text=text, audio=silence, ref=ref, motion=motion)
    n, segments = h * w, (Segment(BLOCK * h * w, 0),)
    rope, nowhere = rounded(cond.rope)[:, n:], torch.stack([torch.ones_like(cond.rope[0]), torch.zeros_like(cond.rope[1])])
    expert = Expert(net, replace(cond, grid=(BLOCK, h, w), segments=segments, context=None), [], [])

    def attend(q, k, v, layer):
        """The first n tokens are the blank frame."""
        keys, values = k[:, n:], v[:, n:]                            # (1, S, K, D)
        expert.ref_keys.append(keys[:, :n].clone())
        expert.rows.append(torch.stack([rotate(keys, rope).to(v.dtype), values]))
        y = attention(rotate(q[:, n:], rope).to(v.dtype), *expert.rows[layer])                       # (1, S, C)
        return torch.cat([y.new_zeros(1, n, y.shape[2]), y], dim=1)
    net(blank, torch.zeros(1, device=ref.device), replace(cond, rope=nowhere), attend)
    return expert


def sinks(nets, text, ref, motion):
    """-> Expert of each step; one per network."""
    experts = {id(net): net for net in nets}
    experts = {key: sink(net, text, ref, motion) for key, net in experts.items()}
    return [experts[id(net)] for net in nets]


class Ring:
    """What one step remembers: per layer the keys and values of the condition tokens, then of `window` latent frames of n tokens.

    fast/rings.py has one for GPUs.
    """

    def __init__(self, expert, n, window):
        self.n, self.S = n, expert.rows[0].shape[2]
        self.layers = [rows.new_zeros(*rows.shape[:2], self.S + window * n, *rows.shape[3:]) for rows in expert.rows]
        self.begin(expert)

    def begin(self, expert):
        """Take the condition tokens of a sink pass. What is there of the video stays."""
        self.ref_keys = expert.ref_keys
        for memory, rows in zip(self.layers, expert.rows):
            memory[:, :, :self.S] = rows

    def at(self, slot, seen, moved):
        """-> `attend` of one forward.

        slot, seen  the frame at which the block is written, how many it sees with itself        moved  the reference's table (2, n, 1, D/2)
        """
        return partial(self.attend, slot=slot, seen=seen, moved=moved)

    def attend(self, q, k, v, layer, slot, seen, moved):
        """The block's own keys and values are written first, in the place of the oldest: it sees all of itself. Order does not matter."""
        memory, start = self.layers[layer], self.S + slot * self.n
        memory[0, :, :self.n] = rotate(self.ref_keys[layer], moved)
        memory[0, :, start:start + k.shape[1]], memory[1, :, start:start + k.shape[1]] = k, v
        return attention(q, *memory[:, :, :self.S + seen * self.n])

    def state(self):
        return dict(layers=self.layers, ref_keys=self.ref_keys)

    def restore(self, state):
        for mine, theirs in zip(self.layers, state["layers"]):
            mine.copy_(theirs)
        self.ref_keys = [key.clone() for key in state["ref_keys"]]


class Stream:
    """Blocks of latents, each from noise, sound and what the blocks before it left in the rings. Inference only.

    experts  one per step, of `sinks`; shared by all streams of a picture        window  latent frames in a ring: a multiple of 3
    ring     class of the rings
    """

    def __init__(self, experts, window=WINDOW, shift=SHIFT, ring=Ring):
        check_window(window)
        self.experts, self.window, self.shift, self.cfg, self.grid = experts, window, shift, denoiser(experts[0].net).cfg, experts[0].cond.grid
        self.n = self.grid[1] * self.grid[2]
        self.sigmas, self.timesteps = schedule(len(experts), shift)
        self.frame = 0                                               # latent frames made so far; the number of the next
        self.rings = [ring(expert, self.n, window) for expert in experts]
        self.places = rope_table(grid_positions([0], *map(range, self.grid[1:])), self.width).to(experts[0].cond.rope.device)

    def begin(self, experts):
        """Go on with the condition tokens of other sink passes."""
        self.experts = experts
        for ring, expert in zip(self.rings, experts):
            ring.begin(expert)

    @property
    def width(self):
        return self.cfg.dim // self.cfg.n_head                       # D

    def rope(self, times):
        """The table of whole latent frames (2, len(times)*n, 1, D/2). Angles come from the frame's number in float64: there is no longest video.

        Only the columns of time are new, a few numbers: rows and columns of the picture wait on the device.
        """
        moments = torch.tensor([[time, 0, 0] for time in times], dtype=torch.float64)
        moments, columns = rope_table(moments, self.width).to(self.places.device), self.width // 2 - 2 * (self.width // 6)
        table = self.places.repeat(1, len(times), 1, 1)
        table[..., :columns] = moments[..., :columns].repeat_interleave(self.n, dim=1)
        return rounded(table)

    def conditions(self, audio, pose=None):
        """Cond of the block to come, per step.  audio (1, audio_states, audio_dim, 12), pose (1, pose_dim, 3, H, W) latents or None"""
        rope = self.rope(range(self.frame, self.frame + BLOCK))
        made = {id(expert): expert.condition(audio, pose, rope) for expert in {id(e): e for e in self.experts}.values()}
        return [made[id(expert)] for expert in self.experts]

    def place(self, ahead):
        """Of the block to come -> the ring's frame at which it is written, how many frames it sees with itself, the reference's time."""
        f = self.frame
        return f % self.window, min(f + BLOCK, self.window), REF_TIME + max(0, f - (REF_TIME - ahead))

    def moved(self, ahead):
        """The reference's table for a forward of the block to come, before which it stands `ahead` latent frames, see AHEAD."""
        return self.rope([self.place(ahead)[2]])

    def velocity(self, step, latents, cond, moved):
        """One forward of the block to come.  latents (1, z, 3, H, W), cond of `conditions`, table of `moved` -> (1, z, 3, H, W) float32"""
        ring, (slot, seen, _) = self.rings[step], self.place(0)
        t = torch.full((1,), self.timesteps[step].item(), device=latents.device)
        return self.experts[step].net(latents, t, cond, ring.at(slot, seen, moved))

    def steps(self, x, conds, moved):
        """All forwards of the block to come.  x (1, z, 3, H, W) noise; per step a Cond and a table of `moved` -> (1, z, 3, H, W)"""
        for step, change in enumerate(self.sigmas.diff().tolist()):
            x = x + change * self.velocity(step, x, conds[step], moved[step])
        return x

    @torch.no_grad()
    def block(self, noise, audio, draw, pose=None):
        """The next three latent frames.  noise (1, z, 3, H, W), audio and pose as `conditions`, draw() -> `ahead` of a forward -> (1, z, 3, H, W)"""
        x = self.steps(noise.float(), self.conditions(audio, pose), [self.moved(draw()) for _ in self.experts])
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


@dataclass
class Picture:
    """What is made of a picture and a prompt once: from it a stream begins at once. It takes sink rows of 2.5 latent frames per network."""
    nets: list                   # of each step
    vae: object
    text: object                 # umT5 rows of the prompt (1, S, text_dim)
    motion: object               # (1, z, 19, H, W)
    experts: list                # of each step
    cache: deque                 # of the VAE's decoder, behind the latents of the still picture


@torch.no_grad()
def prepare(nets, vae, text, picture, latents=None):
    """nets one network per step, with `prepare` and the call of model.Denoiser; picture (1, 3, 1, height, width) in [-1, 1] -> Picture

    latents  of `still`, where they are known: then a rank that does not decode, see fast/relay.py, has no VAE
    """
    (ref, latent), cache = latents or still(vae, picture), vae and new_cache(vae.decoder)
    motion = latent.expand(-1, -1, denoiser(nets[0]).cfg.motion_latents, -1, -1)
    if vae:
        decode(vae, latent.expand(-1, -1, LEAD_LATENTS, -1, -1), cache)
    return Picture(nets, vae, text, motion, sinks(nets, text, ref, motion), cache)


class Live:
    """The stream of one viewer: sound block by block -> frames block by block. All that it remembers is in `state`.

    picture, window, shift, ring  as prepare and Stream
    seed         of noise and of the reference's distances: the same seed gives the same video
    replace_ref  when a ring is full for the first time, the first latent that was made takes the picture's place as reference (as the
                 original does on several GPUs; on one it does not)
    """

    def __init__(self, picture, seed=42, window=WINDOW, shift=SHIFT, replace_ref=False, ring=Ring):
        self.picture, self.replace_ref = picture, replace_ref
        self.generator = torch.Generator().manual_seed(seed)         # on the CPU, so that a seed means the same on every machine
        self.stream, self.cache = Stream(picture.experts, window, shift, ring), deque(picture.cache or ())
        self.shape, self.first = (1, picture.motion.shape[1], BLOCK, *picture.motion.shape[3:]), None
        self.hidden = WARM_UP                                        # frames to come that are not shown

    def draw(self):
        return int(torch.randint(AHEAD[0], AHEAD[1] + 1, (), generator=self.generator))

    def noise(self, audio):
        """Of the block to come, on the device of its sound (1, z, 3, H, W)"""
        return torch.randn(self.shape, generator=self.generator, pin_memory=audio.is_cuda).to(audio.device, non_blocking=True)

    @torch.no_grad()
    def latents(self, audio, pose=None):
        """The denoiser's part of `block` -> (1, z, 3, H, W)"""
        stream, picture = self.stream, self.picture
        if self.replace_ref and stream.frame == stream.window:
            stream.begin(sinks(picture.nets, picture.text, self.first, picture.motion))
        begins, latents = stream.frame == 0, stream.block(self.noise(audio), audio, self.draw, pose)
        if begins:
            self.first = latents[:, :, :1].clone()
        return latents

    @torch.no_grad()
    def frames(self, latents):
        """The VAE's part: latents in the order they were made -> (1, 3, 12, height, width), the first time 9"""
        hidden, self.hidden = self.hidden, 0
        return decode(self.picture.vae, latents, self.cache)[:, :, hidden:]

    def block(self, audio, pose=None):
        """audio (1, audio_states, audio_dim, 12), pose (1, pose_dim, 3, H, W) latents or None -> frames (1, 3, 12 or 9, height, width)"""
        return self.frames(self.latents(audio, pose))

    def state(self):
        """Everything that the blocks to come depend on, but weights, picture and prompt: for torch.save. Tensors are not copied."""
        stream = self.stream
        return dict(frame=stream.frame, rings=[ring.state() for ring in stream.rings], first=self.first, hidden=self.hidden, cache=list(self.cache),
                    generator=self.generator.get_state())

    def restore(self, state):
        """Go on where the state of another Live of the same weights, picture, prompt and options was taken.  ValueError if it was of others"""
        stream = self.stream
        shapes, wanted = ([[tuple(x.shape) for x in ring["layers"]] for ring in rings] for rings in (state["rings"], self.state()["rings"]))
        if shapes != wanted:
            raise ValueError(f"wanted the state of {len(wanted)} steps with rings of {wanted[0][0]}, got {len(shapes)} steps and {shapes[0][0]}: "
                             "go on with the size, steps, window and checkpoint that it was saved with")
        for ring, saved in zip(stream.rings, state["rings"]):
            ring.restore(saved)
        stream.frame, self.first, self.hidden = state["frame"], state["first"], state["hidden"]
        self.cache = deque(x if x is None else x.clone() for x in state["cache"])
        self.generator.set_state(state["generator"])
        return self


def ring_bytes(cfg, n, steps=STEPS, window=WINDOW, itemsize=2):
    """Of the rings of one viewer, with their condition rows: what a stream takes beside weights, whatever its length."""
    return steps * cfg.n_layer * 2 * int((window + 2.5) * n) * cfg.dim * itemsize
