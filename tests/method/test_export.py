"""Low-rank customizations, and what plain diffusers makes of an exported one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from escd.method.customization import customized, load_customization
from escd.method.delta import LowRank
from escd.method.export import export
from escd.method.low_rank import low_rank, relative_error
from escd.method.pipeline import ESCDPipeline


@pytest.mark.parametrize("rank", [1, 4])
def test_a_low_rank_change_is_the_best_one_of_its_rank(shape, rank):
    small = low_rank(shape, rank)
    assert set(small.delta) == set(shape.delta) and small.nbytes < shape.nbytes
    for name, w in shape.delta.items():
        kept = small.delta[name]
        if not isinstance(kept, LowRank):
            assert kept is w
            continue
        matrix = w.flatten(1)
        assert kept.shape == tuple(w.shape) and kept.up.shape[1] == min(rank, *matrix.shape)
        values = torch.linalg.svdvals(matrix)
        best = values[rank:].square().sum().sqrt()
        off = (kept.float() - w).norm()
        assert off <= best * 1.001 + 2e-3 * matrix.norm(), f"{name}: {off} where {best} can be had"


def test_the_rank_follows_from_the_error_that_is_allowed(shape):
    errors = (0.5, 0.2, 0.05)
    smalls = [low_rank(shape, error=error, only_exportable=True) for error in errors]
    without_vectors = low_rank(shape, 10_000, only_exportable=True)
    assert relative_error(without_vectors, without_vectors) == 0
    for error, small in zip(errors, smalls, strict=True):
        assert relative_error(small, without_vectors) <= error + 1e-3
    ranks = [max(w.up.shape[1] for w in small.delta.values()) for small in smalls]
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1]
    looser = low_rank(shape, ranks[0] - 1, only_exportable=True)
    assert relative_error(looser, without_vectors) > errors[0], "a smaller rank would have done"


def test_a_rank_beyond_the_weight_changes_nothing_but_rounding(shape):
    assert relative_error(low_rank(shape, 10_000), shape) < 1e-3
    assert relative_error(low_rank(shape, 10_000, only_exportable=True), shape) > 0, "vectors are left out"


@pytest.mark.parametrize(
    "wrong", [{}, {"rank": 2, "error": 0.1}, {"rank": 0}, {"rank": True}, {"error": 0.0}, {"error": 1.0}]
)
def test_bad_ranks_are_refused(shape, wrong):
    with pytest.raises(ValueError):
        low_rank(shape, **wrong)


def test_a_low_rank_customization_is_saved_read_and_used_like_any_other(backbone, shape, tmp_path):
    small = low_rank(shape, 2)
    file = small.save(tmp_path / "small.safetensors")
    read = load_customization(file, backbone)
    assert file.stat().st_size < shape.save(tmp_path / "full.safetensors").stat().st_size
    for name, w in small.delta.items():
        assert torch.equal(read.delta[name].float(), w.float())
        assert isinstance(read.delta[name], LowRank) == isinstance(w, LowRank)
    before = {n: p.detach().clone() for n, p in backbone.unet.named_parameters()}
    for name, p in customized(backbone.unet, [(read, 0.5)]).named_parameters():
        change = 0.5 * small.delta[name].float() if name in small.delta else 0
        torch.testing.assert_close(p.detach(), before[name] + change)
    assert all(torch.equal(p, before[n]) for n, p in backbone.unet.named_parameters())


@pytest.mark.parametrize("broken", ["missing", "other rank"])
def test_factors_that_do_not_belong_together_are_refused(backbone, shape, tmp_path, broken):
    file = low_rank(shape, 2).save(tmp_path / "small.safetensors")
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    name = next(n for n in tensors if n.startswith("down."))
    if broken == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:1]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match="belong together"):
        load_customization(file, backbone)


@pytest.mark.parametrize("attribute", ["shape", "appearance"])
def test_plain_diffusers_draws_the_same_picture_from_an_exported_customization(
    attribute, backbone, tiny_folder, tmp_path, request
):
    learnt = low_rank(request.getfixturevalue(attribute), 3, only_exportable=True)
    done = export(learnt, tmp_path)
    assert done.left_behind == () and done.web_ui.is_file()
    token = learnt.attribute.token
    prompt = f"a {token} shape on a gray background"
    noise = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    ours = ESCDPipeline(backbone, **{attribute: learnt})
    ours.set_progress_bar_config(disable=True)
    settings_of_ours = settings | {"guidance_from": "customized"}  # as diffusers has it
    ours = ours(prompt, num_images_per_prompt=2, latents=noise, **settings_of_ours).images

    plain = StableDiffusionPipeline.from_pretrained(
        tiny_folder, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    plain.set_progress_bar_config(disable=True)
    untouched = plain(prompt, num_images_per_prompt=2, latents=noise, **settings).images
    plain.load_lora_weights(tmp_path, weight_name=done.lora.name)
    plain.load_textual_inversion(str(done.embedding), token=token)
    theirs = plain(prompt, num_images_per_prompt=2, latents=noise, **settings).images
    assert (theirs - untouched).abs().max() > 0.05, "the customization shows"
    assert (theirs - ours).abs().max() < 1e-3


def test_what_diffusers_lora_cannot_carry_is_listed(shape, tmp_path):
    done = export(shape, tmp_path)
    assert set(done.left_behind) == {n for n, w in shape.delta.items() if w.ndim == 1}
    written = load_file(done.lora)
    names = {n.removeprefix("unet.").split(".lora_")[0] for n in written}
    assert names == {n.removesuffix(".weight") for n, w in shape.delta.items() if w.ndim > 1}
    assert load_file(done.embedding)["*m"].shape == (1, len(shape.pseudo_word))


def read_as_web_interfaces_do(file, unet) -> dict[str, torch.Tensor]:
    """The change of each parameter that ComfyUI's `load_lora` reads from a file; none may be left over."""
    found, read = load_file(file), {}
    for module in {name.rpartition(".")[0] for name, _ in unet.named_parameters()}:
        x = "lora_unet_" + module.replace(".", "_")
        if f"{x}.lora_up.weight" in found:
            up, down, alpha = (found.pop(f"{x}.{k}") for k in ("lora_up.weight", "lora_down.weight", "alpha"))
            change = up.float().flatten(1) @ down.float().flatten(1) * (alpha / len(down))
            read[f"{module}.weight"] = change.view(unet.get_parameter(f"{module}.weight").shape)
        for parameter, kinds in {"weight": ("diff", "w_norm"), "bias": ("diff_b", "b_norm")}.items():
            for kind in kinds:
                if (change := found.pop(f"{x}.{kind}", None)) is not None:
                    assert f"{module}.{parameter}" not in read
                    read[f"{module}.{parameter}"] = change.float()
    assert {name.split(".")[0] for name in found} <= {"lora_unet_out_0"}, "A1111's name for conv_norm_out"
    return read


