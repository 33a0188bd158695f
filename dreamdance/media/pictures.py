"""Reads pictures of any mode, orientation and colour profile as a viewer shows them.

Files that `animate` reads and PIL pictures that callers give to the pipelines take this same path. The result is
upright, opaque and in sRGB. Of a file with several frames (an animation, the pages of a TIFF) the first is used; of a
PIL picture, its current frame.
"""

import io
import logging
import struct
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from dreamdance.errors import UserError

logger = logging.getLogger(__name__)

MAX_PICTURE_PIXELS = 1 << 26
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # others run programs (EPS), or have little-tested readers

Colour = tuple[int, int, int]
# The background of a transparent reference: viewers and browsers show white, and cut-out tools assume it.
WHITE: Colour = (255, 255, 255)

# Errors that Pillow's readers raise on damaged files; those of the second line come from inside its readers.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, Image.DecompressionBombError),
    *(ValueError, KeyError, IndexError, TypeError, OverflowError, EOFError, struct.error),
)


# The rotation that turns a picture of each EXIF orientation upright. Pillow's `exif_transpose` does the same, but
# rewrites the other tags and fails if one of them is malformed.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(UserError):
    """A picture cannot be used. The message names it and the accepted kinds."""


def read_picture(path: Path, *, background: Colour = WHITE) -> NDArray[np.uint8]:
    """Reads a picture file.

    Args:
        path: PNG, JPEG, WebP, BMP or TIFF.
        background: sRGB colour behind transparent parts.

    Returns:
        `H W 3` uint8, upright sRGB.

    Raises:
        PictureError: the file is missing, damaged, too large, of another format, or its values have no stated range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # bounded below, by our own limit
            with Image.open(path, formats=PICTURE_FORMATS) as picture:
                if picture.width * picture.height > MAX_PICTURE_PIXELS:
                    raise PictureError(
                        f"{path} is {picture.width}x{picture.height}: pictures of up to {MAX_PICTURE_PIXELS} pixels "
                        "are accepted"
                    )
                return to_rgb_picture(picture, background=background, name=str(path))
    except PictureError:
        raise
    except _DECODING_ERRORS as error:
        raise PictureError(
            f"{path} is no picture that can be read ({', '.join(PICTURE_FORMATS)} are): {error}"
        ) from error


def to_rgb_picture(picture: Image.Image, *, background: Colour = WHITE, name: str = "a picture") -> NDArray[np.uint8]:
    """Converts a picture of any mode to the pixels that a viewer shows.

    The EXIF orientation is applied; an embedded ICC profile is converted to sRGB, and values without one are taken as
    sRGB; transparent parts are blended with the background here, before anything resizes the picture, so that colours
    hidden under alpha 0 never show. 16-bit values are scaled to 8 bits, floats from [0, 1].

    Args:
        picture: a picture from a file or from memory.
        background: sRGB colour behind transparent parts.
        name: the picture's name in messages.

    Returns:
        `H W 3` uint8.

    Raises:
        PictureError: the picture holds 32-bit integers, or floats outside of [0, 1]: the value of white is unknown.
    """
    profile = picture.info.get("icc_profile")
    colours, alpha = _split_alpha(_to_bytes(_upright(picture, name), name))
    colours = _to_srgb(colours, profile, name)
    if alpha is not None:
        canvas = Image.new("RGB", colours.size, background)
        canvas.paste(colours, mask=alpha)
        colours = canvas
    return np.asarray(colours)


def _upright(picture: Image.Image, name: str) -> Image.Image:
    picture.load()  # loading turns a TIFF upright and removes its tag
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODING_ERRORS as error:
        logger.warning("%s: its EXIF data are damaged (%s); it is read as upright", name, error)
        return picture
    method = _UPRIGHT.get(orientation)
    return picture if method is None else picture.transpose(method)


def _to_bytes(picture: Image.Image, name: str) -> Image.Image:
    """Converts a picture to a mode of 8 bits. Pillow's own conversion clips larger values and truncates floats."""
    # in a TIFF 0 may mean white: Pillow inverts 8-bit values itself, but no others
    from_white = getattr(picture, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        values = np.asarray(picture).astype(np.uint16)
        shades = np.round(values / 257).astype(np.uint8)
        gray = Image.fromarray(255 - shades if from_white else shades)
        transparent = picture.info.get("transparency")
        if isinstance(transparent, int):
            opaque = np.where(values == transparent, 0, 255).astype(np.uint8)
            gray = Image.merge("LA", (gray, Image.fromarray(opaque)))
        return gray
    if picture.mode == "I":
        low, high = picture.getextrema()
        raise PictureError(
            f"{name} holds integers of 32 bits, from {low} to {high}, and the value of white is unknown: save it with "
            "8 or 16 bits per channel"
        )
    if picture.mode == "F":
        floats = np.asarray(picture)
        if not (floats.min() >= 0 and floats.max() <= 1):  # NaN fails every comparison, so that it is refused too
            raise PictureError(
                f"{name} holds floats from {floats.min():.4g} to {floats.max():.4g}; floats in [0, 1] are accepted, or "
                "8 or 16 bits per channel"
            )
        return Image.fromarray(np.round((1 - floats if from_white else floats) * 255).astype(np.uint8))
    return picture


def _split_alpha(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Returns the colours (mode L, RGB or CMYK) and, for pictures with transparency, the opacity of each pixel."""
    transparent = picture.info.get("transparency")
    if (
        isinstance(transparent, tuple) and max(transparent) > 255
    ):  # the transparent colour of a 16-bit file, whose pixels were read with 8 bits
        picture = picture.copy()
        picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    if picture.mode in ("LA", "La") or (picture.mode == "L" and transparent is not None):
        gray, alpha = picture.convert("LA").split()
        return gray, alpha
    if picture.mode in ("RGBA", "RGBa", "PA") or transparent is not None:
        with_alpha = picture.convert("RGBA")
        return with_alpha.convert("RGB"), with_alpha.getchannel("A")
    if picture.mode in ("L", "RGB", "CMYK"):
        return picture, None
    return picture.convert("L" if picture.mode == "1" else "RGB"), None


def _to_srgb(picture: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """Converts from the embedded profile. A profile for another kind of colours is a leftover and is ignored."""
    if profile:
        try:
            embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            kind = embedded.profile.xcolor_space.strip()
            source = picture.convert("RGB") if (kind, picture.mode) == ("RGB", "L") else picture
            if source.mode == {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(kind):
                converted = ImageCms.profileToProfile(
                    source, embedded, ImageCms.createProfile("sRGB"), outputMode="RGB"
                )
                assert converted is not None, "only a conversion in place returns nothing"
                return converted
        except (ImageCms.PyCMSError, OSError) as error:
            logger.warning("%s: its colour profile is damaged (%s); its values are read as sRGB", name, error)
    return picture.convert("RGB")
