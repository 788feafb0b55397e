"""How the package is laid out: its layers and who imports whom, read from the code, and a diagram of both.

`python -m escd.paper.layout` draws docs/layout.png.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from .. import paths
from ..ending import run_command
from ..files import whole
from .canvas import FROZEN, MUTED, PANEL, Canvas, Drawing, house_style

PICTURE = paths.ROOT / "docs" / "layout.png"
IMPORTS_KEY = "Imports"  # text chunk of PICTURE: the arrows it shows
# From the top to the bottom: a layer imports from itself and from the layers below it. Each has its folder of
# the same name, if there is one, and these files beside the folders.
LAYERS = {
    "paper": ("draw",),
    "pretrain": (),
    "evaluation": ("study", "evaluate"),
    "method": ("__init__", "__main__", "commands", "loading", "sliders", "drawn"),
    "backbone": ("parts",),
    "data": (),
    "files": ("paths", "files", "reading", "records", "frozen", "ending", "waiting", "notebook"),
}
PURPOSES = {
    "paper": "tables, figures and numbers from stored results",
    "pretrain": "training of mini, of filters and of the judges",
    "evaluation": "references, prompts, judges, scores, the study",
    "method": "the paper's three stages, baselines, the pipeline",
    "backbone": "the pretrained model; knows nothing of the method",
    "data": "synthetic world, captions, images, references",
    "files": "paths, safe writing, records",
}


def sources(package: Path = paths.PACKAGE) -> dict[str, ast.Module]:
    """The parsed files of a package: name within it ("method.tuning"; "__init__" for its own) -> code."""
    names = {
        path: ".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")
    }
    return {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in sorted(names.items())}


def imports(code: dict[str, ast.Module], package: str = paths.PACKAGE.name) -> dict[str, set[str]]:
    """Which files of a package each file imports, in functions and for type checkers too."""
    return {
        name: {_file(target, code) for node in ast.walk(tree) for target in _targets(node, name, package)}
        - {name}
        for name, tree in code.items()
    }


def _targets(node: ast.AST, name: str, package: str) -> Iterator[str]:
    """Dotted names within the package that an import statement of file `name` asks for."""
    if isinstance(node, ast.Import):
        asked = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        folder = [package, *name.split(".")[:-1]]
        base = folder[: len(folder) - node.level + 1] if node.level else []
        start = ".".join([*base, node.module] if node.module else base)
        asked = [f"{start}.{alias.name}" for alias in node.names]
    else:
        return
    for dotted in asked:
        if dotted == package or dotted.startswith(f"{package}."):
            yield dotted[len(package) + 1 :]


def _file(target: str, code: dict[str, ast.Module]) -> str:
    """The file that holds a dotted name: the longest beginning of it that is a module or a folder."""
    parts = target.split(".") if target else []
    for length in range(len(parts), 0, -1):
        beginning = ".".join(parts[:length])
        for file in (beginning, f"{beginning}.__init__"):
            if file in code:
                return file
    return "__init__"


def layer_of(name: str) -> str:
    """The layer of a file of this package; KeyError for one that has none."""
    folder, _, rest = name.partition(".")
    if rest and folder in LAYERS:
        return folder
    layers = [layer for layer, files in LAYERS.items() if name in files]
    if not layers:
        raise KeyError(
            f"escd/{name.replace('.', '/')}.py is in no layer: add it to LAYERS in {Path(__file__).name}"
        )
    return layers[0]


def layer_imports() -> list[tuple[str, str]]:
    """Which layer imports from which other one, from the top to the bottom."""
    code = sources()
    between = {(layer_of(name), layer_of(other)) for name, used in imports(code).items() for other in used}
    return [(one, other) for one in LAYERS for other in LAYERS if one != other and (one, other) in between]


@house_style()
def diagram_layout(arrows: list[tuple[str, str]]) -> Drawing:
    """The layers as boxes and `arrows` (importing layer, imported layer) between them."""
    names, height, gap, width = list(LAYERS), 0.36, 0.13, 4.1
    step = height + gap
    lanes = [one for one in names if any(arrow[0] == one for arrow in arrows)]
    canvas = Canvas(width + 0.24 * len(lanes) + 0.15, step * len(names) - gap + 0.04)
    middles = {name: canvas.height - 0.02 - height / 2 - k * step for k, name in enumerate(names)}
    for name, y in middles.items():
        fill = PANEL if name == "files" else FROZEN if name == "backbone" else "white"
        canvas.box((0.02 + width / 2, y), width, height, fill=fill)
        title = "files beside the folders" if name == "files" else f"{name}/"
        canvas.text((0.12, y + 0.075), title, ha="left", weight="bold", size=7.5)
        beside = "" if name == "files" else "".join(f", {file}.py" for file in LAYERS[name])
        canvas.text((0.12, y - 0.085), PURPOSES[name], ha="left", size=6.5)
        canvas.text((width - 0.06, y + 0.075), beside.removeprefix(", "), ha="right", size=6, colour=MUTED)
    right = width + 0.02
    for k, name in enumerate(lanes):
        # a lane of its own for each layer: down from the layer, and into all that it imports
        x = right + 0.16 + 0.24 * (len(lanes) - 1 - k)
        start = (right, middles[name] - 0.14)
        for other in (arrow[1] for arrow in arrows if arrow[0] == name):
            end = middles[other] + 0.14 - 0.052 * k
            canvas.arrow(start, (x, start[1]), (x, end), (right, end))
    return canvas.figure


def main() -> None:
    """Draw docs/layout.png from the imports as they are."""
    arrows = layer_imports()
    note = "; ".join(f"{one} -> {other}" for one, other in arrows)
    with whole(PICTURE) as unfinished, house_style():
        diagram_layout(arrows).savefig(
            unfinished, format="png", dpi=140, metadata={"Software": None, IMPORTS_KEY: note}
        )
    print(f"{PICTURE.relative_to(paths.ROOT)}: {note}")


if __name__ == "__main__":
    run_command(main)
