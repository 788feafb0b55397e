"""Backbones: loading, storing, the text tower with pseudo-words, the image tower."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from types import SimpleNamespace

import huggingface_hub
import open_clip
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import escd.backbone.hub
import escd.backbone.image_tower
import escd.backbone.layout
import escd.backbone.model
import escd.loading
from escd import Backbone, ImageTower, load_backbone
from escd.backbone.devices import as_device, choose_device
from escd.backbone.folder import load_scheduler, save_backbone
from escd.backbone.prompts import check_prompt
from escd.loading import read_backbone
from escd.method.customization import load_customization

# ---- loading and storing


def test_saving_and_loading_keeps_everything(backbone, tmp_path):
    save_backbone(backbone, tmp_path)
    again = read_backbone(tmp_path)
    assert again.identity == backbone.identity and len(again.identity) == 12
    for name, module in backbone.modules.items():
        for key, w in module.state_dict().items():
            assert torch.equal(again.modules[name].state_dict()[key], w), (name, key)
    assert again.tokenizer.get_vocab() == backbone.tokenizer.get_vocab()
    assert dict(again.scheduler.config) == dict(backbone.scheduler.config)
    assert torch.equal(again.encode_prompt("a red star"), backbone.encode_prompt("a red star"))


def test_half_precision_on_disk_is_the_same_backbone_in_float32(backbone, tmp_path):
    save_backbone(backbone, tmp_path, torch.float16)
    assert (
        load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype
        == torch.float16
    )
    again = load_backbone(tmp_path, device="cpu")
    assert {m.dtype for m in again.modules.values()} == {torch.float32}
    assert again.identity == backbone.identity
    assert again.name == tmp_path.name
    assert backbone.dtype == torch.float32  # saving in half precision did not change it


def test_identity_follows_the_weights_not_the_precision(backbone):
    before = backbone.identity
    assert backbone.to(dtype=torch.float16).identity == before
    forget_identity(backbone)
    assert backbone.identity == before
    backbone.unet.conv_in.weight.data += 0.01
    forget_identity(backbone)
    assert backbone.identity != before


def forget_identity(backbone):
    del backbone.identity, backbone.identity_without_filters


def test_identity_follows_the_filters_and_a_customization_does_not(backbone, shape, tmp_path):
    path = shape.save(tmp_path / "x.safetensors")
    before, networks = backbone.identity, backbone.identity_without_filters
    backbone.filters["shape"].fuse[-1].weight.data += 0.01
    forget_identity(backbone)
    changed = backbone.identity
    backbone.filters.clear()
    forget_identity(backbone)
    assert len({before, changed, backbone.identity}) == 3
    assert backbone.identity_without_filters == networks == shape.backbone_identity == backbone.identity
    assert load_customization(path, backbone).steps == shape.steps


def test_identity_outlives_bfloat16(tiny_folder):
    backbone = load_backbone(tiny_folder, device="cpu").to(dtype=torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    exact = load_backbone(tiny_folder, device="cpu")
    assert backbone.identity == exact.identity
    assert backbone.identity_without_filters == exact.identity_without_filters


def test_a_loaded_backbone_is_frozen_and_on_the_best_device(tiny_folder):
    backbone = load_backbone(tiny_folder)
    assert backbone.device.type == choose_device().type
    for module in backbone.modules.values():
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_the_folder_is_a_stable_diffusion_folder(tiny_folder):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    names = load_file(tiny_folder / "text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # what transformers 4 reads
    assert (tiny_folder / "tokenizer/vocab.json").is_file() and (
        tiny_folder / "tokenizer/merges.txt"
    ).is_file()


def test_text_weights_load_under_either_name(backbone, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "unprefixed")
    file = folder / "text_encoder/model.safetensors"
    save_file({k.removeprefix("text_model."): w for k, w in load_file(file).items()}, file)
    assert torch.equal(read_backbone(folder).encode_prompt("a star"), backbone.encode_prompt("a star"))


def as_published(tiny_folder, folder):
    """The tiny backbone laid out as SD 1.5 is: fp16 files, PNDM, a safety checker, no image tower."""
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("image_tower"))
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    shutil.rmtree(folder / "scheduler")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_published_folder_takes_an_image_tower(backbone, tiny_folder, tmp_path):
    folder = as_published(tiny_folder, tmp_path / "sd")
    loaded = load_backbone(folder, device="cpu", image_tower=backbone.image_tower)
    assert loaded.identity == backbone.identity
    assert loaded.image_tower is backbone.image_tower
    assert type(loaded.scheduler).__name__ == "DDIMScheduler"
    assert loaded.scheduler.config.beta_end == 0.012 and loaded.scheduler.config.steps_offset == 1
    assert loaded.scheduler.config.clip_sample is False


@torch.no_grad()
def test_a_published_folder_takes_open_clips_weights(clip, tiny_folder, tmp_path, monkeypatch):
    small = dataclasses.replace(escd.backbone.hub.OPENCLIP, architecture=CLIP_CFG)
    monkeypatch.setattr(escd.backbone.hub, "OPENCLIP", small)
    save_file(clip.state_dict(), tmp_path / "open_clip.safetensors")
    folder = as_published(tiny_folder, tmp_path / "sd")
    shutil.rmtree(folder / "filters", ignore_errors=True)  # which read another tower's token
    loaded = load_backbone(folder, device="cpu", image_tower=tmp_path / "open_clip.safetensors")
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.image_tower(x), ImageTower.from_open_clip(clip, CLIP_CFG)(x))
    with pytest.raises(FileNotFoundError, match="no image tower at"):
        load_backbone(folder, image_tower=tmp_path / "missing.safetensors")


# ---- what cannot be loaded


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_hub_model_that_is_not_here_is_told_clearly(offline):
    with pytest.raises(
        OSError, match=r"nobody/nothing-v1\.5 is no folder, it is not in the Hugging Face cache, and"
    ):
        load_backbone("nobody/nothing-v1.5")


WEIGHTS = [f"{name}/{stem}" for name, stem in escd.backbone.layout.STEMS.items()]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Sets what the hub says it has (name -> bytes); the calls that would download are kept, not made."""
    downloads = []
    monkeypatch.setattr(escd.backbone.hub, "HF_HUB_CACHE", str(tmp_path / "not" / "there"))

    def download(repository, *, allow_patterns, **_):
        downloads.append(allow_patterns)
        return tmp_path

    monkeypatch.setattr(escd.backbone.hub, "snapshot_download", download)

    def has(files):
        info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in files.items()])
        api = SimpleNamespace(model_info=lambda *a, **k: info)
        monkeypatch.setattr(escd.backbone.hub, "HfApi", lambda: api)
        return downloads

    return has


