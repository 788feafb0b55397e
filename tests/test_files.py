"""Files are written whole or not at all, under the umask, and nothing of a killed writer stays."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import escd
from escd import files, records
from escd.paper import draw, numbers, sheets, stems
from escd.paper.canvas import Drawing

ROOT = Path(__file__).resolve().parents[1]


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def allowed(request):
    """The mode of a new file under some umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def run_and_kill(code: str, folder: Path) -> None:
    """Run Python code that creates `folder`/ready when it is where it is to be killed, and kill it there."""
    ran = subprocess.Popen([sys.executable, "-c", ALONE + code], cwd=folder)
    while not (folder / "ready").exists():
        assert ran.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    ran.kill()
    ran.wait()
    (folder / "ready").unlink()


# The module alone: a process that imports torch takes seconds to begin.
ALONE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", {str(ROOT / "escd" / "files.py")!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
"""
LEFT = """
with files.whole("result.txt") as unfinished:
    unfinished.write_text("half")
    open("ready", "w").close()
    import time; time.sleep(600)
"""


# ---- one file


def test_a_new_file_has_the_mode_of_the_umask(allowed, tmp_path, shape, backbone):
    assert mode(shape.save(tmp_path / "shape.safetensors")) == allowed
    exported = escd.export(shape, tmp_path / "out")
    assert {mode(path) for path in exported.files} == {allowed}
    escd.ESCDPipeline(backbone, shape=shape).save_pretrained(tmp_path / "pipe")
    assert {mode(path) for path in (tmp_path / "pipe").rglob("*") if path.is_file()} == {allowed}
    drawn = Drawing(1, 1).save(tmp_path / "figure")
    files.write_text(tmp_path / "text", "a")
    assert {mode(path) for path in (*drawn, tmp_path / "text")} == {allowed}


def test_an_old_file_keeps_its_mode_and_its_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to("real.txt")
    files.write_text(tmp_path / "link.txt", "new é")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text(encoding="utf-8") == "new é"
    assert mode(tmp_path / "real.txt") == 0o640


@pytest.mark.parametrize("end", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, end):
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(type(end)), files.whole(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("half")
        raise end
    with pytest.raises(type(end)), files.together(tmp_path) as scratch:
        (scratch / "a.txt").write_text("new")
        (scratch / "b.txt").write_text("half")
        raise end
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path):
    run_and_kill(LEFT, tmp_path)
    (left,) = tmp_path.iterdir()
    assert (left / "result.txt").read_text() == "half"
    files.write_text(tmp_path / "other.txt", "whole")
    assert names(tmp_path) == ["other.txt"]


def test_what_others_are_writing_is_not_swept(tmp_path):
    elsewhere = tmp_path / ".escd-00000000-1-00000000"
    elsewhere.mkdir()
    with files.whole(tmp_path / "a.txt") as unfinished:
        files.write_text(tmp_path / "b.txt", "b")
        unfinished.write_text("a")
    assert names(tmp_path) == [elsewhere.name, "a.txt", "b.txt"]
    os.utime(elsewhere, (0, 0))  # of another machine, and old
    files.write_text(tmp_path / "b.txt", "b")
    assert names(tmp_path) == ["a.txt", "b.txt"]


SAVES = """
for k in range(100):
    with files.whole("x.bin") as unfinished:
        unfinished.write_bytes(sys.argv[1].encode() * 100_000)
    assert len(set(open("x.bin", "rb").read())) == 1
