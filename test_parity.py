"""Our numbers against the official ones, every gap printed.

    python test_parity.py --golden golden             every case of a folder of reference outputs; exit status 1 if one fails
    python test_parity.py --golden golden --only vae  the cases whose name contains a word
    python test_parity.py --weights DIR --official REPO [--device cuda --dtype bfloat16]
                                                      component by component against a checkout of Wan-Video/Wan2.2, on real weights
    pytest test_parity.py                             the committed folder, as tests

A reference case is NAME.json (how weights and inputs are rebuilt from numpy's legacy random numbers, what was called) and
NAME.safetensors (what the official code answered, float32 on a CPU). golden/SPEC.md describes the format; sizes, seeds, prefixes and
weights are all read from the JSON.
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import dataclasses
import json
import math
import re
import sys
import zlib
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from formats import checkpoints
from formats import names
from audio import align_to_fps, audio_frame_indices, hidden_states, normalise, resample_50_to_30
from fast.blocks import FastDenoiser
from model import attention, expert_index, per_token
from media.pictures import fit_frame, fit_i2v, fit_picture, fit_ti2v, i2v_size, s2v_size, ti2v_size
from sampling import Experts, denoise, expert_guidance, make_solver
from media.frames import pose_step
from wan_s2v import ClipInputs, RunConfig, Stages, image_condition, make_clips

GOLDEN = Path(__file__).parent / "golden"
# Float32 sums in another order give gaps of 1e-7 to 1.5e-6, measured on every case, pipelines included; a porting mistake gives 2e-3 or more.
TOLERANCE = 1e-5
FLOAT16 = 1e-4              # videos are stored as float16: a step there is 4.9e-4 at 1.0, met by one value in a hundred (relative L2 3e-5)


class Row(NamedTuple):
    """One comparison: largest and mean |difference|, relative L2, what it may be; and the relative L2 of the denoiser run by fast/."""
    case: str
    output: str
    max: float
    mean: float
    relative: float
    tolerance: float
    ok: bool
    fast: float | None = None

    def __str__(self):
        fast = "" if self.fast is None else f"  fast {self.fast:8.2e}"
        return (f"{self.case:24s} {self.output:30s} max {self.max:8.2e}  mean {self.mean:8.2e}  rel L2 {self.relative:8.2e}  "
                f"tolerance {self.tolerance:7.0e}  {'pass' if self.ok else 'FAIL'}{fast}")


def compare(case, output, ours, theirs, tolerance=TOLERANCE):
    """Relative L2 against the tolerance, and no single value further off than 10 tolerances of the largest. 0 means equal."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    if ours.shape != theirs.shape:
        print(f"{case} {output}: shape {tuple(ours.shape)}, wanted {tuple(theirs.shape)}")
        return Row(case, output, np.inf, np.inf, np.inf, tolerance, False)
    a, b = ours.double().flatten(), theirs.double().flatten()
    gap, size = (a - b).abs(), b.norm().clamp_min(1e-30)
    relative = float((a - b).norm() / size)
    largest = float(gap.max()) if gap.numel() else 0.0
    ok = largest == 0 if tolerance == 0 else relative <= tolerance and largest <= 10 * tolerance * max(1.0, float(b.abs().max()))
    return Row(case, output, largest, float(gap.mean()) if gap.numel() else 0.0, relative, tolerance, ok)


# ------------------------------------------------------------------------------------------- weights and inputs, from the JSON

def rng(seed):
    return np.random.RandomState(zlib.crc32(seed.encode("utf-8")))


@cache                                                               # a case is computed twice
def weight(seed, name, shape):
    """One tensor of a state dict by the rules of golden/SPEC.md section 1 -> float32."""
    n = rng(seed).standard_normal(tuple(shape))
    if name.endswith("gamma") or (len(shape) == 1 and name.endswith(".weight")):
        n = 1 + 0.1 * n
    elif name.endswith(".weights"):
        n = 0.01 + 0.002 * n
    elif len(shape) <= 1:
        n = 0.05 * n
    elif name.endswith(("modulation", "padding_tokens")):
        n = 0.1 * n
    else:
        n = n / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(n, np.float32))


