"""Equal frames make equal video files: in every process, whatever its memory holds, and on any number of cores."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dreamdance.media.video import write_video

# Each process fills its memory with other values while it writes a video of many colours and much motion.
WRITE = """
import os, sys
import numpy as np
from dreamdance.media.video import write_video

if sys.argv[2] == "one core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
y, x = np.mgrid[:720, :480]
frames = [np.stack([(x + 5 * i) % 256, (y + 3 * i) % 256, (x * y // 64 + 7 * i) % 256], -1) for i in range(16)]

class Frames:
    def __len__(self):
        return len(frames)

    def __getitem__(self, number):
        sizes = random.integers(1000, 2000000, 20)
        used = [np.full(size, value, np.uint8) for size, value in zip(sizes, random.integers(0, 256, 20))]
        return frames[number].astype(np.uint8)

random = np.random.default_rng(int(sys.argv[3]))
write_video(sys.argv[1], Frames(), fps=8, lossless=sys.argv[1].endswith("mkv"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_processes_write_equal_files(tmp_path, suffix):
    files = [tmp_path / f"{number}{suffix}" for number in range(4)]
    cores = ["one core", "all", "all", "all"] if hasattr(os, "sched_setaffinity") else ["all"] * 4
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITE, str(file), number_of_cores, str(seed)])
        for seed, (file, number_of_cores) in enumerate(zip(files, cores, strict=True))
    ]
    assert [process.wait(timeout=100) for process in processes] == [0] * 4
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1


def test_the_encoder_states_that_nothing_depends_on_memory_or_cores(tmp_path):
    """The test above finds differences of memory on processors with AVX-512 alone; this is x264's own note."""
    write_video(tmp_path / "clip.mp4", np.zeros((2, 32, 32, 3), np.uint8), fps=8)
    options = x264_options(tmp_path / "clip.mp4")
    assert {name: options[name] for name in ("mbtree", "threads", "crf")} == {
        "mbtree": "0",
        "threads": "1",
        "crf": "18.0",
    }


def x264_options(path: Path) -> dict[str, str]:
    """The options that x264 writes into the video, as text: `x264 - core 165 ... - options: cabac=1 ref=3 ...`."""
    note = path.read_bytes().split(b" - options: ")[1].split(b"\0")[0]
    return dict(word.split("=", 1) for word in note.decode("ascii", errors="ignore").split() if "=" in word)
