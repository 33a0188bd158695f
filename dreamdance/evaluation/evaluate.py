"""The `evaluate` task: compares results of an `animate` run, and trivial answers, with the truth of held-out clips."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreamdance.data.loading.stored_clip import ReferenceFrame, StoredClip, fixed_reference, own_frame
from dreamdance.errors import MissingInputError, UserError
from dreamdance.evaluation.clips import (
    Prediction,
    Result,
    ResultError,
    Size,
    Truth,
    find_results,
    open_clips,
    read_requested_ids,
    read_result,
    read_truth,
)
from dreamdance.evaluation.compared_frames import ComparedFrames, describe_references
from dreamdance.evaluation.measured import EvaluatedClip, MeasuredClips, note_table, read_result_states
from dreamdance.evaluation.measures import Measures, describe_measures, measure_clip, sum_costs
from dreamdance.evaluation.network_metrics import describe_costs, frechet_scores, open_networks
from dreamdance.evaluation.report_page import PAGE_FILE, SHOWN_FOLDER, write_report_page
from dreamdance.evaluation.scores import Scores, as_bytes, mean_scores
from dreamdance.evaluation.shown_clip import is_shown, show_clip
from dreamdance.evaluation.side_by_side import check_comparable, join_rows
from dreamdance.evaluation.split import read_split
from dreamdance.evaluation.table import RESULT_ROW, TRUTH_ROW, Table, describe_missing
from dreamdance.evaluation.times import find_runs, pair_frames
from dreamdance.evaluation.trivial import FRAMES_PER_TRAINING_CLIP, TrainingMean, average_training_set, trivial_answers
from dreamdance.media.grids import GridRow, draw_grid
from dreamdance.recipe.schema import EvaluateRecipe
from dreamdance.runs.layout import ProgressLog
from dreamdance.runs.work_queue import WorkQueue
from dreamdance.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

TABLE_JSON, TABLE_MARKDOWN, OVERVIEW_FILE = "table.json", "table.md", "overview.png"
MEASURED_FOLDER = "measured"
# Number of clips in the overview, and least width of its pictures in pixels.
OVERVIEW_CLIPS = 12
SMALLEST_WIDTH = 128


class PartialTableError(UserError):
    """The table lacks clips. The run is not finished, so that no script takes this table for the whole one."""


def evaluate(recipe: EvaluateRecipe, run_folder: Path) -> None:
    """Measures all results that have a true clip of the same id. The ranks share the work; one writes the table.

    Args:
        recipe: names the results, the truth shards, and optionally the training set.
        run_folder: folder for `table.json`, `table.md`, `report.html` with its folder of videos, and `overview.png`,
            and for the measurements until these exist.

    Raises:
        MissingInputError: there are no results, or no result has a true clip.
        ResultError: a result is damaged, has changed while it was measured, or does not match the other results or the
            truth.
        PartialTableError: clips that `animate` was asked for have no result; the table of the others is written.
        LostWorkerError: another rank gives no sign.
    """
    ranks = Ranks.from_environment()
    progress = ProgressLog(run_folder, ranks)
    with WorkQueue(ranks, limits=recipe.cluster, run_folder=run_folder) as queue:
        queue.watchdog.enter("looking for results", recipe.results)
        results = {
            row: {path.name: path for path in find_results(Path(folder))}
            for row, folder in {RESULT_ROW: recipe.results, **recipe.compare}.items()
        }
        firsts = {row: read_result(next(iter(found.values()))) for row, found in results.items()}
        check_comparable(firsts)
        first = firsts[RESULT_ROW]
        training_mean = None
        if recipe.training_set is not None:
            progress.write(done=0, total=len(results[RESULT_ROW]), unit="clips", message="averaging the training set")
            training_mean = average_training_set(
                recipe.training_set,
                frame_size=first.frame_size,
                map_size=first.map_size,
                before_clip=partial(queue.watchdog.enter, "averaging the training set"),
            )
        queue.watchdog.enter("loading networks", recipe.metrics.weights)
        measures = Measures(
            recipe.metrics, open_networks(recipe.metrics), partial(queue.watchdog.enter, "measuring by networks")
        )
        hashes = [str(file.sha256) for files in measures.networks.files.values() for file in files]
        measured = MeasuredClips(run_folder / MEASURED_FOLDER, recipe, networks=hashes)
        requested = [read_requested_ids(Path(folder)) for folder in (recipe.results, *recipe.compare.values())]
        comparison = Comparison(recipe, results, set().union(*requested), firsts, training_mean, measures)
        found, missing = measure_clips(comparison, measured, queue, progress, run_folder / SHOWN_FOLDER)

        def write_table() -> None:
            folders = [results[row][clip_id] for clip_id in found for row in results]
            measured.check(folders, partial(queue.watchdog.enter, "comparing a result with its measurement"))
            queue.watchdog.enter("writing the table", str(run_folder))
            evaluated = {
                clip_id: join_rows(clip_id, {row: measured.read(results[row][clip_id]) for row in results})
                for clip_id in found
            }
            tabulate(comparison, evaluated, missing, run_folder)

        queue.once("table", write_table)
    if ranks.is_main:  # not earlier: if a rank is lost, the next start finds all measurements
        text = (run_folder / TABLE_MARKDOWN).read_text(encoding="utf-8")
        # `--follow` shows messages, and therefore the table
        message = f"{run_folder}:\n\n{text}\npage: {run_folder / PAGE_FILE}"
        progress.write(done=len(found), total=len(found), unit="clips", message=message)
        table = json.loads((run_folder / TABLE_JSON).read_text(encoding="utf-8"))
        if table["missing"]:  # the measurements stay for the next start
            raise PartialTableError(
                f"{run_folder / TABLE_MARKDOWN}: {describe_missing(table['missing'], len(table['clips']))}"
            )
        measured.close()


@dataclass(frozen=True)
class Comparison:
    """The inputs of the comparison.

    Attributes:
        recipe: names the results and the truth.
        results: row of the table -> id -> result folder; the row of `results` first, then those of `compare`.
        entries: ids of all clips that `animate` was asked for, while some of them have no result.
        firsts: the first result of each row; all others must have its sizes.
        training_mean: mean pictures of the training set; None if the recipe names no training set.
        measures: what is measured.
    """

    recipe: EvaluateRecipe
    results: dict[str, dict[str, Path]]
    entries: set[str]
    firsts: dict[str, Result]
    training_mean: TrainingMean | None
    measures: Measures = field(default_factory=Measures)

    @property
    def first(self) -> Result:
        return self.firsts[RESULT_ROW]


def measure_clips(
    comparison: Comparison, measured: MeasuredClips, queue: WorkQueue, progress: ProgressLog, shown: Path
) -> tuple[list[str], list[str]]:
    """Measures, together with all other ranks, the results that were not measured before.

    Returns:
        The ids of all true clips that have every result, and the ids of true clips that miss one which `animate` was
        asked for. Both are the same on all ranks, even if results appear meanwhile.

    Raises:
        MissingInputError: no result has a true clip.
        ResultError: a result is damaged, or does not match the other results or the truth.
    """
    recipe, results = comparison.recipe, comparison.results
    split = None if recipe.split is None else read_split(Path(recipe.split))
    clips = open_clips(recipe.truth, before_shard=partial(queue.watchdog.enter, "checking a shard"))
    share = queue.share("measure", [str(number) for number in range(len(clips))])

    def report(message: str) -> None:
        progress.write(done=share.num_done(), total=len(clips), unit="clips", message=message)

    for item in share.take():
        if item is None:
            report("waiting for the other ranks")
            continue
        queue.watchdog.enter("measuring a clip", f"{item} of the truth")  # not measured: clips differ in length
        clip = clips.clip(int(item))
        if split is not None and clip.clip_id not in split:
            share.finish(item, "")
            continue
        if not all(clip.clip_id in found for found in results.values()):
            share.finish(item, json.dumps({"missing": clip.clip_id}) if clip.clip_id in comparison.entries else "")
            continue
        folders = {row: found[clip.clip_id] for row, found in results.items()}
        new = {row: folder for row, folder in folders.items() if not measured.holds(folder)}
        scored = {folder: _measure(comparison, row, folder, clip) for row, folder in new.items()}
        if new or not is_shown(shown, clip.clip_id):  # before the measurement, which says that both are done
            show_clip(shown, clip, folders, map_size=comparison.first.map_size)
        for folder, evaluated in scored.items():
            measured.write(folder, evaluated)
        share.finish(item, json.dumps({"measured": clip.clip_id}), made=clip.clip_id if new else None)
        report(f"measured {clip.clip_id}")
    outcomes = [json.loads(text) for text in share.results().values() if text]
    measured_ids = [outcome["measured"] for outcome in outcomes if "measured" in outcome]
    if not measured_ids and not queue.everyone_left:
        folders = results[RESULT_ROW]
        others = "".join(f", and a result in {folder}" for folder in recipe.compare.values())
        raise MissingInputError(
            f"none of the {len(folders)} results in {recipe.results} has a clip with its id in {recipe.truth.local}"
            f"{others} (the first result is '{next(iter(folders))}'; keys: results, truth.local, compare, split)"
        )
    return measured_ids, [outcome["missing"] for outcome in outcomes if "missing" in outcome]


def _measure(comparison: Comparison, row: str, folder: Path, clip: StoredClip) -> EvaluatedClip:
    files, result = read_result_states(folder), read_result(folder)
    _check_sizes(result, comparison.firsts[row])
    if result.reference_frame is None:
        result = replace(result, reference_frame=comparison.recipe.reference_frame)
    size, measures = comparison.first.map_size, comparison.measures
    # the trivial answers are those of the clip: measured once, beside its first result
    has_trivial = folder == comparison.results[RESULT_ROW][clip.clip_id]
    mean = comparison.training_mean
    evaluated = evaluate_clip(result, clip, mean, has_trivial=has_trivial, map_size=size, measures=measures)
    return replace(evaluated, files=files)


def tabulate(
    comparison: Comparison, evaluated: dict[str, EvaluatedClip], missing: Sequence[str], run_folder: Path
) -> None:
    """Writes the table from the measurements of all ranks."""
    for other in sorted(set().union(*comparison.results.values()) - set(evaluated)):
        lacking = [row for row, found in comparison.results.items() if other not in found]
        reason = f"{lacking} lack it" if lacking else f"no clip in {comparison.recipe.truth.local} has its id"
        reason += f", or it is not in {comparison.recipe.split}" if comparison.recipe.split and not lacking else ""
        logger.warning("result '%s' is left out: %s", other, reason)
    videos, windows = frechet_scores([clip.features for clip in evaluated.values()], truth_row=TRUTH_ROW)
    rows = _mean_rows(evaluated)
    protocol = describe_protocol(comparison.recipe, comparison.first, evaluated, comparison.training_mean)
    costs = sum_costs([clip.costs for clip in evaluated.values()])
    table = Table(
        rows={name: scores | videos.get(name, {}) for name, scores in rows.items()},
        clips={name: clip.scores for name, clip in evaluated.items()},
        protocol=protocol
        | describe_measures(comparison.measures, costs, windows, [clip.compared for clip in evaluated.values()]),
        missing=missing,
        compared=list(comparison.recipe.compare),
        windows=windows,
    )
    write_report(table, evaluated, run_folder)
    write_report_page(table, run_folder)
    note_table(comparison.recipe, evaluated.values(), run_folder, watched=comparison.measures.networks.watched)
    logger.info("%s\n\n%s", run_folder / TABLE_MARKDOWN, table.as_markdown())
    if costs:
        logger.info("networks, for 16 frames: %s", describe_costs(costs))


def evaluate_clip(
    result: Result,
    clip: StoredClip,
    training_mean: TrainingMean | None,
    *,
    has_trivial: bool = True,
    map_size: Size | None = None,
    measures: Measures | None = None,
) -> EvaluatedClip:
    """Scores the result, the trivial answers and the truth itself, on all frames except the reference frame.

    A result that names no frame of the clip was made from the reference that `prepare` gives with the clip.

    Args:
        result: of an `animate` run.
        clip: the true clip.
        training_mean: of the training set, or None.
        has_trivial: whether the trivial answers are scored too.
        map_size: size of the truth's maps; by default that of the result's.
        measures: what is measured beside the scores that need no network.

    Raises:
        ResultError: no frame of the result can be compared.
    """
    chosen = fixed_reference(clip)
    if result.reference_frame is not None:
        chosen = ReferenceFrame(result.reference_frame)
    elif chosen.subject == "clip":
        logger.warning("result '%s' does not name its reference frame: the last frame is assumed", result.id)
    if chosen.subject == "clip" and chosen.number >= clip.num_frames:
        pairs = []
    else:
        pairs = pair_frames(result, num_frames=clip.num_frames, fps=clip.fps)
        pairs = [(frame, true_frame) for frame, true_frame in pairs if true_frame != own_frame(clip, chosen)]
    if not pairs:
        raise ResultError(
            f"result '{result.id}' has {result.num_frames} frames at {result.fps:g} per second and frame "
            f"{chosen.number} as its reference; its clip has {clip.num_frames} frames at {clip.fps:g}: no frame can "
            "be compared"
        )
    compared = [true_frame for _, true_frame in pairs]
    read = partial(read_truth, clip, frame_size=result.frame_size, map_size=map_size or result.map_size)
    truth = read(frames=compared)
    reference = read(frames=[chosen.number], subject=chosen.subject)
    prediction = result.prediction.at([frame for frame, _ in pairs])
    trivial = trivial_answers(reference, len(compared), training_mean) if has_trivial else {}
    answers = {RESULT_ROW: prediction, **trivial}
    seams = [place for place, (frame, _) in enumerate(pairs) if frame > 0 and frame in result.window_starts]
    measures = measures or Measures()
    found = measure_clip(answers, truth, truth_row=TRUTH_ROW, runs=find_runs(pairs), seams=seams, measures=measures)
    row = _overview_row(result.id, prediction, truth, reference)
    of_clip = ComparedFrames(tuple(compared), own_frame(clip, chosen), clip.num_frames)
    return EvaluatedClip(found.scores, row, of_clip, features=found.features, costs=found.costs)


def describe_protocol(
    recipe: EvaluateRecipe, first: Result, evaluated: dict[str, EvaluatedClip], training_mean: TrainingMean | None
) -> dict[str, Any]:
    """What was measured, and how; every table contains it."""
    (height, width), (map_height, map_width) = first.frame_size, first.map_size
    protocol = {
        "results": recipe.results,
        **{f"results of {name}": folder for name, folder in recipe.compare.items()},
        "truth": recipe.truth.local,
        "clips": f"{len(evaluated)}, mean over clips; {sum(clip.num_frames for clip in evaluated.values())} frames",
        "reference": describe_references([clip.compared for clip in evaluated.values()]),
        "frames": f"{width}x{height} pixels, compared at equal times, without the reference frame; truth resized "
        "with antialiasing"
        + f"; both then at {recipe.metrics.width}x{recipe.metrics.height}"
        * bool(recipe.metrics.width),
        "L1, PSNR, SSIM": "for values in [0, 1]; PSNR is the mean over frames; SSIM has the defaults of scikit-image",
    }
    names = {name for clip in evaluated.values() for name in clip.scores[RESULT_ROW]}
    if "l1_body" in names:
        protocol["body"] = "inside the true body mask; SSIM there is the mean over windows centred in it"
    else:
        protocol["body"] = (
            "not measured: the clips have no body mask; scores of whole frames include the still background"
        )
    if "angular_error_mean_frame" in names:
        protocol["geometry"] = "over whole frames, background included: the true clips have no body mask"
    elif "angular_error_mean" not in names:
        protocol["geometry"] = "not measured: results and true clips need normals and depth"
    if first.prediction.normals is not None:
        protocol |= {
            "maps": f"{map_width}x{map_height} pixels, stage 1's size",
            "depth": "disparity aligned to the truth by one scale and shift per clip, fitted to whole frames, clamped "
            "to the clip's farthest point, inverted, measured inside the body; for the body's relief fitted inside it",
            "normals to depth": "angle between predicted normals and the normals of predicted depth, with the true "
            "camera and the true range of disparity; at least one pixel inside the outline. With the camera unknown: "
            "in parallel projection, the relief scaled to the normals' steepness; compare it with the truth's own",
        }
    if training_mean is not None:
        protocol["training set's mean"] = (
            f"over {training_mean.num_clips} clips, up to {FRAMES_PER_TRAINING_CLIP} frames each"
        )
    return protocol


def write_report(table: Table, evaluated: dict[str, EvaluatedClip], run_folder: Path) -> None:
    """Writes the table as JSON and as Markdown, and the overview picture."""
    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / TABLE_JSON).write_text(json.dumps(table.as_json(), indent=2) + "\n", encoding="utf-8")
    (run_folder / TABLE_MARKDOWN).write_text(table.as_markdown(), encoding="utf-8")
    clips = list(evaluated.values())[:OVERVIEW_CLIPS]
    num_pictures = len(clips[0].row.pictures)
    titles = ["reference", "true frame", "frame", "true normal", "normal", "true depth", "depth"][:num_pictures]
    grid = draw_grid([clip.row for clip in clips], titles=titles, smallest_width=SMALLEST_WIDTH)
    Image.fromarray(grid).save(run_folder / OVERVIEW_FILE)


def _mean_rows(evaluated: dict[str, EvaluatedClip]) -> dict[str, Scores]:
    names = dict.fromkeys(name for clip in evaluated.values() for name in clip.scores)
    num_frames = [clip.num_frames for clip in evaluated.values()]
    rows = {name: mean_scores([clip.scores.get(name, {}) for clip in evaluated.values()], num_frames) for name in names}
    return {name: scores for name, scores in rows.items() if scores}


def _check_sizes(result: Result, first: Result) -> None:
    if (result.frame_size, result.map_size) != (first.frame_size, first.map_size):
        raise ResultError(
            f"result '{result.id}' has another size than '{first.id}' ({result.frame_size} and {first.frame_size}, "
            "rows x columns): `results` must name the folder of one animate run"
        )


def _overview_row(name: str, prediction: Prediction, truth: Truth, reference: Truth) -> GridRow:
    """The reference, and the middle frame of the truth and of the prediction, for each kind of picture."""
    middle = len(truth.pictures.given_frames) // 2
    pictures = [reference.pictures.given_frames[0]]
    pictures += [truth.pictures.given_frames[middle], prediction.given_frames[middle]]
    if prediction.normals is not None and truth.pictures.normals is not None:
        pictures += [(maps[middle] + 1) / 2 for maps in (truth.pictures.normals, prediction.normals)]
    if prediction.disparity is not None and truth.pictures.disparity is not None:
        maps = (truth.pictures.disparity, prediction.disparity)
        pictures += [np.repeat(disparity[middle][..., None], 3, axis=-1) for disparity in maps]
    height, width = pictures[0].shape[:2]
    return GridRow(name, [_enlarged(as_bytes(picture), height, width) for picture in pictures])


def _enlarged(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Enlarges a map to the frames' size without interpolation, so that every pixel is visible."""
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST))
