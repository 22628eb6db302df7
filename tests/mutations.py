"""Plants bugs in the kernels, one at a time: `python tests/mutations.py [WORDS OF A BUG'S NAME]`.

A property suite that lets a forgotten mask through would prove nothing. Each bug has one place in
kernels.py. The properties of tests/test_triton.py that concern its operation must catch it, and
must pass without a bug. The name of the first one that fails is printed. Works on copies; exits
with status 1 if a bug survives.

A family of bugs has a name, its mutants, and a way to try one. "written" are the bugs in this file,
and "generated" those of generated_mutations.py. "ptx" are those of ptx_mutations.py: a barrier,
wait or fence is removed from the compiled code. The watch of ptx/ says what goes wrong without it,
or the reason is printed why it is redundant.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import generated_mutations
import ptx_mutations
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "corpora", "runs", "notebooks", "results")

# {operation: (its tests, as pytest's -k takes them, {bug: (source, what replaces it)})}
MUTATIONS = {
    "attention": (
        "attention_is_as_good or sum_to_one or drop_the_same or weight_at_the_threshold or huge "
        "or saturated",
        {
            "keys outside are not masked, forward": (
                's = tl.where((key_pos < length)[None, :], s, float("-inf"))',
                "s = s + 0.0",
            ),
            "keys outside are not masked, dq": (
                "e = tl.where((key_pos < length)[None, :], e, 0.0)",
                "e = e + 0.0",
            ),
            "one block too many is whole, forward": (
                "o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)\n\n        whole = length",
                "o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)\n\n"
                "        whole = (length + BLOCK_K - 1)",
            ),
            "one block too many is whole, dk_dv": (
                "whole = length // BLOCK_Q * BLOCK_Q",
                "whole = (length + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q",
            ),
            "the rest of the keys is left out, forward": (
                "end = length if PARTIAL else whole\n            for first_key",
                "end = whole\n            for first_key",
            ),
            "the rest of the keys is left out, dq": (
                "end = whole if PASS == 1 else length",
                "end = length if PASS == 0 else whole",
            ),
            "the rest of the queries is left out, dk_dv": (
                "end = length if PARTIAL else whole\n            for first_query",
                "end = whole\n            for first_query",
            ),
            "a program whose last queries are outside does nothing": (
                "if first_query >= length:  # the grid",
                "if first_query + BLOCK_Q > length + 40:  # the grid",
            ),
            "the start of the sequence is forgotten, dk_dv": (
                "dout_ptr += (start.to(tl.int64) * N + head) * D",
                "dout_ptr += head * D",
            ),
            "the scale is forgotten": (
                "scale = D**-0.5 * LOG2_E.value", "scale = LOG2_E.value",
            ),
            "the exponent has base e": ("scale = D**-0.5 * LOG2_E.value", "scale = D**-0.5"),
            "the running sum does not shrink": (
                "l = l * shrink + tl.sum(e, 1)",
                "l = l + tl.sum(e, 1)",
            ),
            "the running output does not shrink": ("o = o * shrink[:, None]", "o = o + 0.0"),
            "dropout's scale in the sum that normalizes": (
                "l = l * shrink + tl.sum(e, 1)",
                "l = l * shrink + tl.sum(e, 1) / keep_scale",
            ),
            "no dropout scale on the output": (
                "o * (keep_scale / l)[:, None]",
                "o * (1 / l)[:, None]",
            ),
            "no dropout in the forward pass": (
                "e = tl.where(keep, e, scale * 0.0)",
                "e = e + 0.0",
            ),
            "delta from the wrong product": (
                "tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)",
                "tl.sum(out.to(tl.float32) * out.to(tl.float32), 1)",
            ),
            "delta without its factor 1 - p": (
                "do.to(tl.float32), 1) / keep_scale",
                "do.to(tl.float32), 1)",
            ),
            "no delta in dk": ("ds = p * (dp - delta[None, :])", "ds = p * dp"),
            "no delta in dq": ("ds = e * (dp - delta[:, None])", "ds = e * dp"),
            "the rng_offset is forgotten": ("c1.to(tl.uint32) + rng_offset", "c1.to(tl.uint32)"),
            "the rng_key is forgotten": (
                "_halves(rng_key, start.to(tl.uint32), c1",
                "_halves(rng_offset, start.to(tl.uint32), c1",
            ),
            "all heads have one mask": (
                "_philox(head.to(tl.uint32),",
                "_philox((head * 0).to(tl.uint32),",
            ),
            "all sequences have one mask": (
                "(rng_key, start.to(tl.uint32),",
                "(rng_key, (start * 0).to(tl.uint32),",
            ),
            "the seed's upper word is forgotten": (
                "(seed >> 32).to(tl.uint32))",
                "(seed >> 63).to(tl.uint32))",
            ),
            "another head's mask in dq": (
                "threshold)\n\n        # Queries beyond the end are zeros, and",
                "threshold)\n        attention_rng = (rng_key + 1, rng_offset, start, threshold)\n"
                "        # Queries beyond the end are zeros, and",
            ),
            "another head's mask in dk_dv": (
                "threshold)\n\n        # Keys beyond the end are zeros",
                "threshold)\n        attention_rng = (rng_key + 1, rng_offset, start, threshold)\n"
                "        # Keys beyond the end are zeros",
            ),
            "the halves of a word in the other order": (
                "return word_0 << 16 >= least, word_0 >= least,",
                "return word_0 >= least, word_0 << 16 >= least,",
            ),
            "the four halves in another order": (
                "tl.join(tl.join(keep_00, keep_01), tl.join(keep_10, keep_11))",
                "tl.join(tl.join(keep_00, keep_10), tl.join(keep_01, keep_11))",
            ),
            "the transposed tile is permuted as the other": (
                "tl.permute(keep, (0, 4, 1, 2, 5, 3))",
                "tl.permute(keep, (0, 5, 1, 2, 4, 3))",
            ),
            "dk and dv are swapped": (
                "tl.store(dqkv_ptr + dq_offset + N * D, dk, mask=mask)\n"
                "        tl.store(dqkv_ptr + dq_offset + 2 * N * D, dv, mask=mask)",
                "tl.store(dqkv_ptr + dq_offset + N * D, dv, mask=mask)\n"
                "        tl.store(dqkv_ptr + dq_offset + 2 * N * D, dk, mask=mask)",
            ),
            "no dropout in dv": (
                "p_kept = tl.where(keep, p, scale * 0.0)",
                "p_kept = p",
            ),
            "no dropout in dk": (
                "dp = tl.where(keep, dp, 0.0)\n\n                # Accumulate.\n                dv",
                "\n                # Accumulate.\n                dv",
            ),
            "no dropout in dq": (
                "dp = tl.where(keep, dp, 0.0)\n\n                # Accumulate.\n                if",
                "dp = dp * 1.0\n\n                # Accumulate.\n                if",
            ),
            "no factor 1 / (1 - p) on dq": (
                "dq *= scale / LOG2_E * keep_scale",
                "dq *= scale / LOG2_E",
            ),
            "the binary scale on dk": (
                "dk *= scale / LOG2_E * keep_scale",
                "dk *= scale * keep_scale",
            ),
            "no factor 1 / (1 - p) on dv": ("dv *= keep_scale", "dv *= 1.0"),
            "norm is forgotten in dq": (
                "dq *= norm[:, None]",
                "dq *= 1.0",
            ),
            "norm is forgotten in delta": (
                "p_dp = e * norm[:, None] * dp",
                "p_dp = e * dp",
            ),
            "norm is forgotten in dk_dv": (
                "p *= norm[None, :]",
                "p *= 1.0",
            ),
            "the sum's logarithm beside a large maximum, fp32": (
                "tl.store(shift_ptr + stat_offset, m, mask=query_pos < length)\n"
                "            tl.store(norm_ptr + stat_offset, 1 / l,",
                "tl.store(shift_ptr + stat_offset, m + tl.log2(l), mask=query_pos < length)\n"
                "            tl.store(norm_ptr + stat_offset, l / l,",
            ),
            "the sum is forgotten in shift, half precision": (
                "tl.store(shift_ptr + stat_offset, m + tl.log2(l)",
                "tl.store(shift_ptr + stat_offset, m",
            ),
        },
    ),
    "layer_norm": (
        "layer_norm or dropout",
        {
            "no pivot": (
                "chunks = ()  # (BLOCK_R, BLOCK_H) each",
                "chunks = ()\n        pivot *= 0.0",
            ),
            "the pivot without dropout": (
                "pivot *= tl.where(keep, keep_scale, 0.0)",
                "pivot *= keep_scale",
            ),
            "the pivot is missing in the mean that is kept": (
                "tl.store(mean_ptr + row, mean + pivot",
                "tl.store(mean_ptr + row, mean",
            ),
            "the mask before the mean is subtracted": (
                "tl.where((column < H)[None, :], chunks[i] - mean[:, None], 0.0)",
                "chunks[i] - mean[:, None]",
            ),
            "the pivot is subtracted outside as well": (
                "h = tl.where(mask, h - pivot[:, None], 0.0)",
                "h = h - pivot[:, None]",
            ),
            "the mean over the tile's width": (
                "mean = tl.sum(total, 1) / H",
                "mean = tl.sum(total, 1) / (len(chunks) * BLOCK_H)",
            ),
            "eps outside of the root": (
                "1 / tl.sqrt(tl.sum(square, 1) / H + eps)",
                "1 / (tl.sqrt(tl.sum(square, 1) / H) + eps)",
            ),
            "the mean of the last chunk alone": ("total += h", "total = h"),
            "the variance of the last chunk alone": (
                "square += centered * centered",
                "square = centered * centered",
            ),
            "every chunk has the first one's mask": (
                "group = first // 4 + tl.arange(0, BLOCK_H // 4)",
                "group = first * 0 + tl.arange(0, BLOCK_H // 4)",
            ),
            "the halves in another order": (
                "tl.join(tl.join(keep_0, keep_2), tl.join(keep_1, keep_3))",
                "tl.join(tl.join(keep_0, keep_1), tl.join(keep_2, keep_3))",
            ),
            "no mean of g": (
                "g_chunks[i] - mean_g[:, None] - n_chunks[i]",
                "g_chunks[i] - n_chunks[i]",
            ),
            "no mean of g n": (" - n_chunks[i] * mean_gn[:, None]", ""),
            "the mean of g of the last chunk alone": ("sum_g += g\n", "sum_g = g\n"),
            "dx without the mask": (
                "tl.store(dx_ptr + offset, dh * factors[i]",
                "tl.store(dx_ptr + offset, dh",
            ),
            "dresidual with the mask": (
                "tl.store(dresidual_ptr + offset, dh,",
                "tl.store(dresidual_ptr + offset, dh * factors[i],",
            ),
            "dweight from g": ("(dweights[i] + dy * n,)", "(dweights[i] + g * n,)"),
            "dweight of the last block of rows alone": ("(dweights[i] + dy * n,)", "(dy * n,)"),
            "dbias from g": ("(dbiases[i] + dy,)", "(dbiases[i] + g,)"),
        },
    ),
    "cross-entropy": (
        "cross_entropy",
        {
            "columns outside are 0": (
                'mask=column < V, other=float("-inf")',
                "mask=column < V, other=0.0",
            ),
            "the running sum does not shrink": (
                "l = l * tl.exp(m - m_new) + tl.exp(x - m_new)",
                "l = l + tl.exp(x - m_new)",
            ),
            "no running maximum": ("m_new = tl.maximum(m, tl.max(x, 0))", "m_new = m * 0.0"),
            "the maximum begins at -inf": ("tl.full([], -3.0e38,", 'tl.full([], float("-inf"),'),
            "-100 counts, forward": ("tl.where(label == -100, 0.0, lse - chosen)", "lse - chosen"),
            "-100 counts, backward": (
                "factor = tl.where(label == -100, 0.0, factor)",
                "factor = tl.where(label == -100, tl.load(upstream_ptr), factor)",
            ),
            "no upstream factor": (
                'tl.where(is_column, tl.load(upstream_ptr), float("nan"))',
                'tl.where(is_column, 1.0, float("nan"))',
            ),
            "a label that is no column has a gradient": (
                'tl.where(is_column, tl.load(upstream_ptr), float("nan"))',
                "tl.load(upstream_ptr)",
            ),
            "the label's column in the first block alone": (
                "column == label",
                "column - first == label",
            ),
            "the label's logit of the first row": (
                "tl.load(logits_ptr + label,",
                "tl.load(logits_ptr - row * V + label,",
            ),
        },
    ),
}  # fmt: skip


class Family(NamedTuple):
    """Bugs of one kind, and how to try one of them."""

    name: str
    mutants: dict  # {name: what `caught_by` takes}
    sound: dict  # the same without a bug: nothing may catch it
    caught_by: Callable  # returns the property that a mutant breaks, or None
    excuse: Callable | None = None  # returns why a mutant that nothing catches is no bug
    too_many: Callable | None = None  # returns what is wrong with a list of such mutants


class Mutant(NamedTuple):
    """kernels.py with a bug in it."""

    source: str
    tests: str  # those that must find it, as pytest's -k takes them


def failing_property(mutant):
    """The first of its tests that fails with this kernels.py, or None."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED, dirs_exist_ok=True)
        with open(os.path.join(copy, "kernels.py"), "w") as f:
            f.write(mutant.source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", "-k", mutant.tests, "tests/test_triton.py"]
        environment = os.environ | {
            "HYPOTHESIS_PROFILE": "first_failure",
            "OMP_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # to import plugins takes a second
        }
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"a crash, {signal.Signals(-done.returncode).name}"
    # ERROR: the test had passed, and then something was found written outside of an output.
    failure = re.search(r"^(?:FAILED|ERROR) tests/test_triton\.py::(\w+)", done.stdout, re.M)
    if done.returncode > 1 or not failure:  # no test at all, or a bug that is no Python
        raise SystemExit(f"the tests do not run\n{done.stdout[-2000:]}")
    return failure[1]


def without_a_bug(source):
    """{name: mutant} for the tests of each operation."""
    return {
        f"{operation}: no bug": Mutant(source, tests) for operation, (tests, _) in MUTATIONS.items()
    }


def written_family(source):
    """The bugs of MUTATIONS."""
    mutants = {}
    for operation, (tests, bugs) in MUTATIONS.items():
        for name, (replaced, by) in bugs.items():
            if source.count(replaced) != 1:
                raise SystemExit(f"not once in kernels.py: {replaced!r}")
            mutants[f"{operation}: {name}"] = Mutant(source.replace(replaced, by), tests)
    return Family("written", mutants, without_a_bug(source), failing_property)


def generated_family(source):
    """The bugs that a program plants. Their tests are those of the written ones."""
    mutants = {}
    for name, (function, changed) in generated_mutations.planted(source).items():
        operation = operation_of(function)
        tests, _ = MUTATIONS[operation]
        mutants[f"{operation}: {name}"] = Mutant(changed, tests)
    return Family("generated", mutants, {}, failing_property)


def ptx_family():
    """What is removed from the compiled code."""
    return Family(
        "ptx",
        ptx_mutations.removals(),
        {},
        ptx_mutations.caught_by,
        ptx_mutations.why_redundant,
        ptx_mutations.too_many,
    )


def operation_of(function):
    """The operation whose tests must find a bug in a kernel, or in what several kernels call."""
    if "cross_entropy" in function:
        return "cross-entropy"
    return "layer_norm" if "layer_norm" in function or "dropout" in function else "attention"


def chosen(mutants, words):
    """Those whose name contains the words."""
    return {name: mutant for name, mutant in mutants.items() if words in name}


def main(words):
    """Tries the bugs whose operation and name contain `words`. Returns the exit status."""
    if words.startswith("-"):
        print(__doc__)
        return 0
    with open(os.path.join(ROOT, "kernels.py")) as f:
        source = f.read()
    families = []
    for family in (written_family(source), generated_family(source), ptx_family()):
        mutants = chosen(family.mutants, words)
        families.append(family._replace(mutants=mutants, sound=chosen(family.sound, words)))
    trials = [
        (family, name, mutant)
        for family in families
        for name, mutant in (family.sound | family.mutants).items()
    ]
    if not trials:
        raise SystemExit(f"no planted bug is called {words!r}")

    caught_by = {}  # {(family, name of a mutant): the property, or None}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = pool.map(lambda trial: trial[0].caught_by(trial[2]), trials)
        verdicts = tqdm(verdicts, total=len(trials), unit="bug")
        for (family, name, _), verdict in zip(trials, verdicts):
            caught_by[family.name, name] = verdict
            tqdm.write(f"{verdict or 'passed'}: {family.name}, {name}", file=sys.stdout)

    failures = []
    for family in families:
        survivors = [name for name in family.mutants if not caught_by[family.name, name]]
        bugs = len(family.mutants)
        if bugs:
            print(f"{family.name}: {bugs - len(survivors)} of {bugs} bugs caught")
        if family.excuse:
            for name in survivors:
                print(f"redundant: {name}: {family.excuse(family.mutants[name])}")
            failures += family.too_many([family.mutants[name] for name in survivors])
        else:
            failures += [f"survived: {name}" for name in survivors]
        for name in family.sound:
            if caught_by[family.name, name]:
                failures.append(f"{name}, and yet {caught_by[family.name, name]} fails")
    for failure in failures:
        print(failure)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