def test_a_full_disk_is_told_before_the_download(monkeypatch, hub):
    downloads = hub({f"{w}.safetensors": 10**9 for w in WEIGHTS} | {"v1-5.ckpt": 4 * 10**9})
    usage = SimpleNamespace(free=2_000_000_000)
    monkeypatch.setattr(escd.backbone.hub.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(OSError, match=r"nobody/nothing needs 3\.0 GB more in .*2\.0 GB are free.*HF_HOME"):
        load_backbone("nobody/nothing")
    assert not downloads
    usage.free = 4_000_000_000  # enough for what is wanted, not for the pickle
    with pytest.raises(FileNotFoundError, match="not a backbone"):
        load_backbone("nobody/nothing")
    assert downloads


@pytest.mark.parametrize("variant", ["", ".fp16", ".bf16"])
def test_the_variant_that_the_hub_has_is_fetched(variant, hub):
    downloads = hub({f"{w}{variant}.safetensors": 1 for w in WEIGHTS})
    with pytest.raises(FileNotFoundError):  # nothing was fetched, so there is nothing to load
        load_backbone("nobody/nothing")
    (patterns,) = downloads
    assert [p for p in patterns if p.endswith("safetensors")] == [
        f"{w}{variant}.safetensors" for w in WEIGHTS
    ]


def test_what_cannot_be_used_is_refused_before_the_download(hub):
    downloads = hub({f"{w}.bin": 1 for w in WEIGHTS})
    with pytest.raises(
        ValueError, match=r"nobody/nothing.*unet/diffusion_pytorch_model\.bin.*save_pretrained"
    ):
        load_backbone("nobody/nothing")
    hub({f"{w}.safetensors": 1 for w in [*WEIGHTS, "text_encoder_2/model"]})
    with pytest.raises(ValueError, match=r"nobody/nothing is a Stable Diffusion XL model"):
        load_backbone("nobody/nothing")
    assert not downloads


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_of_one_variant_is_read(variant, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "sd")
    for file in folder.glob("*/*.safetensors"):
        if file.parent.name in escd.backbone.layout.STEMS:
            file.rename(file.with_suffix(f".{variant}.safetensors"))
    assert load_backbone(folder, device="cpu").identity == load_backbone(tiny_folder, device="cpu").identity


def test_a_missing_image_tower_is_told_clearly(offline, tiny_folder, tmp_path, monkeypatch):
    absent = dataclasses.replace(escd.backbone.hub.OPENCLIP, repository="nobody/nothing")
    monkeypatch.setattr(escd.backbone.hub, "OPENCLIP", absent)
    folder = as_published(tiny_folder, tmp_path / "sd")
    with pytest.raises(OSError, match=r"no image tower of its own; nobody/nothing.*image_tower="):
        load_backbone(folder)  # its filters read one
    shutil.rmtree(folder / "filters")
    loaded = load_backbone(folder, device="cpu")
    with pytest.raises(OSError, match=r"no image tower of its own; nobody/nothing.*image_tower="):
        escd.extract_features(loaded, torch.zeros(1, 3, 16, 16))


def test_open_clips_weights_are_fetched_when_a_filter_reads_them(clip, tiny_folder, tmp_path, monkeypatch):
    save_file(clip.state_dict(), tmp_path / "open_clip.safetensors")
    monkeypatch.setattr(
        escd.backbone.hub, "OPENCLIP", dataclasses.replace(escd.backbone.hub.OPENCLIP, architecture=CLIP_CFG)
    )
    fetched = []
    monkeypatch.setattr(
        escd.backbone.hub,
        "hf_hub_download",
        lambda *_, **__: fetched.append(1) or str(tmp_path / "open_clip.safetensors"),
    )
    folder = as_published(tiny_folder, tmp_path / "sd")
    shutil.rmtree(folder / "filters")
    loaded = load_backbone(folder, device="cpu", dtype=torch.bfloat16)
    picture = torch.zeros(3, 16, 16)
    learnt = escd.customize(picture, "shape", loaded, steps=1, progress=False)
    pipe = escd.ESCDPipeline(loaded, shape=learnt)
    assert pipe("a *m shape", num_inference_steps=1).images
    assert pipe.components["image_tower"] is None and pipe.to("cpu") is pipe
    save_backbone(loaded, tmp_path / "again")
    assert not (tmp_path / "again" / "image_tower").exists() and not fetched
    tower = load_backbone(tmp_path / "again", device="cpu", dtype=torch.bfloat16).image_tower
    assert fetched == [1] and tower.dtype is torch.bfloat16 and not tower.training
    assert not any(p.requires_grad for p in tower.parameters())
    published = ImageTower.from_open_clip(clip, CLIP_CFG).to(torch.bfloat16).state_dict()
    read = tower.state_dict()
    assert read.keys() == published.keys() and all(torch.equal(read[k], w) for k, w in published.items())


class Hub:
    """A hub that answers as huggingface_hub's errors say it does."""

    def __init__(self, kind, status):
        response = SimpleNamespace(headers={}, request=None, status_code=status)
        self.error = kind(
            f"{status} Client Error.\n\nMore\nlines. See https://hub.invalid", response=response
        )

    def __call__(self, *_, **__):
        raise self.error


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (
            errors.RepositoryNotFoundError,
            401,
            "no backbone 'nobody/nothing': .*no model of that name.*log in",
        ),
        (errors.GatedRepoError, 403, "nobody/nothing is given only to those who agree.*log in"),
        (errors.HfHubHTTPError, 429, r"the hub does not give nobody/nothing: 429 Client Error\."),
    ],
)
def test_what_the_hub_refuses_is_one_line(kind, status, message, monkeypatch):
    monkeypatch.setattr(escd.backbone.hub, "snapshot_download", Hub(kind, status))
    monkeypatch.setattr(escd.backbone.hub, "HfApi", lambda: SimpleNamespace(model_info=Hub(kind, status)))
    with pytest.raises(OSError, match=message) as told:
        load_backbone("nobody/nothing")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("device", ["nowhere", "cpu:", "cuda:99", "meta", 5])
