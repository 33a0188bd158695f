"""The section `data.filters`: which clips a training run uses, by the scores that prepare stored with them."""

from typing import Annotated

from pydantic import Field

from dreamdance.recipe.sections import Fraction, Positive, Scale, Section, Unit

Degrees = Annotated[float, Field(ge=0.0, le=180.0), Unit("degrees")]


class ScoreFilters(Section):
    """Limits of the clips' scores. A clip is used if it passes all of them; one without a named score does not pass."""

    cut: Fraction | None = Field(
        default=None,
        description="Highest accepted probability of a cut within the clip.",
    )
    motion: Annotated[tuple[Scale, Scale], Unit("frame heights per second")] | None = Field(
        default=None,
        description=(
            "Smallest and largest accepted motion, as [low, high]: the mean over the whole picture. Still clips teach "
            "no motion; very fast ones are blurred."
        ),
    )
    sharpness: Scale | None = Field(
        default=None,
        description="Smallest accepted sharpness: the variance of the Laplacian of the brightness within the body.",
    )
    visible_joints: Fraction | None = Field(
        default=None,
        description="Smallest accepted share of the 18 joints of the body that are seen, over all frames.",
    )
    people: Positive | None = Field(
        default=None,
        description="Accepted number of people: 1 leaves out clips without a person and with several.",
    )
    jitter: Scale | None = Field(
        default=None,
        description="Largest accepted jitter of the key points before they are smoothed.",
    )
    geometry_angle: Degrees | None = Field(
        default=None,
        description=(
            "Largest accepted mean angle between the normals and those of the depth: it leaves out clips whose normals "
            "and depth disagree."
        ),
    )
