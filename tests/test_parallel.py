"""Several processes make what one makes.  pytest tests/test_parallel.py; with RANKS=1 before it every pipeline on 2 and 4 ranks, tasks on 6 and 12"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from inputs import TINY, as_entries, as_stored, clip, empty, random_net
from kill_runs import quick
from ranks import as_torchrun, golden_rows, on_ranks
from test_model import SMALL, TASKS
from test_offload import CPU, streamed
from test_parts import end_at

import sample
from fast import bench, bench_ranks, blocks
from fast.attention8 import attention8
from fast.bench_ranks import Simulated
from fast.fp8 import quantized
from fast.offload import stream
from fast.padding import trim
from fast.parallel import ParallelDenoiser, Ranks, Run, choose_split, cut, sent_bytes
from fast.plan import MemoryPlan, RunConfig, plan_memory
from fast.plan_text import ranks_text
from fast.probe import GIB, Memory
from media.frames import read_frames
from media.sound import load_audio
from model import Config, Denoiser
from test_parity import GOLDEN
from tiny import random_weights
from vae import VAE, VAEConfig

PIPELINES = [path.stem for path in sorted(GOLDEN.glob("*.json")) if path.stem.startswith(("pipeline", "moe"))]
HERE, MORE = Path(__file__).parents[1], "RANKS" in os.environ
SPLITS = [(1, 3), (2, 2)]
TOLERANCE = 1e-5


def gap(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


# ---- whole pipelines, as the official code made them

@pytest.mark.parametrize("split, names", [(split, PIPELINES) for split in ((2, 1), (1, 2), (2, 2), (1, 4))] if MORE else [
    ((2, 2), ["moe_switch"]), ((1, 2), ["pipeline_s2v_pose"]), ((2, 1), ["pipeline_ti2v"])], ids=str)
def test_pipelines_of_the_official_code(split, names, tmp_path):
    """These networks have 4 heads: S2V with its later clip, start from reference and pose, two-expert T2V, I2V, TI2V with its clean frame."""
    for rows in on_ranks(split[0] * split[1], tmp_path, golden_rows, split, names):
        assert rows.keys() == set(names)
        for name in names:
            assert rows[name] and all(row.ok for row in rows[name]), "\n".join(map(str, rows[name]))


# ---- the denoiser

def nets():
    """A network of 12 heads for each task, with clips whose tokens no number of ranks divides -> [(name, net, latents, arguments of prepare)]"""
    for task in TASKS:
        torch.manual_seed(0)
        net = Denoiser(Config(**SMALL | dict(n_head=12), **TASKS[task])).eval().requires_grad_(False)
        for name, p in net.named_parameters():
            if name.endswith(("modulation", "mix")):
                torch.nn.init.normal_(p, std=0.3)
        cfg, g = net.cfg, torch.Generator().manual_seed(1)
        T, H, W = (3, 8, 8) if task == "s2v" else (5, 10, 6)
        def randn(*shape): return torch.randn(1, *shape, generator=g)
        given = dict(shape=(T, H, W), text=randn(5, cfg.text_dim))
        if task == "s2v":
            given |= dict(audio=randn(cfg.audio_states, cfg.audio_dim, 4 * T), ref=randn(cfg.out_dim, 1, H, W))
            cases = [dict(), dict(motion=randn(cfg.out_dim, 19, H, W), pose=randn(cfg.pose_dim, T, H, W))]
        elif task == "i2v":
            cases = [dict(image=randn(20, T, H, W))]
        else:
            cases = [dict(), dict(clean_frames=1)] if task == "ti2v" else [dict()]
        latents = randn(cfg.out_dim, T, H, W)
        for case in cases:
            yield f"{task} {', '.join(case)}", net, latents, given | case


@cache
def both_branches():
    """What one process makes of them -> {case: (net, latents, arguments of both branches, their velocities)}"""
    made, t = {}, torch.tensor([700.0])
    for name, net, latents, given in nets():
        other = given | dict(text=given["text"].flip(1)) | (dict(audio=0 * given["audio"]) if "audio" in given else {})
        made[name] = net, latents, (given, other), [net(latents, t, net.prepare(**case)) for case in (given, other)]
    return made


def velocities(rank, split, cases):
    """-> {case: gaps of both branches to one process}"""
    ranks, gaps, t = Ranks(rank, split), {}, torch.tensor([700.0])
    for name, (net, latents, arguments, want) in cases.items():
        shared = ParallelDenoiser(net, ranks=ranks, chunk=13)
        run, uncond = (shared.prepare(**given) for given in arguments)
        got = [*shared.both(latents, t, run, uncond), shared(latents, t, run)]                       # the last: without guidance
        gaps[name] = [gap(*pair) for pair in zip(got, [*want, want[0]], strict=True)]
    return gaps


@pytest.mark.parametrize("split", SPLITS + [(2, 1), (1, 2), (1, 4), (2, 3), (1, 6), (1, 12)] * MORE, ids=str)
def test_the_velocity_of_every_task(split, tmp_path):
    for found in on_ranks(split[0] * split[1], tmp_path, velocities, split, both_branches()):
        print(found)
        assert len(found) == 6 and all(each < TOLERANCE for gaps in found.values() for each in gaps), found


def all_at_once(rank, split, tensors, wanted):
    """-> gaps to one process: float8 and streamed; and 8-bit attention, with text keys on the host"""
    gaps, ranks = [], Ranks(rank, split)
    for attend, how, want in ((blocks.attend, {}, wanted[0]), (attention8, dict(host_layers=True), wanted[1])):
        shared = ParallelDenoiser(streamed(empty(TINY, tensors), tensors, 2), 11, attend, MORE, ranks=ranks, **how)
        latents, t, runs = clip(shared, TINY)
        gaps.append(max(gap(v, one) for v, one in zip(shared.both(latents, t, *runs), want, strict=True)))
    return gaps


def test_float8_streamed_in_8_bit_attention_on_every_rank(tmp_path):
    """Each head's numbers are those of one process, whoever computes it; with RANKS compiled too."""
    tensors, wanted = quantized(as_entries(random_net(TINY).state_dict())), []
    for attend in (blocks.attend, attention8):
        one = blocks.FastDenoiser(stream(empty(TINY, tensors), tensors, CPU, as_stored), attend=attend)
        latents, t, conds = clip(one, TINY)
        wanted.append([one(latents, t, cond) for cond in conds])
    for exact, eight in on_ranks(4, tmp_path, all_at_once, (2, 2), tensors, wanted):
        print(exact, eight)
        assert exact < TOLERANCE and eight < 1e-3                    # a difference of 1e-7 may round to another of 255 steps