def test_a_device_that_is_not_there(device, tiny_folder):
    with pytest.raises(ValueError, match=r"there is no device .* on this machine, only cpu") as told:
        load_backbone(tiny_folder, device=device)
    assert "\n" not in str(told.value)


def test_cuda_without_a_gpu(tiny_folder, monkeypatch, backbone):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for ask in (lambda: load_backbone(tiny_folder, device="cuda"), lambda: backbone.to("cuda")):
        with pytest.raises(ValueError, match=r"no device 'cuda' on this machine, only cpu$"):
            ask()
    assert as_device("cpu") == as_device(torch.device("cpu")) == torch.device("cpu")


def test_a_dtype_by_its_name_and_one_that_no_backbone_runs_in(tiny_folder, backbone):
    assert load_backbone(tiny_folder, device="cpu", dtype="float16").dtype == torch.float16
    assert backbone.to(dtype="bfloat16").dtype == torch.bfloat16
    for wrong in (torch.float8_e4m3fn, "fp8", "float", torch.int8, torch.complex64, 16):
        for ask in (load_backbone, read_backbone):
            with pytest.raises(ValueError, match="dtype is one of float32, float16, bfloat16, float64, not"):
                ask(tiny_folder, dtype=wrong)


@pytest.mark.parametrize("content", [b"", b"[]", b"{" * 10_000, b"\xff\xfe{}", b"[" * 100_000])
@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_a_configuration_that_is_none_names_its_file(network, content, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "sd", copy_function=os.link)
    (folder / network / "config.json").unlink()
    (folder / network / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{network}/config\.json is not"):
        load_backbone(folder, device="cpu")


NO_SCHEDULERS = (
    *(["diffusers", name] for name in ("UNet2DConditionModel", "logging", "__doc__", "Mine", 3)),
    *(["os", "system"], ["diffusers"], "DDIMScheduler", None),
)


@pytest.mark.parametrize("named", NO_SCHEDULERS)
def test_what_is_no_scheduler_is_not_made(named, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "scheduler", tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": named}))
    with pytest.raises(
        ValueError, match=r"model_index\.json: scheduler must name one of diffusers' schedulers"
    ):
        load_scheduler(tmp_path)


def test_the_scheduler_that_is_named_is_made(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "scheduler", tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "PNDMScheduler"]}))
    assert type(load_scheduler(tmp_path)) is PNDMScheduler


