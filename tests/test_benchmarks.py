"""The benchmarks run; what they print depends on the machine."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from diffusers import UNet2DConditionModel

from escd import records
from escd.backbone.parts import parameters_of
from escd.method.low_rank import megabytes_at

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def test_world(capsys, monkeypatch):
    threads = torch.get_num_threads()
    arguments = ["--batches", "1", "4", "--threads", "1", "--seconds", "0.05"]
    monkeypatch.setattr("sys.argv", ["world.py", *arguments])
    try:
        runpy.run_path(str(FOLDER / "world.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["1", "4"]
    assert all(float(row.split()[1]) > 0 for row in rows[2:])


def test_concurrency(capsys, monkeypatch):
    threads = str(torch.get_num_threads())
    arguments = ["--rounds", "1", "--steps", "1", "--threads", threads]
    monkeypatch.setattr("sys.argv", ["concurrency.py", *arguments])
    runpy.run_path(str(FOLDER / "concurrency.py"), run_name="__main__")
    assert float(capsys.readouterr().out.split()[-1]) > 0


def test_tuning_step(capsys, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        "sys.argv", ["tuning_step.py", "--rounds", "1", "--batch", "2", "--threads", str(threads)]
    )
    runpy.run_path(str(FOLDER / "tuning_step.py"), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split(":")[0] for row in rows] == ["encoder", "decoder"]
    assert all(float(row.split()[-1]) > 0 for row in rows)


def test_busy(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["busy.py", "--rounds", "1", "--steps", "1", "--spin", "100"])
    main = runpy.run_path(str(FOLDER / "busy.py"))["main"]
    # Processes that tune nothing: to tune in six of them takes a minute.
    nothing = """import sys, time
print("{first}", flush=True)
for line in sys.stdin:
    time.sleep(0.1)
    print("done", flush=True)
