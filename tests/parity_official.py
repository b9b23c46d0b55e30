"""Our networks against the official code, component by component: same weights, same inputs, every difference in a row.

Used by `python test_parity.py --weights DIR --official REPO` and by fast/against.py. The official code is imported from a
checkout of Wan-Video/Wan2.2 (read at 42bf4cf) that the user has, with the packages it asks for; nothing is changed there or copied here.

Axes    B batch   T latent frames   P pixel frames   H W latent size   S text tokens   C channels
Source  wan/speech2video.py and wan/textimage2video.py for how the official pipelines call their networks
"""
import contextlib
import gc
import importlib
import importlib.util
import sys
import types
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from formats import checkpoints, foreign
from audio import audio_features
from sampling import make_solver
from text import Tokenizer, encode_prompt

PROMPTS = {"prompt": "A woman in a red coat talks to the camera, soft light.", "unclean prompt": "  caf&amp;eacute;\n\t&lt;3 ",
           "negative prompt": checkpoints.NEGATIVE_S2V}
LATENT = (5, 16, 24)         # T, H, W of the denoiser's inputs: 20 frames of 128 x 192 pixels; uneven, so that swapped axes show
EXPERT_TIME = {"denoiser": 500, "denoiser_high": 950, "denoiser_low": 400}

# float32: sums in another order, through up to 40 layers, give some 1e-6; a wrong line gives 1e-3 and more (relative L2).
# bfloat16: what rounding does depends on the weights, so the official code sets the mark. Our bfloat16 output must be about as near to
# the official float32 output as the official bfloat16 output is.
TOLERANCE = 1e-4
BFLOAT16_MARGIN = 1.25


# -------------------------------------------------------------------------------------------------- importing the official code

def plain_attention(q, k, v, q_lens=None, k_lens=None, softmax_scale=None, causal=False, **unused):
    """The official flash_attention without the flash-attn package: computes in v's dtype, so float32 stays float32.

    q, k, v (B, tokens, heads, D) -> same shape and dtype as q. Keys beyond k_lens (B,) are left out.
    """
    n = k.shape[1] if k_lens is None else int(k_lens.max())
    mask = None
    if k_lens is not None and int(k_lens.min()) < n:
        mask = (torch.arange(n) < k_lens.cpu()[:, None])[:, None, None].to(q.device)                # (B, 1, 1, n)
    heads = [x.transpose(1, 2).to(v.dtype) for x in (q, k[:, :n], v[:, :n])]                        # (B, heads, tokens, D)
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=causal, scale=softmax_scale).transpose(1, 2).to(q.dtype)


