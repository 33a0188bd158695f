"""Checks a folder of shards from end to end: index, files, and, with --decode, every frame of every clip.

    python tools/verify_shards.py data/dancers/train
    python tools/verify_shards.py /scratch/cache --remote s3://bucket/train --decode

Hashes every file, and notes those that are ready to be read, so that no training hashes them again.
Exits with 1 and the name of the first bad file, or with 0 and what the folder holds.
"""

import argparse
import sys

from dreamdance.data.loading.dataset import StoredClips
from dreamdance.errors import UserError
from dreamdance.modalities import MODALITIES
from dreamdance.recipe.sections import Shards


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the shards lie, or are fetched to")
    parser.add_argument("--remote", help="where they come from, as in a recipe's `remote`")
    parser.add_argument("--size-only", action="store_true", help="compare sizes, not hashes")
    parser.add_argument("--decode", action="store_true", help="decode every frame of every clip as well")
    options = parser.parse_args(arguments)
    try:
        shards = Shards(local=options.folder, remote=options.remote)
        clips = StoredClips(shards, verify="size" if options.size_only else "hash")
        num_frames = decode_all(clips) if options.decode else None
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    decoded = "" if num_frames is None else f", {num_frames} frames decoded"
    print(f"{options.folder}: {len(clips)} clips in {len(clips.index.shards)} shards are sound{decoded}")
    return 0


def decode_all(clips: StoredClips) -> int:
    """Decodes everything; returns the number of frames.

    Raises:
        ShardError: naming the clip that cannot be decoded.
    """
    num_frames = 0
    for number in range(len(clips)):
        clip = clips.clip(number)
        for column in MODALITIES:
            if clip.has(column):
                clip.frames(column)
        num_frames += clip.num_frames
    return num_frames


if __name__ == "__main__":
    sys.exit(main())
