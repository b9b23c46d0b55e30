"""The memory plan: its arithmetic against counted bytes, and what it chooses for the released S2V-14B on cards of several sizes."""
import dataclasses
from pathlib import Path

import pytest
import torch

import fake_checkpoint
from machine import GIB, USABLE, Machine, fit, weight_bytes
from wan_s2v import token_counts

CPU = torch.device("cpu")
BF16 = Machine(CPU, torch.bfloat16, vae_dtype=torch.bfloat16)
FP8 = dataclasses.replace(BF16, quantize=True)
SHAPE = (20, 88, 160)        # 80 frames of 1280x704
TOKENS = token_counts(SHAPE)[1]


@pytest.fixture(scope="module")
def released():
    """S2V-14B as a checkpoint of numbers that nobody reads."""
    dtypes = {"denoiser": torch.bfloat16, "text": torch.bfloat16, "vae": torch.float32, "audio": torch.float32}
    return fake_checkpoint.random_checkpoint("s2v-14B", fake_checkpoint.released("s2v-14B"), dtypes, Path("tokenizer.json"))


def counted(net):
    return sum(p.numel() * p.element_size() for p in net.parameters())


@pytest.mark.parametrize("machine", [BF16, FP8, Machine(CPU, torch.float32)])
def test_weight_bytes_are_those_of_the_loaded_network(tmp_path, machine):
    configs = fake_checkpoint.tiny("s2v-14B")
    checkpoint = fake_checkpoint.random_checkpoint("s2v-14B", configs, dict.fromkeys(configs, torch.bfloat16), tmp_path, boundary=None)
    net = checkpoint.load("denoiser", "cpu", machine.dtype, machine.quantize)
    on_device, pinned, blocks = weight_bytes(checkpoint.parts["denoiser"], machine, None)
    assert pinned == 0 and blocks == configs["denoiser"].n_layer
    print(f"counted {counted(net):,} bytes, planned {on_device:,}")
    assert counted(net) <= on_device <= 1.03 * counted(net)          # parameters begin at multiples of 256 bytes


def test_tokens():
    assert TOKENS == 79_200 and token_counts((20, 56, 104))[0] == 30_576


@pytest.mark.parametrize("gb, machine, shape, resident", [
    (141, BF16, SHAPE, (40, 40)), (48, FP8, SHAPE, (40, 40)), (24, FP8, SHAPE, (30, 40)), (16, FP8, SHAPE, (10, 25)), (10, FP8, SHAPE, (0, 5)),
    (8, FP8, (20, 60, 104), (0, 10)), (24, BF16, (20, 60, 104), (10, 30))])
def test_choice_for_a_card(released, gb, machine, shape, resident):
    limit = gb * USABLE * GIB
    chosen = fit(released, shape, token_counts(shape)[1], machine, limit)
    print(chosen)
    assert chosen.peak <= limit and resident[0] <= chosen.blocks[0] <= resident[1]
    assert (chosen.streamed > 0) == (chosen.blocks[0] < 40)
    assert chosen.machine.one_loop == (gb >= 48)
    assert (chosen.machine.text_resident == 0) == (gb < 16)


def test_what_cannot_fit_is_refused_with_what_would(released):
    with pytest.raises(ValueError, match="--size.*--clip-frames"):
        fit(released, SHAPE, TOKENS, FP8, 7.2 * GIB)
    with pytest.raises(ValueError, match="--fp8"):
        fit(released, SHAPE, TOKENS, BF16, 5 * GIB)


def test_number_of_resident_blocks_is_obeyed(released):
    chosen = fit(released, SHAPE, TOKENS, dataclasses.replace(FP8, resident=7), 60 * GIB)
    assert chosen.machine.resident == 7 and chosen.blocks == (7, 40)
