"""The parts of `--dry-run`: the resolved recipe with the command line's values marked, the batch, the batch script."""

from pathlib import Path

from dreamdance.launch.slurm_cluster import batch_script
from dreamdance.launch.submission import ClusterName
from dreamdance.recipe import LoadedRecipe, TrainingRecipe, dump_recipe
from dreamdance.recipe.yaml_text import read_yaml

MARK = "  # <- command line"


def resolved_recipe(loaded: LoadedRecipe) -> str:
    """The whole recipe with its defaults, and a mark on every line whose value comes from the command line."""
    text = dump_recipe(loaded.recipe)
    starts = read_yaml(text).lines
    marked = {line for path, line in starts.items() if path and ".".join(map(str, path)) in loaded.overridden}
    lines = text.rstrip().splitlines()
    return "\n".join(line + MARK if number in marked else line for number, line in enumerate(lines, start=1))


def pages(loaded: LoadedRecipe, run_folder: Path, cluster: ClusterName, described: str) -> str:
    """All parts one below the other; `described` is what other places know of the plan, may be empty."""
    plan = "\n".join(filter(None, [batch_arithmetic(loaded, cluster), described]))
    return (
        f"# Recipe {loaded.file} (run folder {run_folder})\n{resolved_recipe(loaded)}\n\n# Plan\n{plan}\n\n"
        f"# Batch script\n{script(loaded, run_folder, cluster)}"
    )


def batch_arithmetic(loaded: LoadedRecipe, cluster: ClusterName) -> str:
    """The number of processes, and how they divide a batch."""
    recipe = loaded.recipe
    nodes, tasks = recipe.cluster.nodes, recipe.cluster.tasks_per_node
    lines = [f"processes: {nodes} node{'s' * (nodes > 1)} x {tasks} = {recipe.cluster.world_size}, cluster: {cluster}"]
    if recipe.cluster.array > 1:
        lines.append(f"jobs: {recipe.cluster.array} of so many processes share the items (cluster.array)")
    if isinstance(recipe, TrainingRecipe):
        steps, micro = recipe.accumulation_steps, recipe.micro_batch_size
        shares = f"{micro} (micro batch) x {steps} (accumulation) x {recipe.cluster.world_size} (processes)"
        samples = recipe.batch_size * recipe.max_steps
        lines.append(f"batch: {shares} = {recipe.batch_size} samples per optimizer step")
        lines.append(
            f"training: {recipe.max_steps:,} steps = {samples:,} samples of {recipe.data.num_frames} "
            f"frame{'s' * (recipe.data.num_frames > 1)} at {recipe.data.width}x{recipe.data.height}"
        )
    return "\n".join(lines)


def script(loaded: LoadedRecipe, run_folder: Path, cluster: ClusterName) -> str:
    """The batch script; with a note where the cluster is not Slurm, so that it is not used."""
    note = "" if cluster == "slurm" else f"# (cluster {cluster} does not use this script; Slurm would)\n"
    return note + batch_script(loaded.recipe, run_folder.absolute()).rstrip()
