"""The `animate` task: the ranks share the entries of a manifest, skip finished ones and report failed ones.

The ranks have the manifest, the output folder and a `WorkQueue` in common. The noise of an entry depends only on its
seed and id, so neither the number of ranks nor a restart changes a result.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dreamdance.errors import UserError, is_transient
from dreamdance.inference.driving_videos import KeypointFinder
from dreamdance.inference.entry_inputs import EntryError, EntryInputs, Size, load_inputs, read_entry_states
from dreamdance.inference.manifest import ManifestEntry, read_entries
from dreamdance.inference.part_seconds import PartSeconds, describe_parts, machine_name
from dreamdance.inference.reference_pose import explaining_missing_annotator
from dreamdance.inference.results import (
    ClipResult,
    installed_versions,
    is_done,
    known_states,
    list_entries,
    note_results,
    write_result,
)
from dreamdance.inference.stages import Stages, before_each_computation, load_stages
from dreamdance.media.transforms import encode_normals, resize_images
from dreamdance.modalities import GIVEN_CONTROLS
from dreamdance.pipelines import AnimationPipeline, GeometryPipeline
from dreamdance.pipelines.drawing_sizes import drawings_are_checked
from dreamdance.recipe.schema import AnimateRecipe
from dreamdance.runs.array_member import sharing
from dreamdance.runs.file_states import FileState
from dreamdance.runs.files import write_atomically
from dreamdance.runs.folder_lock import OutputError, lock_folder
from dreamdance.runs.layout import ENTRIES_FILE, ProgressLog
from dreamdance.runs.work_queue import Share, WorkQueue
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.sample_random import sample_generator
from dreamdance.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)

FAILURES_FILE = "failures.json"
# The keys of `animation` that results of older commits lack, with the values that change nothing.
_LATER_KEYS: dict[str, Any] = {"conditioning_scale": 1.0, "control_scales": {}, "repeated_noise": False}


class AnimateError(UserError):
    """Some entries of the manifest failed; the text lists them and the reasons."""


@dataclass(frozen=True)
class Failure:
    """An entry that could not be animated."""

    id: str
    line: int
    reason: str


def animate(recipe: AnimateRecipe, run_folder: Path) -> None:
    """Animates all entries of a recipe's manifest.

    Args:
        recipe: the manifest, the output folder and the two trained runs.
        run_folder: the folder for the progress log and the note of finished work; its parent contains the trained runs.

    Raises:
        ManifestError: the manifest is wrong; nothing was animated.
        MissingInputError: a run or its export does not exist.
        OutputError: the output folder cannot be written, or another run is writing into it.
        LostWorkerError: another rank gives no sign.
        AnimateError: some entries failed; raised on the main rank after all entries have been tried.
    """
    ranks = Ranks.from_environment()
    entries = read_entries(Path(recipe.manifest), default_seed=recipe.seed)
    progress = partial(ProgressLog(run_folder, ranks).write, total=len(entries), unit="clips")
    # The main rank locks the folder for all ranks. The others wait for the queue, which the main rank opens afterwards.
    jobs = sharing(run_folder)
    with lock_folder(Path(recipe.output), key="output", sharing=jobs) if ranks.is_main else nullcontext():
        if ranks.is_main:
            list_entries(entries, Path(recipe.output))
        with WorkQueue(ranks, limits=recipe.cluster, run_folder=run_folder) as queue:
            queue.watchdog.enter("loading the networks", recipe.name)
            stages = load_stages(recipe, run_folder, ranks.device)
            if stages.animation.reference_first:
                entries = [replace(entry, needs_reference_pose=True) for entry in entries]
            failures = animate_entries(entries, recipe, stages, queue, progress)
            if not failures:
                noting = partial(queue.watchdog.enter, "noting what was done")
                queue.once("note", partial(note_results, entries, Path(recipe.output), stages, run_folder, noting))
        if ranks.is_main:
            for line in describe_parts(Path(recipe.output), [entry.id for entry in entries]):
                logger.info(line)
                progress(done=len(entries), message=line)
            report_failures(failures, Path(recipe.output), run_folder, num_entries=len(entries))


def animate_entries(
    entries: Sequence[ManifestEntry],
    recipe: AnimateRecipe,
    stages: Stages,
    queue: WorkQueue,
    progress: Callable[..., None],
) -> list[Failure]:
    """Animates entries until the ranks together have tried all of them; a failed entry does not stop the others.

    Returns:
        The failures of all ranks; the main rank reports them. A rank with failures must not end with an error before
        that, because the launcher would then stop the ranks that are still working.

    Raises:
        OutputError: results cannot be written; further entries would fail too.
    """
    by_id = {entry.id: entry for entry in entries}
    searching = partial(queue.watchdog.enter, "finding key points", "a part")
    finder = KeypointFinder(recipe.annotators, Path(recipe.output), searching)
    if any(entry.video is not None for entry in entries):
        _ = finder.annotator  # missing weights end the run before anything is animated
    share = queue.share("animate", list(by_id))
    computing = partial(queue.watchdog.enter, "computing", "a network's pass", is_measured=True)
    before_each_computation(stages, computing)
    parts = PartSeconds(stages)
    for item in share.take():
        if item is None:
            progress(done=share.num_done(), message="waiting for the other ranks")
            continue
        entry, failure, is_new = by_id[item], None, False
        progress(done=share.num_done(), message=f"animating {entry.id}")
        try:
            is_new = animate_entry(entry, recipe, stages, queue.watchdog, share, finder, parts)
        except OutputError:
            raise
        except (UserError, torch.OutOfMemoryError) as error:
            if is_transient(error):  # an error of a machine or of storage, not of the entry: the next start may succeed
                raise
            logger.error("entry '%s' (line %d) failed: %s", entry.id, entry.line, error)
            failure = Failure(entry.id, entry.line, str(error))
        share.finish(item, json.dumps(asdict(failure)) if failure else "", made=item if is_new else None)
    progress(done=share.num_done(), message="all clips are finished")
    return [Failure(**json.loads(text)) for text in share.results().values() if text]


def animate_entry(
    entry: ManifestEntry,
    recipe: AnimateRecipe,
    stages: Stages,
    watchdog: Watchdog,
    share: Share,
    finder: KeypointFinder,
    parts: PartSeconds,
) -> bool:
    """Animates one entry and writes its result, unless the same result exists; returns whether it wrote one.

    Raises:
        UserError: the inputs of the entry cannot be used.
    """
    watchdog.enter("reading an entry", entry.id)
    folder = Path(recipe.output) / entry.id
    states = read_entry_states(entry, known_states(folder))
    request = describe_request(entry, recipe, stages, states)
    if entry.video is not None or entry.reference_pose_from == "annotator":
        with explaining_missing_annotator(entry):
            request["annotator"] = finder.settings(entry.person)
    if is_done(folder, request):
        logger.info("skipped '%s': %s contains its result", entry.id, folder)
        return False
    started = time.monotonic()
    frame_size = Size(recipe.width, recipe.height)
    map_size = Size(recipe.geometry_width, recipe.geometry_height)
    given = [name for name in GIVEN_CONTROLS if name in stages.animation.controls]
    trained = _trained_size(stages.animation)
    inputs = load_inputs(
        entry, aspect=frame_size, pose_sizes={frame_size, map_size}, maps=given, finder=finder, trained=trained
    )
    if read_entry_states(entry, {entry.files[name].absolute(): state for name, state in states.items()}) != states:
        raise EntryError("one of the entry's files was replaced while they were read")
    parts.take()  # an entry that failed may have left some
    with drawings_are_checked():
        result = run_stages(entry, inputs, recipe, stages, parts)
    details = {
        "id": entry.id,
        "files": {name: {"path": str(path), **states[name].to_json()} for name, path in entry.files.items()},
        "exports": stages.exports,
        "reference_frame": entry.reference_frame,
        "window_starts": stages.animation.window_starts(
            len(result.frames), recipe.animation.window_frames, recipe.animation.window_overlap
        ),
        "seconds": round(time.monotonic() - started, 3),
        "part_seconds": parts.take(),
        "device": str(stages.animation.device),
        "machine": machine_name(stages.animation.device),
        "versions": installed_versions(),
    }
    watchdog.enter("writing a result", entry.id)
    share.check(entry.id)
    write_result(folder, result, request=request, details=details)
    logger.info("animated '%s': %d frames in %.1f s", entry.id, len(result.frames), details["seconds"])
    return True


def _trained_size(pipeline: AnimationPipeline) -> Size | None:
    height, width = pipeline.trained_size
    return None if height is None or width is None else Size(width, height)


def describe_request(
    entry: ManifestEntry, recipe: AnimateRecipe, stages: Stages, states: Mapping[str, FileState]
) -> dict[str, Any]:
    """Everything that a result depends on: equal requests have equal results."""
    settings = ("geometry_width", "geometry_height", "width", "height", "precision", "tf32")
    return {
        "inputs": {name: state.sha256 for name, state in states.items()},
        "seed": entry.seed,
        # As the results of older commits record it.
        "align": {None: False, "scale": True}.get(entry.align, entry.align),
        "fps": entry.fps,
        **({} if entry.keypoints_size is None else {"keypoints_size": list(entry.keypoints_size)}),
        **({} if entry.person is None or entry.video is not None else {"person": entry.person}),
        "weights": stages.weights,
        **{name: getattr(recipe, name) for name in settings},
        "geometry": recipe.geometry.model_dump(mode="json") if stages.geometry is not None else None,
        "animation": _without_later_keys(recipe.animation.model_dump(mode="json")),
        **({} if entry.reference_pose_from is None else {"reference_pose_from": entry.reference_pose_from}),
        **({"reference_frame": entry.reference_frame} if entry.reference_pose_from == "reference_frame" else {}),
    }


def run_stages(
    entry: ManifestEntry, inputs: EntryInputs, recipe: AnimateRecipe, stages: Stages, parts: PartSeconds
) -> ClipResult:
    """Runs both pipelines on one entry; both draw noise from one generator, stage 1 first."""
    generator = sample_generator((entry.seed, 0, _number_of(entry.id)), "animate")
    poses = inputs.poses[Size(recipe.width, recipe.height)]
    drawn = inputs.poses[Size(recipe.geometry_width, recipe.geometry_height)]
    maps, of_reference = dict(inputs.maps), dict(inputs.reference_maps)
    normals = depths = None
    if stages.geometry is not None:
        with parts.of_stage("geometry"):
            normals, depths, _ = run_geometry(stages.geometry, inputs.reference, drawn, recipe, generator)
        maps |= {"normal": encode_normals(normals), "depth": depths}
    if stages.animation.reference_first:
        of_reference["pose"] = inputs.reference_poses[Size(recipe.width, recipe.height)]
        if stages.geometry is not None:  # a clip of one frame, whose pose is that of the reference itself
            own = inputs.reference_poses[Size(recipe.geometry_width, recipe.geometry_height)][None]
            with parts.of_stage("geometry"):
                own_normals, own_depths, _ = run_geometry(stages.geometry, inputs.reference, own, recipe, generator)
            of_reference |= {"normal": encode_normals(own_normals)[:, 0], "depth": own_depths[:, 0]}
    with parts.of_stage("animation"):
        (frames,) = cast(
            tuple[Tensor],
            stages.animation(
                inputs.reference,
                poses,
                maps=maps,
                reference_maps=of_reference or None,
                height=recipe.height,
                width=recipe.width,
                fps=stages.animation.trained_fps or inputs.fps,
                **recipe.animation.model_dump(),
                generator=generator,
                output_type="pt",
                return_dict=False,
            ),
        )
    return ClipResult(
        reference=inputs.reference,
        poses=poses,
        frames=frames[0],
        normals=None if normals is None else normals[0],
        depths=None if depths is None else depths[0],
        fps=inputs.fps,
        driving_video=inputs.video,
    )


def run_geometry(
    geometry: GeometryPipeline, reference: Tensor, poses: Tensor, recipe: AnimateRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 1 on a reference `3 H W` and poses `f 3 h w` of its size.

    Returns:
        Unit normals `1 f 3 h w`, depths `1 f 1 h w` and pictures `1 f 3 h w`, both in [0,1].
    """
    return cast(
        tuple[Tensor, Tensor, Tensor],
        geometry(
            # The same part of the picture as stage 2 gets, even if the aspects of the two sizes differ a little.
            resize_images(reference, recipe.geometry_height, recipe.geometry_width),
            poses,
            height=recipe.geometry_height,
            width=recipe.geometry_width,
            guidance_scales=recipe.geometry.guidance_scales.in_order,
            **recipe.geometry.model_dump(exclude={"guidance_scales"}),
            generator=generator,
            output_type="pt",
            return_dict=False,
        ),
    )


