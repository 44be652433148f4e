"""Names and wildcards on the command line."""

import pytest

from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.selection import pick
from resfuse.resnet_ref import MODELS

KNOWN = ["resnet18", "resnet50", "resnet18_v1", "vgg19"]


def test_wildcards_resolve_in_the_registrys_order_each_name_once() -> None:
    assert pick("-m", ["vgg19", "resnet*"], KNOWN) == KNOWN
    assert pick("-m", ["resnet?0", "resnet50"], KNOWN) == ["resnet50"]
    assert pick("-m", ["*_v1"], KNOWN) == ["resnet18_v1"]


def test_a_name_that_is_no_pattern_matches_itself_alone() -> None:
    assert pick("-m", ["resnet18"], KNOWN) == ["resnet18"]


def test_what_matches_nothing_is_named_with_what_is_close_and_what_is_known() -> None:
    with pytest.raises(UsageError, match=r"argument -m: unknown name 'resnet81'; did you mean "):
        pick("-m", ["vgg19", "resnet81"], KNOWN)
    with pytest.raises(UsageError, match=r"known: resnet18, resnet50, resnet18_v1, vgg19$"):
        pick("-m", ["dense*"], KNOWN)


def test_many_names_are_not_shown_but_where_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["bench", "-m"], ["kernels", "-m"], ["engine"], ["layers"], ["roofline"]):
        assert main([*command, "resnet5"]) == 2
        said = capsys.readouterr().err
        assert len(said) < 200 and "did you mean resnet50 or " in said
        assert f"`resfuse list models` shows the {len(MODELS)} that are known" in said
    assert main(["study", "models", "-m", "nosuch"]) == 2
    said = capsys.readouterr().err
    assert len(said) < 200 and "`resfuse study models --list` shows the" in said
    assert main(["study", "models", "-m", "resnet18"]) == 2
    assert "did you mean timm resnet18" in capsys.readouterr().err
    assert main(["study", "models", "-m", "timm rep*", "--list"]) == 0
    assert "timm repvgg_a0" in capsys.readouterr().out.splitlines()
