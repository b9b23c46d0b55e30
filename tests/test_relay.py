"""A stream by many processes is that of one.  pytest tests/test_relay.py"""
import io
import json
import os
import re
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import parity_live
import pytest
import torch
import torch.distributed as dist
from ranks import as_torchrun, on_ranks
from safetensors.torch import load_file
from test_live import FACE, HERE, VOICE, begin, parts  # noqa: F401

import live
import sample
from fast.plan import RunConfig
from fast.relay import Line, Relay
from jobs import live as program
from jobs import live_plan, ranks
from test_parity import GOLDEN, compare
from tiny import random_weights


def relay(rank, parts, size, replace_ref, change=None):
    """What the last in line makes of five blocks, frames by frames; of the others the bytes of their rings."""
    line = Line(rank, size)
    if change:
        change(line)
    text, *latents = line.once(lambda: (parts.text, *live.still(parts.vae, parts.picture)))
    picture = live.prepare([parts.net] * len(line.steps(4)), parts.vae if line.last else None, text, None, latents)
    video, heard, greeted, take = Relay(picture, line, 4, 1, 6, replace_ref=replace_ref), [], [], line.take
    line.take = lambda like: greeted.append(rank) or take(like)
    video.greet()
    assert greeted == ([] if line.first else [rank]) and not line.sending

    def sound():
        for block, features in enumerate(parts.sound[:5]):
            video.samples.extend([2 * block, 2 * block + 1])
            yield features[0], 100 + block, 0.5 * block
    made = []
    for features, total, there in video.blocks(sound(), heard.append):
        assert (total, there) == (100 + len(made), 0.5 * len(made))
        made.append(video.latents(features[None]))
        if line.last:
            made[-1] = video.frames(made[-1])
    rings = sum(layer.nbytes for ring in video.stream.rings for layer in ring.layers)
    return dict(frames=made if line.last else None, heard=heard, rings=rings, steps=len(video.stream.rings))


