"""Checkpoints of random numbers: the tiny ones that the demo and the tests run on, and official-layout folders of any size.

    python -m tiny.random_weights s2v-14B DST                official layout and sizes, 49 GB: everything but the numbers is as published
    python -m tiny.random_weights s2v-14B DST --tiny         the same files, a few MB
    python -m tiny.random_weights s2v-14B DST --set denoiser.n_layer=2 --set vae.dim=32
    python -m tiny.random_weights t2v-A14B weights/tiny-t2v --tiny --ours      our layout

A tensor depends on its name and shape only. Norm weights are about 1, linear layers have deviation 1/sqrt(inputs), so activations stay
finite at any size. Names and shapes come from our networks on the meta device, through the converter's tables read backwards.
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import dataclasses
import json
import math
import shutil
import sys
import zlib
from functools import cache, partial
from pathlib import Path

import torch
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

import convert_weights as convert
from fast.probe import any_terminal
from formats import checkpoints, foreign, names
from jobs.lock import one_at_a_time
from audio import AudioConfig
from model import Config
from text import TextConfig
from vae import VAE22, VAEConfig

BLOCK = 1_000_003            # random numbers that all tensors are cut from: prime, so that rows of a matrix never repeat each other
SHARD_BYTES = 10 * 10**9     # as the published shards
RECIPE = "random numbers: the picture will be noise; it shows that everything runs, not what the model can do"   # note of a tiny checkpoint


# ------------------------------------------------------------------------------------------------------------- random numbers

@cache
def normal_block():
    return torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))


def spread(name, shape):
    """Mean and deviation of a tensor's values, by its official name."""
    if name.endswith(("gamma", "weight_g")) or (len(shape) == 1 and name.endswith(".weight")):
        return 1.0, 0.1                                                  # norms
    if name.endswith(".weights"):
        return 0.01, 0.002                                               # mixture of the audio states
    if len(shape) == 1:
        return 0.0, 0.05                                                 # biases
    if name.endswith(("modulation", "padding_tokens")):
        return 0.0, 0.1
    return 0.0, math.prod(shape[1:]) ** -0.5                             # linear, convolution, embedding


