"""Checks a whole folder of shards: the index, the files, and, with --decode, every frame of every clip.

    python tools/verify_shards.py data/dancers/train
    python tools/verify_shards.py /scratch/cache --remote s3://bucket/train --decode

The command hashes every file and records the files that passed, so that no training hashes them again.
The exit code is 1 if a file is bad, and the output then names the first one; else it is 0.
"""

import argparse
import sys

from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.tracks import SUBJECTS
from dreamdance.errors import UserError
from dreamdance.modalities import MODALITIES
from dreamdance.recipe.sections import Shards


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of the shards; with --remote, the folder to download to")
    parser.add_argument("--remote", help="folder or URL to download the shards from, as in a recipe's `remote`")
    parser.add_argument("--size-only", action="store_true", help="compare sizes, not hashes")
    parser.add_argument("--decode", action="store_true", help="also decode every frame of every clip")
    options = parser.parse_args(arguments)
    try:
        shards = Shards(local=options.folder, remote=options.remote)
        clips = StoredClips(shards, verify="size" if options.size_only else "hash")
        num_frames = decode_all(clips) if options.decode else None
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    decoded = "" if num_frames is None else f", {num_frames} frames decoded"
    print(f"{options.folder}: {len(clips)} clips in {len(clips.index.shards)} shards are valid{decoded}")
    return 0


def decode_all(clips: StoredClips) -> int:
    """Decodes every frame of every clip, and of its references, at the largest size; returns the number of frames.

    Raises:
        ShardError: a clip cannot be decoded; the error names it.
    """
    num_frames = 0
    for number in range(len(clips)):
        clip = clips.clip(number)
        for subject in SUBJECTS:
            for column in MODALITIES:
                if clip.has(column, subject):
                    clip.frames(column, subject=subject)
        num_frames += clip.num_frames
    return num_frames


if __name__ == "__main__":
    sys.exit(main())
