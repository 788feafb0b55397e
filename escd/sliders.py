"""The sliders of a notebook: strengths of shape and appearance, as the front of one plain function."""

from __future__ import annotations

import base64
import html
import io
import re
import threading
import time
from typing import TYPE_CHECKING

import ipywidgets
import torch
from PIL import Image

from .backbone.prompts import cut_off, reader, starred_words

if TYPE_CHECKING:
    from transformers import CLIPTokenizerFast

    from .method.pipeline import ESCDPipeline

# Every word that a text encoder with a small vocabulary has read is one token of it. A large vocabulary, as
# Stable Diffusion's, writes rare words in pieces that it has read, too.
SMALL_VOCABULARY = 10_000
SLOW = 2.0  # seconds of drawing from which on they are told beforehand

# Widgets whose kernel has gone are marked as disconnected by the page itself. Only the page can say it then.
STALE = "escd-stale"
ON_THE_PAGE = f"""<style>
.{STALE} {{ opacity: 0.35; }}
.escd-no-kernel {{ display: none; }}
.jupyter-widgets-disconnected .escd-no-kernel {{ display: block; }}
</style>
<div class="escd-no-kernel"><b>No kernel answers these sliders: run the cell again.</b></div>"""


def render(
    pipe: ESCDPipeline,
    prompt: str,
    shape_strength: float = 1.0,
    appearance_strength: float = 1.0,
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float | None = None,
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


def remarks(pipe: ESCDPipeline, prompt: str) -> list[str]:
    """Remarks on a prompt that may not give what the user expects; usually none."""
    said = []
    if not prompt.strip():
        return ["The prompt is empty: the image is anything the model draws, and no strength changes it."]
    if cut := cut_off(pipe.tokenizer, prompt, pipe.customizations):
        length = pipe.tokenizer.model_max_length
        said.append(f"The model reads {length} tokens of a prompt. It does not read: “{cut}”.")
    if unknown := unknown_words(pipe.tokenizer, prompt):
        listed = ", ".join(f"“{word}”" for word in unknown)
        said.append(f"The model does not know {listed}: it draws what it makes of the rest.")
    loaded = {customization.attribute.name: token for token, customization in pipe.customizations.items()}
    standing = starred_words(prompt)
    for name in ("shape", "appearance"):
        if name not in loaded:
            said.append(f"No {name} is loaded: its slider changes nothing.")
        elif loaded[name] not in standing:
            said.append(f"The prompt has no {loaded[name]}: the slider of {name} changes nothing.")
    return said


def unknown_words(tokenizer: CLIPTokenizerFast, prompt: str) -> list[str]:
    """The words of `prompt` that a tokenizer with a small vocabulary has no token for, in order."""
    if len(tokenizer) >= SMALL_VOCABULARY:
        return []
    words = re.findall(r"[^\W\d_]+", re.sub(r"\*\w+", " ", prompt.lower()))
    with reader(tokenizer) as reads:
        return [word for word in dict.fromkeys(words) if len(reads.tokenize(word)) > 1]


class _Sliders(ipywidgets.VBox):
    """A box that a page without a kernel shows as its picture, and not as the box's Python name."""

    def _repr_mimebundle_(self, **given: object) -> dict:
        bundle = super()._repr_mimebundle_(**given)
        picture = next(child for child in self.children if isinstance(child, ipywidgets.Image))
        return bundle and bundle | {"image/png": base64.b64encode(picture.value).decode()}


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
    What is not wrong, but may surprise, is written there as well (`remarks`). An image that does not belong
    to the sliders, while the next is drawn or after an error, is dimmed.
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
    loaded = {customization.attribute.name for customization in pipe.customizations.values()}
    for name in ("shape", "appearance"):
        controls[f"{name}_strength"].disabled = name not in loaded
    picture = ipywidgets.Image(format="png", width=size, height=size)
    said, on_the_page = ipywidgets.HTML(), ipywidgets.HTML(ON_THE_PAGE)
    one_at_a_time = threading.Lock()  # a page's messages may come in a thread of their own
    seconds_a_step = 0.0

    def draw(_change: object = None) -> None:
        nonlocal seconds_a_step
        with one_at_a_time:
            values = {name: control.value for name, control in controls.items()}
            expected = seconds_a_step * values["steps"]
            said.value = f"drawing, about {expected:.0f} s ..." if expected >= SLOW else "drawing ..."
            picture.add_class(STALE)
            begun = time.perf_counter()
            try:
                image = render(pipe, **values)
            except Exception as error:  # said to the person, and not swallowed
                said.value = f"<b>{html.escape(type(error).__name__)}</b>: {html.escape(str(error))}"
                raise
            seconds_a_step = (time.perf_counter() - begun) / values["steps"]
            buffer = io.BytesIO()
            image.resize((size, size), Image.Resampling.BICUBIC).save(buffer, format="PNG")
            picture.value = buffer.getvalue()
            picture.remove_class(STALE)
            said.value = "<br>".join(map(html.escape, remarks(pipe, values["prompt"])))

    draw()
    for control in controls.values():
        control.observe(draw, names="value")
    return _Sliders([*controls.values(), said, on_the_page, picture])