def entries(module):
    """A module of a case as if it lay in a file: {official name: Entry}"""
    def read(name, shape): return weight(module["crc_name_prefix"] + name, name, shape).clone()
    return {name: checkpoints.Entry(Path("golden"), tuple(shape), torch.float32, partial(read, name, tuple(shape)))
            for name, shape in module["state_dict"].items()}


def network(module):
    """A module of a case -> our network with its weights, through the converter's tables."""
    tensors = entries(module)
    kind, config, rules = names.identify(module["class"].split(".")[-1], module["constructor"], tensors)
    return checkpoints.materialise(kind, config, checkpoints.match(tensors, rules, kind, config))


def value(meta, name):
    """An input of a case -> tensor (or uint8 array for pictures)."""
    entry = meta["inputs"][name]
    random, how, shape = rng(entry["seed_string"]), entry["how"], tuple(entry["shape"])
    if how.startswith("RandomState.randint"):
        low, high = (int(n) for n in re.search(r"randint\((-?\d+), *(-?\d+)", how).groups())
        return torch.from_numpy(random.randint(low, high, shape).astype(np.int64))
    n = random.standard_normal(shape)
    if how.startswith("uint8"):
        return np.rint((np.tanh(n) + 1) * 127.5).astype(np.uint8)
    if how.startswith("tanh"):
        n = np.tanh(n)
    n = n.astype(np.float32)
    if scaled := re.search(r"then \* ([\d.]+) \+ ([\d.]+)", how):
        n = n * np.float32(scaled[1]) + np.float32(scaled[2])
    return torch.from_numpy(n)


def argument(meta, spec):
    """An argument of a call: a named input, listed values or a constant."""
    if isinstance(spec, list):
        return [argument(meta, item) for item in spec]
    if not isinstance(spec, dict):
        return spec
    if "input" in spec:
        return value(meta, spec["input"])
    dtype = getattr(torch, spec["dtype"])
    if "values" in spec:
        return torch.tensor(spec["values"], dtype=dtype).reshape(spec["tensor"])
    if "constant" in spec:
        return torch.full(spec["tensor"], spec["constant"], dtype=dtype)
    if "constant_per_row" in spec:
        return torch.tensor(spec["constant_per_row"], dtype=dtype)[:, None].expand(*spec["tensor"])
    return None


# ------------------------------------------------------------------------------------------------------- cases: the denoiser

def dit(meta, golden, run):
    """T2V, I2V, TI2V: each sample of a call on its own, since the official batches may mix sizes.  run: a Denoiser -> how it is called"""
    net = run(network(meta["modules"]["model"]))
    for output, call in meta["calls"].items():
        x, context, t, y = (argument(meta, call.get(name)) for name in ("x", "context", "t", "y"))
        for i, latents in enumerate(x):
            time, clean = (t.flatten()[0:1] if len(x) == 1 else t[i, :1], 0) if t is not None else (torch.tensor([float(meta["scalars"]["t"])]), 1)
            cond = net.prepare(shape=latents.shape[1:], text=context[i][None], image=y and y[i][None], clean_frames=clean)
            name = output if len(x) == 1 else f"{output}_{i}"
            yield name, net(latents[None], time, cond)[0], golden[name]