"""


def test_processes_and_threads_that_save_one_path_do_not_meet(tmp_path, shape, backbone):
    both = [subprocess.Popen([sys.executable, "-c", ALONE + SAVES, k], cwd=tmp_path) for k in "12"]
    path, raised = tmp_path / "y.safetensors", []

    def save():
        for _ in range(10):
            try:
                shape.save(path)
            except Exception as error:
                raised.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    assert escd.load_customization(path, backbone).steps == shape.steps
    assert [process.wait() for process in both] == [0, 0]
    assert names(tmp_path) == ["x.bin", "y.safetensors"]


@pytest.mark.parametrize("links", [True, False])
def test_no_two_writers_take_one_unused_name(tmp_path, monkeypatch, links):
    if not links:

        def no_links(*_):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    written = [files.save_unused(tmp_path / "p.txt", lambda path: path.write_text("a")) for _ in range(3)]
    assert [path.name for path in written] == ["p.txt", "p-2.txt", "p-3.txt"]

    def slow(path):
        path.write_text("mine")
        files.write_text(tmp_path / "p-4.txt", "theirs")

    assert files.save_unused(tmp_path / "p.txt", slow).name == "p-5.txt"
    assert (tmp_path / "p-4.txt").read_text() == "theirs"


# ---- asked before


def test_what_cannot_be_written_is_known_before(tmp_path, monkeypatch):
    files.require_writable(tmp_path / "a.safetensors", 1000)
    assert names(tmp_path) == []
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        files.require_writable(tmp_path)
    with pytest.raises(OSError, match=r"File name too long: '.*/a{300}'"):
        files.require_writable(tmp_path / ("a" * 300))
    with pytest.raises(FileNotFoundError, match=r"no folder .*none to write a to"):
        files.require_writable(tmp_path / "none" / "a")
    with pytest.raises(OSError, match="a device or a pipe"):
        files.require_writable("/dev/null")
    if sys.platform == "linux":
        with pytest.raises(OSError, match=r"nothing can be written there: .*'/proc/a'"):
            files.require_writable("/proc/a")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
    files.require_writable(tmp_path / "a", 1_900_000)
    with pytest.raises(OSError, match=r"2\.1 MB are to be written where 2\.0 MB are free: '.*a'"):
        files.require_writable(tmp_path / "a", 2_100_000)


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is writable to the administrator")
def test_a_read_only_folder_or_file_is_known_before(tmp_path):
    (tmp_path / "file").touch(0o444)
    with pytest.raises(PermissionError, match="may not be changed"):
        files.require_writable(tmp_path / "file")
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="nothing can be written there"):
        files.require_writable(tmp_path / "a")


def test_a_device_is_never_replaced(shape):
    with pytest.raises(OSError, match="a device or a pipe"):
        shape.save("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_what_safetensors_cannot_write_is_an_oserror(shape, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        shape.save(tmp_path / "folder")
    with pytest.raises(OSError, match=r"cannot write to .*File name too long"):
        shape.save(tmp_path / ("a" * 300))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write to .*File too large"):
            shape.save(tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["folder"]


def test_what_cannot_be_written_is_kept_elsewhere(tmp_path, monkeypatch, shape, backbone):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "horse.safetensors").write_text("another result")
    kept = files.save_elsewhere(tmp_path / "gone" / "horse.safetensors", shape.save)
    assert kept == Path("horse-2.safetensors")
    assert escd.load_customization(kept, backbone).steps == shape.steps
    kept = files.save_elsewhere(tmp_path / ("a" * 300 + ".safetensors"), shape.save)
    assert kept == tmp_path / "escd-result.safetensors" and kept.is_file()


# ---- figures, numbers, pictures, records


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupted_drawing_leaves_both_old_files(tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in Drawing(1, 1).save(tmp_path / "figure")}
    drawing = Drawing(2, 2)
    real = Drawing.savefig

    def half(self, path, **options):
        if path.suffix == ".png":
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        real(self, path, **options)

    monkeypatch.setattr(Drawing, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        drawing.save(tmp_path / "figure")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_manifest_picture_or_readme_is_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setitem(stems.STEMS, "a_test", stems.Stem(lambda: Drawing(1, 1), "notebooks/none.ipynb"))
    draw.draw_figures(["a_test"], tmp_path)
    manifest = (tmp_path / "manifest.json").read_text()
    assert json.loads(manifest)["a_test"]["sha256"].keys() == {"a_test.pdf", "a_test.png"}
    readme, macros = tmp_path / "README.md", tmp_path / "numbers.tex"
    readme.write_text(f"é\n{numbers.BEGIN}\n{numbers.END}\n", encoding="utf-8")
    monkeypatch.setattr(numbers, "numbers", dict)
    monkeypatch.setattr(numbers, "_summary", lambda values: "the numbers")
    numbers.write_numbers(readme, macros)
    written = readme.read_text(encoding="utf-8")
    assert written == f"é\n{numbers.BEGIN}\nthe numbers\n{numbers.END}\n"
    monkeypatch.setattr(os, "fsync", interrupted)  # after the writing, before the new file takes its place
    monkeypatch.setitem(stems.STEMS, "a_test", stems.Stem(lambda: Drawing(2, 2), "notebooks/none.ipynb"))
    monkeypatch.setattr(numbers, "_summary", lambda values: "other numbers")
    before = names(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        draw.draw_figures(["a_test"], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        numbers.write_numbers(readme, macros)
    assert (tmp_path / "manifest.json").read_text() == manifest
    assert readme.read_text(encoding="utf-8") == written and names(tmp_path) == before


def test_pictures_of_a_record_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    config = sheets.ProcessConfig("a star", 0, (0,))
    picture = np.zeros((4, 4, 3), np.uint8)
    monkeypatch.setitem(sheets.MAKERS, sheets.ProcessConfig, lambda config: ([picture], {}))
    monkeypatch.setattr(sheets, "_inputs", lambda config: {})

    def half(self, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Image.Image, "save", half)
        sheets.stored_images(config)
    assert names(tmp_path / "images") == []
    _, (stored,) = sheets.stored_images(config)
    assert np.array_equal(stored, picture) and len(names(tmp_path / "images")) == 1


def test_an_interrupted_append_leaves_the_records_as_they_were(tmp_path, monkeypatch):
    config = sheets.ProcessConfig("a star", 0, (0,))
    records.get(config, lambda _: {"score": 1.0}, folder=tmp_path)
    before = (tmp_path / "process.jsonl").read_bytes()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", interrupted)
        records.get(config, lambda _: {"score": 2.0}, folder=tmp_path, again=True)
    assert (tmp_path / "process.jsonl").read_bytes() == before
    records.get(config, lambda _: {"score": 2.0}, folder=tmp_path, again=True)
    assert (tmp_path / "process.jsonl").read_bytes().startswith(before)
    assert names(tmp_path) == [".lock", "process.jsonl"]
