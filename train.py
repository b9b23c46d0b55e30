"""Train the denoiser: a tiny one from nothing on drawn faces, or any S2V checkpoint further on a folder of videos.

    python train.py dit                                        one denoiser for all noise levels, and the text encoder with it
    python train.py dit --expert high; ... --expert low        the two experts, both starting from it
    python train.py tune --ckpt weights/tiny --data videos     fine-tune by LoRA; --lora 0 changes all weights
    python train.py live                                       make it causal, for live.py, by LoRA (tiny/streams.py)
    torchrun --nproc-per-node 2 train.py dit                   the same on several GPUs: each adds a batch

`dit` needs wav2vec2 and VAE, which `python -m tiny.stages audio` and `vae` train; `export` then makes a checkpoint folder. All commands of
weights/tiny, with seconds and losses, are in docs/training.md.

Flow matching  x = (1 - sigma) latents + sigma eps. The network is told t = 1000 sigma and predicts the velocity eps - latents.
Clips          First: encoded behind the reference picture, no motion tokens. Later: encoded behind the 73 frames before them, whose 19 latents
               are the motion. Steps alternate between the two kinds (tiny/clips.py).
Resume         All randomness of step s comes from generators seeded by (seed, s), and a drawn clip from its number. So a run that was stopped
               and resumed gives the bits of one that was not. A state is refused by a run with other options.

Axes    B batch   T latent frames   P pixel frames   H W latent size   S text tokens
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import dataclasses
import math
import sys
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import convert_weights
from audio import audio_features
from fast.probe import any_terminal
from media.sound import load_audio
from fast import fp8
from formats import checkpoints, lora
from media.pictures import fit_frame, fit_picture, load_image, s2v_size
from media.ffmpeg import probe
from media.frames import nearest_frames, read_frames
from fast.blocks import attention_backend
from text import Tokenizer, encode_prompt
from tiny import networks, speech
from tiny.clips import CLIP, PAST, Clips, Pool, drawn_clips
from tiny.optimise import (LOOP, Stage, add_loop_options, autocast, average_gradients, backward, batches, between, clear_gradients, generator,
                           resume, run, save_state, save_weights, world, write_curve)
from wan_s2v import FPS, WARM_UP, run_dtype

TARGETS = ("self_attn.q self_attn.k self_attn.v self_attn.o cross_attn.q cross_attn.k cross_attn.v cross_attn.o ffn.0 ffn.2 "
           "inject.q inject.k inject.v inject.o")


# --------------------------------------------------------------------------------------------------------------- noise and loss

def noise_levels(n, shift, boundary, expert, g):
    """sigma (n,), as dense as the sampler's steps, on the expert's side of the boundary ("both": all)."""
    edge = boundary / (shift - (shift - 1) * boundary) if boundary else None         # where shift u / (1 + (shift - 1) u) is the boundary
    low, high = {"both": (0, 1), "low": (0, edge), "high": (edge, 1)}[expert]
    u = low + (high - low) * torch.rand(n, generator=g, device=g.device)
    return shift * u / (1 + (shift - 1) * u)


def drop_conditions(clips, share, g, end):
    """Take sound and caption away from a share of the clips, as in the negative branch of guidance.  end  the caption's last token"""
    keep = torch.rand(len(clips.ids), generator=g, device=g.device) >= share
    nothing = torch.zeros_like(clips.ids)
    nothing[:, 0] = end
    return clips._replace(audio=clips.audio * keep.view(-1, 1, 1, 1), ids=torch.where(keep[:, None], clips.ids, nothing))


def draw_noise(clips, motion_noise, g):
    """-> clips with some noise on the motion latents, as the sampler's own are not perfect either; eps, the noise for the latents"""
    eps = torch.randn(clips.latents.shape, generator=g, device=g.device)
    if clips.motion is not None:
        amount = motion_noise * torch.rand(len(eps), 1, 1, 1, 1, generator=g, device=g.device)
        clips = clips._replace(motion=clips.motion + amount * torch.randn(clips.motion.shape, generator=g, device=g.device))
    return clips, eps


