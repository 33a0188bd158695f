"""Converts a folder of shards of schema 1 to schema 2, which training reads frame by frame.

    python tools/convert_shards.py data/dance/train data/dance_2/train
    python tools/convert_shards.py data/dance/train data/dance_2/train --rgb-format jpeg --smaller-size 256x384

Every shard is hashed before it is read. Maps and key points stay the same to the bit, and so do pictures unless
--rgb-format is jpeg or webp. Clips, their order and the record of their videos are kept, so that the `prepare` recipe
of the folder finds it complete, if it states the form of the converted clips; the last line prints how (schema 1 has no
stored references, and conversion makes none). A stopped conversion continues with the same command. The source is not
changed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dreamdance.data.loading.stored_clip import StoredClip
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.frame_codecs import CODECS
from dreamdance.data.shards.index import DETAILS_KEY, read_index
from dreamdance.data.shards.mds import INDEX_FILE
from dreamdance.data.writing.clip_record import RGB_QUALITY, ClipRecord
from dreamdance.data.writing.shard_folder import SOURCES_KEY
from dreamdance.data.writing.shard_parts import Part, ShardFormat
from dreamdance.data.writing.shard_writer import write_shards
from dreamdance.errors import ShardError, UserError
from dreamdance.modalities import MODALITIES
from dreamdance.recipe.sections import Shards
from dreamdance.recipe.stored_sizes import smaller_sizes_problem
from dreamdance.runs.files import write_atomically
from dreamdance.runtime.ranks import Ranks

# Settings of the form of the files; a conversion replaces them.
_FORM_KEYS = ("compression", "hashes", "rgb_format", "rgb_quality", "smaller_sizes")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of shards of schema 1")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--rgb-format", choices=CODECS, default="png", help="codec of the pictures (png: lossless)")
    parser.add_argument("--rgb-quality", type=_quality, default=RGB_QUALITY, help=f"of jpeg and webp ({RGB_QUALITY})")
    parser.add_argument(
        "--smaller-size",
        type=_size,
        action="append",
        default=[],
        metavar="WxH",
        help="a further size at which all frames are stored; may be given again",
    )
    parser.add_argument("--num-workers", type=int, default=1, help="number of processes (1)")
    options = parser.parse_args(arguments)
    shard_format = ShardFormat(
        rgb_format=options.rgb_format, rgb_quality=options.rgb_quality, smaller_sizes=tuple(options.smaller_size)
    )
    try:
        num_clips = convert(options.source, options.target, shard_format, num_workers=options.num_workers)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.target}: {num_clips} clips converted from {options.source}")
    print(f"The prepare recipe finds them complete with {' '.join(_recipe_words(options.target, shard_format))}")
    return 0


def convert(source: Path, target: Path, shard_format: ShardFormat, *, num_workers: int = 1) -> int:
    """Writes the clips of a folder of schema 1 into another folder as schema 2; returns their number.

    Raises:
        ShardError: the source is damaged or has schema 2 already, the target was begun with other settings, or frames
            do not fit a further size.
    """
    _open_source.cache_clear()  # the folder may have changed since
    index = read_index(source / INDEX_FILE)
    if any(shard.schema_version != 1 for shard in index.shards):
        raise ShardError(f"{source} has shards of schema 2 already; nothing is converted")
    parts: dict[str, list[int]] = {}
    first = 0
    for shard in index.shards:
        numbers = parts.setdefault(shard.raw.name.partition(".")[0], [])
        numbers += range(first, first + shard.num_samples)
        first += shard.num_samples
    _check_sizes(_open_source(source).clip(0), shard_format)  # before anything is written
    settings = {key: value for key, value in index.details.get("settings", {}).items() if key not in _FORM_KEYS}
    write_shards(
        target,
        [Part(name, ConvertedPart(source, tuple(numbers), shard_format)) for name, numbers in parts.items()],
        settings=settings,
        shard_format=shard_format,
        num_workers=num_workers,
    )
    if SOURCES_KEY in index.details:
        content = json.loads((target / INDEX_FILE).read_text(encoding="utf-8"))
        content[DETAILS_KEY][SOURCES_KEY] = index.details[SOURCES_KEY]
        write_atomically(target / INDEX_FILE, json.dumps(content, sort_keys=True))
    return index.num_samples


@dataclass(frozen=True)
class ConvertedPart:
    """The clips of one part; the worker that writes the part reads them."""

    source: Path
    numbers: tuple[int, ...]
    shard_format: ShardFormat

    def __call__(self) -> Iterator[ClipRecord]:
        """Yields the clips.

        Raises:
            ShardError: a clip is damaged, or does not fit a further size.
        """
        for number in self.numbers:
            clip = _open_source(self.source).clip(number)
            _check_sizes(clip, self.shard_format)
            yield _record(clip)


@lru_cache(maxsize=1)
def _open_source(source: Path) -> StoredClips:
    """The reader that all parts of a process share."""
    return StoredClips(Shards(local=str(source)), ranks=Ranks())


def _check_sizes(clip: StoredClip, shard_format: ShardFormat) -> None:
    if problem := smaller_sizes_problem((clip.width, clip.height), shard_format.smaller_sizes):
        raise ShardError(f"{clip.where}: --smaller-size {problem}")


def _record(clip: StoredClip) -> ClipRecord:
    return ClipRecord(
        clip_id=clip.clip_id,
        fps=clip.fps,
        maps={name: clip.frames(name) for name in MODALITIES if clip.has(name)},
        keypoints=clip.keypoints,
        metadata=clip.metadata,
    )


def _recipe_words(target: Path, shard_format: ShardFormat) -> list[str]:
    """The words that the converted folder's `prepare` recipe needs."""
    section = "videos" if "files" in read_index(target / INDEX_FILE).details.get("settings", {}) else "dancers"
    words = [f"{section}.references=0", f"rgb_format={shard_format.rgb_format}"]
    if shard_format.rgb_format != "png":
        words.append(f"rgb_quality={shard_format.rgb_quality}")
    return [*words, f"smaller_sizes={json.dumps(shard_format.smaller_sizes, separators=(',', ':'))}"]


def _quality(text: str) -> int:
    if not (text.isdigit() and 1 <= int(text) <= 100):
        raise argparse.ArgumentTypeError(f"the quality '{text}' is no whole number from 1 to 100")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    width, separator, height = text.partition("x")
    if not (separator and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 256x384")
    return int(width), int(height)


if __name__ == "__main__":
    sys.exit(main())
