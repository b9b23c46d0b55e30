"""The cases live_* of test_parity.py: live.py against the outputs of Live Avatar's code. golden/LIVE_SPEC.md describes them.

What only that code does stands here and not in live.py: decoding clip by clip behind encoded frames, and float8 with one scale per tensor.
"""
import json
import math
import re
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import live
from fast import fp8
from fast.relay import Relay
from formats import checkpoints, lora, names
from media.pictures import fit_picture, s2v_size
from model import MOTION_LATENTS, Config, per_token, rope_table, token_positions
from test_parity import FLOAT16, argument, audio_bucket, entries, network, value
from vae import new_cache


def schedule(meta, golden, run):
    for output, call in meta["calls"].items():
        (sigmas, timesteps), x, path = live.schedule(call["steps"], call["shift"]), value(meta, "x"), []
        for t, step in zip(timesteps.tolist(), sigmas.diff().tolist()):
            x = x + step * (-0.3 * x + 0.5 * torch.sin(torch.tensor(t) / 1000 * 3 + x))
            path.append(x)
        yield f"{output}_timesteps", timesteps, golden[f"{output}_timesteps"], 0
        yield f"{output}_sigmas", sigmas, golden[f"{output}_sigmas"], 0
        yield f"{output}_path", torch.cat(path), golden[f"{output}_path"]


def audio(meta, golden, run):
    """Every block's sound by itself; and, as base S2V has it, all at once."""
    net, states, n = network(meta["modules"]["model"]), value(meta, "audio"), meta["scalars"]["columns_per_block"]
    parts = {str(b): states[..., n * b:n * (b + 1)] for b in range(meta["scalars"]["blocks"])} | {"whole": states}
    for name, part in parts.items():
        for kind, tokens in zip(("global", "local"), net.audio_latents(part)):
            yield f"{kind}_{name}", tokens, golden[f"{kind}_{name}"]


# ------------------------------------------------------------------------------------------------------------------ one forward

def begin(meta, run, ref, motion, steps=1, window=live.WINDOW, module="model"):
    """A Stream of a case's network, after its sink pass."""
    return live.Stream(passes(meta, [run(network(meta["modules"][module]))] * steps, ref, motion), window)


def passes(meta, nets, ref, motion):
    return live.sinks(nets, value(meta, "context")[None], ref, motion)


def again(meta, stream, ref, motion):
    """The sink pass of other latents."""
    stream.begin(passes(meta, [expert.net for expert in stream.experts], ref, motion))


def pairs(rope):
    """Our table (2, N, 1, D/2) -> as theirs (N, D/2, 2)"""
    return rope[:, :, 0].permute(1, 2, 0)


