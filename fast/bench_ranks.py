"""`fast.bench --ranks N`: a step and the VAE measured on N ranks. `fast.bench --simulate 2,4,8`: what N GPUs may be expected to take, from this one.

The simulation runs on this GPU what one rank of N computes, measured: its run of tokens through all that works token by token, its share of the
heads over all tokens, its tile of the VAE; it is the rank with most to do: the first, all of whose tokens hear, and for the VAE the second, whose
tile has neighbours on both sides. What would come from others is made of its own rows. Added is the time of the exchange: bytes that the rank
sends over the bandwidth of its link, and LATENCY for each call.
"""
import os
import subprocess
import sys

import torch
import torch.distributed as dist

from fast import attention8, bench, blocks
from fast.parallel import ParallelDenoiser, Ranks, choose_split
from fast.probe import memory_used
from formats.checkpoints import materialise
from wan_s2v import decode_frames

LATENCY = 30e-6              # seconds of a call of NCCL, with its launch
GUIDANCE = (4.5,)            # any above 1: two branches


class Simulated(Ranks):
    """A rank of a split without the others. `log`: of each exchange its bytes, how many share it, and the group: "team", "pair" or None for all."""

    def __init__(self, split, rank=0):
        super().__init__(rank, split, connect=False)
        self.team, self.pair, self.log = "team", "pair", []

    def exchange(self, x, send, receive, group=None):
        self.log.append((x[0].nbytes * sum(send[1:]), len(send), group))
        return x[torch.arange(sum(receive), device=x.device) % len(x)]

    def join(self, x, lengths, axis):
        return self.gather(x.movedim(axis, 0).contiguous(), lengths).movedim(0, axis)


def launch(args, argv, program="fast.bench"):
    """The same command by N processes -> exit status"""
    rest = [word for i, word in enumerate(argv) if word != "--ranks" and (i == 0 or argv[i - 1] != "--ranks") and not word.startswith("--ranks=")]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    return subprocess.run([*start, "-m", program, *rest]).returncode


def connect(heads, device, parallel):
    """The Ranks of a process that torchrun has started."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), choose_split(dist.get_world_size(), parallel, heads, GUIDANCE))


def network(args, configs, device, dtype, memory):
    cfg = configs["denoiser"]
    return materialise("denoiser", cfg, bench.random_entries("denoiser", cfg, device, dtype), device, dtype, args.fp8, memory.resident)


def step(args, net, cfg, device, dtype, shape, memory, ranks, attend=None):
    """-> function that computes both branches of a step, of a clip whose numbers are random and the same on every rank"""
    attend = attend or (attention8.attention8 if args.attention8 else blocks.attend)
    how = args.chunk or memory.chunk, attend, args.compile, memory.host_layers
    fast = ParallelDenoiser(net, *how, ranks=ranks) if ranks else blocks.FastDenoiser(net, *how)
    torch.manual_seed(0)

    def random(*size):
        return torch.randn(size, device=device, dtype=dtype)
    given = bench.clip_arguments(cfg, shape, random)
    conds = [fast.prepare(shape=shape, **given | dict(text=text)) for text in (given["text"], random(*given["text"].shape))]
    latents, t = random(1, cfg.out_dim, *shape), torch.full((1,), 500, device=device)
    return lambda: fast.both(latents, t, *conds) if ranks else [fast(latents, t, cond) for cond in conds]


def vae_runs(args, configs, vae, device, shape, memory, ranks):
    """-> functions that decode a clip, and encode its last frames"""
    vae.ranks, vae.tiles, s2v, (T, H, W), (st, sh, sw) = ranks, args.tiles or memory.tiles, bool(configs["denoiser"].audio_dim), shape, vae.stride
    z = torch.randn(1, vae.config.z_dim, T + 19 if s2v else T, H, W, device=device)
    video = torch.rand(1, 3, 73 if s2v else 1, H * sh, W * sw) * 2 - 1
    return lambda: decode_frames(vae, [z], st * T if s2v else 1 + st * (T - 1)), lambda: vae.encode(video)


def measured(args, configs, device, dtype, shape, memory):
    """On all ranks -> what rank 0 reports"""
    ranks, net = connect(configs["denoiser"].n_head, device, args.parallel), network(args, configs, device, dtype, memory)
    found = (equality if args.stage == "error" else timed)(args, configs, net, device, dtype, shape, memory, ranks)
    dist.destroy_process_group()
    return dict(split=ranks.split, **found)


def timed(args, configs, net, device, dtype, shape, memory, ranks):
    both = step(args, net, configs["denoiser"], device, dtype, shape, memory, ranks)
    times = [bench.seconds(both, device, args.repeats)[0]]
    if args.profile:
        bench.profile(both)
    vae = bench.random_network("vae", configs, device, bench.DTYPES[args.vae_dtype])
    times += [bench.seconds(run, device, args.repeats)[0] for run in vae_runs(args, configs, vae, device, shape, memory, ranks)]
    gpu, _ = memory_used(device)
    print(f"ranks      {ranks.size} = {ranks.halves} x {ranks.runs}: step with guidance {times[0]:.3f} s, decode {times[1]:.2f} s, encode "
          f"{times[2]:.2f} s, peak {gpu:.1f} GiB reserved on each")
    return dict(s_per_step=times[0], s_decode=times[1], s_encode=times[2], peak_gpu_gib=gpu)


def equality(args, configs, net, device, dtype, shape, memory, ranks):
    """How far a step by all ranks is from one by this rank alone; and, to compare, that from one whose attention sums its keys in the other order."""
    def velocities(ranks, attend=None):
        return torch.stack(list(step(args, net, configs["denoiser"], device, dtype, shape, memory, ranks, attend)())).double()
    alone = velocities(None)
    together, turned = velocities(ranks), velocities(None, lambda q, k, v, layer: blocks.attend(q, k.flip(1), v.flip(1), layer))
    gaps = [float((x - alone).norm() / alone.norm()) for x in (together, turned)]
    print(f"error      of {ranks.size} = {ranks.halves} x {ranks.runs} ranks against one: {gaps[0]:.3e}; of one that sums keys in the other order: "
          f"{gaps[1]:.3e}; ratio {gaps[0] / max(gaps[1], 1e-30):.2f}")
    return dict(ranks=gaps[0], other_order=gaps[1])


def sending(log, args, ranks):
    """Seconds of exchanges: of every rank's partners those on its own machine are reached by the link, the others by the network."""
    total = 0.0
    for nbytes, members, group in log:
        near = 1 if group == "pair" and ranks.size > args.per_machine else min(members, args.per_machine)    # then the halves are on two machines
        far = (members - near) / (members - 1)
        total += LATENCY + nbytes * (1 - far) / (args.link * 1e9) + nbytes * far / (args.network * 1e9)
    return total


