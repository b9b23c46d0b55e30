"""The names that other layouts give to tensors and to the fields of config.json. The only file that knows them; lora.py adds what LoRA files
put around a layer's name.

A component (denoiser, vae, text, audio) is described by one table, their name -> our name, read in both directions.

Source  Wan-Video/Wan2.2@42bf4cf wan/configs/*.py and each from_pretrained; huggingface/diffusers WanTransformer3DModel, AutoencoderKLWan
"""
import dataclasses
import math
import re
from functools import cache

from formats.checks import check_kinds, make_config
from text import TextConfig
from vae import VAE22, VAEConfig

# ---------------------------------------------------------------------------------------------------------------- name tables
# (their name, our name): `#` is a number, `*` anything, in the same order on both sides; what stands in [] may be absent.
# None: known and not needed. The first match wins, in both directions, so special cases stand above general ones.

DENOISER = [
    ("patch_embedding.*", "patch.*"),
    ("text_embedding.*", "text.*"),
    ("time_embedding.*", "time.*"),
    ("time_projection.1.*", "time_mod.*"),
    ("blocks.#.norm3.*", "blocks.#.cross_norm.*"),
    ("blocks.#.*", "blocks.#.*"),
    ("head.modulation", "head.modulation"),
    ("head.head.*", "head.linear.*"),
    ("cond_encoder.*", "pose.*"),
    ("trainable_cond_mask.weight", "token_kind.weight"),
    ("frame_packer.proj.*", "motion.near.*"),
    ("frame_packer.proj_2x.*", "motion.mid.*"),
    ("frame_packer.proj_4x.*", "motion.far.*"),
    ("casual_audio_encoder.weights", "audio.mix"),
    ("casual_audio_encoder.encoder.padding_tokens", "audio.pad_token"),
    ("casual_audio_encoder.encoder.final_linear.*", "audio.out.*"),
    ("casual_audio_encoder.encoder.conv1_*.conv.*", "audio.conv_*.*"),
    ("casual_audio_encoder.encoder.conv#.conv.*", "audio.conv#.*"),
]
DENOISER_DIFFUSERS = [
    ("patch_embedding.*", "patch.*"),
    ("condition_embedder.text_embedder.linear_1.*", "text.0.*"),
    ("condition_embedder.text_embedder.linear_2.*", "text.2.*"),
    ("condition_embedder.time_embedder.linear_1.*", "time.0.*"),
    ("condition_embedder.time_embedder.linear_2.*", "time.2.*"),
    ("condition_embedder.time_proj.*", "time_mod.*"),
    ("blocks.#.scale_shift_table", "blocks.#.modulation"),
    ("blocks.#.norm2.*", "blocks.#.cross_norm.*"),
    ("blocks.#.attn1.to_out.0.*", "blocks.#.self_attn.o.*"),
    ("blocks.#.attn1.norm_*", "blocks.#.self_attn.norm_*"),
    ("blocks.#.attn1.to_*.*", "blocks.#.self_attn.*.*"),
    ("blocks.#.attn2.to_out.0.*", "blocks.#.cross_attn.o.*"),
    ("blocks.#.attn2.norm_*", "blocks.#.cross_attn.norm_*"),
    ("blocks.#.attn2.to_*.*", "blocks.#.cross_attn.*.*"),
    ("blocks.#.ffn.net.0.proj.*", "blocks.#.ffn.0.*"),
    ("blocks.#.ffn.net.2.*", "blocks.#.ffn.2.*"),
    ("scale_shift_table", "head.modulation"),
    ("proj_out.*", "head.linear.*"),
]
VAE = [
    ("conv1.*", "encoder.to_latent.*"),
    ("conv2.*", "decoder.from_latent.*"),
    ("*.conv1.*", "*.conv_in.*"),
    ("*.head.0.gamma", "*.norm_out.gamma"),
    ("*.head.2.*", "*.conv_out.*"),
    ("*.middle.1.to_qkv.*", "*.middle.attention.qkv.*"),
    ("*.middle.1.*", "*.middle.attention.*"),
]
VAE_BLOCK = [
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.2.*", "conv1.*"),
    ("residual.3.gamma", "norm2.gamma"),
    ("residual.6.*", "conv2.*"),
    ("shortcut.*", "shortcut.*"),
]
VAE_RESAMPLE = [
    ("resample.1.*", "space.*"),
    ("time_conv.*", "time.*"),
]
VAE_DIFFUSERS = [
    ("quant_conv.*", "encoder.to_latent.*"),
    ("post_quant_conv.*", "decoder.from_latent.*"),
    ("*.conv_in.*", "*.conv_in.*"),
    ("*.norm_out.gamma", "*.norm_out.gamma"),
    ("*.conv_out.*", "*.conv_out.*"),
    ("*.mid_block.attentions.0.to_qkv.*", "*.middle.attention.qkv.*"),
    ("*.mid_block.attentions.0.*", "*.middle.attention.*"),
]
VAE_BLOCK_DIFFUSERS = [
    ("norm#.gamma", "norm#.gamma"),
    ("conv#.*", "conv#.*"),
    ("conv_shortcut.*", "shortcut.*"),
]
TEXT = [
    ("token_embedding.weight", "embed.weight"),
    ("blocks.#.pos_embedding.embedding.weight", "blocks.#.attn.position.weight"),
    ("blocks.#.ffn.gate.0.weight", "blocks.#.ffn.gate.weight"),
    ("blocks.#.ffn.fc1.weight", "blocks.#.ffn.up.weight"),
    ("blocks.#.ffn.fc2.weight", "blocks.#.ffn.down.weight"),
    ("blocks.#.*", "blocks.#.*"),
    ("norm.weight", "norm.weight"),
]
TEXT_DIFFUSERS = [
    ("shared.weight", "embed.weight"),
    ("encoder.embed_tokens.weight", None),          # the same tensor again, written by some versions of transformers
    ("spiece_model", None),                         # ComfyUI keeps the tokenizer in the file; ours is tokenizer.json
    ("encoder.block.#.layer.0.SelfAttention.relative_attention_bias.weight", "blocks.#.attn.position.weight"),
    ("encoder.block.#.layer.0.SelfAttention.*", "blocks.#.attn.*"),
    ("encoder.block.#.layer.0.layer_norm.weight", "blocks.#.norm1.weight"),
    ("encoder.block.#.layer.1.layer_norm.weight", "blocks.#.norm2.weight"),
    ("encoder.block.#.layer.1.DenseReluDense.wi_0.weight", "blocks.#.ffn.gate.weight"),
    ("encoder.block.#.layer.1.DenseReluDense.wi_1.weight", "blocks.#.ffn.up.weight"),
    ("encoder.block.#.layer.1.DenseReluDense.wo.weight", "blocks.#.ffn.down.weight"),
    ("encoder.final_layer_norm.weight", "norm.weight"),
]
TEXT_GGUF = [                                       # llama.cpp's names
    ("token_embd.weight", "embed.weight"),
    ("enc.blk.#.attn_rel_b.weight", "blocks.#.attn.position.weight"),
    ("enc.blk.#.attn_norm.weight", "blocks.#.norm1.weight"),
    ("enc.blk.#.attn_*.weight", "blocks.#.attn.*.weight"),
    ("enc.blk.#.ffn_norm.weight", "blocks.#.norm2.weight"),
    ("enc.blk.#.ffn_*.weight", "blocks.#.ffn.*.weight"),
    ("enc.output_norm.weight", "norm.weight"),
]
AUDIO = [
    ("lm_head.*", None),                            # letters, for speech recognition
    ("[wav2vec2.]masked_spec_embed", None),         # training only
    ("[wav2vec2.]feature_extractor.conv_layers.#.conv.*", "conv.#.conv.*"),
    ("[wav2vec2.]feature_extractor.conv_layers.#.layer_norm.*", "conv.#.norm.*"),
    ("[wav2vec2.]feature_projection.layer_norm.*", "norm_in.*"),
    ("[wav2vec2.]feature_projection.projection.*", "project.*"),
    ("[wav2vec2.]encoder.pos_conv_embed.conv.bias", "pos_conv.bias"),
    ("[wav2vec2.]encoder.pos_conv_embed.conv.weight_g", "pos_conv.g"),
    ("[wav2vec2.]encoder.pos_conv_embed.conv.weight_v", "pos_conv.v"),
    ("[wav2vec2.]encoder.pos_conv_embed.conv.parametrizations.weight.original0", "pos_conv.g"),
    ("[wav2vec2.]encoder.pos_conv_embed.conv.parametrizations.weight.original1", "pos_conv.v"),
    ("[wav2vec2.]encoder.layer_norm.*", "norm.*"),
    ("[wav2vec2.]encoder.layers.#.attention.out_proj.*", "blocks.#.o.*"),
    ("[wav2vec2.]encoder.layers.#.layer_norm.*", "blocks.#.norm1.*"),
    ("[wav2vec2.]encoder.layers.#.final_layer_norm.*", "blocks.#.norm2.*"),
    ("[wav2vec2.]encoder.layers.#.feed_forward.intermediate_dense.*", "blocks.#.ffn.0.*"),
    ("[wav2vec2.]encoder.layers.#.feed_forward.output_dense.*", "blocks.#.ffn.2.*"),
    ("[wav2vec2.]encoder.layers.#.attention.*_proj.*", "blocks.#.*.*"),
]


