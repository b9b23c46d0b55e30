"""Pictures in: file -> RGB picture, how large the video becomes, picture -> tensor.

Axes    H W height and width in pixels; sizes are (height, width) everywhere
Pixels  uint8 0..255 become float32 -1..1
Source  Wan-Video/Wan2.2@42bf4cf wan/speech2video.py (size L189-250, crop L342-357 and L469-497), wan/image2video.py (L259-272, L314-318),
        wan/textimage2video.py (L462-477), wan/utils/utils.py (best_output_size), and the Resize and CenterCrop of torchvision they call.
"""
import importlib.util
import math
import os
import warnings
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "HEIF")   # not EPS: it would start ghostscript
BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC")
MIN_SIDE = 16         # pixels; less cannot show a face
MAX_PIXELS = 2**26    # 67 million, 200 MB as RGB: checked in the header, before anything is decoded


def load_image(path):
    """A picture file as an RGB PIL image in sRGB: first frame, upright as its EXIF says, transparency over white, 16-bit grey scaled to 8 bit.

    HEIC is read where the package pillow-heif is installed. For opaque upright 8-bit pictures in sRGB this is what the official `Image.open(path).convert("RGB")` gives, bit for bit.
    raises  ValueError (one line) if the file is missing, not a picture, damaged, under 16 pixels a side or over 67 megapixels
    """
    if not os.path.isfile(path):
        raise ValueError(f"wanted a picture file, got a pipe or a folder: {path}" if os.path.exists(path) else f"picture not found: {path}")
    Image.init()      # registers every format; without it only the common ones are known by name
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif
        pillow_heif.register_heif_opener()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # Pillow warns of large pictures and damaged EXIF; both are dealt with here
        with _as_value_error(path):
            img = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
        with img:
            if min(img.size) < MIN_SIDE:
                raise ValueError(f"{path} is {img.width}x{img.height} pixels, wanted at least {MIN_SIDE}x{MIN_SIDE}: use a larger picture")
            if img.width * img.height > MAX_PIXELS:
                raise ValueError(_too_many_pixels(path))
            with _as_value_error(path):
                return _to_rgb(img)


def _too_many_pixels(path):
    return f"{path} has too many pixels, wanted at most {MAX_PIXELS // 10**6} million (8192x8192): scale it down first"


def _unknown(path):
    with open(path, "rb") as file:
        head = file.read(12)
    name = BRANDS.get(head[8:]) if head[4:8] == b"ftyp" else None
    if name is None:
        return f"{path} is not a picture: wanted JPEG, PNG, WebP, BMP, GIF or TIFF"
    if importlib.util.find_spec("pillow_heif") and name == "HEIC":
        return f"{path} is a damaged {name} picture: save it again as JPEG or PNG"
    remedy = "pip install pillow-heif" if name == "HEIC" else "pip install a Pillow with AVIF"
    return f"{path} is a {name} picture, which this Pillow cannot read: {remedy}, or save it as JPEG or PNG"


@contextmanager
def _as_value_error(path):
    """Any error of a decoder (OSError, SyntaxError, struct.error, zlib.error, EOFError ...) becomes a one-line ValueError."""
    try:
        yield
    except Image.UnidentifiedImageError:
        raise ValueError(_unknown(path)) from None
    except Image.DecompressionBombError:
        raise ValueError(_too_many_pixels(path)) from None
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is a damaged or unsupported picture ({reason}): save it again as PNG or JPEG") from None


