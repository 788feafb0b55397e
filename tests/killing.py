"""Kill commands at moments of their writing, and look at what is left: `python tests/killing.py`.

Every command runs in a child of its own, which ends as a SIGKILL ends it: at the k-th time that it makes,
opens, renames or removes something in its folder, or up to three milliseconds later. Each file must then be,
to the byte, the one from before or the one of a whole run; and the command, run again, must end as a whole
run does and leave nothing unfinished.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "pretrain")]

import torch  # noqa: E402
from conftest import make_backbone  # noqa: E402
from PIL import Image  # noqa: E402
from test_pretrain import Toy  # noqa: E402

from escd import records  # noqa: E402
from escd.backbone.folder import save_backbone  # noqa: E402
from escd.commands import main as escd  # noqa: E402
from escd.method import config  # noqa: E402
from escd.paper import draw, sheets, stems  # noqa: E402
from escd.paper.canvas import Drawing, pixels  # noqa: E402
from escd.pretrain import loop  # noqa: E402

EVENTS = {"open", "os.mkdir", "os.rename", "os.link", "os.chmod", "os.remove", "os.rmdir"}
# What differs between any two runs, and what is no result.
TIMES = {"date", "seconds", "seconds_per_image", "images_per_second"}
NO_RESULT = {".lock"}
TINY = ["--backbone", "backbone"]


def prepare() -> None:
    """What the commands need, and results of before that they must not spoil."""
    Path("tokenizer").mkdir()
    save_backbone(make_backbone(Path("tokenizer")), "backbone")
    image = Image.new("RGB", (40, 30), "white")
    image.paste("red", (10, 5, 30, 25))
    image.save("horse.png")
    customize("1")
    generate("green")
    shutil.copy("horse-shape.safetensors", "other.safetensors")
    export()
    drawing(1)
    study("one")


def customize(steps: str = "2") -> None:
    command = ["customize", "horse.png", "--attribute", "shape", "--steps", steps]
    assert escd([*command, "--part", "down.0/attn2", *TINY]) == 0


def generate(colour: str = "red") -> None:
    command = ["generate", f"a {colour} *m shape", "--shape", "horse-shape.safetensors"]
    assert escd([*command, "--steps", "1", "--images", "2", "--overwrite", *TINY]) == 0


def export() -> None:
    assert escd(["export", "other.safetensors", "--output", "out", *TINY]) == 0


def export_again() -> None:
    assert escd(["export", "other.safetensors", "--output", "out", "--rank", "1", *TINY]) == 0


def drawing(size: int = 2) -> None:
    stems.STEMS["killed"] = stems.Stem(lambda: Drawing(size, size), "notebooks/none.ipynb")
    draw.draw_figures(["killed"], Path("."))


def study(said: str = "two") -> None:
    """A record of each of two configurations, and a picture beside one."""
    records.FOLDER = Path("records")
    sheets._inputs = lambda config: {}
    sheets.MAKERS[sheets.SheetConfig] = lambda config: ([pixels(Image.new("RGB", (8, 8), "red"))], {})
    for prompt in (said, f"{said} more"):
        sheets.stored_images(sheets.SheetConfig((prompt,)))


def pretrain() -> None:
    loop.RUNS = Path("runs")
    Path("weights").mkdir(exist_ok=True)
    loop.train(lambda device: Toy(), weights=Path("weights"), checkpoint_seconds=0, progress=False)


COMMANDS = {
    "customize": customize,
    "generate": generate,
    "export": export_again,
    "draw": drawing,
    "study": study,
    "pretrain": pretrain,
}


def in_child(
    command: Callable[[], object], folder: Path, kill_at: int | None = None, late: bool = False
) -> tuple[int, int]:
    """Run a command in a folder; its exit status, and how many events it had.

    It is killed at the event `kill_at`, or a little later.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        _, status = os.waitpid(child, 0)
        said = os.read(ours, 100)
        os.close(ours)
        return status, int(said or 0)
    try:
        os.chdir(folder)
        here, count = f"{Path.cwd()}{os.sep}", 0

        def look(event: str, arguments: tuple) -> None:
            nonlocal count
            if event not in EVENTS or isinstance(arguments[0], int):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            if not os.path.abspath(os.fsdecode(arguments[0])).startswith(here):
                return
            count += 1
            if count == kill_at:
                if not late:
                    os.kill(os.getpid(), signal.SIGKILL)
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))  # its signal ends it, too

        nothing = os.open(os.devnull, os.O_WRONLY)
        report = os.dup(2)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        sys.addaudithook(look)
        command()
        os.write(theirs, str(count).encode())
        os._exit(0)
    except BaseException:
        os.write(report, traceback.format_exc().encode())
        os._exit(1)


