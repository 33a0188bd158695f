"""The manifest of `animate`: one JSON object per line; all lines are checked before anything runs.

Users write the manifest: its paths may point anywhere, but its ids become folder names and are restricted. A problem in
the manifest itself stops the run; one error lists all problems. If a file that an entry names is missing or damaged,
only that entry fails.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dreamdance.errors import ManifestError
from dreamdance.modalities import GIVEN_CONTROLS
from dreamdance.recipe.annotator_section import PersonBox

MAX_MANIFEST_BYTES = 1 << 28
MAX_SEED = (1 << 63) - 1
ID_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

REQUIRED_FIELDS = ("id", "image")
# What moves the person; an entry has one of them.
DRIVING_FIELDS = ("pose", "keypoints", "video")
# What may give the pose of the reference picture.
REFERENCE_FIELDS = ("reference_keypoints", "reference_pose")
PATH_FIELDS = ("image", "pose", "keypoints", "video", *REFERENCE_FIELDS, *GIVEN_CONTROLS)
OTHER_FIELDS = ("seed", "align", "fps", *REFERENCE_FIELDS, "reference_frame", "keypoints_size", "person")
FIELDS = (*REQUIRED_FIELDS, *DRIVING_FIELDS, *OTHER_FIELDS, *GIVEN_CONTROLS)

# How a driving skeleton is fitted to the body of the reference: by one scale (`media.alignment`), or bone by bone
# (`media.retargeting`).
Alignment = Literal["scale", "bones"]
ReferencePoseSource = Literal["reference_pose", "reference_keypoints", "reference_frame", "annotator"]


@dataclass(frozen=True)
class ManifestEntry:
    """One pair of a reference image and a pose sequence, or a driving video.

    Attributes:
        id: name of the result's folder, unique.
        image: the reference picture.
        pose: video of pose drawings, or None.
        keypoints: key-point file (`media.keypoint_formats`), or None.
        video: video of a person, whose key points the recipe's annotator finds, or None. An entry has exactly one of
            `pose`, `keypoints` and `video`.
        seed: seed of the noise, which also depends on the id.
        align: how to fit the driving skeleton to the body of the reference; None leaves it as it is.
        reference_keypoints: key-point file of the reference picture; only its first frame is used. With `video`, None
            lets the annotator find them.
        reference_pose: picture of the reference's pose drawing, for drawings whose key points are not known.
        fps: frames per second; None keeps the frame rate of the sequence. Drawings and key points are played at this
            rate; from `video`, frames are taken at this rate.
        maps: videos of the control maps that stage 2 reads and stage 1 does not make, by modality.
        reference_frame: frame number of the reference in the clip that it was taken from, for the evaluation. The pose
            of that frame is the reference's if nothing else gives it and the poses are not aligned.
        keypoints_size: width and height of the frames of `keypoints`, in pixels, if the file does not state them.
        person: who to follow in `keypoints` or `video` of several people; None takes the largest, or whom the recipe
            names. For `video`, a place in the order of size, or a box in fractions of the frame.
        line: line number in the manifest, for messages.
        needs_reference_pose: whether stage 2 was trained with `objective.reference_first`; not a field of the manifest.
    """

    id: str
    image: Path
    pose: Path | None = None
    keypoints: Path | None = None
    video: Path | None = None
    seed: int = 0
    align: Alignment | None = None
    reference_keypoints: Path | None = None
    reference_pose: Path | None = None
    fps: float | None = None
    maps: dict[str, Path] = field(default_factory=dict)
    reference_frame: int | None = None
    keypoints_size: tuple[int, int] | None = None
    person: int | PersonBox | None = None
    line: int = field(default=0, compare=False)
    needs_reference_pose: bool = False

    @property
    def reference_pose_from(self) -> ReferencePoseSource | None:
        """Where the pose of the reference comes from; None if stage 2 does not need it."""
        if not self.needs_reference_pose:
            return None
        if self.reference_pose is not None:
            return "reference_pose"
        if self.reference_keypoints is not None:
            return "reference_keypoints"
        if self.reference_frame is not None and self.video is None and self.align is None:
            return "reference_frame"
        return "annotator"

    @property
    def files(self) -> dict[str, Path]:
        """All files that the result depends on, by field; those of a folder of key points by field and name."""
        named = {name: getattr(self, name) for name in PATH_FIELDS if name not in GIVEN_CONTROLS} | self.maps
        used = {self.reference_pose_from, None if self.align is None else "reference_keypoints"}
        named = {name: path for name, path in named.items() if name not in REFERENCE_FIELDS or name in used}
        files: dict[str, Path] = {}
        for name, path in named.items():
            if path is not None and name in ("keypoints", "reference_keypoints") and path.is_dir():
                files |= {f"{name}/{file.name}": file for file in sorted(path.glob("*.json"))}
            elif path is not None:
                files[name] = path
        return files


def read_entries(path: Path, *, default_seed: int = 0) -> list[ManifestEntry]:
    """Reads and checks a manifest.

    Args:
        path: JSON lines, UTF-8, with or without a byte-order mark; empty lines are skipped. Relative paths in it are
            relative to its folder.
        default_seed: the seed of entries without one.

    Raises:
        ManifestError: the file cannot be read or has problems; the error lists all of them with line numbers.
    """
    entries: list[ManifestEntry] = []
    problems: list[str] = []
    first_lines: dict[str, int] = {}
    for number, text in _lines(path):
        found, values = _check_line(text)
        name = values.get("id")
        if isinstance(name, str) and not found:
            if name in first_lines:
                found.append(f"line {first_lines[name]} already has the id '{name}'; ids must be unique")
            first_lines.setdefault(name, number)
        problems += [f"{path}:{number}: {problem}" for problem in found]
        if not found:
            entries.append(_make_entry(values, path.parent, number, default_seed))
    if problems:
        raise ManifestError("\n".join(problems))
    if not entries:
        raise ManifestError(f"{path} has no entries; each line must be a JSON object with fields of {_listed(FIELDS)}")
    return entries


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"manifest {path} has more than {MAX_MANIFEST_BYTES} bytes (key: manifest)")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ManifestError(f"manifest {path} cannot be read: {error.strerror} (key: manifest)") from error
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"manifest {path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8 (key: manifest)"
        ) from error
    # Splits only at line feeds: `str.splitlines` also splits at characters of JSON strings (U+2028, U+0085, ...).
    # A byte-order mark may be at the start of any line, if files were joined.
    lines = (line.removeprefix("\ufeff").strip(" \t\r") for line in text.split("\n"))
    return ((number, line) for number, line in enumerate(lines, start=1) if line)


def _check_line(text: str) -> tuple[list[str], dict[str, Any]]:
    """The problems of one line, and its values."""
    try:
        values = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        return [f"not valid JSON: {error}"], {}
    if not isinstance(values, dict):
        return [f"must be a JSON object, not {type(values).__name__}"], {}
    problems = []
    for name in values:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"accepted are {_listed(FIELDS)}"
            problems.append(f"unknown field '{name}'; {hint}")
    problems += [f"'{name}' is missing" for name in REQUIRED_FIELDS if name not in values]
    problems += [problem for name, value in values.items() for problem in _check_value(name, value)]
    problems += _check_driving(values)
    if values.get("align") in (True, *get_args(Alignment)):
        if "pose" in values:
            problems.append("'align' needs 'keypoints' or 'video': the drawings of a pose video cannot be rescaled")
        if "reference_keypoints" not in values and "video" not in values:
            problems.append("'align' needs 'reference_keypoints', a key-point file of the reference image")
        problems += [
            f"'align' moves only the pose, so '{name}' would not match it" for name in GIVEN_CONTROLS if name in values
        ]
    return problems, values


def _check_driving(values: dict[str, Any]) -> Iterator[str]:
    """Yields the problems of what moves the person."""
    given = [name for name in DRIVING_FIELDS if name in values]
    if len(given) != 1:
        yield (
            "exactly one of 'pose' (a video of drawings), 'keypoints' (a key-point file) and 'video' (a video of a "
            f"person) must be given; this entry has {' and '.join(given) or 'none'}"
        )
    if "keypoints" not in values and "keypoints_size" in values:
        yield "'keypoints_size' describes 'keypoints', which is not given"
    if "person" in values and not {"keypoints", "video"} & values.keys():
        yield "'person' describes 'keypoints' or 'video', which are not given"
    if isinstance(values.get("person"), list) and "video" not in values:
        yield "'person' can be a box only for 'video'; for 'keypoints' it is a whole number"


def _check_value(name: str, value: Any) -> Iterator[str]:
    """Yields the problems of the value of one field."""
    is_integer = type(value) is int
    match name:
        case "id" if not isinstance(value, str) or not ID_PATTERN.fullmatch(value):
            yield f"id {value!r} must be 1 to 200 letters, digits, '.', '_' or '-', and not begin with '.' or '-'"
        case "seed" if not is_integer or not 0 <= value <= MAX_SEED:
            yield f"seed {value!r} must be a whole number from 0 to {MAX_SEED}"
        case "reference_frame" if not is_integer or value < 0:
            yield f"reference_frame {value!r} must be a whole number from 0"
        case "person" if not (is_integer and value >= 0) and not _is_box(value):
            yield (
                f"person {value!r} must be a whole number from 0, or a box [left, top, right, bottom] in fractions of "
                "the frame, with left < right and top < bottom"
            )
        case "keypoints_size" if not _is_size(value):
            yield f"keypoints_size {value!r} must be [width, height], whole numbers from 1 to 65536"
        case "align" if type(value) is not bool and value not in get_args(Alignment):
            yield f'align {value!r} must be "scale" (the same as true), "bones" or false'
        case "fps" if (not is_integer and type(value) is not float) or not 0 < value <= 1000:
            yield f"fps {value!r} must be a number above 0, at most 1000"
        case _ if name in PATH_FIELDS:
            yield from _check_path(name, value)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(one) is int and 0 < one <= 65536 for one in value)


def _is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4 or any(type(one) not in (int, float) for one in value):
        return False
    left, top, right, bottom = value
    return bool(0 <= left < right <= 1 and 0 <= top < bottom <= 1)


def _check_path(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str) or not value or "\0" in value:
        yield f"{name} {value!r} must be a path"
    else:
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            yield f"{name} {value!r} must be a path: it contains half of a surrogate pair"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field '{repeated}' is given twice")
    return values


def _make_entry(values: dict[str, Any], folder: Path, line: int, default_seed: int) -> ManifestEntry:
    paths = {name: folder / values[name] for name in PATH_FIELDS if name in values}
    maps = {name: paths.pop(name) for name in GIVEN_CONTROLS if name in paths}
    others = {name: value for name, value in values.items() if name not in PATH_FIELDS}
    if "keypoints_size" in others:
        others["keypoints_size"] = tuple(others["keypoints_size"])
    if isinstance(others.get("person"), list):
        others["person"] = tuple(others["person"])
    if type(others.get("align")) is bool:
        others["align"] = "scale" if others["align"] else None
    return ManifestEntry(**{"seed": default_seed, **others, **paths}, maps=maps, line=line)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
