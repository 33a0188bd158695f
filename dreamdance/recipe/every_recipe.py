"""The keys that the recipes of all tasks have."""

from pydantic import Field

from dreamdance.recipe.sections import Cluster, Name, NonNegative, Section

TASK = "What the recipe does; it decides which other keys exist."


class Recipe(Section):
    """The keys of every recipe: a task, a name that is unique over all recipes, a seed, a place to run."""

    task: str = Field(description=TASK)
    name: Name = Field(
        description="Name of the run and of its folder under --runs. The same name continues the same run."
    )
    seed: NonNegative = Field(
        default=0,
        description=(
            "Seed of all random draws: of data, noise and random weights in training, and of the validation videos in "
            "prepare. In animate, the seed of entries without one. evaluate draws nothing."
        ),
    )
    tf32: bool = Field(
        default=False,
        description=(
            "Lets GPUs round the factors of float32 products to 10 bits. Networks in float32 (the autoencoder; all "
            "networks at `precision: fp32`) are faster, with relative errors of about 1e-3 instead of 1e-6."
        ),
    )
    cluster: Cluster = Field(default=Cluster(), description="Where the job runs, and what the launcher asks of Slurm.")
