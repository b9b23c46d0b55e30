"""The plan, which is arithmetic: its bytes against counted ones, what fits where at the released sizes, when it pays to compile. No GPU is needed."""
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast import blocks, fp8
from fast.plan import AUDIO, MemoryPlan, OVERHEAD, RunConfig, activation_bytes, make_plan, plan_memory, token_counts, weigh
from fast.probe import GIB, USABLE, Memory
from formats.checkpoints import Entry, open_checkpoint, parameter_dtype
from model import Config
from tests.inputs import clip, empty
from tiny import random_weights

SAMPLES = Path(__file__).parents[1] / "samples"
CUDA = torch.device("cuda")                                          # a name: nothing here asks whether it is there
BF16 = RunConfig(device=CUDA, dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
FP8 = replace(BF16, fp8=True)
EIGHT = replace(FP8, attention8=True)
SHAPES = {"s2v-14B": (20, 88, 160), "t2v-A14B": (21, 90, 160), "i2v-A14B": (21, 90, 160), "ti2v-5B": (31, 44, 80)}  # 1280x704 or 1280x720
TOKENS = {"s2v-14B": 79_200, "t2v-A14B": 75_600, "i2v-A14B": 75_600, "ti2v-5B": 27_280}


@cache
def released(task):
    """A published checkpoint of numbers that nobody reads."""
    dtypes = {"denoiser": torch.bfloat16, "text": torch.bfloat16, "vae": torch.float32, "audio": torch.float32}
    return random_weights.random_checkpoint(task, random_weights.released(task), dtypes, Path("tokenizer.json"))


def card(gib, host=64, total=64):
    """So many GiB of a device (None: a CPU) and of the host."""
    return Memory(None if gib is None else int(gib * GIB), int(host * GIB), int(total * GIB))


def fit(config, gib, task="s2v-14B", shape=None, samples=0, **host):
    shape = shape or SHAPES[task]
    return plan_memory(config, released(task), shape, token_counts(shape)[1] if task == "s2v-14B" else TOKENS[task], card(gib, **host),
                       samples)


# ------------------------------------------------------------------------------------------------ planned against counted bytes

class Live(TorchDispatchMode):
    """Counts the bytes of all storages alive among those that operations made."""

    def __init__(self, known):
        super().__init__()
        self.seen, self.bytes, self.peak = {x.untyped_storage()._cdata for x in known}, 0, 0

    def freed(self, key, nbytes):
        self.seen.discard(key)
        self.bytes -= nbytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out


@pytest.mark.parametrize("config, chunk", [(EIGHT, 16384), (FP8, 16384), (FP8, None), (BF16, 16384), (BF16, None)])
def test_activation_bytes_are_those_of_live_tensors(monkeypatch, config, chunk):
    """A forward of two full-size blocks, not compiled, on tensors without content."""
    def linear(self, x):
        fp8.quantize(x)
        return x.new_empty(*x.shape[:-1], len(self.weight), dtype=torch.bfloat16)

    def attend(q, k, v, layer):
        kept = v.to(fp8.E4M3)                                        # beside q, k, v for a while
        return q.flatten(2) if kept.shape else None
    monkeypatch.setattr(fp8.FP8Linear, "forward", linear)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    cfg = replace(Config(), n_layer=2, audio_layers=(0,))
    names = [name for name, _ in empty(cfg).named_parameters()]
    net = empty(cfg, [f"{name}_scale" for name in names if fp8.uses_fp8(name)] if config.fp8 else ()).requires_grad_(False)
    for name, p in net.named_parameters():
        p.data = p.data.to(parameter_dtype("denoiser", name, Entry(None, p.shape, p.dtype, None), torch.bfloat16))
    run = blocks.FastDenoiser(net, chunk, attend if config.attention8 else blocks.attend)
    with Live(net.parameters()) as live:
        latents, t, conds = clip(run, cfg, *SHAPES["s2v-14B"], device="meta")
        live.peak = 0
        run(latents, t, conds[0])
    planned = activation_bytes(config, cfg, TOKENS["s2v-14B"], MemoryPlan(chunk=chunk, fp8=config.fp8)) - OVERHEAD - AUDIO
    print(f"counted {live.peak / GIB:.2f} GiB, planned {planned / GIB:.2f} and {(OVERHEAD + AUDIO) / GIB:.2f} for what is not tensors")
    assert live.peak < 1.02 * planned < 1.3 * live.peak      # without a chunk given, the longest is the video's, not all tokens


@pytest.mark.parametrize("config", [BF16, FP8, RunConfig(dtype=torch.float32)])
def test_weight_bytes_are_those_of_the_loaded_network(tmp_path, config):
    configs = random_weights.tiny("s2v-14B")
    checkpoint = random_weights.random_checkpoint("s2v-14B", configs, dict.fromkeys(configs, torch.bfloat16), tmp_path, boundary=None)
    net = checkpoint.load("denoiser", "cpu", config.dtype, config.fp8)
    counted = sum(p.nbytes for p in net.parameters())
    on_device, pinned, n = weigh(checkpoint.parts["denoiser"], config)(None)
    assert pinned == 0 and n == configs["denoiser"].n_layer
    print(f"counted {counted:,} bytes, planned {on_device:,}")
    assert counted <= on_device <= 1.03 * counted                    # parameters begin at multiples of 256 bytes


# ------------------------------------------------------------------------------------------------------------- what fits where

def test_tokens():
    assert token_counts(SHAPES["s2v-14B"])[1] == TOKENS["s2v-14B"] and token_counts((20, 56, 104))[0] == 30_576


@pytest.mark.parametrize("gb, config, shape, resident", [
    (141, BF16, None, (40, 40)), (48, FP8, None, (40, 40)), (24, FP8, None, (30, 40)), (16, FP8, None, (10, 25)), (10, FP8, None, (0, 5)),
    (8, FP8, (20, 60, 104), (0, 10)), (8, FP8, None, (0, 2)), (8, EIGHT, None, (0, 2)), (24, BF16, (20, 60, 104), (10, 30))])
def test_choice_for_a_card(gb, config, shape, resident):
    chosen = fit(config, gb * USABLE, shape=shape)
    print(chosen)
    n = 40 if chosen.resident is None else chosen.resident
    assert chosen.peak <= gb * USABLE * GIB and resident[0] <= n <= resident[1]
    assert (chosen.streamed > 0) == (n < 40)
    assert (chosen.chunk is None) == (gb >= 48) and chosen.host_layers >= (n < 40)
    assert (chosen.text_resident == 0) == (gb < 16)


@pytest.mark.parametrize("task, smallest, whole", [("t2v-A14B", 8, 48), ("i2v-A14B", 8, 48), ("ti2v-5B", 8, 24)])
def test_the_family_fits(task, smallest, whole):
    """At their default sizes in float8: on the smallest card by streaming, on the larger one whole. One expert is there at a time.

    TI2V is streamed for its VAE alone: its tokens, 27,280, need no small chunks, which cost 5%."""
    small, large = fit(FP8, smallest * USABLE, task), fit(FP8, whole * USABLE, task)
    print(small, large, sep="\n")
    assert small.peak <= smallest * USABLE * GIB and large.resident is None and large.chunk is None and large.streamed == 0
    assert small.streamed > 0 and small.host_layers == (task != "ti2v-5B")
    assert large.weights == weigh(released(task).parts[released(task).experts[0]], FP8)(None)[0]


def test_number_of_resident_blocks_is_obeyed():
    chosen = fit(replace(FP8, resident=7), 60)
    assert (chosen.resident, chosen.blocks, chosen.chunk) == (7, 40, None) and chosen.streamed > 0


def test_a_cpu_holds_everything():
    """Both experts in float32; nothing is streamed, chunked or cut."""
    chosen = fit(RunConfig(dtype=torch.float32, vae_dtype=torch.float32), None, "t2v-A14B", host=200, total=200)
    assert chosen == MemoryPlan(blocks=40, denoiser=chosen.denoiser, weights=chosen.weights, host=chosen.host)
    assert chosen.host > 2 * chosen.weights > 100 * GIB


@pytest.mark.parametrize("config, gib, remedy", [
    (FP8, 6, "choose a smaller --size or fewer frames"), (EIGHT, 5, "choose a smaller --size or fewer frames"),
    (BF16, 2, "choose a smaller --size or fewer frames"), (replace(EIGHT, compile=True), 6.95, "leave out --attention8"),
    (BF16, 7.2, "add --fp8"), (replace(FP8, resident=40), 7.2, "leave out --resident")])
def test_what_cannot_fit_is_refused_with_what_would(config, gib, remedy):
    """The option named is one that was tried."""
    with pytest.raises(ValueError, match=f"GiB of device memory are wanted, .* are there: {remedy}$"):
        fit(config, gib)


def test_more_resident_blocks_than_there_are_are_refused():
    with pytest.raises(ValueError, match="blocks 0 to 40 can be resident, got 41"):
        fit(replace(EIGHT, resident=41), 141)


@pytest.mark.parametrize("config, gib, remedy", [(EIGHT, 7.2, "choose a smaller --size"), (BF16, 10, "add --fp8"),
                                                 (RunConfig(dtype=torch.float32, vae_dtype=torch.float32), None, "choose a smaller --size")])
def test_host_memory_is_planned(config, gib, remedy):
    """All blocks streamed: what is pinned, text keys, clips with their history, and PyTorch. An H200 machine had 22.0 GiB in use with 7.2 GiB
    and 8 bits. Refused where there is less in the whole machine."""
    chosen = fit(config, gib, total=200)
    if config is EIGHT:
        assert chosen.streamed + 6.5 * GIB < chosen.host < 23.5 * GIB
    with pytest.raises(ValueError, match=f"GiB of host memory are wanted, this machine has 16.0: {remedy}$"):
        fit(config, gib, total=16)


# ------------------------------------------------------------------------------------------------------------- what will be made

def plan(checkpoint, gib=141, host=64, **options):
    return make_plan(RunConfig(**dict(device=CUDA) | options), checkpoint, card(gib, host, 200))


GIVEN = dict(audio=str(SAMPLES / "voice.flac"), image=str(SAMPLES / "face.png"))


@pytest.mark.parametrize("task, options, made", [
    ("s2v-14B", GIVEN | dict(clips=1), (128, 128, 77, 16)),
    ("t2v-A14B", dict(prompt="a"), (720, 1280, 81, 16)), ("i2v-A14B", dict(image=GIVEN["image"]), (960, 960, 81, 16)),
    ("ti2v-5B", dict(prompt="a"), (704, 1280, 121, 24))])
def test_defaults_of_the_family(task, options, made):
    """Size, length and rate are the checkpoint's (S2V never enlarges a picture); bfloat16 and a float16 VAE are what a GPU gets."""
    got = plan(released(task), **options)
    assert (got.height, got.width, got.frames, got.fps) == made and got.clips == 1
    assert (got.config.dtype, got.config.vae_dtype, got.config.solver) == (torch.bfloat16, torch.float16, "unipc")
    assert got.tokens[0] == (got.video_tokens * 21 // 20 if task == "s2v-14B" else got.video_tokens)
    assert got.memory.peak < 141 * GIB and "all blocks resident" in str(got)


@pytest.mark.parametrize("seconds, clip_frames, made, official", [
    (5, None, (1, 80), 77), (10, None, (2, 160), 157), (60, None, (12, 960), 957), (5.01, None, (2, 157), 157), (4.5, None, (1, 77), 77),
    (1, 16, (1, 16), 13), (0.9, 16, (1, 15), 13)])
def test_nothing_heard_is_lost_at_the_end(tmp_path, seconds, clip_frames, made, official):
    """The frames last as long as the sound; the official count where it is asked for; what a user leaves out is left out."""
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, int(16000 * seconds)), 16000)
    options = GIVEN | dict(audio=str(tmp_path / "a.wav"), clip_frames=clip_frames)
    ours, theirs = plan(released("s2v-14B"), **options), plan(released("s2v-14B"), **options, official=True)
    assert (ours.clips, ours.frames) == made and ours.frames / 16 >= min(seconds, made[1] / 16)
    assert (theirs.clips, theirs.frames) == (made[0], official) and theirs.held == 0
    assert ours.held == made[1] - official and ("the last frame held" in str(ours)) == (ours.held > 0)
    if ours.held:
        assert f"the last {seconds - official / 16:.2f} s of the sound are left out" in str(theirs)
        assert plan(released("s2v-14B"), **options, frames=official).frames == official


