"""Writes example inputs for `animate`: reference and poses of each validation clip, and a manifest that lists them.

Pairs of dancers have a manifest of their own: the reference of one, driven by the poses of another.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dreamdance.data.loading.stored_clip import ReferenceFrame, StoredClip, fixed_reference
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.index import read_index
from dreamdance.data.shards.mds import INDEX_FILE
from dreamdance.media.keypoints import KeypointSequence, write_keypoint_file
from dreamdance.media.video import write_video
from dreamdance.recipe.sections import Shards
from dreamdance.runs.files import write_atomically
from dreamdance.runs.layout import DRIVEN_BY, EXAMPLE_FIELDS, PAIRS_FILE
from dreamdance.runtime.ranks import Ranks

MANIFEST_FILE = "manifest.jsonl"
EXAMPLES_FOLDER = "examples"


def write_examples(output: Path, *, before_clip: Callable[[str], None], has_pairs: bool = False) -> int:
    """Writes the reference and the poses of each validation clip, then the manifests. Without clips they are empty.

    The reference is that of `data.loading.stored_clip.fixed_reference`, which validation uses too.

    Args:
        output: the folder that contains `validation`.
        before_clip: called before each clip with a text that contains its number.
        has_pairs: whether to write `pairs.jsonl`; clips that other clips' poses drive are listed there alone.

    Returns:
        The number of clips in the first manifest.
    """
    index = output / "validation" / INDEX_FILE
    manifests = [output / MANIFEST_FILE, *([output / PAIRS_FILE] if has_pairs else [])]
    num_clips = read_index(index, may_be_empty=True).num_samples
    if not all(_is_up_to_date(manifest, index) for manifest in manifests):
        own, pairs = dict[str, dict[str, Any]](), list[dict[str, Any]]()
        clips = None
        for number in range(num_clips):
            before_clip(f"clip {number} of {num_clips}")
            clips = clips or StoredClips(Shards(local=str(output / "validation")), verify="size", ranks=Ranks())
            clip = clips.clip(number)
            if DRIVEN_BY in clip.metadata:  # after the clips whose poses drive others
                pairs.append(_write_pair(clip, number, output, own[clip.metadata[DRIVEN_BY]]))
            else:
                own[clip.clip_id] = _write_example(clip, number, output)
        for manifest, entries in zip(manifests, (own.values(), pairs), strict=False):
            write_atomically(manifest, "".join(json.dumps(entry) + "\n" for entry in entries))
    return len(_read_entries(manifests[0]))


def _write_example(clip: StoredClip, number: int, output: Path) -> dict[str, str | int | float]:
    """Writes the reference and the poses of a clip; returns its entry in the manifest.

    A reference that is stored beside the clip has no number in the clip; the evaluation finds it by itself.
    """
    folder = Path(EXAMPLES_FOLDER) / clip.clip_id
    (output / folder).mkdir(parents=True, exist_ok=True)
    reference = fixed_reference(clip)
    Image.fromarray(clip.reference_picture(reference)).save(output / folder / "reference.png")
    return {
        "id": clip.clip_id,
        "image": str(folder / "reference.png"),
        **_write_poses(clip, output, folder),
        **_write_reference_pose(clip, reference, output, folder),
        "seed": number,
        "align": False,
        "fps": clip.fps,
        **({"reference_frame": reference.number} if reference.subject == "clip" else {}),
    }


def _write_pair(clip: StoredClip, number: int, output: Path, driver: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the reference of a clip; returns an entry that another clip's poses drive, fitted bone by bone.

    The key points of the reference are stated: they are no frame of the driving poses.
    """
    folder = Path(EXAMPLES_FOLDER) / clip.clip_id
    (output / folder).mkdir(parents=True, exist_ok=True)
    reference = fixed_reference(clip)
    Image.fromarray(clip.reference_picture(reference)).save(output / folder / "reference.png")
    keypoints = clip.keypoints_of([reference.number], subject=reference.subject)
    sequence = KeypointSequence(keypoints, width=clip.width, height=clip.height, fps=clip.fps)
    write_keypoint_file(output / folder / "reference_keypoints.json", sequence)
    return {
        "id": clip.clip_id,
        "image": str(folder / "reference.png"),
        "keypoints": driver["keypoints"],
        "reference_keypoints": str(folder / "reference_keypoints.json"),
        "seed": number,
        "align": "bones",
        "fps": clip.fps,
        **({"reference_frame": reference.number} if reference.subject == "clip" else {}),
    }


def _write_reference_pose(clip: StoredClip, reference: ReferenceFrame, output: Path, folder: Path) -> dict[str, str]:
    """Writes the pose of a reference that is no frame of the clip; returns the manifest field, if there is a pose."""
    if reference.subject == "clip":
        return {}
    if clip.has_keypoints_of("references"):
        keypoints = clip.keypoints_of([reference.number], subject="references")
        sequence = KeypointSequence(keypoints, width=clip.width, height=clip.height, fps=clip.fps)
        write_keypoint_file(output / folder / "reference_keypoints.json", sequence)
        return {"reference_keypoints": str(folder / "reference_keypoints.json")}
    if not clip.has("pose", "references"):
        return {}
    drawing = clip.frames("pose", [reference.number], subject="references")[0]
    Image.fromarray(drawing).save(output / folder / "reference_pose.png")
    return {"reference_pose": str(folder / "reference_pose.png")}


def _read_entries(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").split("\n") if line]


def _is_up_to_date(manifest: Path, index: Path) -> bool:
    if not manifest.exists() or manifest.stat().st_mtime_ns < index.stat().st_mtime_ns:
        return False
    named = [entry[field] for entry in _read_entries(manifest) for field in EXAMPLE_FIELDS if field in entry]
    return all((manifest.parent / path).is_file() for path in named)


def _write_poses(clip: StoredClip, output: Path, folder: Path) -> dict[str, str]:
    """Writes the key points, or, without key points, the drawings as a lossless video; returns the manifest field."""
    if clip.keypoints is not None:
        sequence = KeypointSequence(clip.keypoints, width=clip.width, height=clip.height, fps=clip.fps)
        write_keypoint_file(output / folder / "keypoints.json", sequence)
        return {"keypoints": str(folder / "keypoints.json")}
    write_video(output / folder / "pose.mkv", clip.frames("pose"), fps=clip.fps, lossless=True)
    return {"pose": str(folder / "pose.mkv")}
