"""What the study learnt is found again only where everything that made it is the same, never cut short."""

import dataclasses
import json
import re
import sys

import pytest
import torch

from escd import records
from escd.evaluation import kept
from escd.evaluation.references import load_references
from escd.method.config import TuningConfig
from escd.method.customization import load_customization

SHORT = TuningConfig.of("shape", steps=3, batch_size=2, views=4)


@pytest.fixture(scope="module")
def reference():
    return load_references(which="development")[0]


@pytest.fixture
def learn(backbone, reference, tmp_path):
    """Learn, or find again, in the folder tmp_path/kept."""

    def learn(config=SHORT) -> kept.Learnt:
        weights = kept.weights_sha256(backbone)
        return kept.learn(tmp_path / "kept", "shape", reference, config, backbone, weights)

    return learn


def test_what_was_learnt_is_found_again_and_says_how_it_came_about(learn, tmp_path):
    first, again = learn(), learn()
    assert not first.kept and again.kept and first.about == again.about
    assert first.about.steps == 3 and first.about.seconds > 0 and first.about.commit == records.commit()
    assert first.about.sha256 == kept.sha256_of(again.customization)
    assert again.as_dict() == {**dataclasses.asdict(first.about), "kept": True}
    assert sorted(path.suffix for path in (tmp_path / "kept").iterdir()) == [".json", ".safetensors"]


def test_an_interrupt_reaches_the_caller_and_keeps_nothing(learn, tmp_path, interrupted_once):
    with pytest.raises(KeyboardInterrupt):
        learn()
    assert not (tmp_path / "kept").exists()
    assert learn().customization.steps == 3


@pytest.mark.parametrize("said", [True, False])
def test_a_kept_customization_with_fewer_steps_is_refused(learn, tmp_path, backbone, capsys, said):
    whole = learn()
    (path,) = (tmp_path / "kept").glob("*.safetensors")
    cut = learn(dataclasses.replace(SHORT, steps=1)).customization
    cut.save(path)
    if said:  # the text beside it is of the same file
        about = dataclasses.replace(whole.about, steps=1, sha256=kept.sha256_of(cut))
        path.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(about)))
    again = learn()
    assert "has 1 steps and is to have 3" in capsys.readouterr().out
    assert not again.kept and again.about.sha256 == whole.about.sha256
    assert load_customization(path, backbone).steps == 3


def test_a_file_without_its_text_does_not_count(learn, tmp_path):
    learn()
    for path in (tmp_path / "kept").glob("*.json"):
        path.unlink()
    assert not learn().kept


def test_the_key_holds_everything_that_decides_what_is_learnt(backbone, reference, monkeypatch):
    def key(given=reference, config=SHORT):
        weights = kept.weights_sha256(backbone)
        return kept.key_of("shape", given, config, backbone, weights)

    keys = [key()]
    assert key() == keys[0]
    backbone.filters["shape"].fuse[-1].weight.data += 0.01
    keys.append(key())
    backbone.vae.register_to_config(scaling_factor=0.5)
    keys.append(key())
    backbone.image_tower.visual.conv1.weight.data += 0.01
    keys.append(key())
    keys.append(key(config=dataclasses.replace(SHORT, dropout=0.5)))
    keys.append(key(load_references(which="development")[1]))
    monkeypatch.setattr(kept, "code_sha256", lambda: "changed")
    keys.append(key())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(key())
    torch.set_num_threads(threads)
    assert len(set(keys)) == len(keys)


def test_a_pseudo_word_in_the_vocabulary_is_no_other_backbone(backbone):
    before = kept.weights_sha256(backbone)
    backbone.encode_prompt("a *m shape", {"*m": torch.zeros(32)})
    assert kept.weights_sha256(backbone) == before


def test_the_code_is_the_source_of_all_that_is_imported(tmp_path, monkeypatch):
    files = {
        "__init__": "from .near import x", "start": "import json\nfrom .near import x\nfrom . import aside",
        "near": "def late():\n    from .part.deep import y\nx = 1", "aside": "", "other": "",
        "part/__init__": "from ..third import z", "part/deep": "y = 1", "third": "z = 1",
    }  # fmt: skip
    for name, source in files.items():
        path = tmp_path / "toy_package" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = kept.sources("toy_package.start")
    for name in [name for name in sys.modules if re.match(r"toy_package\b", name)]:
        monkeypatch.delitem(sys.modules, name)
    expected = {"start", "near", "aside", "part", "part.deep", "third"}
    assert set(found) == {f"toy_package.{name}" for name in expected}
    before = kept.code_sha256.__wrapped__("toy_package.start")
    (tmp_path / "toy_package" / "other.py").write_text("changed = 1")
    assert kept.code_sha256.__wrapped__("toy_package.start") == before
    (tmp_path / "toy_package" / "third.py").write_text("z = 2")
    assert kept.code_sha256.__wrapped__("toy_package.start") != before


def test_the_method_is_its_three_stages_and_what_they_stand_on():
    names = {name.rpartition(".")[2] for name in kept.sources(kept.METHOD)}
    assert {"encoder", "fusion", "tuning", "parts", "halves", "images", "world"} <= names
    assert not {"sliders", "study", "judges", "draw", "records"} & names