@pytest.mark.parametrize("seconds, said", [
    (3, "1 clip of 80 frames -> 77 frames at 16 fps = 4.81 s; an mp4 ends with the sound, after 3.00 s"),
    (5, "-> 80 frames at 16 fps = 5.00 s, the last frame held for 0.19 s until the sound ends (the mouth has finished: it leads by 0.19 s)"),
    (6, "1 clip of 80 frames -> 77 frames at 16 fps = 4.81 s: the last 1.19 s of the sound are left out")])
def test_the_plan_says_which_of_sound_and_picture_is_longer(tmp_path, seconds, said):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 16000 * seconds), 16000)
    assert said in str(plan(released("s2v-14B"), **GIVEN | dict(audio=str(tmp_path / "a.wav"), clips=1)))


@pytest.mark.parametrize("size, side, large", [((256, 256), 128, 256), ((1280, 720), 512, 960), ((500, 300), 128, 384), ((160, 160), 128, None)])
def test_a_size_above_the_pictures_own_is_said_and_can_be_had(tmp_path, size, side, large):
    """And where the next multiples of 64 would be above the size, there is nothing to say."""
    Image.new("RGB", (side, side)).save(tmp_path / "square.png")
    options = GIVEN | dict(image=str(tmp_path / "square.png"), size=size, clips=1)
    own, enlarged = plan(released("s2v-14B"), **options), plan(released("s2v-14B"), **options, enlarge=True)
    assert (own.width, own.height) == (side, side)
    assert (enlarged.width, enlarged.height) == (large or side, large or side) and "--enlarge" not in str(enlarged)
    wanted = f"of {size[0]}x{size[1]} the picture fills only its own {side}x{side}: --enlarge makes {large}x{large} of it"
    assert (wanted in str(own)) == (large is not None) == ("--enlarge" in str(own))


