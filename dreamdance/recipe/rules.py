"""Rules about relations between a recipe's values, which types cannot express. Every rule names the key to change."""

from collections.abc import Callable, Collection, Iterator

from dreamdance.errors import RecipeError
from dreamdance.recipe.batch_arithmetic import accumulation_steps
from dreamdance.recipe.encode_rules import AUTOENCODER_DOWNSCALE, encode_problems
from dreamdance.recipe.path_rules import find_expandable
from dreamdance.recipe.schema import (
    AnimateRecipe,
    AnimationSampling,
    AutoencoderSource,
    EncodeRecipe,
    EvaluateRecipe,
    GeometrySampling,
    ImageEncoderSource,
    NetworkSource,
    PrepareRecipe,
    Recipe,
    Stage1Recipe,
    Stage2Recipe,
    TrainingRecipe,
)
from dreamdance.recipe.sections import Cluster
from dreamdance.recipe.stage2_rules import stage2_problems
from dreamdance.recipe.stored_sizes import smaller_sizes_problem
from dreamdance.recipe.yaml_text import KeyPath, Problem

DEFAULT_UNET_LEVELS = 4
ASPECT_TOLERANCE = 0.03  # sizes are multiples of the autoencoder's factor, so two aspects are only nearly equal

_OWN_GPU = "leave it out and set cluster.gpus_per_node: a process finds its GPU among all of its node's"
# Options of sbatch and srun that would contradict the recipe or the launcher, and what to do instead.
ASKED_ELSEWHERE = {
    **{name: f"set cluster.{name}" for name in ("nodes", "partition", "account", "qos", "constraint", "reservation")},
    "ntasks": "set cluster.nodes and cluster.tasks_per_node",
    "ntasks-per-node": "set cluster.tasks_per_node",
    "cpus-per-task": "set cluster.cpus_per_task",
    **dict.fromkeys(("gpus", "gpus-per-node"), "set cluster.gpus_per_node; for GPUs of one kind see sbatch_arguments"),
    **dict.fromkeys(("gpus-per-task", "ntasks-per-gpu", "gpu-bind", "tres-bind"), _OWN_GPU),
    "time": "set cluster.time_minutes",
    "signal": "set cluster.stop_seconds: ranks save when they receive SIGUSR2",
    "no-requeue": "set cluster.max_requeues to 0",
    "mail-user": "set cluster.mail_user",
    "job-name": "set name",
    "array": "set cluster.array, or use --sweep",
    "container-image": "set cluster.container_image",
    "open-mode": "leave it out: each start appends to the log of the previous start",
    **dict.fromkeys(("output", "error"), "leave it out: a run's logs are in its folder"),
    "kill-on-bad-exit": "leave it out: a job ends with its first process that fails",
}
SHORT_OPTIONS = {
    "-N": "nodes", "-n": "ntasks", "-c": "cpus-per-task", "-G": "gpus", "-t": "time", "-p": "partition",
    "-A": "account", "-q": "qos", "-C": "constraint", "-J": "job-name", "-a": "array", "-o": "output",
    "-e": "error", "-K": "kill-on-bad-exit",
}  # fmt: skip


def problems(recipe: Recipe, known_keys: Collection[str] = ()) -> list[Problem]:
    """Lists the recipe's values that do not fit together; the list is empty if all fit."""
    checks: list[Callable[[], Iterator[Problem]]] = [lambda: _cluster(recipe), lambda: find_expandable(recipe)]
    match recipe:
        case TrainingRecipe():
            checks += [lambda: _batch(recipe), lambda: _data(recipe), lambda: _schedule(recipe, known_keys)]
            checks += [lambda: _networks(recipe), lambda: _sizes(recipe), lambda: _initial_weights(recipe)]
            if isinstance(recipe, Stage1Recipe):
                checks.append(lambda: _stage1(recipe))
            if isinstance(recipe, Stage2Recipe):
                checks.append(lambda: stage2_problems(recipe))
            checks.append(lambda: _windows(recipe.sampling, "sampling"))
        case PrepareRecipe():
            checks.append(lambda: _prepare(recipe))
        case EncodeRecipe():
            checks += [lambda: encode_problems(recipe)]
            if recipe.model is not None:
                checks += [lambda: _networks(recipe)]
            if recipe.geometry_from is not None:
                checks.append(lambda: _windows(recipe.geometry, "geometry"))
        case EvaluateRecipe():
            checks.append(lambda: _metrics(recipe))
        case AnimateRecipe():
            checks += [lambda: _windows(recipe.geometry, "geometry"), lambda: _windows(recipe.animation, "animation")]
            checks.append(lambda: _aspects(recipe))
    return [problem for check in checks for problem in check()]