def random_tensor(name, shape, dtype, seed):
    """The random block, repeated as often as needed, from a place that depends on name and seed."""
    mean, deviation = spread(name, shape)
    block, size, start = normal_block(), math.prod(shape), zlib.crc32(f"{seed}:{name}".encode()) % BLOCK
    block = torch.cat([block[start:start + size], block[:min(start, max(0, start + size - BLOCK))]])
    return (block * deviation + mean).to(dtype).repeat(-(-size // BLOCK))[:size].view(shape)


# ---------------------------------------------------------------------------------------------------------------------- sizes

def released(task):
    """{component kind: config} of a published checkpoint."""
    denoiser = {"s2v-14B": Config(), "t2v-A14B": Config(audio_dim=0), "i2v-A14B": Config(audio_dim=0, in_dim=36),
                "ti2v-5B": Config(dim=3072, ffn_dim=14336, n_head=24, n_layer=30, in_dim=48, out_dim=48, audio_dim=0)}[task]
    configs = {"denoiser": denoiser, "vae": VAE22 if task == "ti2v-5B" else VAEConfig(), "text": TextConfig()}
    return configs | ({"audio": AudioConfig()} if denoiser.audio_dim else {})


def tiny(task):
    """The same at a size for demonstration: a 5 second video of 128x128 pixels takes well under a minute on two CPU cores."""
    full = released(task)
    configs = {
        "denoiser": dataclasses.replace(full["denoiser"], dim=128, ffn_dim=384, n_head=4, n_layer=6, text_dim=64, freq_dim=64,
                                        audio_dim=64 if "audio" in full else 0, audio_states=5 if "audio" in full else 25,
                                        audio_layers=(0, 3)),
        "vae": dataclasses.replace(full["vae"], dim=16, dec_dim=16, num_res_blocks=1),
        "text": TextConfig(vocab=1024, dim=64, dim_attn=64, ffn=128, n_head=4, n_layer=2)}
    if "audio" in full:
        configs["audio"] = AudioConfig(dim=64, ffn_dim=128, n_head=4, n_layer=4, conv_dim=(32,) * 7, pos_kernel=32, pos_groups=4)
    return configs


def changed(configs, settings):
    """Configs with some fields replaced.  settings ["denoiser.n_layer=2", ...]"""
    for setting in settings:
        place, _, value = setting.partition("=")
        kind, _, field = place.partition(".")
        if kind not in configs or field not in {f.name for f in dataclasses.fields(configs[kind])}:
            raise ValueError(f"wanted COMPONENT.FIELD=VALUE such as denoiser.n_layer=2, got {setting}: components {', '.join(configs)}")
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{setting}: wanted a number, true, false or a list such as [0,3], got {value}") from None
        values = {field: tuple(value) if isinstance(value, list) else value}
        if field == "n_layer" and kind == "denoiser":
            values["audio_layers"] = tuple(i for i in configs[kind].audio_layers if i < value)
        configs = configs | {kind: dataclasses.replace(configs[kind], **values)}
    return configs


# ---------------------------------------------------------------------------------------------------------------- checkpoints

def official_names(kind, config):
    """{our name: official name} of every parameter"""
    table = names.inverse(names.official_rules(kind, config))
    return {ours: names.rename(ours, table) for ours in checkpoints.parameter_shapes(kind, config)}


def random_part(kind, config, dtype, component):
    """A Part whose numbers are made when they are read."""
    shapes = checkpoints.parameter_shapes(kind, config)
    tensors = {}
    for ours, name in official_names(kind, config).items():
        make = partial(random_tensor, name, shapes[ours], dtype, seed=component)
        tensors[ours] = checkpoints.Entry(Path(component), shapes[ours], dtype, make)
    return checkpoints.Part(kind, config, tensors)


def random_checkpoint(task, configs, dtypes, tokenizer, **sampling):
    """A Checkpoint of random numbers.

    dtypes     {component kind: dtype}      sampling  values that differ from the task's; a `boundary` makes two experts, None one
    """
    boundary = sampling.pop("boundary", checkpoints.BOUNDARY.get(task))
    parts = {name: random_part("denoiser", configs["denoiser"], dtypes["denoiser"], name) for name in checkpoints.expert_names(boundary)}
    parts |= {kind: random_part(kind, config, dtypes[kind], kind) for kind, config in configs.items() if kind != "denoiser"}
    return checkpoints.Checkpoint(Path("random"), task, boundary, checkpoints.SAMPLING[task] | sampling, tokenizer, parts, RECIPE)


TINY = {"tiny": "s2v-14B", "tiny-t2v": "t2v-A14B", "tiny-i2v": "i2v-A14B", "tiny-ti2v": "ti2v-5B", "tiny-quick": "s2v-14B"}   # folder name -> task
TINY_SAMPLING = {"size": [128, 128], "steps": 12}
TINY_S2V = {"boundary": 0.875, "guidance": [2.0, 2.0]}      # two experts, unlike the released S2V, so that the switch is seen to work


def write_tiny(name, folder):
    """The tiny random checkpoint of a name in our layout, into an existing folder. tiny-quick is for tests of other things: its VAE
    has a twelfth of the work, its denoiser a third of the layers."""
    task, configs = TINY[name], tiny(TINY[name])
    if name == "tiny-quick":
        small = dict(vae=dict(dim=4, dec_dim=4), denoiser=dict(n_layer=2, audio_layers=(0,), audio_states=3), audio=dict(n_layer=2))
        configs |= {kind: dataclasses.replace(configs[kind], **fields) for kind, fields in small.items()}
    make_tokenizer(folder / "tokenizer.json", [checkpoints.SAMPLING[task]["negative_prompt"]])
    sampling = TINY_SAMPLING | (TINY_S2V if task == "s2v-14B" else {})
    dtypes = dict.fromkeys(checkpoints.CONFIGS, torch.bfloat16)
    convert.write_checkpoint(random_checkpoint(task, configs, dtypes, folder / "tokenizer.json", **sampling), folder)


def ensure_tiny(folder):
    """Make the tiny checkpoint of that name (weights/tiny, -t2v, -i2v, -ti2v, -quick) unless it is there.  -> folder

    A folder that something else wrote, a trained one say, is left as it is. Safe when interrupted or when two programs do it at once.
    raises  ValueError for another folder name
    """
    folder = Path(folder)
    if folder.name not in TINY:
        raise ValueError(f"no tiny checkpoint is called {folder.name}: choose one of {', '.join(TINY)}")
    config = folder / "config.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder.parent):
        for rest in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(rest, ignore_errors=True)                      # of a program that was killed
        if config.is_file():
            note = checkpoints.read_json(config).get("note") or ""
            if note == RECIPE or not note.startswith(RECIPE.split(":")[0]):
                return folder
            shutil.rmtree(folder)
        try:
            convert.new_folder(folder, 2**25, partial(write_tiny, folder.name))
        except (ValueError, OSError):
            if not config.is_file():                                     # else, on a disk without locks, another program was faster
                raise
    return folder


# ------------------------------------------------------------------------------------------------------------ official layout

def denoiser_json(task, config):
    """config.json of a denoiser with the fields that the published ones have."""
    s2v = config.audio_dim > 0
    fields = {"_class_name": "WanModel_S2V" if s2v else "WanModel", "_diffusers_version": "0.33.0", "model_type": task.split("-")[0]}
    fields |= {theirs: getattr(config, ours) for theirs, ours in (names.FIELDS | (names.FIELDS_S2V if s2v else {})).items()}
    inert = {"zero_init": True, "enable_tsm": False, "trainable_token_pos_emb": False, "motion_token_num": 1024,
             "framepack_drop_mode": "padd"}
    return fields | ((names.SCOPE_S2V | inert) if s2v else {})


def write_shards(folder, tensors):
    """Files of at most 10 GB and their index.  tensors {official name: Entry}"""
    files, room = [{}], SHARD_BYTES
    for name, entry in tensors.items():
        if entry.nbytes > room and files[-1]:
            files.append({})
            room = SHARD_BYTES
        files[-1][name] = entry
        room -= entry.nbytes
    stem, index = "diffusion_pytorch_model", {}
    for i, part in enumerate(files, 1):
        name = f"{stem}-{i:05d}-of-{len(files):05d}.safetensors"
        convert.write_safetensors(folder / name, part)
        index |= dict.fromkeys(part, name)
    total = sum(entry.nbytes for entry in tensors.values())
    convert.write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def write_wav2vec(folder, part, tensors):
    """The audio encoder as Wav2Vec2ForCTC saves it, with what transformers' processor wants beside it."""
    C = part.config.dim
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", "-", *"abcdefghijklmnopqrstuvwxyz"]
    unused = {"lm_head.weight": (len(letters), C), "lm_head.bias": (len(letters),), "wav2vec2.masked_spec_embed": (C,)}
    tensors |= {name: checkpoints.Entry(folder, shape, torch.float32, partial(random_tensor, name, shape, torch.float32, seed="audio"))
                for name, shape in unused.items()}
    fields = {"architectures": ["Wav2Vec2ForCTC"], "model_type": "wav2vec2", "vocab_size": len(letters), "pad_token_id": 0}
    fields |= {theirs: getattr(part.config, ours) for theirs, ours in names.FIELDS_AUDIO.items()}
    convert.write_json(folder / "config.json", fields | names.SCOPE_AUDIO | {"num_feat_extract_layers": len(part.config.conv_dim)})
    convert.write_json(folder / "preprocessor_config.json", {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": True,
                                                     "feature_size": 1, "padding_side": "right", "padding_value": 0.0,
                                                     "return_attention_mask": True, "sampling_rate": 16000})
    convert.write_json(folder / "vocab.json", {letter: i for i, letter in enumerate(letters)})
    convert.write_safetensors(folder / "model.safetensors", tensors)


def write_official(checkpoint, folder):
    """A Checkpoint -> the layout that it would be published in, into an existing folder."""
    tokenizer = folder / "google" / "umt5-xxl" / "tokenizer.json"
    convert.write_json(tokenizer.with_name("tokenizer_config.json"), {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>",
                                                              "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512})
    make_tokenizer(tokenizer, [checkpoints.SAMPLING[checkpoint.task]["negative_prompt"]])
    for name, part in checkpoint.parts.items():
        published = official_names(part.kind, part.config)
        tensors = {published[ours]: entry for ours, entry in part.tensors.items()}
        if part.kind == "denoiser":
            root = folder / {"denoiser": ".", "denoiser_high": "high_noise_model", "denoiser_low": "low_noise_model"}[name]
            convert.write_json(root / "config.json", denoiser_json(checkpoint.task, part.config))
            write_shards(root, tensors)
        elif part.kind == "audio":
            write_wav2vec(folder / foreign.WAV2VEC, part, tensors)
        else:
            vae_name = f"Wan2.{2 if part.kind == 'vae' and part.config.shortcuts else 1}_VAE.pth"
            file = vae_name if part.kind == "vae" else "models_t5_umt5-xxl-enc-bf16.pth"
            torch.save({name: entry.read() for name, entry in tensors.items()}, folder / file)


def official(task, target, configs, dtype=torch.bfloat16):
    """Write an official-layout folder of random numbers.

    configs  {component kind: config}, of any size: `released(task)`, `tiny(task)`, ...        dtype  of the denoiser
    raises   ValueError if the target exists or has no room. The text encoder (11 GB when released) is held in memory once.
    """
    dtypes = {"denoiser": dtype, "text": torch.bfloat16, "vae": torch.float32, "audio": torch.float32}
    checkpoint = random_checkpoint(task, configs, dtypes, None)
    convert.new_folder(target, sum(part.nbytes for part in checkpoint.parts.values()), partial(write_official, checkpoint))


# ------------------------------------------------------------------------------------------------------------------ tokenizer
# words of the prompts that the tiny checkpoint meets most; everything else is spelt in characters, and rarer characters in UTF-8 bytes
WORDS = """a an the and or of in on at to with without from by is are be her his she he it they this that who while very not no one two
person people man woman boy girl child face head mouth lips eyes hair nose hand hands talking speaking says singing smiling
laughing looking listening nodding moving still standing sitting walking camera front close up portrait video picture photo
background light dark bright soft red orange yellow green blue purple pink brown black white grey round square wide narrow open
closed big small young old happy sad calm angry slowly quickly clear blurry quality high low worst best detail details style
static cartoon realistic cinematic music voice song word words"""


def make_tokenizer(path, texts=()):
    """Write a small tokenizer.json: <pad> 0, </s> 1, <unk> 2, 256 bytes, ASCII, WORDS, then the characters of `texts`.

    texts    strings whose characters should cost one token each (the checkpoint's negative prompt, say) instead of three bytes
    returns  number of tokens; the same arguments write the same bytes
    """
    pieces = ["<pad>", "</s>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    singles = ["\u2581"] + [chr(code) for code in range(33, 127)]
    singles += [char for char in "".join(texts) if not char.isspace()]
    words = [spelling for word in WORDS.split() for spelling in ("\u2581" + word, "\u2581" + word.capitalize())]
    vocab = {piece: 0.0 for piece in pieces}
    for piece in singles + words:                                     # log probabilities: a word is cheaper than its letters
        vocab.setdefault(piece, -10.0 if len(piece) == 1 else -12.0)
    tokenizer = tokenizers.Tokenizer(models.Unigram(list(vocab.items()), unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()              # "a face" -> "\u2581a", "\u2581face"
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(pieces[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path), pretty=False)
    return tokenizer.get_vocab_size()


def main(argv=None):
    any_terminal()
    parser = argparse.ArgumentParser(description="Write a checkpoint of random numbers.")
    parser.add_argument("task", choices=list(checkpoints.SAMPLING))
    parser.add_argument("target", help="new folder")
    parser.add_argument("--tiny", action="store_true", help="a few MB instead of the released size")
    parser.add_argument("--ours", action="store_true", help="the converted layout, as weights/tiny* have it (with --tiny)")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of an official denoiser (default: bf16)")
    parser.add_argument("--set", action="append", default=[], metavar="COMPONENT.FIELD=VALUE", help="another size, e.g. denoiser.n_layer=2")
    args = parser.parse_args(argv)
    try:
        if args.ours and not (args.tiny and not args.set):
            raise ValueError("--ours goes with --tiny and without --set: write the official layout, then convert it")
        if args.ours:
            convert.new_folder(args.target, 2**25, partial(write_tiny, {task: name for name, task in reversed(TINY.items())}[args.task]))
        else:
            configs = changed((tiny if args.tiny else released)(args.task), args.set)
            official(args.task, args.target, configs, torch.float32 if args.dtype == "fp32" else torch.bfloat16)
        print(f"wrote {args.target}: random numbers")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