@pytest.mark.parametrize("name", ["minni", "no/such/folder", "a/..", "a/b--c", "a/b.git", ""])
def test_a_name_that_means_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither mini nor sd15, no folder, no hub id"):
        load_backbone(name or "?")


@pytest.mark.parametrize(
    "missing", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer"]
)
def test_an_incomplete_folder_names_what_is_missing(missing, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "part")
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing}.* missing"):
        load_backbone(folder)


def test_pickled_weights_are_not_read(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "pickled")
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model\.bin.*any code.*save_pretrained"):
        load_backbone(folder)


def test_a_single_file_checkpoint_says_how_to_make_a_folder_of_it(tmp_path):
    (tmp_path / "dreams.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"from_single_file\(.*save_pretrained"):
        load_backbone(tmp_path / "dreams.safetensors")


@pytest.mark.parametrize("network", ["unet", "text_encoder", "image_tower"])
def test_weights_cut_short_are_told_clearly(network, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "cut")
    file = next((folder / network).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{network}.* is not a whole safetensors file"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": 2048}, r"not of Stable Diffusion 1\.x's kind"),
        ({"in_channels": 9}, r"reads 9 channels, and latents have 4.*inpainting"),
    ],
)
def test_another_kind_of_model_is_refused(changes, message, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)