def _to_rgb(img):
    img.load()
    try:
        ImageOps.exif_transpose(img, in_place=True)
    except Exception:      # damaged EXIF raises many types; the pixels are good, and are not turned
        pass
    if img.mode == "I" or img.mode.startswith("I;16"):      # Pillow itself would clip at 255
        grey = np.asarray(img).astype(np.int32).clip(0, 65535)
        img = Image.fromarray(((grey + 128) // 257).astype(np.uint8))      # 65535 = 255 * 257
    if img.mode == "F":
        raise ValueError("floating-point pixels")
    if img.info.get("icc_profile"):
        from media.colour import to_srgb
        img = to_srgb(img)
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img.convert("RGB")


def s2v_size(height, width, max_area, step=64):
    """Size of an S2V video: the largest down-scale of the picture with sides padded up to multiples of `step` that fits max_area pixels.

    height, width  of the picture        step  8 FramePack latents; 64 pixels on the 8x8 VAE, 128 on the 16x16 one
    returns        (height, width); a small picture is not enlarged beyond the next multiples
    raises         ValueError if a side would vanish (official: a size of 0)
    """
    largest, smallest = 1.0, 0.1
    if height * width > max_area:      # between the scale that fits without padding and one that surely fits with the most padding
        pad = step - 1
        linear, product = pad * (height + width), height * width
        largest = math.sqrt(max_area / product)
        smallest = (math.sqrt(linear**2 - 2 * product * (pad**2 - max_area)) - linear) / (2 * product)   # 2ac, not 4ac, as official L211
    for i in range(100):
        scale = largest - (largest - smallest) * i / 100
        H, W = (-(-int(side * scale) // step) * step for side in (height, width))
        if H * W <= max_area:
            return _check_size(H, W, step, height, width, max_area)
    return _check_size(0, 0, step, height, width, max_area)      # only budgets below step^2 come here


def i2v_size(height, width, max_area, step=16):
    """Size of an I2V video: max_area pixels in the picture's shape, sides rounded down to multiples of `step` (one patch).

    Kept official quirk: float rounding may lose one step, 480x832 at 480*832 pixels gives 464x832.
    """
    shape = height / width
    H = int(math.sqrt(max_area * shape) // step * step)
    W = int(math.sqrt(max_area / shape) // step * step)
    return _check_size(H, W, step, height, width, max_area)


def ti2v_size(height, width, max_area, step=32):
    """Size of a TI2V video: as i2v_size, but one side is rounded first and the other takes what area is left; the better of both orders."""
    shape = width / height
    ideal_W = (max_area * shape) ** 0.5
    try:
        W1 = int(ideal_W // step * step)
        H1 = int(max_area / W1 // step * step)
        H2 = int(max_area / ideal_W // step * step)
        W2 = int(max_area / H2 // step * step)
        error1, error2 = (max(shape / s, s / shape) for s in (W1 / H1, W2 / H2))
    except ZeroDivisionError:
        return _check_size(0, 0, step, height, width, max_area)
    return (H1, W1) if error1 < error2 else (H2, W2)


def _check_size(H, W, step, height, width, max_area):
    if min(H, W) < step:
        raise ValueError(f"a {width}x{height} picture does not fit a budget of {max_area} pixels with sides of at least {step}: "
                         "raise the size or crop the picture to a squarer shape")
    return H, W


def fit_picture(img, size, official=False):
    """The S2V reference picture at the video's size: scaled until it covers the frame (bilinear, antialiased), centre cropped.

    img       PIL RGB        size  (height, width)
    official  always scale the short side to min(size); where the long side then falls short the frame is filled up with black bars.
              Where that leaves no bars both ways give the same bits.
    returns   (3, H, W) float32 in [-1, 1]
    """
    h, w = _cover_size((img.height, img.width), size, official)
    x = _pixels(img.resize((w, h), Image.Resampling.BILINEAR))       # (3, h, w)
    return center_crop(x, size) / 255 * 2 - 1                        # bars are 0 here, so -1


def fit_frame(frame, size, official=False):
    """A pose frame at the video's size, placed as fit_picture places the reference picture.  (h, w, 3) uint8 -> (3, H, W) float32.

    Scaled after normalisation as official L347-352, so `official` bars are mid grey here, not black.
    """
    x = torch.from_numpy(frame).permute(2, 0, 1) / 255 * 2 - 1       # (3, h, w)
    h, w = _cover_size(x.shape[1:], size, official)
    if (h, w) != x.shape[1:]:
        x = F.interpolate(x[None], (h, w), mode="bilinear", align_corners=False, antialias=True)[0]
    return center_crop(x, size)


def fit_i2v(img, size):
    """The I2V first frame: stretched to `size`, bicubic without antialiasing; values overshoot [-1, 1] a little.  PIL RGB -> (3, H, W)."""
    x = _pixels(img).div_(255).sub_(0.5).div_(0.5)                   # in place: a 67-megapixel picture is 0.8 GB here
    return F.interpolate(x[None], size, mode="bicubic")[0]


def fit_ti2v(img, size):
    """The TI2V first frame: Lanczos until it covers the frame, centre cropped.  PIL RGB -> (3, H, W) float32 in [-1, 1]."""
    H, W = size
    scale = max(W / img.width, H / img.height)
    img = img.resize((round(img.width * scale), round(img.height * scale)), Image.Resampling.LANCZOS)
    left, top = (img.width - W) // 2, (img.height - H) // 2
    return _pixels(img.crop((left, top, left + W, top + H))).div_(255).sub_(0.5).div_(0.5)


def _pixels(img):
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).float()  # (3, h, w)


def _cover_size(size, target, official):
    """Size to scale to before the centre crop: short side to min(target), or more where the long side would not cover (unless official)."""
    (h, w), (H, W) = size, target
    short = min(H, W)
    new = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
    if official or (new[0] >= H and new[1] >= W):
        return new
    scale = max(H / h, W / w)
    return max(H, round(h * scale)), max(W, round(w * scale))


def center_crop(x, size):
    """The middle (H, W) of (..., h, w); a side that falls short is filled up with zeros.  Halves round as in torchvision's CenterCrop."""
    H, W = size
    lack_h, lack_w = max(0, H - x.shape[-2]), max(0, W - x.shape[-1])
    x = F.pad(x, (lack_w // 2, lack_w - lack_w // 2, lack_h // 2, lack_h - lack_h // 2))
    top, left = round((x.shape[-2] - H) / 2), round((x.shape[-1] - W) / 2)
    return x[..., top:top + H, left:left + W]