def injector_rules(config):
    """Audio attention number j follows block audio_layers[j] and lives in that block here."""
    rules = []
    for j, layer in enumerate(config.audio_layers):
        rules.append((f"audio_injector.injector_adain_layers.{j}.linear.*", f"blocks.{layer}.inject.adain.*"))
        rules.append((f"audio_injector.injector.{j}.*", f"blocks.{layer}.inject.*"))
    return rules


def official_rules(kind, config):
    """The name table of an official component."""
    if kind == "denoiser":
        return injector_rules(config) + DENOISER
    return vae_rules(config) if kind == "vae" else {"text": TEXT, "audio": AUDIO}[kind]


def diffusers_rules(kind, config):
    """The name table of a component as diffusers or transformers stores it."""
    return vae_rules(config, diffusers=True) if kind == "vae" else {"denoiser": DENOISER_DIFFUSERS, "text": TEXT_DIFFUSERS}[kind]


def vae_place(config, net, stage, j):
    """Where the official file keeps block j of a stage, or behind the blocks its resampler: Wan2.1 counts through all stages."""
    row = "downsamples" if net == "encoder" else "upsamples"
    n = config.num_res_blocks + (net == "decoder")
    return f"{net}.{row}.{stage}.{row}.{j}" if config.shortcuts else f"{net}.{row}.{stage * (n + 1) + j}"


