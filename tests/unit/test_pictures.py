"""Pictures are read as viewers show them: geometry from the EXIF standard, colours from float64 arithmetic."""

import io
import logging
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.colour_profiles import cmyk_profile, gray_profile, rgb_profile, to_display_p3

from dreamdance.media.pictures import PictureError, read_picture, to_rgb_picture

ORIENTATION = 0x0112
MAGENTA = (255, 0, 255)
QUADRANTS = np.array([[(220, 30, 30), (30, 200, 40)], [(30, 40, 220), (220, 210, 30)]], dtype=np.uint8)
# The standard's operation on the stored rows and columns that makes the picture upright.
SEEN = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def quadrants(height: int = 24, width: int = 16) -> np.ndarray:
    return QUADRANTS.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def both_ways(picture: Image.Image, path: Path, **options: object) -> list[np.ndarray]:
    """As a file, as the PIL picture of that file, and as a copy of that picture without a file."""
    picture.save(path, **options)
    with Image.open(path) as opened:
        return [read_picture(path), to_rgb_picture(opened), to_rgb_picture(opened.copy())]


def png_of_16_bits(values: np.ndarray, *, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG of 1 to 4 channels, which Pillow itself writes with 8 bits only."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    colour = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + header + colour + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".png", {}), (".webp", {"lossless": True}), (".tif", {}), (".tif", {"compression": "tiff_lzw"}),
     (".jpg", {"quality": 100, "subsampling": 0})],
)  # fmt: skip
def test_all_eight_orientations_are_seen_upright(tmp_path: Path, suffix: str, options: dict[str, object]) -> None:
    stored = quadrants()
    for orientation, seen in SEEN.items():
        tags = Image.Exif()
        tags[ORIENTATION] = orientation
        for found in both_ways(Image.fromarray(stored), tmp_path / f"picture{suffix}", exif=tags, **options):
            assert found.shape == seen(stored).shape, orientation
            assert np.abs(found.astype(int) - seen(stored)).max() <= (2 if suffix == ".jpg" else 0), orientation


def test_damaged_exif_data_are_reported_and_the_picture_is_not_turned(caplog: pytest.LogCaptureFixture) -> None:
    picture = Image.fromarray(quadrants())
    picture.info["exif"] = b"Exif\0\0no such thing"
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(to_rgb_picture(picture, name="a.jpg"), quadrants())
    assert "a.jpg: its EXIF data are damaged" in caplog.text


def half_hidden(mode: str) -> Image.Image:
    """Left half green and opaque, right half magenta under alpha 0."""
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :4] = (30, 200, 40, 255)
    pixels[:, 4:] = (*MAGENTA, 0)
    picture = Image.fromarray(pixels)
    if mode == "P":
        flat = picture.convert("RGB").quantize(2)
        flat.info["transparency"] = flat.getpixel((7, 0))
        return flat
    if mode == "RGB":
        flat = picture.convert("RGB")
        flat.info["transparency"] = MAGENTA
        return flat
    return picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_colours_under_alpha_0_never_show(tmp_path: Path, mode: str) -> None:
    green = 131 if mode == "LA" else (30, 200, 40)  # ITU-R 601: .299 r + .587 g + .114 b
    options = {"transparency": half_hidden(mode).info["transparency"]} if mode in ("P", "RGB") else {}
    for found in both_ways(half_hidden(mode), tmp_path / "cutout.png", **options):
        assert (np.abs(found[:, :4].astype(int) - green) <= 3).all()  # a palette is not exact
        assert (found[:, 4:] == 255).all()
    assert (to_rgb_picture(half_hidden(mode), background=(1, 2, 3))[:, 4:] == (1, 2, 3)).all()


def test_half_transparent_colours_blend_with_the_background_by_alpha() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    share = colours[..., 3:] / 255
    expected = share * colours[..., :3] + (1 - share) * np.array([255, 255, 255])
    assert np.abs(to_rgb_picture(Image.fromarray(colours)) - expected).max() <= 1
    premultiplied = Image.fromarray(colours).convert("RGBa")
    assert np.abs(to_rgb_picture(premultiplied) - expected).max() <= 1.6


