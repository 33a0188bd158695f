"""`prepare` from folders of pictures (the form of the TikTok data set), and from a list of names."""

import logging
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from support.true_maps import FOLDER, NAME, write_truth
from support.video_folders import stored_clips, videos_recipe

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.annotation.networks import open_networks
from dreamdance.data.prepare import prepare
from dreamdance.data.writing.video_list import read_list
from dreamdance.errors import MissingInputError, ShardError
from dreamdance.launch.finished import digest_inputs, is_finished, mark_finished
from dreamdance.launch.preflight import _videos
from dreamdance.media.video import VideoError, write_video

WIDTH, HEIGHT, NUM_FRAMES, FPS = 47, 71, 8, 25.0  # odd sizes
SECTION = {"pose": NAME, "mask": NAME, "depth": NAME, "normal": NAME, "smooth": False}
NAMES = ("00001", "00002")


@pytest.fixture(scope="module")
def dancers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    clips = {
        name: render_clip(seed, num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT, fps=8)
        for name, seed in zip(NAMES, HELD_OUT_SEEDS[20:22], strict=True)
    }
    for name, clip in clips.items():
        write_truth(folder, name, clip)
    return folder, clips


@pytest.fixture
def job(tmp_path, dancers, monkeypatch):
    folder, clips = dancers
    monkeypatch.setenv(FOLDER, str(folder))
    open_networks.cache_clear()
    yield Job(tmp_path, clips)
    open_networks.cache_clear()


class Job:
    """Two clips as folders of pictures; the second has masks, which are not those that the annotator finds."""

    def __init__(self, folder, clips) -> None:
        self.folder, self.clips, self.videos = folder, clips, folder / "TikTok_dataset"
        self.masks = np.zeros((NUM_FRAMES, HEIGHT, WIDTH), np.uint8)
        self.masks[:, 10:60, 10:40] = 255
        for name, clip in clips.items():
            (self.videos / name / "images").mkdir(parents=True)
            for number, picture in enumerate(clip.rgb, start=1):
                Image.fromarray(picture).save(self.picture(name, number))
        (self.videos / "00002" / "masks").mkdir()
        for number, mask in enumerate(self.masks, start=1):
            Image.fromarray(mask).save(self.picture("00002", number, "masks"))

    def picture(self, name, number, kind="images"):
        return self.videos / name / kind / f"{number:04d}.png"

    def recipe(self, output="data", **changes):
        changes = {"validation_fraction": 0, "crop_letterbox": False, "images_fps": FPS, **changes}
        recipe = videos_recipe(self.folder / output, self.videos, annotators=SECTION, **changes)
        return recipe.model_copy(update={"contact_sheets": False})

    def run(self, output="data", **changes):
        """Runs `prepare` as a job does, which notes that the run is finished."""
        recipe, run_folder = self.recipe(output, **changes), self.folder / "run"
        inputs = digest_inputs(recipe, self.folder)
        prepare(recipe, run_folder)
        mark_finished(recipe, run_folder, inputs)
        return {clip.clip_id.split(".")[0]: clip for clip in stored_clips(self.folder / output, "train")}

    def is_finished(self):
        return is_finished(self.recipe(), self.folder / "run")

    def packed(self, output="data"):
        return {path.name: path for path in self.folder.glob(f"{output}/annotations/.pictures-*/*")}


def test_clips_have_the_pixels_of_the_pictures_and_the_given_masks(job):
    found = job.run()
    assert set(found) == set(NAMES)
    for name, clip in found.items():
        pictures = [np.asarray(Image.open(job.picture(name, number))) for number in range(1, NUM_FRAMES + 1)]
        np.testing.assert_array_equal(clip.frames("rgb"), pictures)
        assert clip.fps == pytest.approx(FPS)
        np.testing.assert_allclose(clip.keypoints, job.clips[name].keypoints, atol=1e-6)
    np.testing.assert_array_equal(found["00002"].frames("mask"), job.masks)
    np.testing.assert_array_equal(found["00001"].frames("mask") > 0, job.clips["00001"].mask)
    assert set(found["00002"].metadata["given"]) == {"mask"}


