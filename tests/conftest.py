"""A tiny backbone with random weights, in the exact layout of the real ones, for tests without training."""

from __future__ import annotations

import copy
import json
import tempfile

import pytest
import torch
import warm
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

import escd
from escd import frozen, records
from escd.backbone.folder import save_backbone
from escd.backbone.image_tower import ImageTower
from escd.backbone.model import Backbone
from escd.backbone.parts import parameters_of
from escd.loading import read_backbone
from escd.method import step, tuning
from escd.method.attributes import resolve_attribute
from escd.method.customization import Customization
from escd.method.fusion import AttributeFilter
from escd.method.optimizers import Updates
from escd.method.pipeline import ESCDPipeline
from escd.pretrain import autoencoder, filters
from escd.pretrain import unet as unet_stage

WORDS = (
    "man a an the shape appearance texture colour star circle heart in of on with red green blue white and "
    "striped solid background gray pink beige cyan horse * m , . ' s ( ) ! - 2"
).split()

BOTH = "a *m shape with *a appearance on a gray background"
# What some of diffusers' schedulers do with NumPy 2.
from_diffusers = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def pytest_configure(config):
    folder = tempfile.TemporaryDirectory(prefix="escd-")
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(warm.start(folder.name))


def pytest_collection_modifyitems(items):
    # The longest first: at the end neither of two workers waits minutes for the other.
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def make_tokenizer(folder, length: int = 16) -> CLIPTokenizerFast:
    """A CLIP tokenizer that knows each of WORDS as one token, and other words by letters."""
    letters = sorted(set("".join(WORDS)) | set("abcdefghijklmnopqrstuvwxyz"))
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    trainer = BpeTrainer(vocab_size=1000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([[word] for word in WORDS], trainer)
    merges = [
        pair if isinstance(pair, list) else pair.split(" ")
        for pair in json.loads(bpe.to_str())["model"]["merges"]
    ]
    entries = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(c + "</w>" for c in letters),
        *map("".join, merges),
    ]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder, model_max_length=length)
    assert [word for word in WORDS if len(tokenizer.tokenize(word)) != 1] == []
    return tokenizer


def make_backbone(folder, seed: int = 0) -> Backbone:
    """A backbone of 16 px images and 8 x 8 latents, with SD's block types at three resolutions."""
    tokenizer = make_tokenizer(folder)
    width = 32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = Backbone(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                sample_size=16,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=tokenizer.model_max_length,
                    hidden_act="gelu",
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32, 32),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D",) * 3,
                up_block_types=("CrossAttnUpBlock2D",) * 3,
                cross_attention_dim=width,
                attention_head_dim=4,
                norm_num_groups=8,
            ),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            image_tower=ImageTower(
                image_size=16, patch_size=8, width=32, layers=2, embed_dim=16, head_width=16
            ),
            name="tiny",
        )
        # The library starts the text encoder and the attention outputs so small that every prompt looks
        # alike.
        for p in backbone.text_encoder.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
        for name in ("shape", "appearance"):
            attribute_filter = AttributeFilter.for_backbone(backbone, hidden=8)
            torch.nn.init.normal_(attribute_filter.fuse[-1].weight, std=0.3)
            backbone.filters[name] = attribute_filter
    for module in backbone.modules.values():
        module.eval().requires_grad_(False)
    return backbone


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The tiny backbone, saved: a folder in the layout of the shipped one."""
    folder = tmp_path_factory.mktemp("tiny")
    save_backbone(make_backbone(tmp_path_factory.mktemp("tokenizer")), folder)
    return folder


@pytest.fixture(scope="session")
def read_once(tiny_folder) -> Backbone:
    """The tiny backbone as it is read. No test is to change it."""
    return read_backbone(tiny_folder, name="tiny")


@pytest.fixture
def backbone(read_once) -> Backbone:
    """A tiny backbone, fresh for each test, on the CPU."""
    return copy.deepcopy(read_once)  # in half the time that reading takes


def make_customization(backbone: Backbone, attribute, seed: int = 0) -> Customization:
    """A customization with a random pseudo-word and random changes of the attribute's part."""
    attribute = resolve_attribute(attribute)
    generator = torch.Generator().manual_seed(seed)
    parameters = parameters_of(backbone.unet, attribute.part)
    return Customization(
        attribute=attribute,
        pseudo_word=0.3 * torch.randn(32, generator=generator),
        delta={name: 0.05 * torch.randn(p.shape, generator=generator) for name, p in parameters.items()},
        part=attribute.part,
        backbone_identity=backbone.identity_without_filters,
        backbone_name=backbone.name,
        steps=7,
        seed=seed,
        config={"learning_rate": 5e-4},
        losses=[0.5, 0.25],
    )


