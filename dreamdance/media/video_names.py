"""What the clips and files of a video are called: `animate` and file systems do not take every name that videos have.

A video's own name stays in its clips' metadata.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256

MAX_ID_CHARACTERS = 182
"""What is left of the 200 that `inference.manifest` takes, with `.validation.000000` behind it."""
_GOOD_ID = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_ID_CHARACTERS - 1}}}")
_READABLE_CHARACTERS = 40
_PART_DIGITS = 12


def video_ids(names: Iterable[str]) -> dict[str, str]:
    """An id for each video, with which its clips' ids begin; no two are equal, or differ in upper and lower case alone.

    A name that `animate` takes is its own id. Another gives what can be read of it and a hash of the whole; so do
    names that differ in upper and lower case alone, which some file systems take for one.
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


def part_name(name: str) -> str:
    """Under which a video's shards are stored: it does not depend on which other videos there are."""
    return f"{_readable(name).replace('.', '_')}-{_hash(name)[:_PART_DIGITS]}"


def is_text(name: str) -> bool:
    """Whether a file's name is text in UTF-8, as everything must be that is written into JSON."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: object) -> str:
    """As it can be shown and logged, on one line and in UTF-8: a file's name may hold anything."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def _readable(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    words = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-")[:_READABLE_CHARACTERS].rstrip("._-")
    return words or "video"


def _hash(name: str) -> str:
    return sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