def test_a_second_start_reads_no_picture_and_a_changed_picture_is_refused(job):
    job.run()
    before = {name: path.stat().st_mtime_ns for name, path in job.packed().items()}
    job.run()
    assert {name: path.stat().st_mtime_ns for name, path in job.packed().items()} == before
    for path in job.packed().values():
        path.unlink()  # the same pictures make the same videos
    assert set(job.run()) == set(NAMES)
    Image.fromarray(job.clips["00001"].rgb[0]).save(job.picture("00001", 3))
    with pytest.raises(ShardError, match=r"00001\.rgb\.mkv has changed"):
        job.run()


def test_a_finished_run_is_found_finished_until_a_picture_changes(job):
    job.run()
    assert job.is_finished()
    for path in job.packed().values():
        path.unlink()
    assert job.is_finished(), "the videos that were made of the pictures are not needed any more"
    picture, masks = job.picture("00001", 3), job.videos / "00002" / "masks"
    content, times = bytearray(picture.read_bytes()), picture.stat()
    (masks / "._0001.png").write_bytes(b"left by macOS")
    assert job.is_finished()
    content[-1] ^= 1
    picture.write_bytes(content)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not job.is_finished(), "another content of the same size and time"
    content[-1] ^= 1
    picture.write_bytes(content)
    job.run()
    assert job.is_finished(), "the same pixels again"
    for change in (lambda: masks.rename(masks.with_name("other")), lambda: picture.unlink()):
        change()
        assert not job.is_finished()
        with pytest.raises(ShardError, match=r"has changed|was removed"):
            job.run()


def test_a_video_or_a_file_of_key_points_that_is_added_makes_a_run_unfinished(job):
    job.run()
    for name in ("b.webm", "c.MOV", "00001.keypoints.json", "00001.normal.npz"):
        (job.videos / name).write_bytes(b"")
        assert not job.is_finished(), name
        (job.videos / name).unlink()
        assert job.is_finished(), name


def test_pictures_of_16_bits_with_alpha_and_numbers_without_zeros_are_read_as_viewers_show_them(job):
    folder = job.videos / "00001" / "images"
    for number, picture in enumerate(job.clips["00001"].rgb, start=1):
        job.picture("00001", number).rename(folder / f"{number + 4}.png")  # 5, ..., 10, 11, 12
        if number == 2:
            Image.fromarray(np.dstack([picture, np.full((HEIGHT, WIDTH), 255, np.uint8)])).save(folder / "6.png")
        if number == 3:
            Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(folder / "7.png")
    clip = job.run()["00001"]
    expected = job.clips["00001"].rgb.copy()
    expected[2] = expected[2, ..., :1]
    np.testing.assert_array_equal(clip.frames("rgb"), expected)


def test_palettes_transparent_pictures_and_masks_as_editors_save_them(job):
    rgb, masks = job.clips["00002"].rgb.copy(), job.masks
    hole = np.zeros((HEIGHT, WIDTH), np.uint8)
    hole[:20] = 255
    Image.fromarray(np.dstack([rgb[0], 255 - hole])).save(job.picture("00002", 1))
    rgb[0, :20] = 255
    colours = Image.fromarray(rgb[1]).quantize(16)
    colours.save(job.picture("00002", 2))
    rgb[1] = colours.convert("RGB")
    kinds = {
        1: Image.fromarray(masks[0] > 0),  # one bit
        2: Image.fromarray(np.dstack([np.full_like(rgb[1], 255), masks[1]])),  # the person is opaque
        3: Image.fromarray(masks[2].astype(np.uint16) * 257),
        4: Image.fromarray(np.repeat(masks[3][..., None], 3, axis=2)),
        5: Image.fromarray(masks[4]).convert("P"),
    }
    for number, mask in kinds.items():
        job.picture("00002", number, "masks").unlink()
        mask.save(job.videos / "00002" / "masks" / f"{number}.png")
    clip = job.run()["00002"]
    np.testing.assert_array_equal(clip.frames("rgb"), rgb)
    np.testing.assert_array_equal(clip.frames("mask"), masks)