def vae_place_diffusers(config, net, stage, j):
    row, n = ("down", config.num_res_blocks) if net == "encoder" else ("up", config.num_res_blocks + 1)
    if net == "encoder" and not config.shortcuts:
        return f"encoder.down_blocks.{stage * (n + 1) + j}"
    return f"{net}.{row}_blocks.{stage}." + (f"resnets.{j}" if j < n else f"{row}sampler" if config.shortcuts else f"{row}samplers.0")


def vae_rules(config, diffusers=False):
    """The table of a VAE's names, which depends on how many blocks a stage has."""
    table, block, place, middle = VAE, VAE_BLOCK, vae_place, "middle.{}"
    if diffusers:
        table, block, place, middle = VAE_DIFFUSERS, VAE_BLOCK_DIFFUSERS, vae_place_diffusers, "mid_block.resnets.{}"
    rules = []
    for net, n in (("encoder", config.num_res_blocks), ("decoder", config.num_res_blocks + 1)):
        for stage in range(len(config.dim_mult)):
            pieces = [(j, f"blocks.{j}", block) for j in range(n)] + [(n, "resample", VAE_RESAMPLE)]
            rules += [(f"{place(config, net, stage, j)}.{theirs}", f"{net}.stages.{stage}.{where}.{ours}")
                      for j, where, piece in pieces for theirs, ours in piece]
        rules += [(f"{net}.{middle.format(i)}.{theirs}", f"{net}.middle.{name}.{ours}")
                  for i, name in ((0, "block1"), (1 if diffusers else 2, "block2")) for theirs, ours in block]
    return rules + table


@cache
def pattern(template):
    regex = re.escape(template).replace(r"\[", "(?:").replace(r"\]", ")?").replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
    return re.compile(regex)


def rename(name, rules):
    """Their name -> our name; None for a known key that is not needed, "" for an unknown one."""
    for theirs, ours in rules:
        if match := pattern(theirs).fullmatch(name):
            parts = iter(match.groups())
            return ours and re.sub(r"[#*]", lambda _: next(parts), re.sub(r"[\[\]]", "", ours))
    return ""


def inverse(rules):
    """Our name -> their name. Where two of theirs lead to one of ours, the first is the one written."""
    return [(ours, theirs) for theirs, ours in rules if ours]


# ---------------------------------------------------------------------------------------------------------- what a file holds

SIGNATURES = [   # how a key begins that only this component has, and the function (kind, config) -> the table of such names
    ("blocks.0.self_attn.", "denoiser", official_rules), ("condition_embedder.", "denoiser", diffusers_rules),
    ("decoder.upsamples.", "vae", official_rules), ("decoder.up_blocks.", "vae", diffusers_rules),
    ("blocks.0.attn.", "text", official_rules), ("encoder.block.", "text", diffusers_rules), ("enc.blk.", "text", lambda *_: TEXT_GGUF),
    ("wav2vec2.", "audio", official_rules), ("feature_extractor.conv_layers.", "audio", official_rules)]