def _without_later_keys(animation: dict[str, Any]) -> dict[str, Any]:
    """The section `animation` as the results of older commits record it, if its newer keys have no effect."""
    return {name: value for name, value in animation.items() if _LATER_KEYS.get(name, ...) != value}


def report_failures(failures: Sequence[Failure], output: Path, run_folder: Path, *, num_entries: int) -> None:
    """Writes `failures.json` and raises if there are failures; otherwise removes an older file and the list of entries.

    `failures.json` is in the run folder, because an entry may have the same name in the output folder.

    Raises:
        AnimateError: there are failures; the error names each failed entry and the reason.
    """
    path = run_folder / FAILURES_FILE
    if not failures:
        path.unlink(missing_ok=True)
        (output / ENTRIES_FILE).unlink(missing_ok=True)
        logger.info("all %d entries are in %s", num_entries, output)
        return
    write_atomically(path, json.dumps([asdict(failure) for failure in failures], indent=2) + "\n")
    listed = "\n".join(f"  {failure.id} (line {failure.line}): {failure.reason}" for failure in failures)
    raise AnimateError(
        f"{len(failures)} of {num_entries} entries failed (see {path}), the results of the others are in {output}; the "
        f"same command tries these again:\n{listed}"
    )


def _number_of(entry_id: str) -> int:
    """A number computed from an id, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(entry_id.encode(), digest_size=8).digest(), "little")
