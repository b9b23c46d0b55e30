"""The memory plan: its arithmetic against counted bytes, and what it chooses for the released S2V-14B on cards of several sizes."""
import dataclasses
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiny import random_weights as fake_checkpoint
from fast import fp8
import model
from fast.plan import GIB, OVERHEAD, USABLE, Machine, activation_bytes, fit, weigh
from wan_s2v import token_counts

CPU = torch.device("cpu")
BF16 = Machine(CPU, torch.bfloat16, vae_dtype=torch.bfloat16)
FP8 = dataclasses.replace(BF16, quantize=True)
EIGHT = dataclasses.replace(FP8, attention8=True)
SHAPE = (20, 88, 160)        # 80 frames of 1280x704
TOKENS = token_counts(SHAPE)[1]


@pytest.fixture(scope="module")
def released():
    """S2V-14B as a checkpoint of numbers that nobody reads."""
    dtypes = {"denoiser": torch.bfloat16, "text": torch.bfloat16, "vae": torch.float32, "audio": torch.float32}
    return fake_checkpoint.random_checkpoint("s2v-14B", fake_checkpoint.released("s2v-14B"), dtypes, Path("tokenizer.json"))


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


@pytest.mark.parametrize("quantize, eight_bit, span", [(True, True, 4096), (True, False, 4096), (True, False, None), (False, False, 8192),
                                                       (False, False, None)])
def test_activation_bytes_are_those_of_live_tensors(monkeypatch, quantize, eight_bit, span):
    """A forward of two full-size blocks, not compiled, on tensors without content."""
    def linear(self, x):
        fp8.quantize(x)
        return x.new_empty(*x.shape[:-1], len(self.weight), dtype=torch.bfloat16)

    def attend(q, k, v):
        kept = v.to(fp8.E4M3)                                        # beside q, k, v for a while
        return q.flatten(2) if kept.shape else None
    monkeypatch.setattr(fp8.FP8Linear, "forward", linear)
    monkeypatch.setattr(model, "attention", lambda q, k, v: torch.empty_like(q).flatten(2))
    monkeypatch.setattr(model.Block, "attend", staticmethod(attend if eight_bit else model.self_attention))
    cfg = dataclasses.replace(model.Config(), n_layer=2, audio_layers=(0,))
    with torch.device("meta"):
        net = model.Denoiser(cfg).requires_grad_(False)
        for name, p in list(net.named_parameters()):
            if quantize and fp8.uses_fp8(name):
                fp8.to_fp8(net, [name + "_scale"])
            else:
                p.data = p.data.to(net.storage_dtype(name, torch.bfloat16))
        sizes = (1, 40, 4096), (1, 25, 1024, 80), (1, 16, 1, 88, 160), (1, 16, 19, 88, 160)
        with torch.no_grad(), Live(net.parameters()) as live:
            conds = [net.prepare(SHAPE, *map(torch.empty, sizes), chunk=span) for _ in range(2)]
            live.peak = 0
            net.velocities(torch.empty(1, 16, *SHAPE), torch.empty(1), conds[:1])
    planned = activation_bytes(cfg, TOKENS, dataclasses.replace(BF16, quantize=quantize, attention8=eight_bit, one_loop=False, span=span))
    print(f"counted {live.peak / GIB:.2f} GiB, planned {(planned - OVERHEAD) / GIB:.2f} and {OVERHEAD / GIB:.2f} for what is not tensors")
    assert live.peak < 1.02 * (planned - OVERHEAD) < 1.3 * live.peak      # without a span given, the longest is the video's, not all tokens


def counted(net):
    return sum(p.numel() * p.element_size() for p in net.parameters())


