"""The sliders: the plain function first, then the widget in front of it."""

from __future__ import annotations

import base64
import html
import io

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

import escd
from escd import sliders
from escd.backbone.parts import parameters_of
from escd.method.customization import Customization
from escd.method.pipeline import ESCDPipeline
from escd.sliders import STALE, remarks, render, unknown_words

PROMPT = "a *m shape with *a appearance on a gray background"
QUICK = {"steps": 5}


@pytest.fixture
def pipe(backbone) -> ESCDPipeline:
    """A pipeline with a shape and an appearance that change a lot, tuned on nothing."""
    learnt = {}
    for seed, attribute in enumerate(escd.ATTRIBUTES.values()):
        generator = torch.Generator().manual_seed(seed)
        word = backbone.word_embedding(attribute.word)
        learnt[attribute.name] = Customization(
            attribute=attribute,
            pseudo_word=torch.randn(word.shape, generator=generator),
            delta={
                name: 0.1 * torch.randn(w.shape, generator=generator)
                for name, w in parameters_of(backbone.unet, attribute.part).items()
            },
            part=attribute.part,
            backbone_identity=backbone.identity_without_filters,
            backbone_name=backbone.name,
            steps=1,
            seed=seed,
        )
    pipe = ESCDPipeline(backbone, **learnt)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def differ(one: Image.Image, other: Image.Image) -> bool:
    return not np.array_equal(np.asarray(one), np.asarray(other))


def test_render_is_a_function_of_its_arguments(pipe):
    first = render(pipe, PROMPT, **QUICK)
    assert not differ(first, render(pipe, PROMPT, **QUICK))
    assert differ(first, render(pipe, PROMPT, seed=1, **QUICK))
    assert differ(first, render(pipe, PROMPT, shape_strength=0.5, **QUICK))
    assert differ(first, render(pipe, PROMPT, appearance_strength=0.5, **QUICK))
    assert differ(first, render(pipe, PROMPT, guidance_scale=1.0, **QUICK))
    assert differ(first, render(pipe, PROMPT, steps=6))
    direct = pipe(PROMPT, num_inference_steps=5, generator=torch.Generator().manual_seed(0)).images[0]
    assert not differ(first, direct)


def test_no_strength_is_the_plain_words(pipe):
    plain = render(pipe, "a shape shape with appearance appearance on a gray background", **QUICK)
    assert not differ(render(pipe, PROMPT, shape_strength=0, appearance_strength=0, **QUICK), plain)


def parts_of(box: ipywidgets.VBox) -> tuple[dict[str, ipywidgets.Widget], ipywidgets.HTML, ipywidgets.Image]:
    *controls, said, _on_the_page, picture = box.children
    return {control.description: control for control in controls}, said, picture


def shown(picture: ipywidgets.Image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.value)))


def test_moving_a_slider_draws_what_render_draws(pipe):
    controls, said, picture = parts_of(escd.attribute_sliders(pipe, PROMPT, size=64, **QUICK))
    assert set(controls) == {"prompt", "shape", "appearance", "seed", "steps"}
    assert said.value == ""

    def expected(**arguments) -> np.ndarray:
        image = render(pipe, **{"prompt": PROMPT, **QUICK, **arguments})
        return np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))

    assert np.array_equal(shown(picture), expected())
    controls["shape"].value = 0.5
    assert np.array_equal(shown(picture), expected(shape_strength=0.5))
    controls["appearance"].value = 0.25
    assert np.array_equal(shown(picture), expected(shape_strength=0.5, appearance_strength=0.25))
    controls["seed"].value = 3
    # as the browser sends it
    controls["prompt"].set_state({"value": "a *m shape"})
    assert np.array_equal(
        shown(picture), expected(prompt="a *m shape", shape_strength=0.5, appearance_strength=0.25, seed=3)
    )


