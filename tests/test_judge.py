"""`pytest tests/test_triton.py --kernels FILE` passes what is right and says what is wrong."""

import os
import re
import sys

import pytest
from conftest import ROOT, UNDER_TEST, command, import_kernels

PLAIN = os.path.join(ROOT, "tests", "plain_kernels.py")


def judge(path, *flags):
    """Runs the properties on the operations of a file, as a user would."""
    return command(
        *("-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", "tests/test_triton.py"),
        *("--kernels", str(path), *flags),
        env=os.environ | {"HYPOTHESIS_PROFILE": "first_failure"},
    )


def plain_source():
    with open(PLAIN) as f:
        return f.read()


@pytest.mark.slow
def test_what_is_right_passes():
    result = judge(PLAIN)
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 40
    assert "plain_kernels.py does not define cross_entropy" in result.stdout


@pytest.mark.slow
def test_the_project_passes_as_any_other_file_does():
    result = judge("kernels.py", "-m", "not slow", "-k", "refuses or dropout_keep")
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 15


@pytest.mark.slow
def test_what_a_file_lacks_is_not_judged(tmp_path):
    file = tmp_path / "only_norm.py"
    file.write_text(plain_source().replace("def attention(", "def another_name("))
    result = judge(file)
    assert result.returncode == 0, result.stdout
    assert "only_norm.py does not define attention" in result.stdout
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert 10 <= passed < 40


# {what is wrong: (source, what replaces it, one property that shows it)}
WRONG = {
    "keys beyond the end of a sequence": (
        'scores = scores.masked_fill(~inside[:, None, None, :], float("-inf"))',
        "scores = scores + 0.0",
        "test_weights_sum_to_one",
    ),
    "dropout by another rule": (
        "keep = kernels.attention_keep(seed, dropout_p, head, start, L)",
        "torch.manual_seed(seed)\n        keep = torch.rand(weights.shape) >= dropout_p",
        "test_forward_and_backward_drop_the_same_weights",
    ),
    "no gradient of the mean": (
        "dh = (g - mean_g - n * mean_gn) * rstd",
        "dh = (g - n * mean_gn) * rstd",
        "test_layer_norm_is_as_good_as_pytorch",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_fails_by_name(name, tmp_path):
    replaced, by, broken_property = WRONG[name]
    source = plain_source()
    assert source.count(replaced) == 1
    file = tmp_path / "wrong.py"
    file.write_text(source.replace(replaced, by))
    result = judge(file)
    assert result.returncode == 1, result.stdout
    assert f"FAILED tests/test_triton.py::{broken_property}" in result.stdout


@pytest.mark.parametrize(
    "text, words",
    [
        ("def attention(:", "cannot be imported: SyntaxError"),
        ("import a_module_that_is_not_here", "cannot be imported: ModuleNotFoundError"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
        ("attention = 'all you need'", "defines none of attention, layer_norm"),
        (None, "there is no such file"),
    ],
)
def test_a_file_that_cannot_be_judged_is_refused_in_one_line(text, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, UNDER_TEST, None)
    file = tmp_path / "unusable.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(pytest.UsageError) as error:
        import_kernels(str(file))
    message = str(error.value)
    assert message.startswith(f"--kernels {file}: ") and words in message
    assert "\n" not in message


@pytest.mark.slow
def test_a_usage_error_shows_no_traceback():
    result = judge("no_such_file.py")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.strip() == "ERROR: --kernels no_such_file.py: there is no such file"
    assert not result.stdout.strip()