def contents(folder: Path) -> dict[str, object]:
    """Every file there, by name; of what holds times the rest alone. Unfinished files are not looked at."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith(".escd-") or "/.escd-" in name or path.name in NO_RESULT:
            continue
        if path.suffix in (".json", ".jsonl") and "backbone" not in name:
            found[name] = [timeless(json.loads(line)) for line in _documents(path)]
        elif path.name == "state.pt":  # how it goes on is what counts, and pretraining's own test
            found[name] = sorted(torch.load(path, weights_only=True))
        else:
            found[name] = path.read_bytes()
    return found


def _documents(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]


def timeless(value: object) -> object:
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def among(now: object, before: object, after: object) -> bool:
    """Whether a file is that of before, or of after; records and curves may have got a part of the way."""
    if now in (before, after):
        return True
    grows = isinstance(now, list) and isinstance(after, list)
    return grows and all(item in after or item in (before or []) for item in now)


def kill(name: str, start: Path, moments: int, scratch: Path) -> list[str]:
    """Kill one command at some moments; what was wrong afterwards, a line each."""
    whole = scratch / f"{name}-whole"
    shutil.copytree(start, whole)
    status, events = in_child(COMMANDS[name], whole)
    if status:
        return [f"{name}: does not end well even when nobody kills it"]
    before, after = contents(start), contents(whole)
    wrong, ended = [], 0
    for k in range(moments):
        moment = 1 + (k * events // moments if moments < events else k % events)
        folder = scratch / f"{name}-{k}"
        shutil.copytree(start, folder)
        status, _ = in_child(COMMANDS[name], folder, kill_at=moment, late=random.random() < 0.5)
        ended += os.WIFSIGNALED(status)
        now = contents(folder)
        wrong += [f"{name} at {moment}: {file} is lost" for file in before.keys() - now.keys()]
        wrong += [
            f"{name} at {moment}: {file} is neither old nor new"
            for file, value in now.items()
            if name != "pretrain" and not among(value, before.get(file), after.get(file))
        ]
        status, _ = in_child(COMMANDS[name], folder)
        again = contents(folder)
        if status or (name != "pretrain" and again != after) or again.keys() != after.keys():
            odd = {file for file in again.keys() | after.keys() if again.get(file) != after.get(file)}
            wrong.append(f"{name} at {moment}: run again it ends otherwise ({status}; {sorted(odd)})")
        wrong += [f"{name} at {moment}: {left} is left" for left in folder.rglob(".escd-*")]
        shutil.rmtree(folder)
    print(f"{name}: {events} events, killed at {ended} of {moments} moments", flush=True)
    if not ended:
        wrong.append(f"{name}: was never killed")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="*", metavar="command", help=f"{', '.join(COMMANDS)}; all if none")
    parser.add_argument("--moments", type=int, default=50, help="of each command; default 50")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    config.VIEWS["shape"] = 4
    torch.set_num_threads(1)  # a child of a process with threads has none of them
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "start"
        start.mkdir()
        status, _ = in_child(prepare, start)
        wrong = ["what the commands need could not be made"] if status else []
        for name in (options.commands or COMMANDS) if not status else ():
            wrong += kill(name, start, options.moments, Path(scratch))
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