def add_checkout(repo):
    """Make `wan` importable, without its __init__ files: those import the dependencies of every task."""
    root = Path(repo) / "wan"
    if not (root / "modules" / "s2v" / "model_s2v.py").is_file():
        raise ValueError(f"wanted a checkout of Wan-Video/Wan2.2, got {repo} without wan/modules/s2v/model_s2v.py: give its top folder")
    for name in ("wan", "wan.modules", "wan.modules.s2v", "wan.utils", "wan.distributed"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package


def official(name, keep_flash=False):
    """Import wan.<name>. Readers of media files may be missing, since parity hands over tensors, and so may CUDA and flash-attn.

    keep_flash  leave the installed flash-attn in place; it computes in half precision whatever it is given
    """
    with contextlib.suppress(ImportError):              # both look for librosa: they must not find the stub
        import transformers.models.wav2vec2             # noqa: F401
        from diffusers.utils import logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    stubs = [stub for stub in ("librosa", "decord") if stub not in sys.modules and importlib.util.find_spec(stub) is None]
    for stub in stubs:
        sys.modules[stub] = types.ModuleType(stub)
        sys.modules[stub].VideoReader = None            # the one name that is imported from them, by speech2video.py
    no_cuda = contextlib.nullcontext() if torch.cuda.is_available() else mock.patch.object(torch.cuda, "current_device", lambda: "cpu")
    try:
        with warnings.catch_warnings(), no_cuda:        # t5.py L478 asks for the current device while it is imported
            warnings.simplefilter("ignore")             # torch.cuda.amp is deprecated
            module = importlib.import_module("wan." + name)
    finally:
        for stub in stubs:
            del sys.modules[stub]
    for key, imported in list(sys.modules.items()):     # the function was copied into every file that imports it
        if key.startswith("wan.") and hasattr(imported, "flash_attention") and key != "wan.modules.attention":
            imported.flash_attention = sys.modules["wan.modules.attention"].flash_attention if keep_flash else plain_attention
    return module


REAL_AUTOCAST = torch.amp.autocast


def cpu_autocast(device_type="cuda", dtype=None, enabled=True, cache_enabled=None):
    """torch.amp.autocast("cuda", ...) as it would be on a GPU, on a CPU: bfloat16 regions, with float32 ones inside."""
    return REAL_AUTOCAST("cpu", dtype=torch.bfloat16, enabled=enabled and dtype == torch.bfloat16)


@contextlib.contextmanager
def official_precision(device, dtype):
    """How the official pipelines run the denoiser: bfloat16 autocast around it; here float32 too, without TF32."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if device.type == "cpu":
            stack.enter_context(mock.patch.object(torch.amp, "autocast", cpu_autocast))
            stack.enter_context(mock.patch.object(torch.cuda.amp, "autocast", partial(cpu_autocast, "cuda")))
        if dtype == torch.bfloat16:
            stack.enter_context(torch.amp.autocast(device.type, dtype=dtype))
        yield


# --------------------------------------------------------------------------------------------------------------- the components

@dataclass(frozen=True)
class Setting:
    """What is compared, and where it runs. Every *_theirs and *_ours below returns {output: tensor}."""
    folder: Path
    checkpoint: checkpoints.Checkpoint
    device: torch.device
    dtype: torch.dtype

    @property
    def keep_flash(self):
        return self.device.type == "cuda" and self.dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn") is not None


def noise(seed, *shape):
    """Reproducible N(0, 1): float32, with values that bfloat16 can hold, so that rounding inputs is no difference."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def moving_picture(P, height, width):
    """A smooth colour pattern drifting through P frames -> (3, P, height, width) in [-1, 1]"""
    p, y, x = torch.meshgrid(torch.arange(P) / 8, torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    return torch.stack([torch.sin(x + p + c) * torch.cos(y - p * c) for c in range(3)])


def voice(seconds=3.3):
    """A vowel-like sound with pauses -> (samples,) float32 at 16 kHz"""
    t = torch.arange(int(16000 * seconds)) / 16000
    tone = sum(torch.sin(2 * torch.pi * 140 * k * t + 3 * torch.sin(5 * t)) / k for k in range(1, 12))
    return 0.1 * tone * (torch.sin(4 * t) > -0.3) + 0.002 * noise(1, len(t))


def text_theirs(s):
    t5, c = official("modules.t5"), s.checkpoint.configs["text"]

    def empty_encoder(dtype, device, **unused):         # the official function knows the full size only, and initialises it at random
        with torch.device("meta"):
            net = t5.T5Encoder(c.vocab, c.dim, c.dim_attn, c.ffn, c.n_head, c.n_layer, c.n_bucket, shared_pos=False)
        return net.to(dtype).to_empty(device=device)
    with mock.patch.object(t5, "umt5_xxl", empty_encoder):
        encoder = t5.T5EncoderModel(s.checkpoint.configs["denoiser"].text_len, s.dtype, torch.device("cpu"),
                                    str(s.folder / "models_t5_umt5-xxl-enc-bf16.pth"), str(s.checkpoint.tokenizer.parent))
    encoder.model.to(s.device)
    return {name: encoder([prompt], s.device)[0] for name, prompt in PROMPTS.items()}


def text_ours(s, theirs):
    encoder = s.checkpoint.load("text", s.device, s.dtype)
    tokenizer = Tokenizer(s.checkpoint.tokenizer, s.checkpoint.configs["denoiser"].text_len)
    return {name: encode_prompt(encoder, tokenizer, prompt) for name, prompt in PROMPTS.items()}


def audio_theirs(s):
    module = official("modules.s2v.audio_encoder")
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC
    encoder = module.AudioEncoder.__new__(module.AudioEncoder)      # its __init__ also wants the files for writing transcripts
    encoder.processor = Wav2Vec2FeatureExtractor(do_normalize=True)
    encoder.model, encoder.video_rate = Wav2Vec2ForCTC.from_pretrained(s.folder / foreign.WAV2VEC).to(s.device), 30
    module.librosa = types.SimpleNamespace(load=lambda path, sr: (voice().numpy(), sr))
    states = encoder.extract_audio_feat("", return_all_layers=True)                                 # (S, T30, C)
    columns, clips = encoder.get_audio_embed_bucket_fps(states, fps=16, batch_frames=80, m=0)       # (P, S, C)
    return {"hidden states": columns[:, :-1].permute(1, 2, 0), "last hidden state": columns[:, -1].T, "clips": torch.tensor(clips)}


def audio_ours(s, theirs):
    features, clips = audio_features(s.checkpoint.load("audio", s.device, torch.float32), voice().to(s.device))
    return {"hidden states": features[:-1], "last hidden state": features[-1], "clips": torch.tensor(clips)}


def official_vae(c, file, device):
    """The official VAE of a vae.VAEConfig, in float32, with the weights of a .pth file."""
    old = c.stride[1] == 8
    module = official("modules.vae2_1" if old else "modules.vae2_2")
    shape = dict(dim_mult=list(c.dim_mult), temperal_downsample=list(c.temporal_downsample))
    sizes = dict(dim=c.dim, num_res_blocks=c.num_res_blocks, **shape) if old else dict(dec_dim=c.dec_dim, num_res_blocks=c.num_res_blocks)
    with mock.patch.object(module, "_video_vae", partial(module._video_vae, **sizes)):
        return module.Wan2_1_VAE(c.z_dim, str(file), device=device) if old else \
            module.Wan2_2_VAE(c.z_dim, c.dim, str(file), device=device, **shape)


def vae_theirs(s):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae = official_vae(s.checkpoint.configs["vae"], next(s.folder.glob("Wan2.*_VAE.pth")), s.device)
        video = moving_picture(17, 96, 128).to(s.device)
        latents = vae.encode([video])[0]
        return {"encode 17 frames": latents, "encode a picture": vae.encode([video[:, :1]])[0],
                "decode 5 latents": vae.decode([latents])[0]}


def vae_ours(s, theirs):
    vae = s.checkpoint.load("vae", s.device, torch.float32)
    video, latents = moving_picture(17, 96, 128).to(s.device)[None], theirs["encode 17 frames"].to(s.device)[None]
    return {"encode 17 frames": vae.encode(video)[0], "encode a picture": vae.encode(video[:, :, :1])[0],
            "decode 5 latents": vae.decode(latents)[0]}


def denoiser_inputs(s):
    """{output: the arguments of our `Denoiser.prepare` without the shape}; text is (1, S, C)"""
    c, (T, H, W) = s.checkpoint.configs["denoiser"], LATENT
    text = 0.25 * noise(2, 1, min(20, c.text_len), c.text_dim)
    if c.audio_dim:
        first = dict(text=text, audio=0.25 * noise(3, 1, c.audio_states, c.audio_dim, 4 * T), ref=noise(4, 1, c.out_dim, 1, H, W))
        later = first | dict(motion=noise(5, 1, c.out_dim, c.motion_latents, H, W))
        return {"first clip": first, "later clip": later, "later clip, pose": later | dict(pose=noise(6, 1, c.pose_dim, T, H, W))}
    if c.in_dim > c.out_dim:
        return {"picture": dict(text=text, image=noise(7, 1, c.in_dim - c.out_dim, T, H, W))}
    return {"text": dict(text=text)} | ({"text, clean frame": dict(text=text, clean_frames=1)} if s.checkpoint.task == "ti2v-5B" else {})


def call_official(net, c, x, t, text, audio=None, ref=None, motion=None, pose=None, image=None, clean_frames=0):
    """One forward of an official denoiser with arguments named as ours.  x (1, C, T, H, W), t number -> (1, C, T, H, W)"""
    tokens, spatial = x[0, 0].numel() // 4, x[0, 0, 0].numel() // 4
    if c.audio_dim:
        history = torch.zeros(1, c.out_dim, c.motion_latents, *x.shape[3:], device=x.device) if motion is None else motion
        pose = torch.zeros(1, c.pose_dim, *x.shape[2:], device=x.device) if pose is None else pose
        v = net(list(x), t=torch.tensor([t], device=x.device), context=list(text), seq_len=tokens, ref_latents=ref, motion_latents=history,
                cond_states=pose, audio_input=audio, motion_frames=[c.motion_frames, c.motion_latents], drop_motion_frames=motion is None)
    else:
        times = torch.full((1, tokens), t, device=x.device)
        times[:, :clean_frames * spatial] = 0           # textimage2video.py L567-574
        v = net(list(x), t=times, context=list(text), seq_len=tokens, y=image)
    return torch.stack(v)


@contextlib.contextmanager
def official_denoiser(c, keep_flash):
    """The official class for a model.Config, with the two sizes that it takes from no config: text width and number of audio states."""
    module = official("modules.s2v.model_s2v" if c.audio_dim else "modules.model", keep_flash)
    kind = module.WanModel_S2V if c.audio_dim else module.WanModel
    with mock.patch.object(kind, "ignore_for_config", ["args", "kwargs"]), contextlib.ExitStack() as stack:
        if c.audio_dim:
            states = partial(module.CausalAudioEncoder, num_layers=c.audio_states)
            stack.enter_context(mock.patch.object(module, "CausalAudioEncoder", states))
        yield partial(kind, text_dim=c.text_dim), partial(kind.from_pretrained, text_dim=c.text_dim)


def denoiser_theirs(s, name):
    subfolder, c = {"denoiser_high": "high_noise_model", "denoiser_low": "low_noise_model"}.get(name), s.checkpoint.configs["denoiser"]
    stored = s.dtype if c.audio_dim else torch.float32              # speech2video.py L114-117 rounds all weights, the others none
    with official_denoiser(c, s.keep_flash) as (_, from_pretrained):
        net = from_pretrained(str(s.folder), subfolder=subfolder, torch_dtype=stored).eval()
    if s.device.type == "cpu":
        net = net.float()                               # the values stay; a CPU's autocast does not widen weights for float32 regions
    net.to(s.device)
    x = noise(8, 1, c.out_dim, *LATENT).to(s.device)
    with official_precision(s.device, s.dtype):
        return {case: call_official(net, c, x, EXPERT_TIME[name], **to_device(args, s.device)) for case, args in denoiser_inputs(s).items()}


def denoiser_ours(s, theirs, name):
    net, c = s.checkpoint.load(name, s.device, s.dtype), s.checkpoint.configs["denoiser"]
    x, t = noise(8, 1, c.out_dim, *LATENT).to(s.device), torch.tensor([EXPERT_TIME[name]], device=s.device)
    return {case: net(x, t, net.prepare(LATENT, **to_device(args, s.device))) for case, args in denoiser_inputs(s).items()}


def to_device(args, device):
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in args.items()}


def analytic_velocity(x, t):
    """Stands in for a network, so that a difference is the solver's."""
    return -0.3 * x + 0.5 * torch.sin(float(t) / 1000 * 3 + x)


def solver_theirs(s):
    kinds = {"unipc": official("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler}
    dpm, out = official("utils.fm_solvers"), {}
    steps, shift = s.checkpoint.sampling["steps"], s.checkpoint.sampling["shift"]
    for name, kind in (kinds | {"dpm++": dpm.FlowDPMSolverMultistepScheduler}).items():
        scheduler, x = kind(num_train_timesteps=1000, shift=1, use_dynamic_shifting=False), noise(9, 1, 16, *LATENT).to(s.device)
        if name == "unipc":
            scheduler.set_timesteps(steps, device=s.device, shift=shift)
        else:
            dpm.retrieve_timesteps(scheduler, device=s.device, sigmas=dpm.get_sampling_sigmas(steps, shift))
        for t in scheduler.timesteps:
            x = scheduler.step(analytic_velocity(x, t), t, x, return_dict=False)[0]
        out |= {f"{name} timesteps": scheduler.timesteps, f"{name}, {steps} steps": x}
    return out


def solver_ours(s, theirs):
    out, steps = {}, s.checkpoint.sampling["steps"]
    for name in ("unipc", "dpm++"):
        solver, x = make_solver(name, steps, s.checkpoint.sampling["shift"]), noise(9, 1, 16, *LATENT).to(s.device)
        for i, t in enumerate(solver.timesteps):
            x = solver.step(analytic_velocity(x, t), i, x)
        out |= {f"{name} timesteps": solver.timesteps, f"{name}, {steps} steps": x}
    return out


# ------------------------------------------------------------------------------------------------------------------- comparing

def components(checkpoint):
    """[(name, theirs(s), ours(s, theirs's outputs))] in the order of a pipeline"""
    experts = [(name, partial(denoiser_theirs, name=name), partial(denoiser_ours, name=name)) for name in checkpoint.experts]
    audio = [("audio", audio_theirs, audio_ours)] if "audio" in checkpoint.parts else []
    return [("text", text_theirs, text_ours), *audio, ("vae", vae_theirs, vae_ours), *experts, ("solver", solver_theirs, solver_ours)]


def to_cpu(outputs):
    """Copies on the CPU; what the GPU held for the network that made them is given back."""
    outputs = {name: x.float().cpu() for name, x in outputs.items()}
    gc.collect()
    torch.cuda.empty_cache()
    return outputs


@torch.no_grad()
def compare(weights, repo, device="cpu", dtype=torch.float32):
    """Compare every component of an official checkpoint folder; one network is in memory at a time.

    weights  folder as published (not converted)        repo  checkout of Wan-Video/Wan2.2
    dtype    float32, or bfloat16 for text encoder and denoiser; solver, VAE and wav2vec2 are float32 in the official code too
    returns  [test_parity.Row], against the official float32 outputs; a component whose packages are missing is skipped with a line
    raises   ValueError for a folder or checkout of another kind, or if nothing could be compared
    """
    from test_parity import compare as measure          # late: test_parity imports this file
    checkpoint = checkpoints.open_checkpoint(weights)
    if checkpoint.tokenizer.parent.name != "umt5-xxl":
        raise ValueError(f"wanted a folder in the official layout, got {weights} in another: the official code reads no other")
    add_checkout(repo)
    torch.backends.cudnn.allow_tf32 = False             # on by default for convolutions, and good for 1e-3 only
    s, rows = Setting(checkpoint.folder, checkpoint, torch.device(device), torch.float32), []
    for name, theirs, ours in components(checkpoint):
        rounded = replace(s, dtype=dtype)
        print(f"{name}: comparing", file=sys.stderr)
        try:
            wanted = to_cpu(theirs(s))
            half = to_cpu(theirs(rounded)) if dtype != torch.float32 and name.startswith(("text", "denoiser")) else None
        except ImportError as error:
            print(f"{name}: skipped, the official code needs a package that is missing: {error}", file=sys.stderr)
            continue
        got = to_cpu(ours(rounded, wanted))
        for output, x in wanted.items():
            tolerance = TOLERANCE if half is None else BFLOAT16_MARGIN * float((half[output] - x).norm() / x.norm())
            rows.append(measure(name, output, got[output], x, tolerance))
    if not rows:
        raise ValueError(f"nothing could be compared: install the packages that {repo}/requirements.txt names, flash_attn apart")
    return rows
