"""Runs every reference vector file; a file that nobody claims fails."""

import numpy as np
import pytest

from tests.helpers.goldens import GOLDENS_DIR, Golden, checker_of, find, idle, load_checkers, run, why_not_due

load_checkers()
FILES = find(GOLDENS_DIR)
DUE = [f for f in FILES if checker_of(f.relative_to(GOLDENS_DIR).with_suffix("").as_posix())]


def name_of(path) -> str:
    return path.relative_to(GOLDENS_DIR).with_suffix("").as_posix()


def check_file(path, root) -> None:
    golden = Golden.load(path, root)
    checker = checker_of(golden.name)
    if checker is None:
        reason = why_not_due(golden.name)
        if reason is None:
            pytest.fail(f"{golden.name}: no checker claims this file and it is not listed as not yet due")
        pytest.skip(reason)
    run(golden, checker)


@pytest.mark.skipif(not FILES, reason=f"no reference vectors below {GOLDENS_DIR} (set GOLDENS_DIR)")
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_reference_vectors(path):
    check_file(path, GOLDENS_DIR)


@pytest.mark.parametrize("path", DUE, ids=name_of)
def test_a_perturbed_weight_or_expectation_fails(path):
    """Negative control: one weight or input and some expectations, each broken in turn."""
    golden = Golden.load(path, GOLDENS_DIR)
    checker = checker_of(golden.name)
    keys = [k for k, a in golden.arrays.items() if a.dtype.kind == "f" and a.size]
    rng = np.random.default_rng(0)
    weights = [k for k in keys if k.startswith("p:") or ("grad" not in k and "__" not in k)]
    expected = [k for k in keys if k not in weights]
    weights = [k for k in weights if not idle(golden.name, k)]
    for key in {str(rng.choice(weights)), *rng.choice(expected, size=min(4, len(expected)), replace=False).tolist()}:
        broken = dict(golden.arrays)
        broken[key] = broken[key] + 1e-3 * rng.standard_normal(broken[key].shape)
        with pytest.raises(AssertionError):
            run(Golden(golden.name, broken), checker)


@pytest.mark.parametrize("path", DUE[:1], ids=name_of)
def test_an_array_that_no_checker_looks_at_fails(path):
    golden = Golden.load(path, GOLDENS_DIR)
    golden.arrays["grad_of_something_new"] = np.zeros(3)
    with pytest.raises(AssertionError, match="never looked at"):
        run(golden, checker_of(golden.name))


def test_a_file_that_nobody_claims_fails(tmp_path):
    (tmp_path / "unknown").mkdir()
    np.savez(tmp_path / "unknown" / "case.npz", x=np.zeros(2))
    with pytest.raises(pytest.fail.Exception, match="no checker claims"):
        check_file(tmp_path / "unknown" / "case.npz", tmp_path)


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "lora_separate_x.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        Golden.load(tmp_path / "lora_separate_x.npz", tmp_path)