def dit_s2v(meta, golden, run):
    net, call = network(meta["modules"]["model"]), meta["calls"]["out"]
    net.cfg = dataclasses.replace(net.cfg, motion_frames=call["motion_frames"][0])
    runner = run(net)
    x, t, text, ref, motion, pose, audio = (argument(meta, call[name]) for name in (
        "x", "t", "context", "ref_latents", "motion_latents", "cond_states", "audio_input"))
    clip = dict(shape=x[0].shape[1:], text=text[0][None], audio=audio, ref=ref, motion=None if call["drop_motion_frames"] else motion)
    cond = runner.prepare(**clip, pose=pose)
    yield "out", runner(x[0][None], t, cond)[0], golden["out"]
    if not pose.any():
        yield "out (no pose given)", runner(x[0][None], t, runner.prepare(**clip))[0], golden["out"]
    past = audio[..., :1].expand(*audio.shape[:-1], call["motion_frames"][0])
    for name, tokens in zip(("audio_global", "audio_local"), net.audio(torch.cat([past, audio], dim=-1))):
        yield name, tokens, golden[name]
    yield "frame_packer_tokens", net.motion_tokens(motion), golden["frame_packer_tokens"]
    yield "rope", cond.rope[:, :, 0].permute(1, 2, 0), golden["rope"]
    tokens = net.embed(x[0][None], cond)
    every = -(-tokens.shape[1] // len(golden["tokens_head"]))
    yield "tokens_head", tokens[0, ::every], golden["tokens_head"]
    yield "block0_head", first_block(net, tokens, t, cond)[0, ::every], golden["block0_head"]


def first_block(net, x, t, cond):
    """Tokens after block 0, before its audio attention."""
    block, (_, mod) = net.blocks[0], net.modulations(t)
    mod = per_token(block.modulations(mod), cond.segments)
    return block.finish(x, attention(*block.project(x, mod, cond.rope)), mod, cond.layers[0].text)


# ------------------------------------------------------------------------------------------- cases: encoders, solvers, pictures

def vae(meta, golden, run=None):
    net = network(meta["modules"]["vae"])
    for output, call in meta["calls"].items():
        if "videos" in call:
            video = argument(meta, call["videos"])[0][None]
            video = video[:, :, :video.shape[2] - (video.shape[2] - 1) % 4]                  # the official code drops the rest silently
            yield output, net.encode(video)[0], golden[output]
        else:
            yield output, net.decode(argument(meta, call["zs"])[0][None])[0], golden[output]


def umt5(meta, golden, run=None):
    net, ids = network(meta["modules"]["encoder"]), value(meta, "ids")
    mask = torch.zeros_like(ids)
    for row, length in enumerate(meta["scalars"]["valid_lengths"]):
        mask[row, :length] = 1
    ids = torch.where(mask.bool(), ids, meta["scalars"]["pad_id"])
    yield "out", net(ids, mask), golden["out"]
    for row, length in enumerate(meta["scalars"]["valid_lengths"]):
        yield f"row {row} without padding", net(ids[row:row + 1, :length])[0], golden["out"][row, :length]


def wav2vec(meta, golden, run=None):
    net, wave = network(meta["modules"]["model"]), value(meta, "wave")
    yield "input_values_head", normalise(wave)[:len(golden["input_values_head"])], golden["input_values_head"]
    for i, state in enumerate(hidden_states(net, wave)):
        yield f"hidden_{i}", state[None], golden[f"hidden_{i}"]


def audio_bucket(meta, golden, run=None):
    for output, call in meta["calls"].items():
        states = resample_50_to_30(argument(meta, call["features_50fps"]))
        features, _ = align_to_fps(states, call["fps"], call["batch_frames"], call["m"])
        yield output, features.permute(2, 0, 1), golden[output]
        if (interpolated := output.replace("bucket", "interp")) in golden:
            yield interpolated, states, golden[interpolated]
    for row in meta["table"]:
        columns, clips = audio_frame_indices(row["frames_30fps"], row["fps"], row["batch_frames"])
        name = f"{row['frames_50fps']} at {row['fps']} fps, {row['batch_frames']}"
        yield f"columns {name}", columns, torch.tensor(row["indices"]), 0
        yield f"clips {name}", clips, row["num_repeat"], 0
        yield f"frames {name}", int(row["frames_50fps"] / 50 * 30), row["frames_30fps"], 0


def solvers(meta, golden, run=None):
    for output, call in meta["calls"].items():
        solver, x, path = make_solver(call["solver"], call["steps"], call["shift"]), value(meta, "x"), []
        for i, t in enumerate(solver.timesteps.tolist()):
            x = solver.step(-0.3 * x + 0.5 * torch.sin(np.float32(t) / 1000 * 3 + x), i, x)
            path.append(x)
        for name, ours in (("timesteps", solver.timesteps), ("sigmas", solver.sigmas), ("final", x), ("path", torch.cat(path))):
            if f"{output}_{name}" in golden:
                theirs = golden[f"{output}_{name}"]
                yield f"{output}_{name}", ours.reshape(theirs.shape), theirs, 0 if name == "timesteps" else TOLERANCE


def image_prep(meta, golden, run=None):
    steps = {"s2v": (s2v_size, 64), "i2v": (i2v_size, 16), "ti2v": (ti2v_size, 32)}
    for kind, (rule, step) in steps.items():
        wrong = 0
        for row in meta["table"]:
            try:
                got = list(rule(row["height"], row["width"], row["area"], step))
            except ValueError:
                got = None                                           # the official code raises or gives a side of 0
            wrong += got != row[kind] and not (got is None and (isinstance(row[kind], str) or 0 in row[kind]))
        yield f"{kind} sizes wrong of {len(meta['table'])}", wrong, 0, 0
    for row in meta["pose_sampling"]:
        name = f"pose {row['video_frames']} frames at {row['video_fps']} fps"
        yield name, torch.tensor(pose_indices(row["video_frames"], row["video_fps"], row["wanted"])), torch.tensor(row["indices"]), 0
    for name, theirs in golden.items():
        size = tuple(theirs.shape[-2:])
        if name == "pose":
            yield name, pose_frames(meta, size, theirs.shape[1]), theirs
            continue
        picture = Image.fromarray(value(meta, name))
        if name.startswith("i2v"):
            yield name, fit_i2v(picture, size), theirs
        else:
            ours = fit_picture(picture, size, official=True) if name.startswith("s2v") else fit_ti2v(picture, size)
            yield name, ((ours + 1) * 127.5).round(), theirs, 0


def pose_indices(frames, fps, wanted):
    return list(range(0, frames, pose_step(fps)))[:wanted]


def pose_frames(meta, size, frames):
    """The pose clip as the VAE sees it: sampled at 16 fps, missing frames black, the first twice -> (3, frames, height, width)"""
    source, fps = value(meta, "pose"), float(re.search(r"at ([\d.]+) fps", meta["outputs"]["pose"]["meaning"])[1])
    got = [fit_frame(source[i], size, official=True) for i in pose_indices(len(source), fps, frames - 1)]
    got += [-torch.ones_like(got[0])] * (frames - 1 - len(got))
    return torch.stack(got[:1] + got, dim=1)


def manifest(meta, golden, run=None):
    """Full size, no memory: every official name and shape has its place, and every place is filled."""
    tensors = entries(dict(meta, crc_name_prefix=""))
    kind, config, rules = names.identify(meta["model"], meta["constructor"], tensors)
    found = checkpoints.match(tensors, rules, kind, config)
    shapes = checkpoints.parameter_shapes(kind, config)
    dropped = sum(math.prod(entry.shape) for name, entry in tensors.items() if names.rename(name, rules) is None)
    yield "parameters", sum(math.prod(shape) for shape in shapes.values()) + dropped, meta["parameters"], 0
    yield "tensors without a place", len(shapes) - len(found), 0, 0


# ------------------------------------------------------------------------------------------------------- cases: whole pipelines

class Watched:
    """A function whose results are written down."""

    def __init__(self, function):
        self.function, self.results = function, []

    def __call__(self, *args):
        self.results.append(self.function(*args))
        return self.results[-1]


def pose_clips(meta, call, size):
    """Per clip a function that gives its pose frames (3, P, height, width), or None: sampled at 16 fps, missing frames black."""
    n, clips = call["infer_frames"], call["num_repeat"]
    if not call["pose_video"]:
        return [None] * clips
    source, fps = value(meta, "pose_video"), float(re.search(r"at ([\d.]+) fps", " ".join(meta["notes"]))[1])
    frames = [fit_frame(source[i], size, official=True) for i in pose_indices(len(source), fps, n * clips)]
    frames += [-torch.ones(3, *size)] * (n * clips - len(frames))
    return [partial(torch.stack, frames[clip * n:(clip + 1) * n], dim=1) for clip in range(clips)]


def pipeline_s2v(meta, golden, run):
    """The whole clip loop: what the official generate() was given in place of its text encoder, audio encoder and noise."""
    call, coder, net = meta["calls"]["video"], network(meta["modules"]["vae"]), network(meta["modules"]["noise_model"])
    net.cfg = dataclasses.replace(net.cfg, motion_frames=call["motion_frames"])
    net = run(net)
    velocity = Watched(net)
    velocity.prepare = net.prepare
    coder.encode, decode_stream, decoded = Watched(coder.encode), coder.decode_stream, []
    coder.decode_stream = lambda parts: decoded.append(parts) or decode_stream(parts)                # what goes into each decode: lead, latents
    reference, clips, steps = Image.fromarray(value(meta, "ref_image")), call["num_repeat"], call["sampling_steps"]
    size = s2v_size(reference.height, reference.width, call["max_area"])
    config = RunConfig(steps=steps, shift=call["shift"], guidance=(call["guide_scale"],), solver=call["sample_solver"],
                       clip_frames=call["infer_frames"], start_from_ref=call["init_first_frame"])
    noise = [partial(lambda name: value(meta, name)[None], f"noise_{clip}") for clip in range(clips)]
    inputs = ClipInputs(value(meta, "context")[None], value(meta, "context_null")[None],
                        lambda first, end: value(meta, "audio_emb")[0, ..., first:end],
                        fit_picture(reference, size, official=True)[None, :, None], noise, pose_clips(meta, call, size), call["motion_frames"])
    experts = Experts(["denoiser"], None, lambda name: velocity)
    frames = list(make_clips(inputs, coder, experts, config, Stages(), lambda clip, steps: steps))
    guided, encoded = 2 if call["guide_scale"] > 1 else 1, iter(coder.encode.results)
    ours = {"video": torch.cat(frames, dim=2).half(), "ref_latents": next(encoded), "v_cond_first": velocity.results[0]}
    if "motion_latents_init" in golden:                              # without a picture at its end it is encoded here alone: no one uses it
        grey = torch.zeros(1, 3, call["motion_frames"], *size)
        ours["motion_latents_init"] = next(encoded) if config.start_from_ref else network(meta["modules"]["vae"]).encode(grey)
    if guided == 2:
        ours["v_null_first"] = velocity.results[1]
    for clip in range(clips):
        ours |= {f"latents_{clip}": decoded[clip][1], f"v_cond_clip{clip}": velocity.results[clip * steps * guided]}
        if call["pose_video"]:
            ours[f"cond_{clip}"] = next(encoded)[:, :, 1:]
        if clip + 1 < clips:
            ours[f"motion_latents_after_{clip}"] = next(encoded)
    for name, theirs in golden.items():
        yield name, ours[name][0], theirs, FLOAT16 if name == "video" else TOLERANCE


def live(meta, golden, run):
    from tests import parity_live                                    # here, as it needs this file
    yield from parity_live.case(meta, golden, run)


def expert_tables(meta):
    for name, table in meta["tables"].items():
        shift, steps, solver = re.fullmatch(r".*shift([\d.]+)_steps(\d+)_(.+)", name).groups()
        timesteps = make_solver(solver, int(steps), float(shift)).timesteps.tolist()
        index = [expert_index(t, table["boundary"]) for t in timesteps]
        guidance = [expert_guidance(table["guide_scale_config"], i) for i in index]
        yield f"{name} timesteps", timesteps, table["timesteps"], 0
        yield f"{name} experts", index, [("high", "low").index(expert) for expert in table["expert"]], 0
        yield f"{name} guidance", guidance, table["guide_scale"], 0


def run_video(meta, call, run, noise, modules, image=None, clean=None):
    """T2V, I2V or TI2V from given text and noise -> guided velocities and latents of every step."""
    nets = [run(network(meta["modules"][name])) for name in modules]
    branches = [dict(shape=noise.shape[2:], text=value(meta, name)[None], image=image, clean_frames=0 if clean is None else 1)
                for name in ("context", "context_null")]
    names = ["denoiser_high", "denoiser_low"][:len(nets)]
    experts = Experts(names, call.get("boundary"), lambda name: nets[names.index(name)])
    solver, seen = make_solver(call["sample_solver"], call["sampling_steps"], call["shift"]), SimpleNamespace(velocities=[], latents=[])
    step = solver.step

    def watched(velocity, i, latents):
        seen.velocities.append(velocity)
        seen.latents.append(step(velocity, i, latents))
        return seen.latents[-1]
    solver.step = watched
    scale = call["guide_scale"]
    seen.final = denoise(experts.begin(*branches, tuple(scale) if isinstance(scale, list) else (scale,)), solver, noise, clean)
    return seen


def moe_switch(meta, golden, run):
    yield from expert_tables(meta)
    seen = run_video(meta, meta["calls"]["t2v_final"], run, value(meta, "noise")[None],
                     ("high_noise_model", "low_noise_model"))
    for name, ours in (("t2v_final", seen.final), ("t2v_x_after_step0", seen.latents[0]), ("t2v_v_step0", seen.velocities[0]),
                       ("t2v_v_last", seen.velocities[-1])):
        yield name, ours[0], golden[name], TOLERANCE


def pipeline_i2v(meta, golden, run):
    call, coder, picture = meta["calls"]["final_latents"], network(meta["modules"]["vae"]), Image.fromarray(value(meta, "img"))
    size = i2v_size(picture.height, picture.width, call["max_area"])
    image = image_condition(coder, fit_i2v(picture, size)[None, :, None], call["frame_num"])
    seen = run_video(meta, call, run, value(meta, "noise")[None], ("high_noise_model", "low_noise_model"), image)
    head = golden["video_head"]
    for name, ours in (("y", image), ("v_step0", seen.velocities[0]), ("final_latents", seen.final)):
        yield name, ours[0], golden[name], TOLERANCE
    yield "video_head", coder.decode(seen.final)[0, :, :head.shape[1]].half(), head, FLOAT16


def pipeline_ti2v(meta, golden, run):
    coder, picture = network(meta["modules"]["vae"]), Image.fromarray(value(meta, "img"))
    call = meta["calls"]["i2v_final_latents"]
    size = ti2v_size(picture.height, picture.width, call["max_area"])
    clean = coder.encode(fit_ti2v(picture, size)[None, :, None])
    seen = run_video(meta, call, run, value(meta, "noise_i2v")[None], ("model",), clean=clean)
    head = golden["i2v_video_head"]
    for name, ours in (("i2v_image_latent", clean), ("i2v_v_step0", seen.velocities[0]), ("i2v_final_latents", seen.final)):
        yield name, ours[0], golden[name], TOLERANCE
    yield "i2v_video_head", coder.decode(seen.final)[0, :, :head.shape[1]].half(), head, FLOAT16
    seen = run_video(meta, meta["calls"]["t2v_final_latents"], run, value(meta, "noise_t2v")[None], ("model",))
    for name, ours in (("t2v_v_step0", seen.velocities[0]), ("t2v_final_latents", seen.final)):
        yield name, ours[0], golden[name], TOLERANCE


# ------------------------------------------------------------------------------------------------------------------- the driver

CASES = {"dit_s2v": dit_s2v, "dit": dit, "vae": vae, "umt5": umt5, "wav2vec": wav2vec, "audio_bucket": audio_bucket, "solvers": solvers,
         "image_prep": image_prep, "pipeline_s2v": pipeline_s2v, "moe_switch": moe_switch, "pipeline_i2v": pipeline_i2v,
         "pipeline_ti2v": pipeline_ti2v, "live": live, "manifest_live": live,
         "manifest": manifest}                                       # a case is run by the first whose name it begins with


def run_case(path):
    """All rows of one case; an unknown case and an output that nothing was compared with are failures."""
    meta = json.loads(path.read_text(encoding="utf8"))
    name = meta.get("case", path.stem)
    case = next((CASES[prefix] for prefix in CASES if name.startswith(prefix)), None)
    if case is None:
        raise ValueError(f"{path}: unknown case {name!r}, known are those beginning with {', '.join(CASES)}")
    tensors = path.with_suffix(".safetensors")
    golden = load_file(tensors) if tensors.is_file() else {}
    with torch.inference_mode():
        rows = [compare(name, *row) for row in case(meta, golden, lambda net: net)]
        if name.startswith(("dit", "pipeline", "moe", "live_sink", "live_block")):           # once more, by fast/, with chunks of an odd length
            fast = [compare(name, *row) for row in case(meta, golden, lambda net: FastDenoiser(net, chunk=37))]
            rows = [row._replace(fast=other.relative, ok=row.ok and other.ok) for row, other in zip(rows, fast, strict=True)]
    seen = {row.output for row in rows}
    return rows + [Row(name, f"{output} (never compared)", np.inf, np.inf, np.inf, 0, False) for output in golden if output not in seen]


def case_files(folder):
    """The cases of a folder: every JSON but the summary of the manifests."""
    return sorted(path for path in Path(folder).glob("*.json") if path.name != "manifest_summary.json")


@pytest.mark.parametrize("path", case_files(GOLDEN), ids=lambda path: path.stem)
def test_golden(path, record_property):
    rows = run_case(path)
    for row in rows:
        record_property("parity", str(row))                          # conftest.py prints them
    assert rows and all(row.ok for row in rows)


def test_reference_cases_of_other_parameters_run(tmp_path):
    """Without guidance there is no negative branch; every clip has its own pose: each of these names is found, whatever its numbers are."""
    meta = json.loads((GOLDEN / "pipeline_s2v_pose.json").read_text())
    call, inputs = meta["calls"]["video"], meta["inputs"]
    call |= dict(guide_scale=1.0, num_repeat=2, sampling_steps=1, motion_frames=5)
    inputs["noise_1"] = dict(inputs["noise_0"], seed_string="another")
    *shape, frames = inputs["audio_emb"]["shape"]
    inputs["audio_emb"]["shape"] = [*shape, max(frames, 2 * call["infer_frames"])]
    names = ("ref_latents", "v_cond_first", "v_cond_clip1", "cond_0", "cond_1", "latents_1", "motion_latents_after_0", "video")
    (tmp_path / "pipeline_s2v_other.json").write_text(json.dumps(meta | dict(case="pipeline_s2v_other")))
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "pipeline_s2v_other.safetensors")
    assert [row.output for row in run_case(tmp_path / "pipeline_s2v_other.json")] == sorted(names)


