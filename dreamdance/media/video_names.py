"""Names of the clips and files that are made from a video: `animate` and file systems do not accept every video's name.

The clips' metadata keep the video's own name.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from dreamdance.modalities import MODALITIES

# The modalities that a clip may have a file of.
FILE_MODALITIES = tuple(name for name, modality in MODALITIES.items() if modality.domain or modality.control)
# Files of these names are videos; their content decides how they are read.
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
# `inference.manifest` accepts 200 characters; the suffix `.validation.000000` takes the others.
MAX_ID_CHARACTERS = 182
_GOOD_ID = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_ID_CHARACTERS - 1}}}")
_READABLE_CHARACTERS = 40
_PART_DIGITS = 12


def video_ids(names: Iterable[str]) -> dict[str, str]:
    """An id for each video, with which its clips' ids begin; no two are equal, or differ in upper and lower case alone.

    A name that `animate` accepts is its own id. For other names the id consists of the readable part and a hash of the
    whole name; the same holds for names that differ only in case, which some file systems do not distinguish.
    """
    names = sorted(names)
    folded = Counter(name.casefold() for name in names)
    kept = [name for name in names if _GOOD_ID.fullmatch(name) and folded[name.casefold()] == 1]
    ids, taken = {name: name for name in kept}, {name.casefold() for name in kept}
    for name in names:
        if name in ids:
            continue
        digest, digits = _hash(name), 8
        while (candidate := f"{_readable(name)}-{digest[:digits]}").casefold() in taken:
            digits += 1
        ids[name] = candidate
        taken.add(candidate.casefold())
    return ids


def plain_name(file_name: str) -> str | None:
    """The clip's name if a file contains the pictures of a clip, such as `a` for `a.mp4` and `a.rgb.mp4`; else None.

    Upper and lower case of what follows the name make no difference.
    """
    stem, dot, suffix = file_name.rpartition(".")
    if not stem or f"{dot}{suffix.lower()}" not in VIDEO_SUFFIXES:
        return None
    name, dot, kind = stem.rpartition(".")
    if not dot or not name or kind.lower() not in FILE_MODALITIES:
        return stem
    return name if kind.lower() == "rgb" else None


def files_of(folder: Path | str, name: str, endings: Iterable[str]) -> tuple[Path, ...]:
    """The paths of a clip's files; none of them has to exist.

    Args:
        folder: it contains the files.
        name: of the clip.
        endings: what may follow the name, in lower case, such as `.mask.mkv`. A file whose ending has upper-case
            letters, as phones write them, is found too.
    """
    folder = Path(folder).absolute()
    try:
        known = _names_by_lower_case(folder, folder.stat().st_mtime_ns)
    except OSError:
        known = {}
    paths: list[Path] = []
    for ending in endings:
        found = [file for file in known.get(f"{name}{ending}".lower(), ()) if file.startswith(name)]
        paths += [folder / file for file in found or [f"{name}{ending}"]]
    return tuple(paths)


@lru_cache(maxsize=4)
def _names_by_lower_case(folder: Path, changed_ns: int) -> Mapping[str, list[str]]:
    """The names of a folder's files by their form in lower case; `changed_ns` is when the folder was last changed."""
    names = defaultdict[str, list[str]](list)
    for name in sorted(os.listdir(folder)):
        names[name.lower()].append(name)
    return names


def part_name(name: str) -> str:
    """The name under which a video's shards are stored; it does not depend on the other videos."""
    return f"{_readable(name).replace('.', '_')}-{_hash(name)[:_PART_DIGITS]}"


def is_text(name: str) -> bool:
    """Returns whether a file's name is valid UTF-8; only then can it be written into JSON."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: object) -> str:
    """Makes any file's name printable: one line of valid UTF-8."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def _readable(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    words = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-")[:_READABLE_CHARACTERS].rstrip("._-")
    return words or "video"


def _hash(name: str) -> str:
    return sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