@pytest.mark.parametrize("picture, said", [((1500, 100), "picture  1500x100, of which the middle 400x100 is seen"), ((300, 290), "")])
def test_a_picture_that_loses_much_at_its_sides_is_told_of(tmp_path, picture, said):
    """The official rule allows shapes of up to 4 to 1; --official fills up with bars."""
    Image.new("RGB", picture).save(tmp_path / "a.png")
    options = GIVEN | dict(image=str(tmp_path / "a.png"), size=(128, 128))
    made = str(plan(released("s2v-14B"), **options))
    assert said in made and bool(said) == ("is seen" in made)
    assert "is seen" not in str(plan(released("s2v-14B"), **options, official=True))


def test_the_plan_says_when_swapping_is_to_be_expected():
    for host, said in ((8, True), (64, False)):
        text = str(plan(released("t2v-A14B"), 10, host, prompt="a", fp8=True))
        assert ("expect swapping" in text) == said and f"of {host:.1f} GiB free" in text and "float8 matrices" in text


@pytest.mark.parametrize("options, compiled", [
    (dict(steps=40), True), (dict(steps=4), False), (dict(steps=4, compile=True), True), (dict(steps=40, compile=False), False),
    (dict(steps=40, device=torch.device("cpu")), False)])
def test_compiled_where_it_saves_more_than_it_takes(options, compiled):
    """T2V-A14B at 832x480, 81 frames: 80 forwards that are 0.5 s faster each pay for 17 s, 8 do not."""
    options = dict(prompt="a", size=(832, 480)) | options
    assert plan(released("t2v-A14B"), 141 if "device" not in options else None, 200, **options).config.compile is compiled


def test_the_tiny_checkpoint_is_never_compiled():
    tiny = open_checkpoint(random_weights.ensure_tiny(Path(__file__).parents[1] / "weights" / "tiny"))
    assert not plan(tiny, steps=1000, **GIVEN).config.compile