def test_runs_cover_every_token_once():
    """In order, none longer than another by more than one; and the frames of a run hold its video tokens."""
    for name, net, latents, given in nets():
        cond = net.prepare(**given)
        N, hw = sum(n for n, _ in cond.segments), cond.grid[1] * cond.grid[2]
        for runs in (1, 2, 3, 5, 7, 12, N):
            parts = [cut(cond, i, runs) for i in range(runs)]
            assert cut(trim(cond, given["text"].shape[1]), 0, runs).cond.pads == net.cfg.text_len - given["text"].shape[1]
            assert torch.equal(torch.cat([part.cond.rope for part in parts], dim=1), cond.rope) and sum(parts[0].lengths) == N
            assert max(parts[0].lengths) - min(parts[0].lengths) <= 1 and sum(parts[0].video) == cond.grid[0] * hw
            rows = [row for part in parts for n, row in part.cond.segments for _ in range(n)]
            assert rows == [row for n, row in cond.segments for _ in range(n)], name
            x = [net.embed(latents[:, :, part.frames], part.cond)[:, part.skip:part.skip + n] for part, n in zip(parts, parts[0].lengths)]
            assert gap(torch.cat(x, dim=1), net.embed(latents, cond)) < 1e-6


@pytest.mark.parametrize("ranks, mode, heads, guidance, split", [
    (2, "auto", 40, (4.5,), (2, 1)), (4, "auto", 40, (4.5,), (2, 2)), (8, "sequence", 40, (4.5,), (1, 8)), (5, "auto", 40, (4.5,), (1, 5)),
    (4, "auto", 40, (1.0,), (1, 4)), (4, "auto", 40, (1.0, 4.0), (1, 4)), (16, "auto", 40, (4.5,), (2, 8)), (8, "auto", 24, (5.0,), (2, 4))])