@pytest.mark.parametrize("sign", ["second text encoder", "added embeddings"])
def test_stable_diffusion_xl_is_refused_by_name(sign, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "xl")
    if sign == "second text encoder":
        shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    else:
        config = json.loads((folder / "unet/config.json").read_text())
        (folder / "unet/config.json").write_text(json.dumps(config | {"addition_embed_type": "text_time"}))
    with pytest.raises(ValueError, match=r"Stable Diffusion XL.*1\.x or 2\.x"):
        load_backbone(folder)


def test_a_full_gpu_is_told_clearly(tiny_folder, monkeypatch):
    def full(self, device, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backbone = load_backbone(tiny_folder, device="cpu")
    monkeypatch.setattr(escd.loading, "read_backbone", lambda *_, **__: backbone)
    monkeypatch.setattr(Backbone, "to", full)
    monkeypatch.setattr(escd.loading, "as_device", torch.device)  # as if there were one
    with pytest.raises(MemoryError, match=r"does not fit.*cuda.*float16.*CPU"):
        load_backbone(tiny_folder, device="cuda")


# ---- images


def test_latents_are_deterministic_and_of_the_stated_shape(backbone):
    assert backbone.image_size == 16 and backbone.latent_shape == (4, 8, 8)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = backbone.encode_images(x)
    assert latents.shape == (2, *backbone.latent_shape)
    assert torch.equal(latents, backbone.encode_images(x))
    mean = backbone.vae.encode(x).latent_dist.mean
    assert torch.equal(latents, mean * backbone.vae.config.scaling_factor)
    raw = backbone.vae.decode(latents / backbone.vae.config.scaling_factor).sample
    assert torch.equal(backbone.decode_latents(latents), raw.clamp(-1, 1))
    with torch.no_grad():
        backbone.vae.decoder.conv_out.weight *= 100
    images = backbone.decode_latents(latents)
    assert images.shape == x.shape and images.abs().max() == 1  # clamped


# ---- prompts and pseudo-words


def test_a_pseudo_word_with_its_words_embedding_is_the_word(backbone):
    e = backbone.word_embedding("shape")
    for text in ("a *m star", "a *M, star", "(*m) star", "a star - *m.", "a *m's star", "a *m-man *m"):
        plain = text.lower().replace("*m", "shape")
        assert torch.equal(backbone.encode_prompt(text, {"*m": e}), backbone.encode_prompt(plain)), text


def test_a_pseudo_word_enters_where_it_stands_and_gradients_reach_it(backbone):
    v = torch.randn(32, requires_grad=True)
    prompts = ["a red star", "a *m shape"]
    out = backbone.encode_prompt(prompts, {"*m": v})
    assert out.shape == (2, 16, 32)
    plain = backbone.encode_prompt(["a red star", "a shape shape"])
    assert torch.equal(out[0], plain[0])
    assert torch.equal(out[1, :2], plain[1, :2])  # attention is causal: <start> and "a" come before
    assert not torch.allclose(out[1, 2:], plain[1, 2:])
    (gradient,) = torch.autograd.grad(out[0].square().sum(), v, retain_graph=True)
    assert not gradient.any()
    out[1, :, 0].sum().backward()
    assert v.grad.abs().sum() > 0


def test_one_embedding_for_each_prompt(backbone):
    v = torch.randn(2, 32)
    both = backbone.encode_prompt(["a *m star", "a *m star"], {"*m": v})
    for i in range(2):
        alone = backbone.encode_prompt(["a *m star", "a *m star"], {"*m": v[i]})
        assert torch.equal(both[i], alone[i])
    assert not torch.allclose(both[0], both[1])


def test_two_pseudo_words(backbone):
    words = {"*m": backbone.word_embedding("star"), "*a": backbone.word_embedding("red")}
    out = backbone.encode_prompt("a *m shape with *a appearance", words)
    assert torch.equal(out, backbone.encode_prompt("a star shape with red appearance"))


def test_encoding_leaves_no_hook_behind(backbone):
    table = backbone.text_encoder.get_input_embeddings()
    seen = []
    table.register_forward_hook(lambda *_: seen.append(len(table._forward_hooks)) and None)
    backbone.encode_prompt("a *m star", {"*m": torch.randn(32)})
    with pytest.raises(RuntimeError):
        backbone.encode_prompt("a *m star", {"*m": torch.randn(7)})  # does not fit
    assert seen == [1, 1]  # not while it runs either


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a *a star", r"'\*a', but no customization.*loaded: \*m"),
        ("a *man", r"'\*man'.*'\*m' must stand alone, not begin a word"),
        ("a *m2", r"'\*m2'.*must stand alone, not begin a word"),
        ("a*m star", r"'a\*m' in the prompt.*must stand alone"),
        ("*m*a", r"'\*m\*a' in the prompt.*must stand alone"),
        ("**m", r"must stand alone"),
        ("*m*", r"must stand alone"),
        ("_*m", r"must stand alone"),
        ("a star " * 8 + "*m", r"reads 16 tokens.*'\*m' stands behind them"),
    ],
)
def test_pseudo_words_that_would_not_work_are_refused(backbone, prompt, message):
    with pytest.raises(ValueError, match=message):
        check_prompt(backbone.tokenizer, prompt, ["*m"])
    with pytest.raises(ValueError, match=message):
        backbone.encode_prompt(prompt, {"*m": torch.zeros(32)})


