"""Copies the sound of a video into another one that shows the same span of time."""

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from av.audio.stream import AudioStream
from av.container import InputContainer

from dreamdance.media.video import VideoInfo
from dreamdance.media.video_container import VideoError, opened_video
from dreamdance.runs.files import replace_atomically

# Codecs that players expect in mp4; other sound (PCM, Vorbis) is encoded as AAC.
COPIED_CODECS = frozenset({"aac", "mp3", "opus", "flac", "alac", "ac3", "eac3"})


def copy_sound(target: Path, video: VideoInfo, *, seconds: float) -> str | None:
    """Adds the sound of a video, from its first frame on, to an mp4 without sound. Packets are copied where mp4 can.

    Only the first sound stream is taken.

    Args:
        target: the mp4; it is replaced when the new one is complete.
        video: whose sound is taken.
        seconds: the span; later sound is left out.

    Returns:
        How it was done, for people: `copied (aac)`, `encoded as aac (pcm_s16le)`; None if the video has no sound.

    Raises:
        VideoError: the sound cannot be read, or the mp4 cannot be written; the mp4 is as it was.
    """
    start = 0.0 if video.counted else float(video.stamps[0] * video.time_base)
    try:
        with opened_video(video.path) as (source, _):
            if not source.streams.audio:
                return None
            sound = source.streams.audio[0]
            codec = sound.codec_context.codec.canonical_name
            with (
                replace_atomically(target) as temporary,
                av.open(str(target)) as pictures,
                av.open(str(temporary), "w") as output,
            ):
                shown = output.add_stream_from_template(pictures.streams.video[0])
                packets = _video_packets(pictures, shown)
                is_copied = codec in COPIED_CODECS
                if is_copied:
                    heard = output.add_stream_from_template(sound)
                    sounds = _copied_packets(source, sound, heard, start, seconds)
                else:
                    sounds = _encoded_packets(source, sound, output.add_stream("aac", sound.rate), start, seconds)
                for packet in heapq.merge(packets, sounds, key=_decoded_at):
                    output.mux(packet)
    except av.FFmpegError as error:
        raise VideoError(f"the sound of {video.path} cannot be copied: {error.strerror}") from error
    return f"copied ({codec})" if is_copied else f"encoded as aac ({codec})"


def _decoded_at(packet: Any) -> float:
    return float(packet.dts * packet.time_base)


def _video_packets(pictures: InputContainer, stream: Any) -> Iterator[Any]:
    for packet in pictures.demux(video=0):
        if packet.dts is not None:
            packet.stream = stream
            yield packet


def _copied_packets(
    source: InputContainer, sound: AudioStream, stream: Any, start: float, seconds: float
) -> Iterator[Any]:
    """The packets of the span, and the one before it, which decoders need to begin; players do not play that one."""
    for packet in source.demux(sound):
        if packet.dts is None or packet.pts is None or packet.time_base is None:
            continue
        length = float((packet.duration or 0) * packet.time_base)
        time = float(packet.pts * packet.time_base) - start
        if time >= seconds:
            return
        if time + 2 * length > 0:
            offset = round(start / packet.time_base)
            packet.pts -= offset
            packet.dts -= offset
            packet.stream = stream
            yield packet


def _encoded_packets(
    source: InputContainer, sound: AudioStream, stream: Any, start: float, seconds: float
) -> Iterator[Any]:
    # Files of plain samples name no layout.
    stream.layout = layout = "mono" if sound.channels == 1 else "stereo"
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=sound.rate)
    for frame in source.decode(sound):
        time = (frame.time or 0.0) - start
        if time >= seconds:
            break
        if time + frame.samples / frame.sample_rate <= 0:
            continue
        for part in resampler.resample(frame):
            part.pts = None if part.pts is None else part.pts - round(start * sound.rate)
            yield from stream.encode(part)
    yield from stream.encode(None)