@pytest.mark.parametrize("attribute", ["shape", "appearance"])
@pytest.mark.parametrize("rank", [None, 2])
def test_nothing_is_left_behind_in_the_web_interfaces(attribute, rank, backbone, tmp_path, request):
    learnt = request.getfixturevalue(attribute)
    learnt = learnt if rank is None else low_rank(learnt, rank)
    done = export(learnt, tmp_path)
    read = read_as_web_interfaces_do(done.web_ui, backbone.unet)
    assert read.keys() == learnt.delta.keys()
    for name, w in learnt.delta.items():
        torch.testing.assert_close(read[name], w.float(), rtol=1e-3, atol=1e-4)
    written = load_file(done.web_ui)
    if attribute == "appearance":
        for kind in ("w_norm", "b_norm"):
            assert torch.equal(written[f"lora_unet_out_0.{kind}"], written[f"lora_unet_conv_norm_out.{kind}"])
    # A1111 reads no norm without both halves, and no bias without its weight in full.
    halves = [{n.split(".")[0] for n in written if n.endswith(end)} for end in (".w_norm", ".b_norm")]
    assert halves[0] == halves[1] and halves[0]
    if rank is None:
        assert {n[:-2] for n in written if n.endswith(".diff_b")} <= written.keys()


def test_several_exports_share_a_folder(shape, appearance, tmp_path):
    exported = [export(shape, tmp_path), export(appearance, tmp_path)]
    exported += [export(learnt, tmp_path, "a horse (2)") for learnt in (shape, appearance)]
    assert [done.trigger for done in exported] == [
        "shape-embedding",
        "appearance-embedding",
        "a-horse-2-shape-embedding",
        "a-horse-2-appearance-embedding",
    ]
    assert len(list(tmp_path.iterdir())) == 12 == sum(len(done.files) for done in exported)
    assert list(load_file(exported[0].embedding)) == ["*m"]
    assert export(shape, tmp_path, "horse-shape").web_ui.name == "horse-shape-lora.safetensors"


def test_an_interrupted_export_leaves_the_old_one(shape, appearance, tmp_path, monkeypatch):
    done = export(shape, tmp_path)
    before = {file.name: file.read_bytes() for file in done.files}
    shape.pseudo_word = shape.pseudo_word + 1

    def dies(tensors, file, metadata):
        if "lora" in file.name:
            file.write_bytes(b"half a")
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr("escd.method.export.save_file", dies)
    with pytest.raises(OSError, match="No space left"):
        export(shape, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_only_this_project_can_draw_is_not_exported(appearance, tmp_path):
    appearance.config = {**appearance.config, "conditioning": "cached"}
    with pytest.raises(ValueError, match="never reads the pseudo-word"):
        export(appearance, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pseudo_word_alone_is_exported_as_an_embedding_alone(shape, tmp_path):
    shape.delta = {}
    done = export(shape, tmp_path)
    assert done.lora is None and done.web_ui is None and done.embedding.is_file()


def test_a_pseudo_word_alone_leaves_no_lora_of_an_earlier_export_beside_it(shape, tmp_path):
    export(shape, tmp_path, "horse")
    exported = export(dataclasses.replace(shape, delta={}), tmp_path, "horse")
    assert [path.name for path in tmp_path.iterdir()] == [exported.embedding.name]