def velocity_loss(net, clips, text, sigma, eps):
    """Weighted mean square error of the velocity.  text (B, S, C) umT5 rows of the captions, sigma (B,), eps (B, z, T, H, W) -> scalar"""
    s = sigma.view(-1, 1, 1, 1, 1)
    cond = net.prepare(clips.latents.shape[2:], text, clips.audio, clips.ref, clips.motion)
    with attention_backend(eps.device):
        velocity = net((1 - s) * clips.latents + s * eps, 1000 * sigma, cond)
    return (clips.weight * (velocity - (eps - clips.latents)).square()).mean() / clips.weight.mean()


# --------------------------------------------------------------------------------------------------------------------- the loop

def learning_rate(step, o):
    return o.lr * min(1, (step + 1) / o.warmup) * 0.5 * (1 + math.cos(math.pi * min(1, step / o.steps)))


def train(name, stage, o, device):
    """Optimise until o.steps, from the saved state if there is one; leaves the averaged weights in stage.nets.

    Writes OUT/NAME.pt (the state) and OUT/NAME.txt, NAME.png (the loss) every o.save steps.
    raises ValueError if the state is of other networks or options, or the loss is not finite
    """
    path = Path(o.out) / f"{name}.pt"
    weights = [p for p in stage.nets.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in weights]
    optimiser = torch.optim.AdamW(weights, lr=o.lr, betas=(0.9, 0.99), weight_decay=o.decay, fused=device.type == "cuda")
    options = {key: getattr(o, key) for key in f"{LOOP} {stage.options}".split()}
    first, log, losses = resume(path, options, weights, average, optimiser)
    last, graphs, start = min(o.stop or o.steps, o.steps), {}, time.perf_counter() - (log[-1][2] if log else 0)
    for step, (kind, *batch) in enumerate(batches(stage.batch, range(first, last), device), first):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, o)
        losses.append(backward(stage, kind, batch, weights, graphs))             # stage.loss(kind, *batch).backward()
        average_gradients(weights)                                               # of all GPUs
        nn.utils.clip_grad_norm_(weights, o.clip)
        optimiser.step()
        clear_gradients(weights)
        with torch.no_grad():                                                    # the first steps are soon forgotten
            torch._foreach_lerp_(average, weights, 1 - min(o.ema, (step + 1) / (step + 10)))
        if (step + 1) % max(1, o.steps // 200) == 0 or step + 1 == o.steps:
            log.append([step + 1, torch.stack(losses).mean().item(), time.perf_counter() - start])
            losses = []
            if not math.isfinite(log[-1][1]):
                raise ValueError(f"the loss is {log[-1][1]} at step {step + 1}: choose a smaller --lr and start again")
            if world()[0] == 0:
                print(f"{name} step {step + 1:6d} of {o.steps}   loss {log[-1][1]:.4f}   {log[-1][2]:.0f} s", flush=True)
        if (step + 1) % o.save == 0 or step + 1 == last:
            save_state(path, dict(step=step + 1, log=log, losses=losses, weights=weights, average=average,
                                  optimiser=optimiser.state_dict(), options=options))
            write_curve(path.with_suffix(""), log)
    with torch.no_grad():
        for p, mean in zip(weights, average):
            p.copy_(mean)


# ------------------------------------------------------------------------------------------------------ from nothing: drawn faces

def dit_stage(o, device):
    """The denoiser and the text encoder of all noise levels, or an expert that starts from them."""
    nets, _ = networks.trained(o.out, device, None if o.expert == "both" else "both")
    if o.expert == "both":
        nets |= {"denoiser": networks.new_denoiser().to(device), "text": networks.new_text().to(device)}
    net, encoder = nets["denoiser"].requires_grad_(True), nets["text"]
    for block in net.blocks if o.compile else ():
        block.compile(dynamic=True)
    tokenizer, sound = networks.shared_tokenizer(o.out), speech.load_folder(o.speech, device)
    tokens = partial(networks.token_ids, tokenizer, device=device)

    def make(number):
        g = generator(device, o.seed, number, world()[0], 1)
        clips = drawn_clips(nets, sound, tokens, number % 2 == 1, o.fresh, g)
        if not all(x.isfinite().all() for x in clips if x is not None):
            raise ValueError(f"a clip of group {number} holds NaN or infinity: are the earlier stages trained?")
        return clips
    pool = Pool(make, o.pool // o.fresh, o.every)

    def batch(step):
        g = generator(device, o.seed, step, world()[0])
        clips = drop_conditions(pool.draw(step, o.batch, g), o.drop, g, tokenizer.end)
        sigma = noise_levels(o.batch, o.shift, o.boundary, o.expert, g)
        clips, eps = draw_noise(clips, o.motion_noise, g)
        return None, *clips, sigma, eps

    def loss(_, *tensors):
        *clips, sigma, eps = tensors
        clips = Clips(*clips)
        with autocast(device):
            return velocity_loss(net, clips, networks.encode_ids(encoder, clips.ids), sigma, eps)
    return Stage(nn.ModuleDict({"denoiser": net, "text": encoder}), batch, loss,
                 options="shift drop motion_noise pool fresh every" + " boundary" * (o.expert != "both"))


def dit(o, device):
    stage, name = dit_stage(o, device), f"dit_{o.expert}"
    train(name, stage, o, device)
    save_weights(o, name, stage.nets)


# ------------------------------------------------------------------------------------------------------ fine-tuning: videos

def frames_at(path, fps, area, step):
    """All frames of a video at `fps`, the nearest in time, in an S2V size of at most `area` pixels -> (3, P, height, width) uint8"""
    info, frames, size = probe(path, count=False), [], None
    if not (info.fps and info.has_audio):
        raise ValueError(f"wanted videos with sound, got {path} without {'sound' if info.fps else 'a picture'}: take it out of the folder")
    times = Counter(nearest_frames(path, fps).tolist())              # frame of the file -> how often it is used
    for number, frame in enumerate(read_frames(path)):
        size = size or s2v_size(*frame.shape[:2], area, step)
        frames += [((fit_frame(frame, size) + 1) * 127.5).round().byte()] * times[number]
    if not frames:
        raise ValueError(f"{path}: no frame could be read: take it out of the folder")
    return torch.stack(frames, dim=1)


@torch.no_grad()
def filmed_clips(path, vae, encoder, caption, area, lead, device):
    """The first and the later clips that a video with sound holds -> [Clips of one], on the CPU.

    caption  its number        area  pixels of a frame
    lead     the picture at time k/16 s is trained with audio frame k + lead, as the sampler shows it `lead` frames late (tiny/clips.py)
    """
    video, still = frames_at(path, FPS, area, 8 * vae.stride[1]), path.with_suffix(".png")
    P = video.shape[1]
    audio, _ = audio_features(encoder, load_audio(path).to(device), FPS, CLIP)                   # (states, C, audio frames)
    audio = F.pad(audio, (0, P + lead - audio.shape[2]))[None].cpu()                             # zeros behind its end, as in sampling

    def pixels(a, b):
        return (video[None, :, a:b] / 127.5 - 1).to(device)
    picture = fit_picture(load_image(still), video.shape[2:])[None, :, None].to(device) if still.is_file() else pixels(P // 2, P // 2 + 1)
    ref, out = vae.encode(picture), []
    for past in (0, PAST):
        for a in range(past, P - CLIP - lead + 1, CLIP):
            latents = vae.encode(pixels(a - past, a + CLIP) if past else torch.cat([picture, pixels(a, a + CLIP)], dim=2)).cpu()
            before, clip = latents[:, :, :-CLIP // 4], latents[:, :, -CLIP // 4:]
            out.append(Clips(clip, ref.cpu(), before if past else None, audio[..., a + lead:a + lead + CLIP],
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
    del encoder                                                      # makes room
    vae, encoder = (source.load(kind, device, torch.float32) for kind in ("vae", "audio"))
    clips = [clip for path, text in zip(films, texts)
             for clip in filmed_clips(path, vae, encoder, captions.index(text), o.size or width * height, o.lead, device)]
    if not clips:
        raise ValueError(f"wanted videos of {(CLIP + o.lead) / FPS:.1f} s or more in {o.data}, got {len(films)} videos: add some")
    return clips, rows


def load_experts(source, o, device):
    """The denoisers to be tuned, on the CPU: with LoRAs in the run's dtype, or all of them in float32 -> ModuleDict"""
    chosen = source.experts if o.expert == "both" else [f"denoiser_{o.expert}"]
    if not set(chosen) <= set(source.experts):
        raise ValueError(f"{o.ckpt} has one denoiser for all noise levels: leave out --expert {o.expert}")
    experts = nn.ModuleDict()
    for name in chosen:
        net = checkpoints.materialise("denoiser", source.configs["denoiser"], fp8.multiplied_out(source.parts[name].tensors),
                                      dtype=run_dtype(None, device))
        experts[name] = lora.add(net, o.lora, o.targets.split()) if o.lora else net.float().requires_grad_(True)
        for block in net.blocks if o.recompute else ():              # activation checkpointing, with the same attention kernel both times
            block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                    context_fn=lambda: (nullcontext(), attention_backend(device)))
    return experts


def tune_stage(o, source, device):
    """The experts learn in turn, each on its side of the boundary, from first clips and later ones in turn."""
    experts = load_experts(source, o, device)
    names, shift = list(experts), source.sampling["shift"]
    clips, rows = filmed_folder(source, o, device)
    experts.to(device)                                               # the encoders have left it
    kinds = [[c for c in clips if (c.motion is not None) == later] for later in (False, True)]

    def batch(step):
        g = generator(device, o.seed, step, world()[0])
        turn, expert = divmod(step, len(names))
        pool, picks = kinds[turn % 2] or kinds[0], torch.randint(2 ** 31, (o.batch,), generator=g, device=device).tolist()
        pool = [c for c in pool if c.latents.shape == pool[picks[0] % len(pool)].latents.shape]  # of one size
        clips = Clips(*(None if x[0] is None else torch.cat(x).to(device) for x in zip(*(pool[i % len(pool)] for i in picks))))
        clips = drop_conditions(clips, o.drop, g, 0)
        text = nn.utils.rnn.pad_sequence([rows[i] for i in clips.ids[:, 0].tolist()], batch_first=True).to(device)
        sigma = noise_levels(o.batch, shift, source.boundary, names[expert].partition("_")[2] or "both", g)
        clips, eps = draw_noise(clips, o.motion_noise, g)
        return names[expert], text, *clips, sigma, eps

    def loss(expert, text, *tensors):
        *clips, sigma, eps = tensors
        with autocast(device):
            return velocity_loss(experts[expert], Clips(*clips), text, sigma, eps)
    return Stage(experts, batch, loss, record=False, options="drop motion_noise lead size targets")


def as_part(kind, config, net):
    """A trained network -> checkpoints.Part in the dtypes it is stored in: bfloat16; norms and modulation of the denoiser float32."""
    tensors = {}
    for name, value in net.state_dict().items():
        entry = checkpoints.Entry(Path(kind), tuple(value.shape), value.dtype, value.detach)
        dtype = checkpoints.parameter_dtype(kind, name, entry, torch.bfloat16)
        tensors[name] = dataclasses.replace(entry, dtype=dtype, read=partial(value.detach().to, dtype))
    return checkpoints.Part(kind, config, tensors)


def tune(o, device):
    if not o.lora and Path(o.to).exists():
        raise ValueError(f"{o.to} exists: give a new folder with --to")
    source = checkpoints.open_checkpoint(o.ckpt)
    if "audio" not in source.configs:
        raise ValueError(f"a speech-to-video checkpoint is wanted, got {o.ckpt} of {source.task}")
    stage = tune_stage(o, source, device)
    train("_".join(["tune", Path(o.to).stem, o.expert]), stage, o, device)
    if world()[0] or 0 < o.stop < o.steps:
        return
    if o.lora:
        return lora.write(stage.nets, source.configs["denoiser"], o.to)
    parts = {name: as_part("denoiser", source.configs["denoiser"], net) for name, net in stage.nets.items()}
    quantize = any(entry.dtype == fp8.E4M3 for entry in source.parts[source.experts[0]].tensors.values())
    convert_weights.save(dataclasses.replace(source, parts=source.parts | parts), o.to, quantize=quantize)


def live(o, device):
    from tiny.streams import run as run_live                         # it imports this file
    run_live(o, device)


# ----------------------------------------------------------------------------------------------------------------- command line

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, positive, share = parser.add_subparsers(dest="command", required=True), between(1, kind=int), between(0, 1)
    p = commands.add_parser("dit", help="from nothing, on drawn faces", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_loop_options(p, steps=5400, batch=64, lr=1.2e-3)
    p.add_argument("--speech", default="data/speech/train", help="folder of training sound")
    p.add_argument("--boundary", type=share, default=0.65, help="sigma from which the high-noise expert serves")
    p.add_argument("--shift", type=between(0.01, 100), default=3.0, help="of the noise levels, as in sampling")
    p.add_argument("--pool", type=positive, default=768, help="clips kept ready")
    p.add_argument("--fresh", type=positive, default=16, help="clips that are replaced at once")
    p.add_argument("--every", type=positive, default=12, help="steps between two replacements")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the denoiser's blocks")
    p.set_defaults(run=dit)

    t = commands.add_parser("tune", help="fine-tune any S2V checkpoint", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_loop_options(t, steps=200, batch=2, lr=1e-4)
    t.add_argument("--ckpt", default="weights/tiny", help="checkpoint folder to fine-tune")
    t.add_argument("--data", default="videos", help="folder of videos with sound. Beside NAME.mp4 may lie NAME.txt, its caption, and NAME.png, "
                                                    "its reference picture (else its middle frame)")
    t.add_argument("--to", default="tuned", help="LoRA file, or new checkpoint folder")
    t.add_argument("--size", type=between(0, kind=int), default=0, help="pixels of a training frame, as in WIDTH*HEIGHT (0: the checkpoint's)")
    t.add_argument("--lora", type=between(0, kind=int), default=8, help="rank; 0 changes all weights and writes a whole checkpoint")
    t.add_argument("--targets", default=TARGETS, help="layers of a block that get a LoRA")
    t.add_argument("--lead", type=between(0, kind=int), default=WARM_UP,
                   help="frames between a picture and the audio frame it is trained with; 3 makes lips and sound coincide")
    t.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=False,
                   help="compute each block again in the backward pass: much less memory, a third slower")
    t.set_defaults(run=tune)
    v = commands.add_parser("live", help="make it causal, for live.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_loop_options(v, steps=600, batch=4, lr=2e-3)
    v.add_argument("--ckpt", default="weights/tiny", help="checkpoint folder that learns it")
    v.add_argument("--speech", default="data/speech/train", help="folder of training sound")
    v.add_argument("--to", default="weights/tiny-live/live", help="LoRA file")
    v.add_argument("--levels", type=positive, default=4, help="steps of the stream, for whose noise levels it is trained")
    v.add_argument("--lora", type=positive, default=32, help="rank")
    v.add_argument("--targets", default=TARGETS, help="layers of a block that get a LoRA")
    v.add_argument("--pool", type=positive, default=128, help="stretches kept ready")
    v.add_argument("--fresh", type=positive, default=8, help="stretches that are replaced at once")
    v.add_argument("--every", type=positive, default=8, help="steps between two replacements")
    v.add_argument("--expert", choices=("both", "high", "low"), default="both", help="which learns")
    v.set_defaults(run=live, recompute=False)
    for command, what in ((p, "both: all noise levels; high or low: from there, this side of the boundary"), (t, "which to tune")):
        command.add_argument("--expert", choices=("both", "high", "low"), default="both", help=what)
        command.add_argument("--drop", type=share, default=0.1, help="share of clips without sound and caption, for guidance")
        command.add_argument("--motion-noise", type=share, default=0.15, help="most noise on the motion latents")
    return parser.parse_args(argv)


def main(argv=None):
    any_terminal()
    return run(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