@pytest.mark.parametrize(
    "prompt", ["2 * 2 star", "a star *", "2*2", "", "a *m star, *m", "M*A*S*H", "a **red** star", "_*red_"]
)
def test_asterisks_that_are_no_pseudo_words(backbone, prompt):
    check_prompt(backbone.tokenizer, prompt, ["*m"])


def test_asterisks_inside_other_words_are_refused_where_they_begin_a_known_name(backbone):
    for prompt in ("M*A*S*H", "**a**"):
        with pytest.raises(ValueError, match="must stand alone"):
            check_prompt(backbone.tokenizer, prompt, ["*a"])


@pytest.mark.parametrize("asterisk", "\uff0a\u2217\ufe61\u204e\u2731")
def test_what_only_looks_like_an_asterisk_is_a_probable_slip(backbone, asterisk):
    with pytest.warns(UserWarning, match=rf"U\+{ord(asterisk):04X}, which only looks.*write '\*m'"):
        check_prompt(backbone.tokenizer, f"a {asterisk}m shape", ["*m"])
    check_prompt(
        backbone.tokenizer, f"a {asterisk}star, 2 {asterisk} m", ["*m"]
    )  # no name of a pseudo-word: no warning


def test_a_prompt_is_a_string(backbone):
    with pytest.raises(TypeError, match="not int"):
        check_prompt(backbone.tokenizer, 3, [])