PREFIXES = ("model.diffusion_model.", "diffusion_model.")   # in front of every name of some single files


def layout(names):
    """The keys of a file -> its component, function (kind, config) -> name table; None and the official table for unknown keys"""
    return next(((kind, rules) for start, kind, rules in SIGNATURES if any(name.startswith(start) for name in names)), (None, official_rules))


def without_prefix(name):
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def rules_for(kind, config, names):
    """The name table of the layout, official, diffusers or llama.cpp, whose keys these are."""
    return layout(names)[1](kind, config)


# ------------------------------------------------------------------------------------------------------------ foreign configs

# official config.json of a denoiser -> model.Config (official model_s2v.py L253-288, model.py L305-321)
FIELDS = {"dim": "dim", "ffn_dim": "ffn_dim", "num_heads": "n_head", "num_layers": "n_layer", "in_dim": "in_dim", "out_dim": "out_dim",
          "text_len": "text_len", "freq_dim": "freq_dim", "eps": "eps"}
FIELDS_S2V = {"audio_dim": "audio_dim", "num_audio_token": "audio_tokens", "audio_inject_layers": "audio_layers", "cond_dim": "pose_dim"}
OPTIONAL = {"in_dim", "out_dim", "text_len", "freq_dim", "eps", "num_audio_token"}   # model.Config has the official class's default
# The part of the official code that the released models run, and all that is built here. The S2V fields must be there: the official
# class has other defaults. The other four are never written by the official code.
SCOPE = {"patch_size": [1, 2, 2], "window_size": [-1, -1], "qk_norm": True, "cross_attn_norm": True}
SCOPE_S2V = {"enable_adain": True, "adain_mode": "attn_norm", "zero_timestep": True, "enable_framepack": True, "enable_motioner": False,
             "add_last_motion": True}
FIELDS_AUDIO = {"hidden_size": "dim", "intermediate_size": "ffn_dim", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
                "conv_dim": "conv_dim", "conv_kernel": "conv_kernel", "conv_stride": "conv_stride", "conv_bias": "conv_bias",
                "num_conv_pos_embeddings": "pos_kernel", "num_conv_pos_embedding_groups": "pos_groups", "layer_norm_eps": "eps"}
SCOPE_AUDIO = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "hidden_act": "gelu", "feat_extract_activation": "gelu",
               "add_adapter": False}
FIELDS_DIFFUSERS = {"num_attention_heads": "n_head", "ffn_dim": "ffn_dim", "num_layers": "n_layer", "in_channels": "in_dim",
                    "out_channels": "out_dim", "text_dim": "text_dim", "freq_dim": "freq_dim", "eps": "eps"}
SCOPE_DIFFUSERS = {"patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "added_kv_proj_dim": None,
                   "image_dim": None, "pos_embed_seq_len": None}
FIELDS_VAE_DIFFUSERS = {"base_dim": "dim", "z_dim": "z_dim", "dim_mult": "dim_mult", "num_res_blocks": "num_res_blocks",
                        "temperal_downsample": "temporal_downsample", "latents_mean": "mean", "latents_std": "std"}
FIELDS_TEXT = {"vocab_size": "vocab", "d_model": "dim", "d_ff": "ffn", "num_heads": "n_head", "num_layers": "n_layer",
               "relative_attention_num_buckets": "n_bucket"}


def take_fields(fields, table, scope, path, required=None):
    """A foreign config.json's fields under our names.

    fields  its content        table  their name -> ours        scope  name -> the only value supported        required  default: the table
    raises  ValueError naming a missing field, or a field with what was wanted and what came
    """
    if lacking := [name for name in required or table if name not in fields]:
        raise ValueError(f"{path} lacks the field {lacking[0]}: take config.json from the folder of the weights")
    for name, value in scope.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{path}: wanted {name} = {value}, got {fields[name]}: only what the released models use is built")
    return {ours: fields[name] for name, ours in table.items() if name in fields}


