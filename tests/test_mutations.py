"""The planted bugs: each is one small change of a kernel, and the tests' verdict has a name."""

import os

import generated_mutations
import mutations
import pytest
from conftest import ROOT


def source_of_kernels():
    with open(os.path.join(ROOT, "kernels.py")) as f:
        return f.read()


def test_a_generated_bug_changes_one_line_of_a_kernel():
    source = source_of_kernels()
    planted = generated_mutations.planted(source)
    assert len(planted) == 7 * generated_mutations.OF_EACH_KIND
    assert generated_mutations.planted(source) == planted  # the same ones each time
    for name, (function, changed) in planted.items():
        compile(changed, name, "exec")
        before = source.splitlines()
        after = changed.splitlines()
        (line,) = [b for a, b in zip(before, after, strict=True) if a != b]
        assert name.startswith(f"{function}, ") and f": {line.strip()}" in name


def test_a_bug_that_is_not_planted_is_one_that_kernels_offers(monkeypatch):
    monkeypatch.setitem(generated_mutations.NOT_PLANTED, "_a_kernel, sign: x + y", "not there")
    with pytest.raises(ValueError, match="_a_kernel, sign"):
        generated_mutations.planted(source_of_kernels())


@pytest.mark.slow
def test_a_planted_bug_is_caught_by_name():
    family = mutations.written_family(source_of_kernels())
    mutant = family.mutants["attention: keys outside are not masked, forward"]
    assert family.caught_by(mutant).startswith("test_")
