"""One backbone, several callers at the same time: each gets the bits it gets alone."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import assert_untouched, make_customization, snapshot

from escd import ESCDPipeline, customize

BOTH = "a *m shape with *a appearance on a gray background"
SHAPE = "a *m shape on a gray background"
PLAIN = "a striped red and white star on a beige background"
STEPS = 4


def quiet(pipe: ESCDPipeline) -> ESCDPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(backbone, shape, appearance) -> ESCDPipeline:
    return quiet(ESCDPipeline(backbone, shape=shape, appearance=appearance))


@pytest.fixture
def other(backbone) -> ESCDPipeline:
    """Another pipeline on the same backbone, with another shape."""
    return quiet(ESCDPipeline(backbone, shape=make_customization(backbone, "shape", seed=8)))


@pytest.fixture(autouse=True)
def backbone_stays_as_it_is(backbone):
    before, text = snapshot(backbone.unet), snapshot(backbone.text_encoder)
    words = backbone.tokenizer.backend_tokenizer.to_str()
    structure = [list(module.modules()) for module in backbone.modules.values()]
    yield
    assert_untouched(backbone.unet, before)
    assert_untouched(backbone.text_encoder, text)
    assert backbone.tokenizer.backend_tokenizer.to_str() == words
    assert [list(module.modules()) for module in backbone.modules.values()] == structure
    assert not any(m._forward_hooks for modules in structure for m in modules)


def draw(pipe, prompt, seed=0, **options) -> np.ndarray:
    options = {"num_inference_steps": STEPS, "output_type": "np"} | options
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images


class Meeting:
    """Makes calls in several threads take their steps together: each runs in the middle of the others."""

    def __init__(self, callers: int) -> None:
        self.barrier = threading.Barrier(callers, timeout=120)

    def __call__(self, *_: object) -> None:
        self.barrier.wait()


def together(*calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result() for f in [pool.submit(call) for call in calls]]


def test_two_threads_on_one_pipeline(pipe):
    asked = [(BOTH, {"shape_strength": 0.5}), (SHAPE, {"shape_strength": 2.0}), (PLAIN, {})]
    alone = [draw(pipe, prompt, seed, **options) for seed, (prompt, options) in enumerate(asked)]
    meet = Meeting(len(asked))
    drawn = together(
        *(
            lambda seed=seed, prompt=prompt, options=options: draw(
                pipe, prompt, seed, callback_on_step_end=meet, **options
            )
            for seed, (prompt, options) in enumerate(asked)
        )
    )
    assert all(np.array_equal(a, b) for a, b in zip(alone, drawn, strict=True))


def test_two_pipelines_on_one_backbone(pipe, other):
    alone = draw(pipe, SHAPE), draw(other, SHAPE)
    meet = Meeting(2)
    drawn = together(
        lambda: draw(pipe, SHAPE, callback_on_step_end=meet),
        lambda: draw(other, SHAPE, callback_on_step_end=meet),
    )
    assert not np.array_equal(*alone)
    assert all(np.array_equal(a, b) for a, b in zip(alone, drawn, strict=True))


def test_asyncio(pipe):
    alone = [draw(pipe, BOTH, shape_strength=0.3 * k) for k in range(3)]

    async def all_at_once():
        return await asyncio.gather(
            *(asyncio.to_thread(draw, pipe, BOTH, shape_strength=0.3 * k) for k in range(3))
        )

    assert all(np.array_equal(a, b) for a, b in zip(alone, asyncio.run(all_at_once()), strict=True))


def test_a_pipeline_in_its_own_callback(pipe, other):
    half = {"shape_strength": 0.5, "guidance_scale": 4.0}
    alone = draw(pipe, BOTH), draw(other, SHAPE), draw(pipe, SHAPE, **half)
    inner = []

    def call_again(p, step, _t, _tensors):
        if step == 1:
            inner.append(draw(other, SHAPE))
            inner.append(draw(p, SHAPE, num_inference_steps=STEPS, **half))
        assert (p.num_timesteps, p.guidance_scale) == (STEPS, 3.0)  # its own call's, not the inner one's

    outer = draw(pipe, BOTH, callback_on_step_end=call_again, guidance_scale=3.0)
    assert np.array_equal(outer, draw(pipe, BOTH, guidance_scale=3.0))
    assert np.array_equal(inner[0], alone[1]) and np.array_equal(inner[1], alone[2])


@pytest.mark.parametrize("attribute", ["shape", "appearance"])
def test_tuning_while_another_thread_draws(pipe, backbone, attribute):
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ready, done = threading.Event(), threading.Event()

    def tune(callback=None):
        return customize(image, attribute, backbone, steps=3, callback=callback, progress=False)

    def wait(step, _loss):  # in the middle of the tuning, until pictures were drawn
        if step == 1:
            ready.set()
            assert done.wait(120)

    def draw_meanwhile():
        assert ready.wait(120)
        pictures = [draw(pipe, BOTH), draw(pipe, PLAIN)]
        done.set()
        return pictures

    alone, learnt = [draw(pipe, BOTH), draw(pipe, PLAIN)], tune()
    again, drawn = together(lambda: tune(wait), draw_meanwhile)
    assert all(np.array_equal(a, b) for a, b in zip(alone, drawn, strict=True))
    assert torch.equal(again.pseudo_word, learnt.pseudo_word) and again.losses == learnt.losses
    assert all(torch.equal(w, learnt.delta[name]) for name, w in again.delta.items())


def test_tuning_chooses_attentions_kernel_for_its_own_thread_only(backbone, monkeypatch):
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = []

    def look(_step, _loss):
        seen.append(together(torch.backends.cuda.flash_sdp_enabled)[0])

    assert torch.backends.cuda.flash_sdp_enabled()
    customize(image, "shape", backbone, steps=1, callback=look, progress=False)
    assert seen == [True]


def test_two_tunings_at_once(backbone):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = list(zip(images, ("shape", "appearance"), strict=True))
    meet = Meeting(2)

    def tune(image, attribute, callback=None):
        return customize(image, attribute, backbone, steps=2, callback=callback, progress=False)

    alone = [tune(*each) for each in wanted]
    at_once = together(*(lambda each=each: tune(*each, meet) for each in wanted))
    for a, b in zip(alone, at_once, strict=True):
        assert a.losses == b.losses and torch.equal(a.pseudo_word, b.pseudo_word)


def test_interrupting_one_call_leaves_the_other_running(pipe):
    alone, meet = draw(pipe, PLAIN), threading.Barrier(2, timeout=120)

    def stop(p, step, _t, _tensors):
        p.interrupt = step == 0
        meet.wait()

    def go_on(p, step, _t, _tensors):
        if step == 0:
            meet.wait()
        assert not p.interrupt

    halted, whole = together(
        lambda: draw(pipe, PLAIN, callback_on_step_end=stop),
        lambda: draw(pipe, PLAIN, callback_on_step_end=go_on),
    )
    assert np.array_equal(whole, alone) and not np.array_equal(halted, alone)


def test_a_stop_button_on_another_thread(pipe):
    steps = []

    def press(_p, step, _t, _tensors):
        steps.append(step)
        if step == 1:
            together(lambda: setattr(pipe, "_interrupt", True))

    draw(pipe, PLAIN, callback_on_step_end=press)
    assert steps == [0, 1] and pipe.interrupt


def test_offloaded_pipelines_take_turns(pipe):
    alone = [draw(pipe, BOTH), draw(pipe, SHAPE, shape_strength=0.5)]
    pipe.enable_model_cpu_offload(device="cpu")  # the hooks work on any device
    drawn = together(lambda: draw(pipe, BOTH), lambda: draw(pipe, SHAPE, shape_strength=0.5))
    assert all(np.array_equal(a, b) for a, b in zip(alone, drawn, strict=True))