def test_an_attributes_word_must_be_one_token(backbone):
    row = backbone.tokenizer.convert_tokens_to_ids("shape</w>")
    assert torch.equal(
        backbone.word_embedding("shape"), backbone.text_encoder.get_input_embeddings().weight[row]
    )
    for word in ("zebra", "red star", "", "<|endoftext|>", "é"):
        with pytest.raises(ValueError, match="not one token"):
            backbone.word_embedding(word)
    backbone.encode_prompt("a *m star", {"*m": torch.zeros(32)})
    with pytest.raises(ValueError, match="not one token"):
        backbone.word_embedding("*m")


def test_pseudo_words_are_read_by_copies_of_the_tokenizer(backbone, tmp_path):
    before = backbone.tokenizer.backend_tokenizer.to_str()
    backbone.encode_prompt(["a *m star", "a *man"], {"*m": torch.zeros(32), "*man": torch.zeros(32)})
    backbone.cut_off("a *m star", ["*m"])
    (ids,) = backbone.token_ids(["a *M! *a"], ["*a", "*m"]).tolist()
    assert ids[2] == -2 and ids[4] == -1 and min(ids[:2] + ids[5:]) >= 0
    (ids,) = backbone.token_ids(["a *m"]).tolist()
    assert min(ids) >= 0  # not known here, whatever was known before
    assert backbone.tokenizer.backend_tokenizer.to_str() == before
    save_backbone(backbone, tmp_path)
    assert "*m" not in read_backbone(tmp_path).tokenizer.get_vocab()


# ---- the image tower

CLIP_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def clip() -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**CLIP_CFG).eval()


@torch.no_grad()
def test_the_tower_gives_the_token_open_clip_projects(clip):
    tower = ImageTower.from_open_clip(clip, CLIP_CFG)
    assert (tower.config.image_size, tower.config.width) == (16, 64)
    x = torch.rand(3, 3, 16, 16)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    token = tower(2 * x - 1)
    assert token.shape == (3, 64)
    torch.testing.assert_close(
        token @ clip.visual.proj, clip.encode_image((x - mean) / std), rtol=1e-5, atol=1e-5
    )
    assert clip.visual.proj is not None  # the model it came from is whole


def test_the_tower_resizes_and_survives_saving(clip, tmp_path):
    tower = ImageTower.from_open_clip(clip, CLIP_CFG)
    tower.save_pretrained(tmp_path)
    again = ImageTower.from_pretrained(tmp_path)
    smooth = torch.linspace(-1, 1, 64)[None, None, :, None].expand(1, 3, 64, 48)
    assert torch.equal(tower(smooth), again(smooth))
    small = torch.linspace(-1, 1, 16)[None, None, :, None].expand(1, 3, 16, 16)
    torch.testing.assert_close(tower(smooth), tower(small), rtol=0.2, atol=0.2)


def test_a_tower_it_cannot_hold_is_refused(clip):
    with pytest.raises(ValueError, match=r"plain vision transformer.*timm_model_name"):
        ImageTower.from_open_clip(clip, {"embed_dim": 16, "vision_cfg": {"timm_model_name": "convnext"}})
    with pytest.raises(ValueError, match="knows no model 'ViT-B-33'"):
        ImageTower.from_open_clip(clip, "ViT-B-33")
    assert escd.backbone.image_tower._tower_config("ViT-B-32")["width"] == 768


def test_a_large_backbone_without_a_gpu_says_how_long_tuning_takes(tiny_folder, monkeypatch):
    monkeypatch.setattr(escd.loading, "choose_device", lambda: torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backbone(tiny_folder)  # small
        monkeypatch.setattr(escd.backbone.model, "LARGE", 1)
        load_backbone(tiny_folder, device="cpu")  # asked for
    with pytest.warns(UserWarning, match=r"shape \d+ (s|min) \(\d+ steps\), appearance \d+ (s|min)"):
        load_backbone(tiny_folder)
