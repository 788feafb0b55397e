"""Each numbered equation of the paper has a comment `# Eq. N` above the line that computes it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# In the paper's order: label, and the file of the package that computes it.
EQUATIONS = {
    "eq:dm": "backbone/diffusion.py",  # the diffusion loss
    "eq:ldm": "backbone/diffusion.py",  # the same under a prompt
    "eq:fdown": "method/encoder.py",  # features of the UNet's encoder
    "eq:ref": "method/encoder.py",  # embeds_ref
    "eq:fusion": "method/fusion.py",  # pseudo-word from embeds_ref and a word
    "eq:tuning": "method/tuning.py",  # masked loss of attribute-aware finetuning
    "eq:strength": "method/customization.py",  # weights and pseudo-word at a strength
    "eq:rank": "method/low_rank.py",  # change at a low rank
}
COMMENT = re.compile(r"^\s*# Eqs?\. (\d+)\b")
MENTION = re.compile(r"\bEqs?\. (\d+)(?:(?: and |-)(\d+))?")


def labels(tex: str) -> list[str]:
    """The labels of the numbered equations in order; an equation without one is "unlabelled"."""
    tex = re.sub(r"(?<!\\)%.*", "", tex)
    numbered = re.findall(r"\\begin\{(equation|align|gather|multline)\}(.*?)\\end\{\1\}", tex, re.DOTALL)
    assert all(kind == "equation" for kind, _ in numbered), "count the rows of an align first"
    found = [re.search(r"\\label\{(.*?)\}", body) for _, body in numbered]
    return [match.group(1) if match else "unlabelled" for match in found]


def commented(source: str) -> list[int]:
    """The numbers of the equation comments that stand directly above a line of code."""
    lines = source.splitlines()
    numbers = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if match := COMMENT.match(line):
            assert following.strip() and not following.strip().startswith("#"), f"no code under {line!r}"
            numbers.append(int(match.group(1)))
    return numbers


def sources() -> dict[str, str]:
    package = ROOT / "escd"
    return {str(path.relative_to(package)): path.read_text() for path in sorted(package.rglob("*.py"))}


def test_the_equations_are_those_of_the_paper_in_order():
    assert labels((ROOT / "paper/main.tex").read_text()) == list(EQUATIONS)


@pytest.mark.parametrize(("number", "file"), list(enumerate(EQUATIONS.values(), 1)))
def test_an_equation_stands_above_the_line_that_computes_it(number, file):
    source = sources()[file]
    assert number in commented(source)
    assert number in mentioned(ast.get_docstring(ast.parse(source))), "the module's docstring names it"


def mentioned(text: str) -> set[int]:
    """The equations that a text names: "Eq. 3" is 3, "Eqs. 1-2" and "Eqs. 1 and 2" are 1 and 2."""
    pairs = [(int(a), int(b or a)) for a, b in MENTION.findall(text)]
    return {number for first, last in pairs for number in range(first, last + 1)}


def test_no_comment_or_docstring_names_an_equation_that_the_paper_lacks():
    for file, source in sources().items():
        assert mentioned(source) <= set(range(1, len(EQUATIONS) + 1)), file
        assert set(commented(source)) <= mentioned(source), file


def test_the_check_sees_missing_and_wrong_equations():
    first = "\\begin{equation}\n a\\label{eq:a}\n\\end{equation} % \\begin{equation}\n"
    tex = first + "\\begin{equation}b\\end{equation}"
    assert labels(tex) == ["eq:a", "unlabelled"]
    assert commented("# Eq. 3: y = x\ny = x\n") == [3] and commented("y = x  # Eq. 3\n") == []
    with pytest.raises(AssertionError, match="no code"):
        commented("# Eq. 3\n\ny = x\n")
    assert mentioned("(paper, Eqs. 1 and 2), Eq. 9, Eqs. 4-6") == {1, 2, 4, 5, 6, 9}
