"""Videos with sound, written by PyAV alone."""

from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

RATE = 16_000


def write_video_with_sound(path: Path, frames: NDArray[np.uint8], *, fps: int, codec: str, seconds: float) -> None:
    """H.264 of high quality, and a rising tone of the given length."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", fps)
        sound: Any = container.add_stream(codec, RATE)  # the types know no codec by a variable
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt, video.options = "yuv420p", {"crf": "4"}
        sound.layout = "mono"
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        times = np.arange(round(RATE * seconds)) / RATE
        tone = (0.4 * np.sin(2 * np.pi * (200 + 100 * times) * times) * 32767).astype(np.int16)
        resampler = av.AudioResampler(format=sound.codec_context.format, layout="mono", rate=RATE)
        for start in range(0, len(tone), 1024):
            part = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="s16", layout="mono")
            part.sample_rate, part.pts = RATE, start
            for ready in resampler.resample(part):
                container.mux(sound.encode(ready))
        container.mux(sound.encode(None))


def sound_packets(path: Path) -> list[tuple[float, bytes]]:
    """Time in seconds and content of each packet of sound."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        return [(float((packet.pts or 0) * (packet.time_base or 1)), bytes(packet)) for packet in packets]


def heard(path: Path) -> NDArray[np.float32]:
    """The decoded samples from time 0 on, in [-1, 1]."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        parts = []
        for frame in container.decode(audio=0):
            skipped = max(0, -round((frame.time or 0.0) * RATE))
            parts += [ready.to_ndarray()[0][skipped:] for ready in resampler.resample(frame)]
    return np.concatenate(parts)