def test_how_ranks_are_split(ranks, mode, heads, guidance, split):
    assert choose_split(ranks, mode, heads, guidance) == split


@pytest.mark.parametrize("B", [1, 2])
def test_what_comes_for_attention_lies_item_by_item(B):
    """As kernels want it; of one item nothing is copied."""
    ranks, came = Ranks.__new__(Ranks), []
    ranks.runs, ranks.team, ranks.exchange = 2, None, lambda x, *lengths: came.append(x.contiguous()) or came[0]
    y = ranks.to_heads(torch.randn(B, 3, 4, 8), [3, 3])
    assert y.shape == (B, 6, 2, 8) and y.is_contiguous() and (y.data_ptr() == came[0].data_ptr()) is (B == 1)


def test_ranks_that_do_not_divide_the_heads():
    with pytest.raises(ValueError, match="3 ranks do not divide the 40 heads of this network: start 1, 2, 4, 5, 8, 10, 16, 20, 40, 80 of them"):
        choose_split(3, "auto", 40, (4.5,))
    with pytest.raises(ValueError, match="start 1, 2, 4, 5, 8, 10, 20, 40 of them"):
        choose_split(16, "sequence", 40, (4.5,))
    with pytest.raises(ValueError, match="3 ranks do not divide the 40 heads of this network in two halves: start 2, 4, 8, 10, 16, 20, 40, 80 of them"):
        choose_split(3, "guidance", 40, (4.5,))
    with pytest.raises(ValueError, match="--parallel guidance wants a guidance above 1, got 1: leave it out"):
        choose_split(2, "guidance", 40, (1.0,))


# ---- the plan, the bench

class Wrong(Ranks):
    def to_heads(self, x, lengths):
        return super().to_heads(x.flip(1), lengths)


def apart(rank, kind):
    """What `fast.bench --ranks N --stage error` says of a tiny network."""
    args, configs = bench.parser().parse_args([]), random_weights.tiny("s2v-14B")
    net = bench_ranks.network(args, configs, CPU, torch.float32, MemoryPlan())
    return bench_ranks.equality(args, configs, net, CPU, torch.float32, (2, 8, 8), MemoryPlan(), kind(rank, (1, 2)))


def test_the_bench_says_how_far_ranks_are_from_one(tmp_path):
    for kind, least, most in ((Ranks, 0, TOLERANCE), (Wrong, 1e-3, 10)):
        (folder := tmp_path / kind.__name__).mkdir()
        for found in on_ranks(2, folder, apart, kind):
            assert least <= found["ranks"] < most and 1e-8 < found["other_order"] < TOLERANCE, found


def test_bytes_sent_are_those_counted():
    """The arithmetic of the plan, and what a rank hands to the exchange; of bench_ranks.py's simulation, which is what it runs on one GPU."""
    _, net, latents, given = next(nets())                            # T2V: 75 tokens
    for split in ((1, 3), (2, 3)):
        ranks = Simulated(split)
        shared = ParallelDenoiser(net, ranks=ranks)
        conds = shared.prepare(**given), shared.prepare(**given)
        u, v = shared.both(latents, torch.tensor([700.0]), *conds)
        assert u.shape == v.shape == latents.shape and torch.isfinite(u).all()
        forwards, velocity = 3 - split[0], latents.nbytes * (split[0] - 1)
        assert sum(nbytes for nbytes, *_ in ranks.log) == forwards * sent_bytes(net.cfg, split, 75, 75, 4) + velocity