def condition_rope(stream):
    """The table of the condition tokens in the sink pass: the reference at 30, motion before 0."""
    return live.rounded(rope_table(token_positions((0, *stream.grid[1:]), True, True), stream.cfg.dim // stream.cfg.n_head))


def condition_rows(stream, layer, kind, step=0):
    """What a ring holds of the condition tokens: keys (0) or values (1)."""
    ring = stream.rings[step]
    return ring.layers[layer][kind, 0, :ring.S]


def turned(keys, stream):
    """Their condition keys are kept unrotated, ours rotated."""
    return live.rotate(keys[None], condition_rope(stream))[0]


def sink(meta, golden, run):
    ref, motion = value(meta, "ref_latents"), value(meta, "motion_latents")
    stream = begin(meta, run, ref, motion)
    yield "tokens", live.denoiser(stream.experts[0].net).context_tokens(ref, motion)[0], golden["tokens"]
    yield "rope", pairs(condition_rope(stream)), golden["rope"]
    for layer in range(stream.cfg.n_layer):
        yield f"cond_k_{layer}", condition_rows(stream, layer, 0), turned(golden[f"cond_k_{layer}"], stream)
        yield f"cond_v_{layer}", condition_rows(stream, layer, 1), golden[f"cond_v_{layer}"]


def forward(meta, run, call, first=0, rounded=live.rounded):
    """The sink pass, given rings, one forward of the block at latent frame `first` -> Stream, Cond, velocity"""
    with mock.patch.object(live, "rounded", rounded):
        stream = begin(meta, run, *(argument(meta, call[name]) for name in ("ref_latents", "motion_latents")),
                       window=meta["scalars"].get("cache_frames", live.WINDOW))
        stream.frame, rows = first, min(first, stream.window) * stream.n
        for layer, ring in enumerate(stream.rings[0].layers if rows else ()):
            start = stream.rings[0].S
            for i, kind in enumerate("kv"):
                ring[i, :, start:start + rows] = value(meta, f"cache_{kind}_{layer}")[:, :rows]
        stream.timesteps = argument(meta, call["t"])[0, :1]
        cond, = stream.conditions(argument(meta, call["audio_input"]), argument(meta, call["cond_states"]))
        return stream, cond, stream.velocity(0, argument(meta, call["x"])[None], cond, stream.moved(call["relative_dist"]))[0]


def unrounded(rope):
    return rope


def own(stream, layer, kind):
    """What the forward wrote to a layer's ring: keys (0) or values (1) of the block."""
    ring, slot = stream.rings[0], stream.place(4)[0]
    start = ring.S + slot * stream.n
    return ring.layers[layer][kind, 0, start:start + live.BLOCK * stream.n]


def block_first(meta, golden, run):
    for output, call in meta["calls"].items():
        stream, cond, velocity = forward(meta, run, call)
        yield output, velocity, golden[output]
        yield f"{output}_exact_rope", forward(meta, run, call, rounded=unrounded)[2], golden[f"{output}_exact_rope"]
        if output != next(iter(meta["calls"])):
            continue
        net, x, t = live.denoiser(stream.experts[0].net), argument(meta, call["x"])[None], stream.timesteps
        tokens, block = net.embed(x, cond), net.blocks[0]
        mod = per_token(block.modulations(net.modulations(t)[1]), cond.segments)
        y = stream.rings[0].attend(*block.project(tokens, mod, cond.rope), 0, *stream.place(0)[:2], stream.moved(call["relative_dist"]))
        for kind, ours in zip(("audio_global", "audio_local"), net.audio_latents(argument(meta, call["audio_input"]))):
            yield kind, ours, golden[kind]
        yield "tokens", tokens[0], golden["tokens"]
        yield "block0", block.finish(tokens, y, mod, cond.layers[0].text)[0], golden["block0"]
        yield "rope", pairs(cond.rope), golden["rope"]
        yield "cond_rope", pairs(condition_rope(stream)), golden["cond_rope"]
        for name in golden:
            if found := re.fullmatch(r"new_([kv])_(\d+)", name):
                yield name, own(stream, int(found[2]), "kv".index(found[1])), golden[name]


def block_later(meta, golden, run):
    for row in meta["table"]:
        name, call = row["variant"], meta["calls"][row["variant"]]
        stream, cond, velocity = forward(meta, run, call, row["first_frame"])
        place = stream.place(row["relative_dist"])
        yield f"{name} place in the ring", torch.tensor(place), torch.tensor([row["slot"], row["frames_attended"], row["ref_time"]]), 0
        yield name, velocity, golden[name]
        exact = forward(meta, run, call, row["first_frame"], unrounded)[2]
        yield f"{name}_exact_rope", exact, golden[f"{name}_exact_rope"]
        yield f"{name}_rope", pairs(cond.rope)[::stream.n], golden[f"{name}_rope"]
        yield f"{name}_cond_rope", pairs(stream.rope([place[2]])), golden[f"{name}_cond_rope"]
        for output in golden:
            if found := re.fullmatch(rf"{name}_new_([kv])_(\d+)", output):
                yield output, own(stream, int(found[2]), "kv".index(found[1])), golden[output]


# -------------------------------------------------------------------------------------------------------------- whole generations

def listed(meta, output):
    """The numbers that an output's meaning lists: "latents 0, 73 and 91 of the 92 ..." -> [0, 73, 91]"""
    return [int(n) for n in re.findall(r"\d+", meta["outputs"][output]["meaning"].split(" of ")[0])]


def reference_picture(meta, call):
    picture = Image.fromarray(value(meta, "ref_image"))
    return fit_picture(picture, s2v_size(picture.height, picture.width, call["max_area"]), official=True)[None, :, None]


def thinned(video, theirs):
    """Our frames at every n-th pixel, as many as theirs."""
    every = video.shape[3] // theirs.shape[2]
    return video[0, :, :, ::every, ::every].half()


REACH = 36       # latents that the VAE looks back, and a few more: it is not given the others, which only cost time
MOVED = 26       # of 92 latents, more than the new frames of two clips fill


def clips(meta, golden, run):
    """The program for one GPU: it decodes a clip behind the latents of the last 365 frames, encoded again."""
    call, coder, steps = meta["calls"]["video"], network(meta["modules"]["vae"]), meta["calls"]["video"]["sampling_steps"]
    n, count, online = call["infer_frames"], len(meta["scalars"]["noise_shapes"]), "online" in meta["case"]
    picture = reference_picture(meta, call)
    distances, sound = iter(value(meta, "relative_dist").flatten().tolist()), value(meta, "audio_emb")
    last = picture.repeat(1, 1, 365, 1, 1)                           # frames
    (ref, steady), begins = live.still(coder, picture), coder.encode(picture)
    lead = torch.cat([begins, steady.expand(-1, -1, 91, -1, -1)], dim=2)                 # of a still picture; those between are not compared
    motion, ours = steady.expand(-1, -1, MOTION_LATENTS, -1, -1), {"ref_latents": ref}
    ours["motion_latents"] = torch.cat([begins, *[steady] * (len(listed(meta, "motion_latents")) - 1)], dim=2)
    stream = begin(meta, run, ref, motion, steps, n // 4, "noise_model")
    velocity, frames = stream.velocity, []
    yield "cond_k_0", condition_rows(stream, 0, 0), turned(golden["cond_k_0"], stream)
    for clip in range(count):
        noise, made = value(meta, f"noise_{clip}")[None], []
        for block in range(n // 12):
            def watched(step, *args):
                ours[f"v_{clip}_{block}_{step}"] = velocity(step, *args)
                return ours[f"v_{clip}_{block}_{step}"]
            stream.velocity, first = watched, n * clip + 12 * block
            made.append(stream.block(noise[:, :, 3 * block:3 * block + 3], sound[..., first:first + 12], lambda: next(distances)))
        ours[f"latents_{clip}"], ours[f"motion_decode_{clip}"] = torch.cat(made, dim=2), lead
        new = coder.decode(torch.cat([lead[:, :, -REACH:], ours[f"latents_{clip}"]], dim=2))[:, :, -n:][:, :, live.WARM_UP if clip == 0 else 0:]
        frames.append(new)
        if clip + 1 < count:
            moved = min(73, new.shape[2])
            last = torch.cat([last[:, :, moved:], new[:, :, -moved:]], dim=2)
            lead = torch.cat([lead[:, :, :92 - MOVED], coder.encode(last[:, :, 4 * (92 - REACH - MOVED):])[:, :, REACH:]], dim=2)
            if online and clip == 0:
                ours["ref_latents_1"], ours["motion_latents_1"] = made[0][:, :, :1], lead[:, :, -19:]
                again(meta, stream, ours["ref_latents_1"], ours["motion_latents_1"])
                yield "cond_k_1", condition_rows(stream, 0, 0), turned(golden["cond_k_1"], stream)
    video = torch.cat(frames, dim=2)
    yield "frames", video.shape[2], meta["scalars"]["frames"], 0
    yield "timesteps", stream.timesteps, torch.tensor(meta["scalars"]["timesteps_all"]), 0
    yield "first frames", list(range(0, stream.frame, 3)), meta["scalars"]["first_frames"], 0
    for name, theirs in golden.items():
        if name == "video":
            yield name, video[0, :, meta["scalars"]["frames_shown"]].half(), theirs, FLOAT16
        elif name == "video_every":
            yield name, thinned(video, theirs), theirs, FLOAT16
        elif name.startswith("motion_decode"):
            yield name, ours[name][0, :, listed(meta, name)], theirs
        elif not name.startswith("cond_k"):
            yield name, ours[name][0], theirs


def pipeline_of_gpus(meta, golden, run, line=None):
    """The program for five GPUs: a reference from one frame, motion from 73, one VAE stream, and a second sink pass with the first latent that
    was made. In one process; or, given the Line of one of many (tests/test_relay.py), in all of them, of which the last compares."""
    call, coder, steps = meta["calls"]["video"], network(meta["modules"]["vae"]), meta["calls"]["video"]["sampling_steps"]
    n, picture = call["infer_frames"], reference_picture(meta, call)
    sound = value(meta, "audio_emb")
    def encoded():
        return coder.encode(picture), coder.encode(picture.repeat(1, 1, 73, 1, 1))
    ref, motion = line.once(encoded) if line else encoded()
    distances = [value(meta, f"relative_dist_{rank}").flatten().tolist() for rank in range(steps)]
    noise = torch.cat([value(meta, name)[None] for name in meta["inputs"] if name.startswith("noise")], dim=2)
    own = line.steps(steps) if line else range(steps)
    nets, cache, made, frames = [run(network(meta["modules"]["noise_model"]))] * len(own), new_cache(coder.decoder), [], []
    if line is None or line.last:
        live.decode(coder, motion[:, :, :live.LEAD_LATENTS], cache)
    picture = live.Picture(nets, coder, value(meta, "context")[None], motion, passes(meta, nets, ref, motion), cache)
    options = dict(window=n // 4, replace_ref=True)
    stream = Relay(picture, line, steps, **options) if line else live.Live(picture, **options)
    blocks, draws = noise.split(live.BLOCK, dim=2), iter([d for row in zip(*distances, strict=True) for d in row])
    stream.noise, stream.draw = lambda audio, given=iter(blocks): next(given).float(), lambda: next(draws)
    heard = ((sound[..., 12 * block:12 * block + 12][0], math.inf, 0.0) for block in range(len(blocks)))
    for features, *_ in stream.blocks(heard, None) if line else heard:
        made.append(stream.latents(features[None]))
        if line is None or line.last:
            frames.append(stream.frames(made[-1]))
    if line and not line.last:
        return
    video, latents = torch.cat(frames, dim=2), torch.cat(made, dim=2)
    yield "frames", video.shape[2], meta["scalars"]["frames"], 0
    yield "warm_up", motion[0, :, :live.LEAD_LATENTS], golden["warm_up"]
    yield "ref_latents", ref[0], golden["ref_latents"]
    yield "motion_latents", motion[0, :, listed(meta, "motion_latents")], golden["motion_latents"]
    yield "ref_latents_1", made[0][0, :, :1], golden["ref_latents_1"]
    yield "latents", latents[0], golden["latents"]
    yield "video", thinned(video, golden["video"]), golden["video"], FLOAT16
    yield "video_head", video[0, :, :golden["video_head"].shape[1]].half(), golden["video_head"], FLOAT16


# ------------------------------------------------------------------------------------------------------ VAE, LoRA, float8, names

def vae(meta, golden, run):
    coder, picture = network(meta["modules"]["vae"]), value(meta, "picture")[None]
    cache, (ref, steady) = new_cache(coder.decoder), live.still(coder, picture)
    for name in [spec["input"] for spec in meta["calls"]["stream"]["zs"]]:
        frames = live.decode(coder, value(meta, name)[None], cache)[0]
        yield (name, frames, golden[name]) if name in golden else (f"{name}_tail", frames[:, -4:], golden[f"{name}_tail"])
    yield "ref_5", ref[0], golden["ref_5"]
    yield "ref_1", coder.encode(picture)[0], golden["ref_1"]
    yield "still_last", steady[0], golden["still_last"]
    count = golden["still"].shape[1]
    yield "still", coder.encode(picture.repeat(1, 1, 4 * count - 3, 1, 1))[0], golden["still"]


def lora_file(meta, golden, run):
    """Merged as their program does it: at half its strength, as the file holds no alpha and the program says 64 for rank 128."""
    model, module = meta["modules"]["model"], meta["modules"]["lora"]
    kind, config, rules = names.identify(model["class"].split(".")[-1], model["constructor"], entries(model))
    tensors = checkpoints.match(entries(model), rules, kind, config)
    strength = module["constructor"]["lora_alpha"] / module["constructor"]["lora_rank"]
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: entry.read() for name, entry in entries(module).items()}, Path(folder) / "lora.safetensors")
        changes, *_ = lora.read_lora(Path(folder) / "lora.safetensors", config, strength)
        merged, called = lora.merged(tensors, [changes]), {name: names.rename(name, rules) for name in model["state_dict"]}
        changed = sorted(name for name, ours in called.items() if ours in changes)
        yield "names that change", changed == sorted(meta["changed"]), True, 0
        for name, theirs in golden.items():
            yield name, merged[called[name]].read(), theirs


def float8(meta, golden, run):
    """Their numbers with one scale per tensor, capped. Ours has one per row (fast/fp8.py), and no cap: the number format is shared."""
    def quantised(x):
        scale = min(fp8.MAX / x.abs().max().clamp(min=1e-12).item(), fp8.MAX)
        return fp8.cast(x * scale).float(), torch.tensor([1 / scale])
    for size in ("large", "small"):
        q, inverse = quantised(value(meta, f"x_{size}"))
        yield f"q_{size}", q, golden[f"q_{size}"], 0
        yield f"inv_{size}", inverse, golden[f"inv_{size}"]
    (x, a), (w, b) = quantised(value(meta, "x")), quantised(value(meta, "weight"))
    yield "linear", (F.linear(x.double(), w.double()) * a * b + value(meta, "bias")).float(), golden["linear"]
    model = meta["modules"]["model"]
    _, _, rules = names.identify(model["class"].split(".")[-1], model["constructor"], entries(model))
    for kind, ours in (("float8", True), ("kept", False)):
        wrong = [layer for layer in meta["layers"][kind] if fp8.uses_fp8(names.rename(f"{layer}.weight", rules)) is not ours]
        yield f"layers, {kind}", len(wrong), 0, 0


def manifest(meta, golden, run):
    """The LoRA at full size, as a file of zeros that takes no room: every tensor finds its layer, at half strength, which is said."""
    header, stop = {}, 0
    for name, shape in meta["state_dict"].items():
        start, stop = stop, stop + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
    head = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "liveavatar.safetensors"
        with open(path, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + stop)
        changes, said, warning = lora.read_lora(path, Config())
    yield "tensors", len(header), meta["tensors"], 0
    yield "parameters", stop // 2, meta["parameters"], 0
    yield "layers that change", len(changes), meta["tensors"] // 2, 0
    yield "said: strength 0.5", "strength 0.5 " in said and warning is None, True, 0


CASES = {"manifest": manifest, "live_schedule": schedule, "live_audio_bucket": audio_bucket, "live_audio": audio, "live_sink": sink,
         "live_block_first": block_first, "live_block_later": block_later, "live_clips": clips, "live_vae": vae, "live_tpp": pipeline_of_gpus,
         "live_lora": lora_file, "live_fp8": float8}


def case(meta, golden, run):
    """A case is run by the first whose name it begins with; the manifest has no name."""
    return next(CASES[prefix] for prefix in CASES if meta.get("case", "manifest").startswith(prefix))(meta, golden, run)