def test_a_transparent_colour_of_16_bits_never_shows(tmp_path: Path) -> None:
    values = np.full((4, 4, 3), 5_000, dtype=np.uint16)
    values[:, 2:] = (65_535, 300, 65_535)
    (tmp_path / "rgb.png").write_bytes(png_of_16_bits(values, transparent=(65_535, 300, 65_535)))
    (tmp_path / "gray.png").write_bytes(png_of_16_bits(values[..., 1:2], transparent=(300,)))
    for name in ("rgb.png", "gray.png"):
        found = read_picture(tmp_path / name)
        assert (found[:, 2:] == 255).all()
        assert (np.abs(found[:, :2] - 5_000 / 257) <= 1).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_gray_of_16_bits_is_scaled_and_not_clipped(tmp_path: Path, mode: str) -> None:
    ramp = np.linspace(0, 65_535, 256 * 8).round().astype(np.uint16).reshape(8, 256)
    stored = ramp.astype(">u2" if mode == "I;16B" else "<u2")
    picture = Image.frombytes(mode, (256, 8), stored.tobytes())
    for found in [*both_ways(picture, tmp_path / "ramp.tif"), to_rgb_picture(picture)]:
        assert np.abs(found - ramp[..., None] / 257).max() <= 0.5
        assert found.mean() == pytest.approx(127.5, abs=0.1)
    (tmp_path / "ramp.png").write_bytes(png_of_16_bits(ramp[..., None]))
    assert np.abs(read_picture(tmp_path / "ramp.png") - ramp[..., None] / 257).max() <= 0.5


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_a_tiff_that_counts_from_white_to_black_is_no_negative(tmp_path: Path, kind: type) -> None:
    share = np.linspace(0, 1, 256).reshape(8, 32)
    largest = 1 if kind is np.float32 else np.iinfo(kind).max
    path = tmp_path / "scan.tif"
    Image.fromarray((share * largest).astype(kind)).save(path)
    tag = struct.pack("<HHI", 262, 3, 1)  # the photometric interpretation: 1 is "black is zero", 0 "white is zero"
    content = path.read_bytes()
    assert content.count(tag + b"\1\0") == 1
    path.write_bytes(content.replace(tag + b"\1\0", tag + b"\0\0"))
    assert np.abs(read_picture(path) - 255 * (1 - share[..., None])).max() <= 1


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_and_alpha_of_16_bits_are_scaled(tmp_path: Path, channels: int) -> None:
    values = np.random.default_rng(channels).integers(0, 65_536, (16, 16, channels)).astype(np.uint16)
    (tmp_path / "deep.png").write_bytes(png_of_16_bits(values))
    colours, alpha = (values, 1.0) if channels == 3 else (values[..., :-1], values[..., -1:] / 65_535)
    expected = alpha * colours / 257 + (1 - alpha) * 255
    assert np.abs(read_picture(tmp_path / "deep.png") - expected).max() <= 2


def test_floats_from_0_to_1_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 512, dtype=np.float32).reshape(2, 256)
    for found in both_ways(Image.fromarray(ramp), tmp_path / "ramp.tif"):
        assert np.abs(found - ramp[..., None] * 255).max() <= 0.5001


@pytest.mark.parametrize("value", [1.5, 255.0, -0.1, float("nan")])
def test_floats_beyond_the_range_are_refused_by_name(tmp_path: Path, value: float) -> None:
    path = tmp_path / "hot.tif"
    Image.fromarray(np.array([[0.5, value]], dtype=np.float32)).save(path)
    with pytest.raises(PictureError, match=r"hot\.tif holds floats from .* floats in \[0, 1\] are accepted"):
        read_picture(path)


def test_integers_of_32_bits_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "count.tif"
    Image.fromarray(np.array([[0, 100_000]], dtype=np.int32)).save(path)
    with pytest.raises(PictureError, match=r"count\.tif holds integers of 32 bits, from 0 to 100000.*8 or 16 bits"):
        read_picture(path)