"""
    monkeypatch.setitem(main.__globals__, "PROCESS", nothing)
    main()
    rows = capsys.readouterr().out.splitlines()[2:5]
    assert [row[:20].strip() for row in rows] == ["as PyTorch comes", "as escd sets it", "100"]
    assert rows[0].split()[-2] == "1.00x" and all(float(row.split()[-4].rstrip("s")) > 0 for row in rows)


def test_pretraining(capsys, monkeypatch, few_pictures):
    threads = torch.get_num_threads()
    arguments = ["--rounds", "1", "--batch", "16", "--threads", str(threads)]
    monkeypatch.setattr("sys.argv", ["pretraining.py", *arguments])
    runpy.run_path(str(FOLDER / "pretraining.py"), run_name="__main__")
    _, *parts, step, arithmetic = capsys.readouterr().out.splitlines()
    shares = [float(part.split()[-2]) for part in parts]
    assert len(parts) == 5 and abs(sum(shares) - 100) <= 3
    assert float(step.split()[-2]) > 0 and 0 < float(arithmetic.split()[-2]) < 100


def test_the_whole_method_at_a_size(capsys, monkeypatch, tmp_path):
    arguments = ["--size", "small", "--pixels", "64", "--steps", "1", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["sd15_size.py", *arguments, "--records", str(tmp_path)])
    runpy.run_path(str(FOLDER / "sd15_size.py"), run_name="__main__")
    assert "the most memory" in capsys.readouterr().out
    (record,) = records.all("size", folder=tmp_path)
    seconds, peak = record.metrics["seconds"], record.metrics["peak_gb"]
    assert list(seconds) == list(peak) and len(seconds) == 6 and min(seconds.values()) > 0
    assert sorted(peak.values()) == list(peak.values()) and set(record.metrics["file_mb"]) == {
        "shape",
        "appearance",
    }
    for sizes in record.metrics["mb_at_rank"].values():
        assert list(sizes.values()) == sorted(sizes.values())


def test_the_methods_at_a_size(capsys, monkeypatch, tmp_path):
    """Each method with its own batch, steps and number of class images, of which few are computed."""
    size = runpy.run_path(str(FOLDER / "sd15_size.py"))
    config = size["SizeConfig"](size="small", pixels=64, steps=1)
    backbone = size["random_backbone"](config, torch.device("cpu"))
    image = torch.zeros(3, 64, 64)
    booth, plus = (
        size["method_at"](name, "appearance", image, backbone, config) for name in ("dreambooth", "p-plus")
    )
    assert booth["prior_images"] == 200 and booth["prior_seconds"] > 0 == plus["prior_seconds"]
    assert booth["tuning_seconds"] == booth["step_seconds"] * booth["steps"]
    assert booth["prior_operations"] > 0 == plus["prior_operations"]
    assert [each["sampling_passes"] for each in (booth, plus)] == pytest.approx([1, 1], abs=0.01)
    assert booth["file_mb"] > plus["file_mb"] > 0
    assert capsys.readouterr().out.count("class images in") == 2


def test_tuning_cost(capsys, monkeypatch, tmp_path):
    arguments = ["--size", "small", "--pixels", "64", "--rounds", "1", "--steps", "1", "--device", "cpu"]
    chosen = ["--dtype", "float32", "--threads", "1", "--methods", "shape", "appearance, encoder"]
    monkeypatch.setattr("sys.argv", ["tuning_cost.py", *arguments, *chosen, "--records", str(tmp_path)])
    run, python = subprocess.run, [sys.executable]

    def warmed(command, **options):
        return run([*(warm.python() if command[:1] == python else command[:1]), *command[1:]], **options)

    monkeypatch.setattr(subprocess, "run", warmed)
    runpy.run_path(str(FOLDER / "tuning_cost.py"), run_name="__main__")
    (record,) = records.all("tuning_cost", folder=tmp_path)
    assert {len(rounds) for rounds in record.metrics["rounds"].values()} == {1}
    _, _, head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "FLOPs" and len(rows) == 3
    whole, shape, kept = (row.split() for row in rows)
    assert whole[-1] == "1.00" and float(kept[-1]) < float(shape[-1]) < 1
    assert all(float(number) > 0 for row in (whole, shape, kept) for number in row[-7:])


def test_the_cost_of_stable_diffusions_halves():
    cost = runpy.run_path(str(FOLDER / "tuning_cost.py"))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**cost["SD15"])
    millions = {
        part: round(sum(p.numel() for p in parameters_of(unet, part).values()) / 1e6, 1)
        for part in ("all", "encoder", "mid", "decoder")
    }
    assert millions == {"all": 859.5, "encoder": 249.6, "mid": 97.0, "decoder": 510.8}
    methods = cost["METHODS"]
    config = cost["TuningCostConfig"](tuple(methods), pixels=512)
    whole, shape, half, kept = (
        cost["flops"](methods[name], config)
        for name in (
            cost["WHOLE"],
            "shape",
            "appearance, frozen encoder without gradients",
            "appearance, encoder outputs kept",
        )
    )
    # 0.77, 0.78 and 0.67 of multiplications alone; attention computes some of its forward pass twice
    assert [x / whole for x in (shape, half, kept)] == pytest.approx([0.77, 0.78, 0.67], abs=0.04)
    prior, layers, reads = (
        cost["flops"](methods[name], config) / whole
        for name in (
            "whole UNet, with class images (DreamBooth)",
            "pseudo-word of each layer (P+)",
            "whole UNet, latents read first (E4T)",
        )
    )
    word = cost["flops"](methods["pseudo-word (Textual Inversion)"], config) / whole
    assert prior == pytest.approx(2) and layers == pytest.approx(word, rel=0.01) and 1.2 < reads < 1.6
    assert megabytes_at(parameters_of(unet, "encoder"), 38) == pytest.approx(25, rel=0.05)
    assert megabytes_at(parameters_of(unet, "decoder"), 19) == pytest.approx(25, rel=0.05)