def test_the_plan_knows_the_ranks():
    """S2V-14B at 1280x704 on cards of 80 GiB: all blocks resident on each, less memory the more there are, and a line that says who does what."""
    configs = random_weights.released("s2v-14B")
    dtypes = {kind: torch.float32 if kind in ("vae", "audio") else torch.bfloat16 for kind in configs}
    checkpoint = random_weights.random_checkpoint("s2v-14B", configs, dtypes, Path("tokenizer.json"))
    free, shape, tokens = Memory(80 * GIB, 500 * GIB, 500 * GIB), (20, 88, 160), 79200
    config = RunConfig(device=torch.device("cuda"), dtype=torch.bfloat16, vae_dtype=torch.float16, compile=True)
    plans = [plan_memory(replace(config, split=split), checkpoint, shape, tokens, free) for split in ((1, 1), (2, 1), (2, 2), (2, 4))]
    print([f"{plan.denoiser / GIB:.1f} GiB, {plan.tiles} tiles" for plan in plans])
    assert all(a.denoiser > b.denoiser and b.resident is None for a, b in pairwise(plans)) and plans[0].weights == plans[3].weights
    assert [plan.tiles % n for plan, n in zip(plans, (1, 2, 4, 8))] == [0] * 4
    plan = SimpleNamespace(config=replace(config, split=(2, 4)), denoiser=configs["denoiser"], tokens=(72160, tokens), video_tokens=70400,
                           latent_shape=shape)
    assert ranks_text(plan) == ("ranks    8: 2 branches of guidance x 4 runs of 19,800 tokens, 10 of 40 heads each; each sends 24.34 GB a forward, "
                                "18 MB a step; memory below is of each")


# ---- the VAE

def coded(rank, split):
    """-> gaps of encoding and decoding to one process"""
    torch.manual_seed(0)
    vae, gaps = VAE(replace(VAEConfig(), dim=8, dec_dim=8)), []
    video, z = torch.rand(1, 3, 5, 72, 88) * 2 - 1, torch.randn(1, 16, 2, 9, 11)
    want = vae.encode(video), vae.decode(z)
    vae.ranks = Ranks(rank, split)
    for tiles in (1, 5):
        vae.tiles = tiles
        gaps += [gap(got, one) for got, one in zip((vae.encode(video), vae.decode(z)), want)]
    return gaps


@pytest.mark.parametrize("split", [(1, 3)] + [(2, 2), (2, 3)] * MORE, ids=str)
def test_tiles_of_the_vae(split, tmp_path):
    for gaps in on_ranks(split[0] * split[1], tmp_path, coded, split):
        print(gaps)
        assert max(gaps) < TOLERANCE


# ---- the program

TWO = ["--audio", "samples/voice.flac", "--image", "samples/face.png", "--size", "64x64", "--clip-frames", "4", "--steps", "2", "--save-every", "1",
       *quick()]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder where one process was stopped after the first clip and a step of the second; that of alone.mp4, where it then went on."""
    broken, whole = tmp_path_factory.mktemp("broken"), tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(HERE)
        patched.setattr(sample.Progress, "__call__", lambda self, clip, steps: end_at(1, 1)(clip, steps))
        assert sample.cli([*TWO, "--clips", "2", "--out", str(broken / "a.mp4")]) == 130
    shutil.copytree(broken, whole, dirs_exist_ok=True)
    assert sample.cli([*TWO, "--clips", "2", "--out", str(whole / "a.mp4")]) == 0 and not torch.distributed.is_initialized()
    return broken, whole


def pixels(path):
    return np.stack(list(read_frames(str(path)))).astype(int)


def test_two_ranks_go_on_where_one_process_was_stopped(stopped, tmp_path):
    """In the midst of a later clip, as one process goes on, which does not touch torch.distributed."""
    broken, whole = stopped
    shutil.copytree(broken, tmp_path, dirs_exist_ok=True)
    assert not as_torchrun(2, tmp_path, [*TWO, "--clips", "2", "--out", str(tmp_path / "a.mp4")]), (tmp_path / "errors").read_text()
    said = (tmp_path / "said").read_text()
    assert said.count("video  ") == said.count("wrote  ") == 1 and "ranks    2: 2 branches of guidance" in said
    assert "going on after clip 1 of 2, step 1 of 2" in said, said
    one, two = pixels(whole / "a.mp4"), pixels(tmp_path / "a.mp4")
    assert one.shape == two.shape == (5, 64, 64, 3) and abs(one - two).max() <= 4              # one rounded otherwise in 8 bits moves its neighbours
    assert torch.equal(load_audio(str(whole / "a.mp4")), load_audio(str(tmp_path / "a.mp4")))


def torchrun(folder, ranks, *args):
    """A running torchrun of sample.py, what it prints in folder/said and folder/errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "sample.py", *args]
    with open(folder / "said", "w") as said, open(folder / "errors", "w") as errors:
        return subprocess.Popen(command, cwd=HERE, stdout=said, stderr=errors, env=os.environ | dict(OMP_NUM_THREADS="1"))