@pytest.fixture(scope="module")
def few_pictures():
    """Stages of pretraining that begin with fewer images, and are scored on fewer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet_stage, "BEGUN", 128)
        patch.setattr(unet_stage, "HELD_OUT", 32)
        patch.setattr(unet_stage, "SAMPLER_STEPS", 2)
        patch.setattr(filters, "SAMPLER_STEPS", 2)
        patch.setattr(autoencoder, "FITTED", 64)
        patch.setattr(autoencoder, "HELD_OUT", 16)
        yield


@pytest.fixture
def shape(backbone) -> Customization:
    return make_customization(backbone, "shape", seed=1)


@pytest.fixture
def appearance(backbone) -> Customization:
    return make_customization(backbone, "appearance", seed=2)


@pytest.fixture
def interrupted_once(monkeypatch) -> None:
    """An interrupt in the second step that is tuned in a test."""
    steps, predicted = [], tuning.predicted

    def interrupted(*given):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return predicted(*given)

    monkeypatch.setattr(tuning, "predicted", interrupted)


@pytest.fixture
def pipe(backbone, shape, appearance) -> ESCDPipeline:
    pipe = ESCDPipeline(backbone, shape=shape, appearance=appearance)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def picture(backbone):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, backbone.image_size, backbone.image_size, generator=generator) * 2 - 1


@pytest.fixture
def one_step(backbone, picture, monkeypatch):
    """Runs one step in float32; returns its batches as drawn, its gradients by optimiser order, its loss."""

    def run(config):
        drawn, gradients = [], []
        draw, apply = tuning.Batches.draw, Updates.apply

        def keep(self, count):
            drawn.append(draw(self, count))
            return drawn[-1]

        def read(self, loss, number):
            learning = [p for group in self.groups for p in group["params"]]
            gradients.extend(torch.autograd.grad(loss, learning, retain_graph=True))
            apply(self, loss, number)

        monkeypatch.setattr(tuning.Batches, "draw", keep)
        monkeypatch.setattr(Updates, "apply", read)
        monkeypatch.setattr(step, "autocast_dtype", lambda *_: None)
        monkeypatch.setattr(tuning, "autocast_dtype", lambda *_: None)
        learnt = escd.customize(picture, config.attribute, backbone, config=config, progress=False)
        return drawn, gradients, learnt

    return run


# ---- what several tests compare with


def snapshot(unet):
    return {name: (p.data_ptr(), p._version, p.detach().clone()) for name, p in unet.named_parameters()}


def assert_untouched(unet, before):
    for name, p in unet.named_parameters():
        pointer, version, values = before[name]
        assert p.data_ptr() == pointer and p._version == version and torch.equal(p, values), name


def as_record(config, metrics):
    return records.Record(
        kind=records.kind_of(config), key=records.key_of(config), config=frozen.as_json(config),
        seed=config.seed, metrics=metrics, inputs={}, seconds=1.0, device="cpu", machine="",
        instruction_set="", threads=1, versions={}, commit=None,
    )  # fmt: skip