@pytest.mark.parametrize("size, replace_ref", [(2, True), (4, False)])
def test_frames_are_those_of_one_process(parts, tmp_path, size, replace_ref):  # noqa: F811
    """Bit for bit, with a ring that wraps; each process has the rings of its own steps; the samples that were heard arrive, in order."""
    alone = begin(parts, 1, steps=4, replace_ref=replace_ref)
    wanted = [alone.block(sound) for sound in parts.sound[:5]]
    found = on_ranks(size, tmp_path, relay, parts, size, replace_ref)
    assert len(found[0]["frames"]) == 5 and all(torch.equal(a, b) for a, b in zip(wanted, found[0]["frames"]))
    assert found[0]["heard"] == list(range(10)) and all(other["frames"] is None and not other["heard"] for other in found[1:])
    one = sum(layer.nbytes for layer in alone.stream.rings[0].layers)
    assert [rank["steps"] for rank in found] == [4 // size] * size and all(r["rings"] == one * r["steps"] for r in found)


@pytest.mark.parametrize("blocks", (1, 2))
def test_a_reference_that_nobody_needs_is_taken(parts, tmp_path, blocks):  # noqa: F811
    """The sound ends before the ring, of two blocks, is full and passed: the first latent is on its way all the same."""
    few = SimpleNamespace(**vars(parts) | dict(sound=parts.sound[:blocks]))
    found = on_ranks(2, tmp_path, relay, few, 2, True, limit=40)
    assert len(found[0]["frames"]) == blocks


def test_a_rank_has_the_shift_that_was_asked_for(parts):  # noqa: F811
    sigmas, timesteps = live.schedule(4, 5.0)
    for rank, own in ((1, slice(0, 2)), (0, slice(2, 4))):
        stream = Relay(begin(parts).picture, Line(rank, 2), 4, shift=5.0).stream
        assert torch.equal(stream.timesteps, timesteps[own]) and torch.equal(stream.sigmas, sigmas[own.start:own.stop + 1])


def losing(line):
    """Of what the first in line sends, a greeting and then blocks, the fourth block is lost."""
    send, sent = line.send, []

    def some(note, *tensors):
        sent.append(note)
        if len(sent) != 5:
            send(note, *tensors)
    line.send = some if line.first else send


def test_a_block_that_is_lost_is_missed(parts, tmp_path):  # noqa: F811
    with pytest.raises(AssertionError, match="wanted the block of latent frame 9, got that of 12"):
        on_ranks(2, tmp_path, relay, parts, 2, False, losing)


def golden_rows(rank, size):
    path = GOLDEN / "live_tpp.json"
    meta = json.loads(path.read_text())
    with torch.inference_mode():
        golden = load_file(path.with_suffix(".safetensors"))
        return [compare("live_tpp", *row) for row in parity_live.pipeline_of_gpus(meta, golden, lambda net: net, Line(rank, size))]


def test_the_original_on_many_gpus(tmp_path):
    """Its own output, with a process for every step as it has them, at the tolerance of one process."""
    rows, *others = on_ranks(4, tmp_path, golden_rows, 4)
    assert not any(others) and {"latents", "video", "ref_latents_1"} <= {row.output for row in rows}
    assert all(row.ok for row in rows), "\n".join(map(str, rows))


def test_the_program_by_three(tmp_path, monkeypatch):
    """The same bytes as by one, from a file of sound; steps 2, 1 and 1; rank 0 alone speaks."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(program, "expected", lambda *_: 25.0)        # a probe of two seconds
    given = ["--live", "--image", FACE, "--audio", VOICE, "--size", "64x64", "--duration", "0.6", "--device", "cpu", "--replace-ref", "--window", "3"]
    assert sample.cli([*given, "--out", str(tmp_path / "one.mp4")]) == 0
    assert not as_torchrun(3, tmp_path, [*given, "--out", str(tmp_path / "three.mp4")]), (tmp_path / "errors").read_text()
    said = (tmp_path / "said").read_text()
    assert said.count("video  ") == said.count("wrote  ") == 1 and "ranks    3 in line, the last is rank 0, which decodes: 2, 1, 1 steps" in said
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "three.mp4").read_bytes()


@pytest.mark.parametrize("given, said", [
    (["--steps", "2"], "--live gives every process some of the 2 steps of a block, got 3 processes: start 2 or fewer"),
    (["--parallel", "sequence"], "--live gives every process some of the steps of a block: leave out --parallel sequence")])
def test_what_is_refused(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    assert as_torchrun(3, tmp_path, ["--live", "--image", FACE, "--audio", VOICE, "--device", "cpu", "--out", str(tmp_path / "a.mp4"), *given])
    lines = [line for line in re.split("[\r\n]", (tmp_path / "errors").read_text()) if line]
    assert len(lines) == 1 and re.fullmatch(rf"error: rank \d: {re.escape(said)}", lines[0]) and not (tmp_path / "a.mp4").exists(), lines


def test_the_plan_of_each_rank():
    """The released network at 704x384: a rank holds the weights, the rings of its steps; one has the VAE, one the encoder of a pipe."""
    half, sizes = torch.bfloat16, {}
    checkpoint = random_weights.random_checkpoint("s2v-14B", random_weights.released("s2v-14B"),
                                                  dict.fromkeys(("denoiser", "text", "vae", "audio"), half), Path("tokenizer.json"))
    config = RunConfig(device=torch.device("cuda"), dtype=half, vae_dtype=torch.float16, steps=4, shift=3.0, fp8=True, compile=True)
    plan = live_plan.LivePlan(config, 384, 704, 25, 12, False, None, float("inf"), {}, checkpoint.sizes(), None, True, 3)
    for size in (1, 3, 4):
        sizes[size] = [live_plan.memory_of(replace(plan, line=Line(rank, size)), checkpoint) for rank in range(size)]
    one, four = sizes[1][0], sizes[4]
    assert all(rank["rings"] == one["rings"] / 4 and rank["denoiser"] == one["denoiser"] for rank in four)
    assert [rank["rings"] * 4 / one["rings"] for rank in sizes[3]] == [1, 2, 1]
    assert four[0]["VAE"] > four[1]["VAE"] > 1e9 and four[2]["VAE"] == four[3]["VAE"] == 0 and abs(four[0]["VAE"] + four[1]["VAE"] - one["VAE"]) < 2


@pytest.mark.parametrize("here, failed, stops", [((0, 1), None, True), ((0,), None, False), ((0, 1), "1, thread 5, of rank 1: out of memory", False),
                                                 ((0, 1), "stopped", True)])
def test_ranks_that_are_told_to_end(here, failed, stops, monkeypatch):
    """By SIGTERM: all stop, unless one has failed or never came, which has to be named first."""
    world = ranks.World.__new__(ranks.World)
    world.rank, world.size, world.store, world.over, world.ending, world.done = 0, 2, dist.HashStore(), False, False, threading.Event()
    world.beats, world.speaking, world.stderr = {}, threading.Lock(), io.StringIO()
    for rank in here:
        world.store.set(f"who/{rank}", f"{socket.gethostname()} {os.getpid()}")
    if failed:
        world.store.set("failed", failed)
    monkeypatch.setattr(ranks, "BEAT", 0.01)
    monkeypatch.setattr(ranks, "INTERRUPT", 60.0)
    sent = []
    monkeypatch.setattr(ranks.signal, "pthread_kill", lambda thread, which: sent.append((thread, which)) or world.done.set())
    watch = threading.Thread(target=world.watch, daemon=True)
    world.told()
    watch.start()
    watch.join(2)
    assert watch.is_alive() != stops and sent == [(threading.main_thread().ident, signal.SIGINT)] * stops
    assert (world.store.check(["failed"]) and world.store.get("failed").decode()) == (failed or ("stopped" if stops else False))
    world.done.set()
    watch.join()


def test_a_rank_that_cannot_be_interrupted_ends(monkeypatch):
    """One that is stopped while it connects, in a call that no signal ends, which took 25 s."""
    world, ends = ranks.World.__new__(ranks.World), []
    world.rank, world.size, world.store, world.over, world.ending, world.done = 0, 1, dist.HashStore(), False, False, threading.Event()
    world.store.set("failed", "stopped")
    for where, name, stand_in in ((ranks, "BEAT", 0.01), (ranks.signal, "pthread_kill", lambda *_: None), (os, "_exit", ends.append),
                                  (ranks.stop, "working", False)):
        monkeypatch.setattr(where, name, stand_in)
    watch = threading.Thread(target=world.watch, daemon=True)
    watch.start()
    watch.join(2)
    assert ends == [130] and not watch.is_alive()
