"""The sliders of a notebook: strengths of shape and appearance, as the front of one plain function."""

from __future__ import annotations

import html
import io
from typing import TYPE_CHECKING

import ipywidgets
import torch
from PIL import Image

if TYPE_CHECKING:
    from escd.pipeline import ESCDPipeline


def render(
    pipe: ESCDPipeline,
    prompt: str,
    shape_strength: float = 1.0,
    appearance_strength: float = 1.0,
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 4.0,
) -> Image.Image:
    """One image of `pipe`; equal arguments give equal images. Raises what the pipeline raises."""
    return pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        shape_strength=shape_strength,
        appearance_strength=appearance_strength,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


def attribute_sliders(
    pipe: ESCDPipeline,
    prompt: str = "a *m shape with *a appearance on a gray background",
    *,
    seed: int = 0,
    steps: int = 25,
    size: int = 256,
) -> ipywidgets.VBox:
    """Sliders for a pipeline: prompt, strength of shape and of appearance, seed, steps; the image below them.

    A strength of 0 is the untouched backbone, 1 is what was tuned, more extrapolates. `size` is the width of
    the image on the page, in pixels. The first image is made at once, and what is wrong with it is raised
    here; what is wrong later is written under the sliders and raised too, so no batch run passes over it.
    """
    wide = ipywidgets.Layout(width="32em")
    named = {"style": {"description_width": "8em"}, "layout": wide, "continuous_update": False}
    controls = {
        "prompt": ipywidgets.Text(value=prompt, description="prompt", **named),
        "shape_strength": ipywidgets.FloatSlider(value=1, max=1.5, step=0.05, description="shape", **named),
        "appearance_strength": ipywidgets.FloatSlider(
            value=1, max=1.5, step=0.05, description="appearance", **named
        ),
        "seed": ipywidgets.BoundedIntText(
            value=seed, min=0, max=2**31 - 1, description="seed", style=named["style"], layout=wide
        ),
        "steps": ipywidgets.IntSlider(value=steps, min=5, max=50, description="steps", **named),
    }
    picture = ipywidgets.Image(format="png", width=size, height=size)
    said = ipywidgets.HTML()

    def draw(_change: object = None) -> None:
        said.value = "drawing ..."
        try:
            image = render(pipe, **{name: control.value for name, control in controls.items()})
        except Exception as error:  # said to the person, and not swallowed
            said.value = f"<b>{html.escape(type(error).__name__)}</b>: {html.escape(str(error))}"
            raise
        buffer = io.BytesIO()
        image.resize((size, size), Image.Resampling.BICUBIC).save(buffer, format="PNG")
        picture.value = buffer.getvalue()
        said.value = ""

    draw()
    for control in controls.values():
        control.observe(draw, names="value")
    return ipywidgets.VBox([*controls.values(), said, picture])
