"""Colour profiles of pictures: what a file holds -> sRGB."""
import io
import sys

from PIL import ImageChops, ImageCms

SAME = 2              # of 255: an sRGB profile moves colours by that much, as it and Pillow's round differently; they are left alone


def to_srgb(img):
    """Converted from the colour profile that the file holds, such as Display P3 of phones; as it is if that is sRGB."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(img.info["icc_profile"]))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        alpha = img.convert("RGBA").getchannel("A") if img.has_transparency_data else None
        converted = ImageCms.profileToProfile(img.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        print(f"warning: the picture's colour profile cannot be used ({reason}): its colours are taken as sRGB", file=sys.stderr)
        return img
    if max(high for _, high in ImageChops.difference(converted, img.convert("RGB")).getextrema()) <= SAME:
        return img
    if alpha:
        converted.putalpha(alpha)
    return converted
