"""What a plan says before anything is loaded: what will be made, who does what, and where it fits."""
import math
from pathlib import Path

from fast.plan import FPS
from fast.probe import GIB
from media.sound import RATE


def plan_text(plan):
    """Plan -> lines"""
    o, sound = plan.config, []
    made, cut = f"{plan.width}x{plan.height}", ""
    if plan.sound is not None:
        heard, shown = len(plan.sound) / RATE, plan.frames / FPS
        sound = [f"sound    {heard:.2f} s of {Path(o.audio).name}"]
        made += f", {plan.clips} clip{'s' * (plan.clips > 1)} of {o.clip_frames} frames ->"
        if heard > shown + 1e-3:
            cut = f": the last {heard - shown:.2f} s of the sound are left out"
        elif shown - heard >= 1 / FPS:
            cut = f"; an mp4 ends with the sound, after {heard:.2f} s"
        elif plan.held:
            cut = f", the last frame held for {plan.held / FPS:.2f} s until the sound ends (the mouth has finished: it leads by 0.19 s)"
    tokens = f"{plan.tokens[0]:,}" + (f" in the first clip, {plan.tokens[1]:,} in a later one" if len(plan.tokens) > 1 else "")
    return "\n".join((
        *sound,
        f"video    {plan.task}: {made} {plan.frames} frames at {plan.fps:g} fps = {plan.frames / plan.fps:.2f} s{cut}",
        *plan.notes,
        f"sampler  {o.solver}, {o.steps} steps, shift {o.shift:g}, guidance {', '.join(f'{g:g}' for g in o.guidance)}, seed {o.seed}",
        *([f"speed    {o.speed}"] if o.speed else []),
        f"tokens   {tokens}",
        f"weights  {size_table(plan.sizes)}",
        *([ranks_text(plan)] if math.prod(o.split) > 1 else []),
        memory_text(plan)))


def memory_text(plan):
    o, m, free = plan.config, plan.memory, plan.free
    host = f"host {m.host / GIB:.1f} of {free.host / GIB:.1f} GiB free" + "; expect swapping" * (m.host > free.host)
    if free.device is None:
        return f"memory   CPU, float32: {host}"
    how = [f"{m.resident} of {m.blocks} blocks resident" if m.resident is not None else "all blocks resident"]
    how += [f"{m.chunk} tokens at once"] * bool(m.chunk) + ["text keys on the host"] * m.host_layers
    how += [f"VAE in {m.tiles} tiles"] * (m.tiles > 1) + ["float8 matrices"] * m.fp8 + ["8-bit attention"] * o.attention8
    how += ["compiled"] * bool(o.compile)
    gib = {name: f"{getattr(m, name) / GIB:.1f}" for name in ("peak", "denoiser", "weights", "text", "vae", "audio", "streamed")}
    return ("memory   {peak} of {limit} GiB on the GPU: denoiser {denoiser} (weights {weights}), text {text}, VAE {vae}, audio {audio}; "
            "{streamed} pinned on the host\n".format(limit=f"{free.device / GIB:.1f}", **gib) +
            f"         {host}\n         {', '.join(how)}")


def size_table(sizes):
    """{component: GiB} -> one line"""
    return ", ".join(f"{name} {gib:.1f} GiB" if gib >= 1 else f"{name} {1024 * gib:.1f} MiB" for name, gib in sizes.items())


def ranks_text(plan):
    """Of many processes: who does what, and what goes between."""
    from fast.parallel import sent_bytes                             # here: one process does without
    (halves, runs), cfg, tokens = plan.config.split, plan.denoiser, plan.tokens[-1]
    sent = sent_bytes(cfg, plan.config.split, tokens, plan.video_tokens, plan.config.dtype.itemsize)
    step = 4 * cfg.out_dim * math.prod(plan.latent_shape)
    what = [f"{halves} branches of guidance"] * (halves > 1) + [f"{runs} runs of {-(-tokens // runs):,} tokens, {cfg.n_head // runs} of {cfg.n_head} "
                                                                "heads each"] * (runs > 1)
    sends = [f"{bytes_text(sent)} a forward"] * (runs > 1) + [f"{bytes_text(step)} a step"] * (halves > 1)
    return f"ranks    {halves * runs}: {' x '.join(what)}; each sends {', '.join(sends)}; memory below is of each"


def bytes_text(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2g} MB"