def _cluster(recipe: Recipe) -> Iterator[Problem]:
    cluster = recipe.cluster
    if cluster.gpus_per_node not in (0, cluster.tasks_per_node):
        yield Problem.at(
            "cluster.gpus_per_node",
            f"cluster.gpus_per_node is {cluster.gpus_per_node} but cluster.tasks_per_node is {cluster.tasks_per_node}: "
            "every process drives one GPU, so make them equal (or gpus_per_node 0 for the CPU)",
        )
    if cluster.array > 1 and isinstance(recipe, TrainingRecipe):
        yield Problem.at(
            "cluster.array",
            f"cluster.array is {cluster.array}, but {recipe.task} is trained by one job; leave it out, and set "
            "cluster.nodes for more machines",
        )
    if cluster.stop_seconds >= 60 * cluster.time_minutes:
        yield Problem.at(
            "cluster.stop_seconds",
            f"cluster.stop_seconds {cluster.stop_seconds} must be less than the time limit, cluster.time_minutes "
            f"{cluster.time_minutes} ({60 * cluster.time_minutes} seconds)",
        )
    for name in cluster.environment:
        if not name.isidentifier():
            yield Problem.at(f"cluster.environment.{name}", f"'{name}' is not a valid name of an environment variable")
    yield from _slurm_arguments(cluster)


def _slurm_arguments(cluster: Cluster) -> Iterator[Problem]:
    """Refuses options for Slurm that another key or the launcher sets."""
    given = [("sbatch_arguments", name.replace("_", "-"), value) for name, value in cluster.sbatch_arguments.items()]
    for word in cluster.srun_arguments:
        name, _, value = word.partition("=")
        name = name.removeprefix("--") if word.startswith("--") else SHORT_OPTIONS.get(word[:2], word)
        given.append(("srun_arguments", name, value if word.startswith("--") else word[2:]))
    for name, number in cluster.gpus_by_kind.items():
        if number != cluster.gpus_per_node:
            yield Problem.at(
                "cluster.sbatch_arguments",
                f"cluster.sbatch_arguments: {name} asks for {number} GPUs per node, but cluster.gpus_per_node is "
                f"{cluster.gpus_per_node}; set cluster.gpus_per_node to as many",
            )
    for place, name, value in given:
        advice = ASKED_ELSEWHERE.get(name)
        if place == "sbatch_arguments" and name in cluster.gpus_by_kind:
            advice = None  # of one kind, in the number of cluster.gpus_per_node
        if (place, name) == ("sbatch_arguments", "mem") and cluster.memory_gib is not None:
            advice = "leave it out, or leave out cluster.memory_gib"
        if advice is not None:
            asked = f"{name} {value}".rstrip()
            yield Problem.at(f"cluster.{place}", f"cluster.{place}: '{asked}' is not accepted here; {advice}")


def _metrics(recipe: EvaluateRecipe) -> Iterator[Problem]:
    if (recipe.metrics.width is None) != (recipe.metrics.height is None):
        yield Problem.at("metrics.width", "metrics.width and metrics.height go together; set both or none")


def _batch(recipe: TrainingRecipe) -> Iterator[Problem]:
    try:
        accumulation_steps(recipe.batch_size, recipe.micro_batch_size, recipe.cluster.world_size)
    except RecipeError as error:
        key = "micro_batch_size" if recipe.batch_size % recipe.micro_batch_size else "batch_size"
        nodes, tasks = recipe.cluster.nodes, recipe.cluster.tasks_per_node
        yield Problem.at(key, f"{error}; this recipe asks for {nodes} node{'s' * (nodes > 1)} x {tasks} processes")


def _data(recipe: TrainingRecipe) -> Iterator[Problem]:
    low, high = recipe.data.stride
    if low > high:
        yield Problem.at("data.stride", f"data.stride [{low}, {high}] is [smallest, largest]; swap the two")
    smallest, largest = recipe.data.crop_scale
    if smallest > largest:
        yield Problem.at(
            "data.crop_scale", f"data.crop_scale [{smallest:g}, {largest:g}] is [smallest, largest]; swap the two"
        )
    if smallest < 1.0 and recipe.data.latents is not None:
        yield Problem.at(
            "data.crop_scale",
            f"data.crop_scale [{smallest:g}, {largest:g}] crops pictures, but data.latents are of whole frames; set it "
            "to [1, 1], or leave data.latents out to encode while training",
        )
    motion = recipe.data.filters.motion
    if motion is not None and motion[0] > motion[1]:
        yield Problem.at(
            "data.filters.motion", f"data.filters.motion [{motion[0]:g}, {motion[1]:g}] is [low, high]; swap them"
        )
    if recipe.data.train.local == recipe.data.validation.local:
        yield Problem.at("data.validation.local", "data.train.local and data.validation.local are the same folder")