def test_numbers_within_names_count_too(job):
    folder = job.videos / "00001" / "images"
    for number in range(1, NUM_FRAMES + 1):
        job.picture("00001", number).rename(folder / f"frame_{number + 5}.png")  # frame_6, ..., frame_10, ...
    np.testing.assert_array_equal(job.run()["00001"].frames("rgb"), job.clips["00001"].rgb)


def test_a_picture_folder_beside_a_video_of_the_same_name_is_a_problem_of_that_clip(job):
    for file, name in (("00001.mp4", "00001"), ("00001.rgb.mkv", "00001"), ("00002.mask.mkv", "00002")):
        write_video(job.videos / file, job.clips["00001"].rgb, fps=FPS, lossless=file.endswith("mkv"))
        with pytest.raises(VideoError, match=rf"has {file} and pictures in {name}"):
            job.run()
        (job.videos / file).unlink()
    assert set(job.run()) == set(NAMES)


def test_a_mask_beside_a_picture_folder_without_masks_is_read_and_nothing_is_packed_again(job):
    masks = np.repeat(job.masks[..., None], 3, axis=3)
    write_video(job.videos / "00001.mask.mkv", masks, fps=FPS, lossless=True)
    for _ in range(2):
        clip = job.run()["00001"]
        np.testing.assert_array_equal(clip.frames("mask"), job.masks)
        times = {name: path.lstat().st_mtime_ns for name, path in job.packed().items()}
    job.run()
    assert {name: path.lstat().st_mtime_ns for name, path in job.packed().items()} == times


def test_a_video_in_the_place_of_a_damaged_picture_folder_is_read(job):
    damage(job, "torn")
    with pytest.raises(VideoError, match="no picture that can be read"):
        job.run()
    shutil.rmtree(job.videos / "00002")
    write_video(job.videos / "00002.rgb.mkv", job.clips["00002"].rgb, fps=FPS, lossless=True)
    np.testing.assert_array_equal(job.run()["00002"].frames("rgb"), job.clips["00002"].rgb)