def processes(parent):
    """{number of the rank: process} of what torchrun has started"""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found[int(re.search(r"\0RANK=(\d+)\0", (folder / "environ").read_text())[1])] = int(folder.name)
        except (OSError, TypeError):                                 # gone, or not begun
            pass
    return found


def test_a_rank_that_is_killed_ends_all(stopped, tmp_path):
    """With status not 0, one line that names it, no process left, and the clips that were finished, which are those of one process."""
    running = torchrun(tmp_path, 2, *TWO, "--out", str(tmp_path / "out.mp4"))
    try:
        begin = time.monotonic()
        while "clip 2/" not in (tmp_path / "errors").read_text() and time.monotonic() < begin + 200:
            time.sleep(0.1)
        ranks = processes(running.pid)
        os.kill(ranks[1], signal.SIGKILL)
        assert running.wait(60) != 0
    finally:
        running.kill()
    errors = (tmp_path / "errors").read_text()
    lines = [line for line in re.split("[\r\n]", errors) if line.startswith("error")]
    assert len(lines) == 1 and lines[0].startswith(f"error: rank 1: process {ranks[1]} on "), errors
    assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    kept, one = pixels(tmp_path / "out.partial.mp4")[:5], pixels(stopped[1] / "a.mp4")
    assert len(kept) in (1, 5) and abs(kept - one[:len(kept)]).max() <= 4


@pytest.mark.parametrize("args, says", [
    (("--parallel", "sequence"), "--parallel sequence wants several processes: torchrun --nproc-per-node 4 sample.py ..."),
    (("--parallel", "alone"), "argument --parallel: invalid choice")])
def test_parallel_without_torchrun(args, says, capsys):
    assert sample.cli(list(args)) == 2 and says in capsys.readouterr().err


def least(rank, split):
    ranks, found = Ranks(rank, split), []
    for local in (2, 1):
        os.environ |= dict(LOCAL_WORLD_SIZE=str(local), WORLD_SIZE="2")
        found.append(tuple(ranks.least(Memory(100 - rank, 50 + rank, 61 + rank))))
    return found


def test_all_plan_with_what_the_least_has(tmp_path):
    """Of the host a share, as many as there are ranks on it."""
    assert on_ranks(2, tmp_path, least, (1, 2)) == [[(99, 25, 30), (99, 50, 61)]] * 2


def test_a_clip_of_fewer_tokens_than_ranks_is_refused():
    with pytest.raises(ValueError, match="3 ranks cannot share 2 tokens: start fewer"):
        cut(SimpleNamespace(grid=(1, 1, 1), segments=[(2, 0)]), 0, 3)


@dataclass
class LayersAlone:
    layers: tuple = ()


@pytest.mark.parametrize("host", [False, True])
def test_a_branch_is_prepared_once_and_its_text_keys_wait_where_the_plan_says(monkeypatch, host):
    prepared = []
    shared = ParallelDenoiser(random_net(TINY), host_layers=host, ranks=SimpleNamespace(index=0, runs=1))
    monkeypatch.setattr(shared.fast, "prepare", lambda **given: prepared.append(given))
    monkeypatch.setattr("fast.parallel.cut", lambda *_: Run(LayersAlone(), None, 0, (), (), None))
    monkeypatch.setattr("fast.parallel.offload.HostLayers", lambda layers: "on the host")
    branch = shared.prepare()
    assert branch() is branch() and prepared == [{}] and branch().cond.layers == ("on the host" if host else ())