def denoiser_config(fields, entries, path):
    """config.json of either layout -> model.Config. Two sizes are in no official config but in the tensors: text_dim and audio_states."""
    if "num_attention_heads" in fields:
        check_kinds(fields, {"num_attention_heads": int, "attention_head_dim": int}, path)
        dim = fields["num_attention_heads"] * fields.get("attention_head_dim", 128)
        return make_config("denoiser", take_fields(fields, FIELDS_DIFFUSERS, SCOPE_DIFFUSERS, path) | {"dim": dim, "audio_dim": 0}, path,
                           entries)
    s2v = fields.get("model_type") == "s2v" or "audio_inject_layers" in fields
    table, scope = (FIELDS | FIELDS_S2V, SCOPE | SCOPE_S2V) if s2v else (FIELDS, SCOPE)
    required = [name for name in (*table, *(SCOPE_S2V if s2v else ())) if name not in OPTIONAL]
    ours = {"audio_dim": 0} | take_fields(fields, table, scope, path, required)
    if "text_embedding.0.weight" in entries:
        ours["text_dim"] = (0, *entries["text_embedding.0.weight"].shape)[-1]
    if "casual_audio_encoder.weights" in entries:
        ours["audio_states"] = math.prod(entries["casual_audio_encoder.weights"].shape)
    return make_config("denoiser", ours, path, entries)


def vae_config(fields, entries, path):
    """vae.VAEConfig of either layout. An official VAE has no config beside it: the shapes of its tensors tell its sizes."""
    if fields is not None:
        ours = take_fields(fields, FIELDS_VAE_DIFFUSERS, {"attn_scales": []}, path)
        return make_config("vae", ours | {"dec_dim": fields.get("decoder_base_dim") or ours["dim"], "patch": fields.get("patch_size") or 1,
                                          "shortcuts": fields.get("is_residual", False)}, path, entries)
    if not all(name in entries and entries[name].shape for name in ("conv2.weight", "encoder.conv1.weight", "decoder.head.0.gamma")):
        return VAEConfig()                                             # not a VAE: matching says what it is
    z_dim, known = entries["conv2.weight"].shape[0], {config.z_dim: config for config in (VAEConfig(), VAE22)}
    if z_dim not in known:
        raise ValueError(f"{path}: wanted {' or '.join(map(str, known))} latent channels, got {z_dim}: no mean and deviation are known")
    resampler = r"encoder\.downsamples\." + (r"0\.downsamples\." if known[z_dim].shortcuts else "") + r"(\d+)\.resample\.1\.weight"
    blocks = [int(found[1]) for name in entries if (found := re.fullmatch(resampler, name))]   # the first resampler follows them
    sizes = dict(dim=entries["encoder.conv1.weight"].shape[0], dec_dim=entries["decoder.head.0.gamma"].shape[0])
    return make_config("vae", dataclasses.asdict(known[z_dim]) | sizes | {"num_res_blocks": min(blocks, default=2)}, path, entries)


def text_config(entries, path):
    """Sizes of umT5 from the shapes of its tensors: the official code keeps no config beside them."""
    rules = rules_for("text", None, entries)
    shape = {ours: entry.shape for name, entry in entries.items() if (ours := rename(name, rules))}
    telling = ("embed.weight", "blocks.0.attn.position.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.up.weight")
    if not all(len(shape.get(name, ())) == 2 for name in telling):
        return TextConfig()                                            # not umT5: matching says what it is
    (vocab, dim), (n_bucket, n_head), (dim_attn, _), (ffn, _) = (shape[name] for name in telling)
    sizes = dict(vocab=vocab, dim=dim, dim_attn=dim_attn, ffn=ffn, n_head=n_head, n_bucket=n_bucket)
    return make_config("text", sizes | {"n_layer": sum(name.endswith(".attn.q.weight") for name in shape)}, path, entries)


def read_config(kind, fields, entries, path):
    """The config of a component in a foreign layout.

    fields  of the config.json beside its tensors, None without one        entries  {their name: Entry}        path  for messages
    """
    if kind in ("denoiser", "vae"):
        return (denoiser_config if kind == "denoiser" else vae_config)(fields, entries, path)
    return text_config(entries, path) if kind == "text" else make_config("audio", take_fields(fields, FIELDS_AUDIO, SCOPE_AUDIO, path), path, entries)


def identify(name, fields, entries):
    """An official module told by its keys -> kind, config, name table.  name for messages, fields its constructor's arguments"""
    kind = layout(entries)[0]
    if kind is None:
        raise ValueError(f"{name} is an unknown model: wanted an official denoiser, VAE, umT5 encoder or wav2vec2 encoder")
    config = read_config(kind, None if kind == "vae" else fields.get("config", fields), entries, name)
    return kind, config, official_rules(kind, config)