def _schedule(recipe: TrainingRecipe, known_keys: Collection[str]) -> Iterator[Problem]:
    if recipe.optimizer.warmup_steps > recipe.max_steps:
        yield Problem.at(
            "optimizer.warmup_steps",
            f"optimizer.warmup_steps {recipe.optimizer.warmup_steps} is more than max_steps {recipe.max_steps}",
        )
    for beta in recipe.optimizer.betas:
        if not 0.0 <= beta < 1.0:
            yield Problem.at("optimizer.betas", f"optimizer.betas holds {beta}; each must be at least 0 and below 1")
    every, keep = recipe.checkpoint.every_steps, recipe.checkpoint.keep_every_steps
    if keep is not None and keep % every:
        yield Problem.at(
            "checkpoint.keep_every_steps",
            f"checkpoint.keep_every_steps {keep} is not a multiple of checkpoint.every_steps {every}, "
            "so no checkpoint would be kept for good",
        )
    for key in recipe.checkpoint.allow_changed:
        if known_keys and key not in known_keys:
            yield Problem.at("checkpoint.allow_changed", f"checkpoint.allow_changed names '{key}', which is not a key")


def _networks(recipe: TrainingRecipe | EncodeRecipe) -> Iterator[Problem]:
    assert recipe.model is not None
    sources: list[tuple[str, NetworkSource | AutoencoderSource | ImageEncoderSource, str]] = [
        ("model.autoencoder", recipe.model.autoencoder, "patch_size"),
        ("model.image_encoder", recipe.model.image_encoder, "stand_in_width"),
    ]
    if isinstance(recipe, TrainingRecipe):
        sources.insert(0, ("model.unet", recipe.model.unet, "config"))
    for name, source, other in sources:
        alternative = getattr(source, other)
        if (source.path is None) == (alternative is None):
            given = "both are given" if source.path is not None else "neither is given"
            yield Problem.at(name, f"{name} needs either path or {other}; {given}")
        if source.subfolder is not None and source.path is None:
            yield Problem.at(f"{name}.subfolder", f"{name}.subfolder is a folder under {name}.path, which is not given")


def _sizes(recipe: TrainingRecipe) -> Iterator[Problem]:
    """Width and height must be multiples of the autoencoder's factor times the reductions of the UNet."""
    unit = (recipe.model.autoencoder.patch_size or AUTOENCODER_DOWNSCALE) * 2 ** (unet_levels(recipe.model.unet) - 1)
    if isinstance(recipe, Stage2Recipe):
        maps = recipe.objective
        pairs = {"objective.geometry_width": maps.geometry_width, "objective.geometry_height": maps.geometry_height}
        for name, size in pairs.items():
            if size % (factor := recipe.model.autoencoder.patch_size or AUTOENCODER_DOWNSCALE):
                yield Problem.at(name, f"{name} {size} must be a multiple of {factor}, the autoencoder's factor")
    for name, size in {"data.width": recipe.data.width, "data.height": recipe.data.height}.items():
        if size % unit:
            below = size - size % unit
            near = [str(option) for option in (below, below + unit) if option > 0]
            yield Problem.at(
                name,
                f"{name} {size} cannot be divided by {unit} (autoencoder and UNet levels); "
                f"nearest that can: {' and '.join(near)}",
            )


def unet_levels(source: NetworkSource) -> int:
    """The number of resolutions of a UNet; 4 by diffusers' default, and in SD and SVD."""
    channels = (source.config or {}).get("block_out_channels")
    return len(channels) if isinstance(channels, list) and channels else DEFAULT_UNET_LEVELS


def _initial_weights(recipe: TrainingRecipe) -> Iterator[Problem]:
    if recipe.init_from == recipe.name:
        yield Problem.at("init_from", f"init_from names this run itself ('{recipe.name}')")
    if recipe.init_step is not None and recipe.init_from is None:
        yield Problem.at("init_step", "init_step is a step of the run that init_from names, but init_from is not given")


