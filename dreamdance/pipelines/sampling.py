"""The base class of the pipelines: stable names in saved files, the denoising loop, and the drawing of noise."""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from einops import repeat
from torch import Tensor, nn

from dreamdance.models.autoencoding import downscale_factor, keep_in_float32
from dreamdance.pipelines.windows import SamplingWindow, blend_windows

PIPELINES_MODULE = "dreamdance.pipelines"
COMPONENTS_MODULE = "dreamdance.pipelines.components"
AUTOENCODERS = ("vae", "geometry_vae")

Generators = torch.Generator | Sequence[torch.Generator] | None
Condition = TypeVar("Condition")
StepCallback = Callable[[DiffusionPipeline, int, Any, dict[str, Tensor]], dict[str, Tensor] | None]


class SamplingPipeline(DiffusionPipeline):
    """A `DiffusionPipeline` whose components may be this package's own classes, shared with a trainer.

    `save_pretrained` writes the diffusers folder layout; `from_pretrained` of the same class reads it, and so does
    `DiffusionPipeline.from_pretrained` after `dreamdance.pipelines` is imported. `default_height` and `default_width`
    in the config are the size in pixels at which the networks were trained; a call uses this size by default. In a
    pipeline of half precision the autoencoders stay in float32.
    """

    _callback_tensor_inputs = ["latents"]

    def register_to_config(self, **kwargs: Any) -> None:
        """Records components; for our own classes, the module in which diffusers finds them is `components`."""
        super().register_to_config(**{name: _public_module(value) for name, value in kwargs.items()})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Works as in diffusers; the autoencoders are in float32, unless `torch_dtype` is a dict with other types.

        By default all networks are in float32; with transformers 5 its own ones would have the type of the files.
        """
        dtype = kwargs.setdefault("torch_dtype", torch.float32)
        if isinstance(dtype, torch.dtype):
            wide = dict.fromkeys(AUTOENCODERS, torch.promote_types(dtype, torch.float32))
            kwargs["torch_dtype"] = {"default": dtype, **wide}
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Works as in diffusers; a cast to half precision leaves the autoencoders in float32."""
        with ExitStack() as kept:
            for name in AUTOENCODERS:
                if isinstance(autoencoder := getattr(self, name, None), nn.Module):
                    kept.enter_context(keep_in_float32(autoencoder))
            return super().to(*args, **kwargs)

    def to_json_string(self) -> str:
        """The content of `model_index.json`, with the full name of our own class.

        If a user loads an export with `DiffusionPipeline` and has not imported this package, the error of diffusers
        then contains this name: "module diffusers has no attribute dreamdance.pipelines.GeometryPipeline".
        """
        index = json.loads(super().to_json_string())
        if type(self).__module__.startswith(f"{PIPELINES_MODULE}."):
            index["_class_name"] = public_name(type(self))
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def size_of_result(self, height: int | None, width: int | None, reference: Tensor) -> tuple[int, int]:
        """The given size; else the size at which the networks were trained; else (older exports) the reference's size.

        Args:
            height, width: size in pixels; each may be None.
            reference: `... H W`.

        Raises:
            ValueError: the size is not a multiple of the autoencoder's factor.
        """
        height = height or self.config.default_height or reference.shape[-2]
        width = width or self.config.default_width or reference.shape[-1]
        check_size(height, width, downscale_factor(self.vae))
        return height, width

    @property
    def trained_size(self) -> tuple[int | None, int | None]:
        """Height and width at which the networks were trained; None in older exports."""
        return self.config.default_height, self.config.default_width

    def _denoise_windows(
        self,
        latents: Tensor,
        windows: Sequence[SamplingWindow],
        predict: Callable[[Tensor, SamplingWindow, Tensor], Tensor],
        num_inference_steps: int,
        generator: Generators,
        callback: StepCallback | None,
    ) -> Tensor:
        """Denoises whole sequences; at every step, the predictions of the windows are averaged.

        Args:
            latents: `b f ...`, unit noise.
            windows: windows over the f frames.
            predict: (the scheduler's scaled latents of a window, the window, timestep) -> prediction for that window.
            num_inference_steps: number of steps of the scheduler.
            generator: source of the scheduler's own random numbers, if it draws any (ancestral schedulers do).
            callback: `callback_on_step_end`, or None.

        Returns:
            `b f ...` float32, clean latents.
        """
        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        drawing = {"generator": _diffusers_generator(generator)} if takes_generator else {}
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                scaled = self.scheduler.scale_model_input(latents, timestep)

                def predict_window(window: SamplingWindow, scaled: Tensor = scaled, at: Tensor = timestep) -> Tensor:
                    return predict(scaled[:, window.frames], window, at)

                prediction = blend_windows(predict_window, windows)
                latents = self.scheduler.step(prediction, timestep, latents, **drawing).prev_sample
                latents = run_callback(callback, self, step, timestep, latents)
                progress.update()
        return latents

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Puts all components in evaluation mode; restores the mode of every module afterwards, also after an error."""
        networks = [component for component in self.components.values() if isinstance(component, nn.Module)]
        modes = [(module, module.training) for network in networks for module in network.modules()]
        try:
            for network in networks:
                network.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def _public_module(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and str(value[0]).startswith("dreamdance."):
        return (COMPONENTS_MODULE, value[1])
    return value


def _diffusers_generator(generator: Generators) -> torch.Generator | list[torch.Generator] | None:
    return generator if isinstance(generator, torch.Generator | None) else list(generator)


def public_name(pipeline_class: type[DiffusionPipeline]) -> str:
    """The full name under which users import one of our pipelines."""
    return f"{PIPELINES_MODULE}.{pipeline_class.__name__}"


def register_pipeline(pipeline_class: type[SamplingPipeline]) -> None:
    """Puts a class into the namespace of diffusers, the only place where `DiffusionPipeline.from_pretrained` looks.

    Exports contain its full name; older exports contain its name without the module.
    """
    for name in (public_name(pipeline_class), pipeline_class.__name__):
        if not hasattr(diffusers, name):
            setattr(diffusers, name, pipeline_class)


def draw_initial_noise(shape: Sequence[int], generator: Generators) -> Tensor:
    """Draws unit normal noise `b ...` float32 for whole sequences.

    The noise is drawn on the generator's device (the CPU if there is no generator), so that it depends neither on the
    windows nor on the networks' device. With one generator per clip, a clip's result does not depend on the rest of the
    batch.

    Raises:
        ValueError: the number of generators is not b.
    """
    if not isinstance(generator, torch.Generator | None):
        generator = list(generator)
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators were given for a batch of {shape[0]}")
    first = generator[0] if isinstance(generator, list) else generator
    device = torch.device("cpu") if first is None else first.device
    return randn_tensor(tuple(shape), generator=generator, device=device, dtype=torch.float32)


def predict_for_each(
    conditions: Sequence[Condition],
    denoise: Callable[[Tensor, Tensor, Condition], Tensor],
    latents: Tensor,
    features: Tensor,
    *,
    merge: Callable[[Sequence[Condition]], Condition],
    sequential: bool,
) -> list[Tensor]:
    """Makes one prediction for each condition, in one batch or, to save memory, one after the other.

    Args:
        conditions: the conditions between which guidance extrapolates.
        denoise: (latents, features, condition) -> prediction, all with the batch as first dimension.
        latents, features: `b ...`, the same for every condition.
        merge: concatenates conditions along the batch.
        sequential: whether to predict one after the other.
    """
    if sequential or len(conditions) == 1:
        return [denoise(latents, features, condition) for condition in conditions]
    # the copies are the outermost dimension, so that the domains of one sample stay together (C1)
    copies = len(conditions)
    latents, features = (repeat(values, "b ... -> (g b) ...", g=copies) for values in (latents, features))
    return list(denoise(latents, features, merge(conditions)).chunk(copies))


def run_callback(
    callback: StepCallback | None, pipeline: DiffusionPipeline, step: int, timestep: Tensor, latents: Tensor
) -> Tensor:
    """Calls `callback_on_step_end` as diffusers does; latents that it returns replace the given ones."""
    if callback is None:
        return latents
    returned = callback(pipeline, step, timestep, {"latents": latents})
    return latents if returned is None else returned.get("latents", latents)


def check_size(height: int, width: int, factor: int) -> None:
    """Raises ValueError if a picture's size is not a multiple of the autoencoder's factor."""
    if height % factor or width % factor or height < factor or width < factor:
        raise ValueError(f"height and width must be multiples of {factor}, the autoencoder's factor: {width}x{height}")


def checked_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the given initial noise; raises ValueError if its shape is wrong."""
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must have the shape {shape}, not {tuple(latents.shape)}")
    return latents
