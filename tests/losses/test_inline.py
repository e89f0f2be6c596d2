"""Arguments behind the name of a loss."""

from __future__ import annotations

import pytest

from prefkern import losses
from prefkern.losses import inline


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("dpo", ("dpo", {})),
        ("tdpo2:alpha=0.5", ("tdpo2", {"alpha": 0.5})),
        ("tdpo2: alpha=0.5, beta=-2e-1", ("tdpo2", {"alpha": 0.5, "beta": -0.2})),
        ("fdpo:divergence=js, flag=True", ("fdpo", {"divergence": "js", "flag": True})),
        ("modpo:w=(0.3, 0.7)", ("modpo", {"w": (0.3, 0.7)})),
    ],
)
def test_split_and_join(text, want):
    assert inline.split(text) == want
    assert inline.split(inline.join(*want)) == want


@pytest.mark.parametrize(
    "text",
    [
        "dpo:",
        "dpo:beta=1, beta=2",
        "dpo:0.5",
        "dpo:beta",
        "dpo:beta=f(1)",
        "dpo:**x",
        "dpo:beta=1) or (2",
    ],
)
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="name:key=value"):
        inline.split(text)


def test_resolve_puts_them_above_what_an_alias_fixes():
    record, fixed = losses.resolve("aot_unpaired:beta=0.3")
    assert record.name == "aot" and fixed == {"paired": False, "beta": 0.3}
    bound = losses.bind("aot_unpaired:beta=0.3", {"paired": True, "beta": 0.5})
    assert bound.args == {"paired": True, "beta": 0.5}, "what a call says stands above both"
    with pytest.raises(ValueError, match="nearest"):
        losses.resolve("tdpo9:alpha=1")
