"""WanVideoPipeline: the rest of the family. T2V (a prompt), I2V (a picture and a prompt), TI2V (a prompt, perhaps a picture) -> one clip.

Stages  plan -> text (umT5) -> picture (VAE) -> denoise -> decode.

    T2V     two experts; latents from noise alone
    I2V     two experts; mask and latents of the picture followed by grey frames enter beside the noise as 20 more channels
    TI2V    one expert, the 16x16x4 VAE; the picture's latent is the first latent frame, held clean at every step

Axes    B batch (1)   T latent frames   P pixel frames   H W latent size
Source  Wan-Video/Wan2.2@42bf4cf wan/{text2video,image2video,textimage2video}.py
"""
from dataclasses import dataclass, replace
from datetime import timedelta

import torch

from fast.plan import Fit, device_limit, estimate_seconds, fit
from model import PATCH
from media.pictures import fit_i2v, fit_ti2v, i2v_size, load_image, ti2v_size
from sampling import denoise
from solver import make_solver
from wan_s2v import Options, Stages, decode_frames, draw_noise, encode_text, load_experts, load_vae, size_table


@dataclass(frozen=True)
class VideoPlan:
    """What will be made, and what it takes; made before anything is loaded."""
    options: Options
    task: str
    fps: float
    height: int                  # of a frame in pixels
    width: int
    latent_shape: tuple[int, int, int]   # T, H, W
    weights: dict[str, float]    # component -> GiB
    fit: Fit
    seconds: float               # of denoising, by a probe
    clips: int = 1

    @property
    def frames(self):
        return self.options.frames

    def __str__(self):
        o, (T, H, W) = self.options, self.latent_shape
        return "\n".join((
            f"video    {self.task}: {self.width}x{self.height}, {self.frames} frames at {self.fps:g} fps = {self.frames / self.fps:.2f} s",
            f"sampler  {o.solver}, {o.steps} steps, shift {o.shift:g}, guidance {', '.join(f'{g:g}' for g in o.guidance)}, seed {o.seed}",
            f"tokens   {T * (H // PATCH[1]) * (W // PATCH[2]):,}",
            f"weights  {size_table(self.weights)}",
            str(self.fit),
            f"time     about {timedelta(seconds=round(self.seconds))} of denoising",
        ))


def image_condition(vae, picture, frames):
    """I2V's extra channels: mask 4 and latents 16.  picture (1, 3, 1, height, width), frames P -> (1, 20, T, H, W)

    The frames after the picture are zeros, mid grey; the mask says that only the first frame is known (official L266-299).
    """
    rest = picture.new_zeros(1, 3, 4, *picture.shape[3:])
    latents = vae.with_fp32_fallback(lambda: torch.cat(list(vae.encode_stream([picture] + [rest] * ((frames - 1) // 4))), dim=2))
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


class WanVideoPipeline:
    """T2V, I2V or TI2V, whichever the checkpoint is. `plan`, then `generate`."""

    def __init__(self, checkpoint, machine, vram=None):
        if checkpoint.configs["denoiser"].audio_dim:
            raise ValueError(f"{checkpoint.task} needs a sound: use WanS2VPipeline")
        self.checkpoint, self.machine, self.limit = checkpoint, machine, device_limit(machine.device, vram)

    def plan(self, options):
        """Options -> VideoPlan. Reads the picture's size, no weights.  raises ValueError for inputs that the task cannot use"""
        task, sampling, vae = self.checkpoint.task, self.checkpoint.sampling, self.checkpoint.configs["vae"]
        options = options.resolve(sampling, frames=sampling["frames"])
        kind = task.split("-")[0]
        if options.audio or options.pose_video:
            raise ValueError(f"{task} makes silent video: leave out the audio and the pose video, or use an S2V checkpoint")
        if kind == "t2v" and options.image:
            raise ValueError(f"{task} takes a prompt and no picture, got {options.image}: leave it out, or use an I2V or TI2V checkpoint")
        if kind == "i2v" and not options.image:
            raise ValueError(f"{task} needs a picture: give one")
        if kind != "i2v" and not options.prompt.strip():
            raise ValueError(f"{task} needs a prompt: say what is to be seen")
        if options.frames % vae.stride[0] != 1:
            raise ValueError(f"frames must be 1 + a multiple of {vae.stride[0]}, got {options.frames}: "
                             f"take {options.frames - (options.frames - 1) % vae.stride[0]}")
        height, width = self.size(options, kind, vae.stride[1])
        shape = (1 + (options.frames - 1) // vae.stride[0], height // vae.stride[1], width // vae.stride[2])
        tokens = shape[0] * (shape[1] // PATCH[1]) * (shape[2] // PATCH[2])
        room = fit(self.checkpoint, shape, tokens, self.machine, self.limit)
        seconds = estimate_seconds(self.checkpoint.configs["denoiser"], replace(room.machine, quantize=room.fp8), tokens, tokens,
                                   options.steps * (2 if max(options.guidance) > 1 else 1))
        return VideoPlan(options, task, sampling["fps"], height, width, shape, self.checkpoint.sizes(), room, seconds)

    def size(self, options, kind, stride):
        """(height, width): the picture's shape within the pixel budget, or without a picture exactly what was asked for."""
        if options.image:
            picture, rule = load_image(options.image), i2v_size if kind == "i2v" else ti2v_size
            return rule(picture.height, picture.width, options.size[0] * options.size[1], step=PATCH[1] * stride)
        width, height = options.size
        if width % (2 * stride) or height % (2 * stride):
            raise ValueError(f"width and height must be multiples of {2 * stride}, got {width}x{height}: "
                             f"take {max(1, round(width / 2 / stride)) * 2 * stride}x{max(1, round(height / 2 / stride)) * 2 * stride}")
        return height, width

    @torch.no_grad()
    def generate(self, plan, stage=None, progress=lambda clip, steps: steps):
        """Make the video; yields it, (3, P, height, width) float32 in [-1, 1] on the CPU. Arguments as in WanS2VPipeline."""
        stage, o, checkpoint, machine = stage or Stages(), plan.options, self.checkpoint, plan.fit.machine
        with stage("text"):
            text, negative = encode_text(checkpoint, (o.prompt, o.negative_prompt), machine)
        image = clean = None
        vae = load_vae(checkpoint, machine)
        if o.image:
            with stage("picture"):
                fit = fit_i2v if checkpoint.configs["denoiser"].in_dim > vae.config.z_dim else fit_ti2v
                picture = fit(load_image(o.image), (plan.height, plan.width)).to(machine.device)[None, :, None]
                if fit is fit_i2v:
                    image = image_condition(vae, picture, o.frames)
                else:
                    clean = vae.encode(picture)

        def arguments(positive):
            return dict(shape=plan.latent_shape, text=text if positive else negative, image=image, clean_frames=0 if clean is None else 1)

        with stage("denoise"):
            vae.to("cpu")                                            # leaves its room to the denoiser
            noise = draw_noise((1, vae.config.z_dim, *plan.latent_shape), o.seed, machine.device, torch.float32)
            solver = make_solver(o.solver, o.steps, o.shift)
            latents = denoise(load_experts(checkpoint, machine), solver, noise, arguments, o.guidance, clean,
                              progress=lambda steps: progress(0, steps))
        with stage("decode"):
            vae.to(machine.device)
            frames = decode_frames(vae, [latents], o.frames)
        yield frames[0]
