"""The three pipelines: geometry (stage 1), animation (stage 2), and both together."""

from dreamdance.pipelines.animation import AnimationPipeline
from dreamdance.pipelines.dreamdance import DreamDancePipeline
from dreamdance.pipelines.geometry import GeometryPipeline
from dreamdance.pipelines.outputs import AnimationOutput, DreamDanceOutput, GeometryOutput
from dreamdance.pipelines.sampling import register_pipeline

__all__ = [
    "AnimationOutput",
    "AnimationPipeline",
    "DreamDanceOutput",
    "DreamDancePipeline",
    "GeometryOutput",
    "GeometryPipeline",
]

for _pipeline_class in (GeometryPipeline, AnimationPipeline, DreamDancePipeline):
    register_pipeline(_pipeline_class)
