"""The sound of a driving video in a result: the same packets, at the same times, cut to the span."""

import av
import numpy as np
import pytest
from support.sounds import RATE, heard, sound_packets, write_video_with_sound

from dreamdance.media.sound import copy_sound
from dreamdance.media.video import VideoError, probe_video, read_frames, write_video

FPS, NUM_FRAMES = 25, 25
FRAMES = np.linspace(0, 250, 50, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)


@pytest.fixture
def target(tmp_path):
    write_video(tmp_path / "result.mp4", FRAMES[:NUM_FRAMES], fps=FPS)
    return tmp_path / "result.mp4"


@pytest.mark.parametrize(("codec", "name"), [("aac", "aac"), ("libmp3lame", "mp3")])
def test_packets_are_copied_with_their_times_and_cut_to_the_span(tmp_path, target, codec, name):
    source = tmp_path / "source.mp4"
    write_video_with_sound(source, FRAMES, fps=FPS, codec=codec, seconds=2.0)
    shown = read_frames(target)
    assert copy_sound(target, probe_video(source), seconds=1.0) == f"copied ({name})"
    expected = [packet for packet in sound_packets(source) if packet[0] < 1.0]
    assert len(expected) < len(sound_packets(source))
    found = sound_packets(target)
    assert [content for _, content in found] == [content for _, content in expected]
    np.testing.assert_allclose([time for time, _ in found], [time for time, _ in expected], atol=2 / RATE)
    assert (read_frames(target) == shown).all()


def test_sound_that_mp4_players_do_not_expect_is_encoded(tmp_path, target):
    source = tmp_path / "source.mkv"
    write_video_with_sound(source, FRAMES, fps=FPS, codec="pcm_s16le", seconds=2.0)
    assert copy_sound(target, probe_video(source), seconds=1.0) == "encoded as aac (pcm_s16le)"
    with av.open(str(target)) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
    found, expected = heard(target), heard(source)
    assert RATE <= len(found) <= 1.15 * RATE
    middle = slice(RATE // 4, RATE * 3 // 4)
    assert np.corrcoef(found[middle], expected[middle])[0, 1] > 0.99


def test_sound_begins_with_the_first_frame_of_the_video(tmp_path, target):
    """A file whose pictures begin half a second after its sound, as recordings that were cut without encoding do."""
    whole, late = tmp_path / "whole.mp4", tmp_path / "late.mkv"
    write_video_with_sound(whole, FRAMES, fps=FPS, codec="aac", seconds=2.0)
    with av.open(str(whole)) as source, av.open(str(late), "w") as output:
        streams = {stream.index: output.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is None:
                continue
            if packet.stream.type == "video":
                shift = round(0.5 / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = streams[packet.stream.index]
            output.mux(packet)
    assert copy_sound(target, probe_video(late), seconds=1.0) == "copied (aac)"
    found, expected = heard(target), heard(whole)[RATE // 2 :]
    middle = slice(RATE // 4, RATE * 3 // 4)
    assert np.corrcoef(found[middle], expected[middle])[0, 1] > 0.9  # matroska rounds times to milliseconds


def test_a_video_without_sound_leaves_the_result_as_it_is(tmp_path, target):
    write_video(tmp_path / "silent.mp4", FRAMES, fps=FPS)
    before = target.read_bytes()
    assert copy_sound(target, probe_video(tmp_path / "silent.mp4"), seconds=1.0) is None
    assert target.read_bytes() == before


def test_a_result_that_cannot_be_written_is_kept(tmp_path, target):
    source = tmp_path / "source.mp4"
    write_video_with_sound(source, FRAMES, fps=FPS, codec="aac", seconds=2.0)
    video = probe_video(source)
    source.write_bytes(b"replaced by something else")
    before = target.read_bytes()
    with pytest.raises(VideoError, match=r"source\.mp4"):
        copy_sound(target, video, seconds=1.0)
    assert target.read_bytes() == before