def test_the_boundary_itself_belongs_to_the_high_noise_expert():
    assert [expert_index(t, 0.875) for t in (876, 875, 874)] == [0, 0, 1] and expert_index(900, 0.9) == 0 and expert_index(0, None) == 0


def test_a_short_motion_history_has_zeros_in_front():
    net = network(json.loads((GOLDEN / "dit_s2v_next.json").read_text())["modules"]["model"])
    latents = torch.randn(1, 16, 5, 8, 8)
    assert torch.equal(net.motion_tokens(latents), net.motion_tokens(torch.cat([torch.zeros(1, 16, 14, 8, 8), latents], dim=2)))


def test_the_norm_before_audio_attention_has_its_own_eps():
    """1e-5, as diffusers' AdaLayerNorm has it by default; seen only where activations are small, which no reference case has."""
    net = network(json.loads((GOLDEN / "dit_s2v_next.json").read_text())["modules"]["model"])
    inject, C = net.blocks[0].inject, net.cfg.dim
    audio, adain, x = torch.randn(2, 1, 3, 5, 4, C // 4), torch.randn(2, 1, 3, 1, C), 1e-3 * torch.randn(1, 3 * 6, C)
    frames = x.view(3, 6, C)
    normal = (frames - frames.mean(-1, keepdim=True)) / (frames.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    wanted = x + inject.o(attention(inject.query(normal * (1 + adain[1, 0]) + adain[0, 0]), *audio[:, 0])).view_as(x)
    row = compare("audio attention", "small activations", net.blocks[0].audio_cross_attention(x, audio, adain), wanted)
    print(row)
    assert row.ok


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--golden", type=Path, help="folder of reference outputs")
    p.add_argument("--only", default="", help="run the cases whose name contains this")
    p.add_argument("--weights", type=Path, help="checkpoint folder in the official layout")
    p.add_argument("--official", type=Path, help="checkout of the official repository")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = p.parse_args()
    if args.weights and args.official:
        from tests.parity_official import compare as compare_official
        rows = compare_official(args.weights, args.official, args.device, getattr(torch, args.dtype))
        print(*rows, sep="\n")
    elif args.golden:
        files = [path for path in case_files(args.golden) if args.only in path.stem]
        if not files:
            raise ValueError(f"{args.golden} has no case{' named ' + args.only if args.only else ''}: wanted NAME.json beside NAME.safetensors")
        rows = []
        for path in files:
            rows.append(run_case(path))
            print(*rows[-1], sep="\n", flush=True)
        rows = sum(rows, [])
    else:
        p.error("give --golden DIR, or --weights DIR with --official REPO")
    failed = [row for row in rows if not row.ok]
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