def _stage1(recipe: Stage1Recipe) -> Iterator[Problem]:
    if recipe.data.maps is not None:
        yield Problem.at("data.maps", "data.maps is for stage 2: stage 1 learns the true maps")
    model, objective = recipe.model, recipe.objective
    wanted = {
        "image": {"geometry_attention": False, "temporal_attention": False},
        "domains": {"geometry_attention": False, "temporal_attention": False},
        "geometry": {"geometry_attention": True, "temporal_attention": False},
        "temporal": {"temporal_attention": True},
    }[recipe.train]
    for name, value in wanted.items():
        if getattr(model, name) is not value:
            yield Problem.at(f"model.{name}", f"train: {recipe.train} needs model.{name}: {str(value).lower()}")
    if model.temporal_attention:
        frames_of = {"data.num_frames": recipe.data.num_frames, "sampling.window_frames": recipe.sampling.window_frames}
        for name, frames in frames_of.items():
            if frames > model.max_frames:
                yield Problem.at(name, f"{name} {frames} is more than model.max_frames {model.max_frames}")
        sampled, trained = min(recipe.sampling.window_frames, recipe.validation.num_frames), recipe.data.num_frames
        if sampled > trained:
            yield Problem.at(
                "sampling.window_frames",
                f"samples of validation.num_frames {recipe.validation.num_frames} in windows of sampling.window_frames "
                f"{recipe.sampling.window_frames} are longer than data.num_frames {trained}, on which temporal "
                f"attention is trained; set one of the two to {trained} or less",
            )
    halvings = (model.autoencoder.patch_size or AUTOENCODER_DOWNSCALE).bit_length() - 1
    if len(model.pose_channels) <= halvings:
        yield Problem.at(
            "model.pose_channels",
            f"model.pose_channels has {len(model.pose_channels)} widths; to reach the latents' size it needs at least "
            f"{halvings + 1}, one before and one after each of {halvings} halvings",
        )
    if objective.beta_start >= objective.beta_end:
        yield Problem.at(
            "objective.beta_start",
            f"objective.beta_start {objective.beta_start} must be below objective.beta_end {objective.beta_end}",
        )
    if objective.zero_terminal_snr and objective.prediction_type == "epsilon":
        yield Problem.at(
            "objective.prediction_type",
            "with objective.zero_terminal_snr the last timestep contains no image, so epsilon cannot be converted into "
            "a sample there; use prediction_type v_prediction or sample",
        )
    for name, weights in (("domain_draw", objective.domain_draw), ("domain_loss", objective.domain_loss)):
        if sum(weights.in_order) == 0.0:
            yield Problem.at(f"objective.{name}", f"objective.{name} is zero for all three domains")


def _windows(sampling: GeometrySampling | AnimationSampling, name: str) -> Iterator[Problem]:
    if sampling.window_overlap >= sampling.window_frames:
        yield Problem.at(
            f"{name}.window_overlap",
            f"{name}.window_overlap {sampling.window_overlap} must be below {name}.window_frames "
            f"{sampling.window_frames}, or windows never advance",
        )


def _aspects(recipe: AnimateRecipe) -> Iterator[Problem]:
    """Both stages must have the same aspect ratio: otherwise stage 1 would show a distorted person."""
    if recipe.geometry_from is None:
        return
    ratio = (recipe.geometry_width * recipe.height) / (recipe.geometry_height * recipe.width)
    if abs(ratio - 1.0) > ASPECT_TOLERANCE:
        yield Problem.at(
            "geometry_width",
            f"geometry_width x geometry_height {recipe.geometry_width}x{recipe.geometry_height} has another "
            f"aspect ratio than width x height {recipe.width}x{recipe.height}: stage 1 would show a distorted person",
        )


def _prepare(recipe: PrepareRecipe) -> Iterator[Problem]:
    if (recipe.dancers is None) == (recipe.videos is None):
        given = "neither is given" if recipe.dancers is None else "both are given"
        yield Problem(f"a prepare recipe has either a section dancers or a section videos; {given}", _place(recipe))
    yield from _smaller_sizes(recipe)
    if recipe.dancers is not None and recipe.dancers.pairs and recipe.dancers.num_validation_clips < 2:
        yield Problem.at("dancers.pairs", "dancers.pairs needs dancers.num_validation_clips of at least 2")
    videos = recipe.videos
    if videos is None:
        return
    if videos.min_clip_frames > videos.clip_frames:
        yield Problem.at(
            "videos.min_clip_frames",
            f"videos.min_clip_frames {videos.min_clip_frames} is more than videos.clip_frames {videos.clip_frames}",
        )
    if (videos.width is None) != (videos.height is None):
        yield Problem.at("videos", "give both videos.width and videos.height, or neither")


def _smaller_sizes(recipe: PrepareRecipe) -> Iterator[Problem]:
    source = recipe.dancers or recipe.videos
    if source is None or not recipe.smaller_sizes:
        return
    if source.width is None or source.height is None:
        yield Problem.at("smaller_sizes", "smaller_sizes needs videos.width and videos.height, the size of the frames")
        return
    if problem := smaller_sizes_problem((source.width, source.height), recipe.smaller_sizes):
        yield Problem.at("smaller_sizes", f"smaller_sizes {problem}")


def _place(recipe: PrepareRecipe) -> KeyPath:
    return ("dancers",) if recipe.dancers is not None else ("task",)
