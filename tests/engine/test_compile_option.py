"""`engine.compile` is refused in one line where it cannot work."""

from types import SimpleNamespace

import pytest

from mmpeft_ds.engine.assembly import outline
from mmpeft_ds.errors import BadInput


@pytest.mark.parametrize(("stage", "pack", "message"), [(3, 0, "stage 3"), (1, 512, "data.pack: 0")])
def test_it_is_refused_at_stage_3_and_with_packed_texts(monkeypatch, stage, pack, message):
    monkeypatch.setattr(outline, "where", lambda recipe, key: key)
    recipe = SimpleNamespace(data=SimpleNamespace(pack=pack))
    with pytest.raises(BadInput, match=f"engine.compile: .*{message}"):
        outline._check_compiling(recipe, stage)


def test_stages_below_without_packing_are_let_through():
    outline._check_compiling(SimpleNamespace(data=SimpleNamespace(pack=0)), 2)