def test_an_error_is_shown_and_raised(pipe):
    controls, said, picture = parts_of(escd.attribute_sliders(pipe, PROMPT, size=64, **QUICK))
    before = picture.value
    with pytest.raises(ValueError, match=r"\*b"):
        controls["prompt"].value = "a *b shape on a <gray> background"
    assert "ValueError" in said.value and "*b" in said.value
    assert picture.value == before and STALE in picture._dom_classes
    controls["prompt"].value = "a *m shape with *a appearance"
    assert said.value == "" and picture.value != before and STALE not in picture._dom_classes


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (PROMPT, ""),
        (PROMPT + " on a gray background", ""),  # 14 tokens, as many as are read: a pseudo-word is one
        ("  ", "The prompt is empty"),
        ("a *m shape with *a appearance" + " on a gray background" * 4, "The model reads 16 tokens of"),
        ("a *m zebra, with *a appearance", "does not know “zebra”"),
        ("a *m shape", "The prompt has no *a: the slider of appearance changes nothing."),
        ("a star", "The prompt has no *m: the slider of shape changes nothing."),
    ],
)
def test_what_may_surprise_is_said_under_the_sliders(pipe, prompt, said):
    controls, told, picture = parts_of(escd.attribute_sliders(pipe, PROMPT, **QUICK))
    controls["prompt"].value = prompt
    assert (html.escape(said) in told.value) if said else told.value == ""
    assert STALE not in picture._dom_classes
    assert remarks(pipe, prompt) == [html.unescape(line) for line in told.value.split("<br>") if line]


def test_words_in_pieces_are_known_to_a_large_vocabulary(pipe, monkeypatch):
    prompt = "a *m zebra's shape"
    assert unknown_words(pipe.tokenizer, prompt) == ["zebra"]
    monkeypatch.setattr(sliders, "SMALL_VOCABULARY", 1)
    assert unknown_words(pipe.tokenizer, prompt) == []


def test_the_slider_of_what_is_not_loaded_says_so_and_does_not_move(pipe):
    alone = ESCDPipeline(pipe.backbone, shape=pipe.customizations["*m"])
    alone.set_progress_bar_config(disable=True)
    controls, said, _ = parts_of(escd.attribute_sliders(alone, "a *m shape", **QUICK))
    assert said.value == "No appearance is loaded: its slider changes nothing."
    assert controls["appearance"].disabled and not controls["shape"].disabled


def test_while_it_draws_the_old_image_is_dimmed_and_the_time_is_said(pipe, monkeypatch):
    controls, said, picture = parts_of(escd.attribute_sliders(pipe, PROMPT, **QUICK))
    met = []

    def slow(*given, **named):
        met.append((said.value, STALE in picture._dom_classes))
        moment.append(moment[-1] + 5)
        return Image.new("RGB", (8, 8))

    moment = [0.0]
    monkeypatch.setattr(sliders, "render", slow)
    monkeypatch.setattr(sliders.time, "perf_counter", lambda: moment[-1])
    controls["seed"].value = 1
    controls["steps"].value = 50
    assert met[0][1] and "drawing" in met[0][0]
    assert met[1] == ("drawing, about 50 s ...", True), "five seconds for five steps, ten times as many steps"


def test_a_page_without_a_kernel_has_the_picture(pipe):
    box = escd.attribute_sliders(pipe, PROMPT, **QUICK)
    bundle = box._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == box.model_id
    assert base64.b64decode(bundle["image/png"]) == parts_of(box)[2].value
    on_the_page = box.children[-2].value
    assert "run the cell again" in on_the_page and f".{STALE}" in on_the_page


def test_what_is_wrong_at_first_is_raised_at_once(pipe):
    with pytest.raises(ValueError, match=r"\*b"):
        escd.attribute_sliders(pipe, "a *b shape", **QUICK)


def test_the_widget_works_without_extensions(pipe):
    box = escd.attribute_sliders(pipe, PROMPT, **QUICK)
    for widget in (box, *box.children):
        assert widget._model_module == widget._view_module == "@jupyter-widgets/controls"
        # a slider that draws while it is dragged draws a hundred images
        assert getattr(widget, "continuous_update", False) is False