def simulated(args, configs, device, dtype, shape, memory):
    """One rank of each number of ranks in turn, on this device -> what is reported"""
    cfg, rows = configs["denoiser"], []
    net, vae = network(args, configs, device, dtype, memory), bench.random_network("vae", configs, device, bench.DTYPES[args.vae_dtype])
    print(f"simulated  each rank computes as this one does, measured; exchanges wait for nothing and nothing overlaps with them; a rank sends "
          f"{args.link:g} GB/s to all others of its\n           machine together ({args.per_machine} GPUs), {args.network:g} GB/s to other machines, "
          f"{LATENCY * 1e6:.0f} us a call; a clip is {args.steps} steps with guidance, decoding and\n           encoding; loading, text, sound and "
          "writing the file are left out")
    for n in [1, *args.simulate]:
        split = choose_split(n, "auto", cfg.n_head, GUIDANCE) if n > 1 else (1, 1)
        first, second = (Simulated(split, rank) if n > 1 else None for rank in (0, 1))
        runs = [(step(args, net, cfg, device, dtype, shape, memory, first), first)]
        runs += [(run, second) for run in vae_runs(args, configs, vae, device, shape, memory, second)]
        compute, sent, send, gpu = [], [], [], 0.0
        for run, ranks in runs:
            log = ranks.log if ranks else []
            log.clear()
            run()                                                    # compiles, prepares; exchanges as any other
            sent.append(sum(nbytes for nbytes, *_ in log))
            send.append(sending(log, args, ranks) if ranks else 0.0)
            compute.append(bench.afresh(lambda: bench.seconds(run, device, args.repeats, warmup=0)[0], device))
            gpu = max(gpu, memory_used(device)[0])
        clip = sum(times * (a + b) for times, a, b in zip((args.steps, 1, 1), compute, send))
        rows.append(dict(ranks=n, split=split, s_compute=compute, bytes_sent=sent, s_exchange=send, s_clip=clip, peak_gpu_gib=gpu))
        one, whole = rows[0], compute[0] + send[0]
        print(f"           {n:3} = {split[0]} x {split[1]}: step {whole:.3f} s = compute {compute[0]:.3f} + exchange {send[0]:.3f} "
              f"({sent[0] / 1e9:.2f} GB), {one['s_compute'][0] / whole:.2f} times as fast; decode {compute[1] + send[1]:.2f} s, encode "
              f"{compute[2] + send[2]:.2f} s; clip {clip:.1f} s, {one['s_clip'] / clip:.2f} times; {gpu:.1f} GiB")
    return rows


def under_torchrun():
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def local_device(name):
    """The device of this process."""
    from fast.probe import pick_device
    return pick_device(name, int(os.environ["LOCAL_RANK"])) if name in ("auto", "cuda") else pick_device(name)