def test_two_shades_gray_and_palettes_are_rgb(tmp_path: Path) -> None:
    checks = np.indices((8, 8)).sum(axis=0) % 2 * 255
    for mode in ("1", "L", "P"):
        picture = Image.fromarray(checks.astype(np.uint8)).convert(mode)
        for found in both_ways(picture, tmp_path / "checks.png"):
            assert np.array_equal(found, np.stack([checks] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_display_p3_becomes_srgb(tmp_path: Path, mode: str) -> None:
    wide = to_display_p3(quadrants())
    assert np.abs(wide.astype(int) - quadrants()).max() > 10, "otherwise this test would prove nothing"
    picture = Image.fromarray(wide)
    picture = picture.quantize(4, method=Image.Quantize.MAXCOVERAGE) if mode == "P" else picture.convert(mode)
    for found in both_ways(picture, tmp_path / "wide.png", icc_profile=rgb_profile()):
        assert np.abs(found.astype(int) - quadrants()).max() <= 2


def test_a_gray_profile_applies_to_gray_pictures(tmp_path: Path) -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    linear = (stored / 255) ** 1.8
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(expected - stored).max() > 10, "otherwise this test would prove nothing"
    gray, opaque = Image.fromarray(stored), Image.new("L", (16, 16), 255)
    for picture in (gray, Image.merge("LA", [gray, opaque])):
        for found in both_ways(picture, tmp_path / "old.png", icc_profile=gray_profile(gamma=1.8)):
            assert np.abs(found - expected[..., None]).max() <= 2


def test_cmyk_is_converted_by_its_profile_and_without_one_by_its_inks(tmp_path: Path) -> None:
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for suffix, options in ((".tif", {}), (".jpg", {"quality": 100})):
        plain = both_ways(inks, tmp_path / f"plain{suffix}", **options)
        for found in plain:
            assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 2
        managed = both_ways(inks, tmp_path / f"managed{suffix}", icc_profile=cmyk_profile(lab=(50, 0, 0)), **options)
        for found in managed:
            assert np.abs(found.astype(int) - 119).max() <= 2  # L* 50 is sRGB's gray 118.9


def test_a_profile_of_another_colour_space_is_ignored() -> None:
    picture = Image.fromarray(quadrants())
    for profile in (cmyk_profile(lab=(50, 0, 0)), gray_profile(gamma=1.8)):
        picture.info["icc_profile"] = profile
        assert np.array_equal(to_rgb_picture(picture), quadrants())
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.info["icc_profile"] = srgb
    assert np.abs(to_rgb_picture(picture).astype(int) - quadrants()).max() <= 1


def test_a_damaged_profile_is_reported_and_the_values_count_as_srgb(caplog: pytest.LogCaptureFixture) -> None:
    picture = Image.fromarray(quadrants())
    for profile in (b"no profile", rgb_profile()[:200]):
        picture.info["icc_profile"] = profile
        with caplog.at_level(logging.WARNING):
            assert np.array_equal(to_rgb_picture(picture, name="a.png"), quadrants())
        assert "a.png: its colour profile is damaged" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_the_first_picture_of_an_animation_or_of_pages_is_read(tmp_path: Path, suffix: str) -> None:
    first, second = Image.fromarray(quadrants()), Image.fromarray(255 - quadrants())
    options = {"lossless": True} if suffix == ".webp" else {}
    first.save(tmp_path / f"several{suffix}", save_all=True, append_images=[second], **options)
    with Image.open(tmp_path / f"several{suffix}") as opened:
        assert opened.n_frames == 2
        opened.seek(1)
        assert np.array_equal(to_rgb_picture(opened), 255 - quadrants()), "a PIL picture gives its current frame"
    assert np.array_equal(read_picture(tmp_path / f"several{suffix}"), quadrants())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's warnings about damaged files
def test_files_damaged_anywhere_are_read_or_refused_by_name_and_nothing_else_happens(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    sources = []
    for kind, options in (("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})):
        content = io.BytesIO()
        Image.fromarray(quadrants()).save(content, kind, exif=tags, icc_profile=rgb_profile(), **options)
        sources.append(content.getvalue())
    chance, path = random.Random(0), tmp_path / "damaged"
    outcomes = {True: 0, False: 0}
    for _ in range(60):
        for source in sources:
            content = bytearray(source)
            for _ in range(chance.randint(1, 4)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
            try:
                outcome = str(read_picture(path).dtype)
            except PictureError as error:
                outcome = str(error)
            outcomes[outcome == "uint8"] += 1
            assert outcome == "uint8" or str(path) in outcome
    assert min(outcomes.values()) > 20, outcomes