@pytest.mark.parametrize("machine", [BF16, FP8, Machine(CPU, torch.float32)])
def test_weight_bytes_are_those_of_the_loaded_network(tmp_path, machine):
    configs = fake_checkpoint.tiny("s2v-14B")
    checkpoint = fake_checkpoint.random_checkpoint("s2v-14B", configs, dict.fromkeys(configs, torch.bfloat16), tmp_path, boundary=None)
    net = checkpoint.load("denoiser", "cpu", machine.dtype, machine.quantize)
    on_device, pinned, blocks = weigh(checkpoint.parts["denoiser"], machine)(None)
    assert pinned == 0 and blocks == configs["denoiser"].n_layer
    print(f"counted {counted(net):,} bytes, planned {on_device:,}")
    assert counted(net) <= on_device <= 1.03 * counted(net)          # parameters begin at multiples of 256 bytes


def test_tokens():
    assert TOKENS == 79_200 and token_counts((20, 56, 104))[0] == 30_576


@pytest.mark.parametrize("gb, machine, shape, resident", [
    (141, BF16, SHAPE, (40, 40)), (48, FP8, SHAPE, (40, 40)), (24, FP8, SHAPE, (30, 40)), (16, FP8, SHAPE, (10, 25)), (10, FP8, SHAPE, (0, 5)),
    (8, FP8, (20, 60, 104), (0, 10)), (8, FP8, SHAPE, (0, 2)), (8, EIGHT, SHAPE, (0, 2)), (24, BF16, (20, 60, 104), (10, 30))])
def test_choice_for_a_card(released, gb, machine, shape, resident):
    limit = gb * USABLE * GIB
    chosen = fit(released, shape, token_counts(shape)[1], machine, limit)
    print(chosen)
    assert chosen.peak <= limit and resident[0] <= chosen.blocks[0] <= resident[1]
    assert (chosen.streamed > 0) == (chosen.blocks[0] < 40)
    assert chosen.machine.one_loop == (gb >= 48)
    assert (chosen.machine.text_resident == 0) == (gb < 16)


def test_what_cannot_fit_is_refused_with_what_would(released):
    """The option named is one that was tried."""
    smaller = "choose a smaller --size or fewer frames"
    for machine, gib, remedy in ((FP8, 6, smaller), (dataclasses.replace(EIGHT, compiled=True), 6.95, "leave out --attention8"), (EIGHT, 5, smaller), (BF16, 2, smaller), (BF16, 7.2, "add --fp8"),
                                 (dataclasses.replace(FP8, resident=40), 7.2, "leave out --resident")):
        with pytest.raises(ValueError, match=f"are there: {remedy}$"):
            fit(released, SHAPE, TOKENS, machine, gib * GIB)
    with pytest.raises(ValueError, match="blocks 0 to 40 can be resident, got 41"):
        fit(released, SHAPE, TOKENS, dataclasses.replace(EIGHT, resident=41), 141 * GIB)


def test_host_memory_is_planned(released, monkeypatch):
    """All blocks streamed: what is pinned, text keys, clips with their history, and PyTorch. An H200 machine had 22.0 GiB in use. Refused where there is less in the whole machine."""
    chosen = fit(released, SHAPE, TOKENS, EIGHT, 7.2 * GIB)
    assert chosen.streamed + 6.5 * GIB < chosen.host < 23.5 * GIB
    assert f"host {chosen.host / GIB:.1f} of" in str(chosen)
    monkeypatch.setattr("fast.plan.host_memory", lambda: (8 * GIB, 16 * GIB))
    assert "expect swapping" in str(chosen)
    with pytest.raises(ValueError, match="GiB of host memory are wanted, this machine has 16.0: choose a smaller --size"):
        fit(released, SHAPE, TOKENS, EIGHT, 7.2 * GIB)


def test_number_of_resident_blocks_is_obeyed(released):
    chosen = fit(released, SHAPE, TOKENS, dataclasses.replace(FP8, resident=7), 60 * GIB)
    assert chosen.machine.resident == 7 and chosen.blocks == (7, 40) and chosen.machine.one_loop and chosen.machine.span is None