def damage(job, kind):
    picture = job.picture("00002", 3)
    if kind == "torn":
        picture.write_bytes(picture.read_bytes()[:300])
    elif kind == "size":
        Image.new("RGB", (WIDTH + 1, HEIGHT)).save(picture)
    elif kind == "mask_size":
        Image.new("L", (WIDTH, HEIGHT - 1)).save(job.picture("00002", 3, "masks"))
    elif kind == "mask":
        job.picture("00002", 3, "masks").unlink()
    elif kind == "picture":
        picture.unlink()
    elif kind == "twice":
        picture.rename(picture.with_name("3.png"))
        Image.new("RGB", (WIDTH, HEIGHT)).save(picture)
    elif kind == "zero_one":
        for number, mask in enumerate(job.masks, start=1):
            Image.fromarray(mask // 255).save(job.picture("00002", number, "masks"))
    else:
        for path in (job.videos / "00002" / "images").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("torn", r"00002/images/0003\.png is no picture that can be read"),
        ("size", r"00002/images/0003\.png is 48x71, images/0001\.png 47x71"),
        ("mask_size", r"00002/masks/0003\.png is 47x70, images/0001\.png 47x71"),
        ("mask", r"00002/masks has no mask for 1 of 8 pictures, such as 0003"),
        ("picture", r"00002/images has no picture for 1 masks, such as 0003"),
        ("twice", r"00002/images has 0003\.png and 3\.png for one frame"),
        ("zero_one", r"00002/masks has the values 0 and 1"),
        ("empty", r"00002/images contains no pictures"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_and_can_be_left_out(job, kind, message):
    damage(job, kind)
    with pytest.raises(VideoError, match=message):
        job.run()
    assert set(job.run(on_error="skip")) == {"00001"}
    assert "00002" in (job.folder / "data" / "damaged_videos.tsv").read_text()


def test_a_repaired_folder_is_added(job):
    whole = job.picture("00002", 3).read_bytes()
    damage(job, "torn")
    job.run(on_error="skip")
    job.picture("00002", 3).write_bytes(whole)
    assert set(job.run(on_error="skip")) == set(NAMES)


def test_a_gap_in_the_numbers_is_a_warning(job, caplog):
    job.picture("00001", 4).unlink()
    clip = job.run()["00001"]
    np.testing.assert_array_equal(clip.frames("rgb"), np.delete(job.clips["00001"].rgb, 3, axis=0))
    assert "no picture is between 0003.png and number 5" in caplog.text


def test_videos_beside_folders_of_pictures_are_read_too(job):
    write_video(job.videos / "b.mkv", job.clips["00001"].rgb, fps=8, lossless=True)
    assert set(job.run()) == {*NAMES, "b"}
    (job.videos / "b.mkv").unlink()
    with pytest.raises(ShardError, match="b was removed"):
        job.run()


def test_a_list_chooses_videos_and_names_those_that_are_missing(job, caplog):
    caplog.set_level(logging.WARNING)
    names = job.folder / "ids.txt"
    names.write_text("# people\n00002  # a dancer\n\n" + "".join(f"{number}\n" for number in range(7000, 7012)))
    assert set(job.run(list=str(names))) == {"00002"}
    missing = (job.folder / "data" / "missing_videos.txt").read_text().split()
    assert missing == [str(number) for number in range(7000, 7012)]
    assert "12 names in" in caplog.text
    assert "7009; all" in caplog.text
    names.write_text("00002\n")
    job.run(list=str(names))
    assert not (job.folder / "data" / "missing_videos.txt").exists()
    with pytest.raises(ShardError, match="00001 was added"):
        job.run()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ids.txt", "https://www.tiktok.com/@a.b/video/6875468410612993286?lang=en#x\n123.mp4 # a dancer\nplain\n"),
        (
            "ids.csv",
            'caption,webVideoUrl,likes\r\n"a, b",https://m.tiktok.com/v/6875468410612993286.html,7\r\n'
            "c,https://www.tiktok.com/@c/video/123,8\r\nd,plain,9\r\n",
        ),
        ("ids.CSV", "Video ID\n6875468410612993286\n123\nplain\n"),
        ("ids.tsv", "6875468410612993286\tfirst\n123.MOV\tsecond\n\nplain\tthird\n"),
    ],
)
def test_lists_hold_names_addresses_or_tables_with_them(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())  # as spreadsheets save it
    assert read_list(tmp_path / name) == ["123", "6875468410612993286", "plain"]


def test_a_list_without_any_of_the_videos_is_an_error_that_names_both(job):
    names = job.folder / "ids.txt"
    names.write_text("7000\n")
    for _ in range(2):  # folders of pictures alone, then a video beside them
        with pytest.raises(MissingInputError, match=r"(?s)ids\.txt .*videos\.list.*TikTok_dataset|pictures-"):
            job.run(list=str(names))
        write_video(job.videos / "b.mkv", job.clips["00001"].rgb, fps=8, lossless=True)
    with pytest.raises(MissingInputError, match=r"nothing\.txt cannot be read"):
        job.run(list=str(job.folder / "nothing.txt"))


def test_the_launcher_finds_folders_of_pictures_and_a_missing_list(job):
    recipe = videos_recipe(job.folder / "data", job.videos, annotators=SECTION, list=str(job.folder / "none.txt"))
    assert "list of videos" in [problem.what for problem in _videos(recipe.videos)]
    assert "videos" not in [problem.what for problem in _videos(recipe.videos)]
