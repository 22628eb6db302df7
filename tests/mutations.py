"""Plants bugs in kernels.py, one at a time: `python tests/mutations.py [WORDS OF A BUG'S NAME]`.

A property suite that lets a forgotten mask through would prove nothing. Each bug has one place in
kernels.py. The properties of tests/test_triton.py that concern its operation must catch it, and
must pass without a bug. Works on copies; exits with status 1 if a bug survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "corpora", "runs", "notebooks", "results")

# {operation: (its tests, as pytest's -k takes them, {bug: (source, what replaces it)})}
MUTATIONS = {
    "attention": (
        "attention_is_as_good or sum_to_one or drop_the_same or huge or saturated",
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
                "delta += tl.sum(e * norm[:, None] * dp, 1)",
                "delta += tl.sum(e * dp, 1)",
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
        "layer_norm and not model",
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


def survives(tests, source, replaced="", by=""):
    """True if the tests pass with `replaced` by something else in the source of kernels.py."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED, dirs_exist_ok=True)
        with open(os.path.join(copy, "kernels.py"), "w") as f:
            f.write(source.replace(replaced, by, 1))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", "-k", tests, "tests/test_triton.py"]
        environment = os.environ | {"HYPOTHESIS_PROFILE": "first_failure", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode > 1:  # not a test that failed: no test at all, or a bug that is no Python
        raise SystemExit(f"{replaced!r}: the tests do not run\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main(words):
    """Tries the bugs whose operation and name contain `words`. Returns the exit status."""
    with open(os.path.join(ROOT, "kernels.py")) as f:
        source = f.read()
    trials = {}  # {name: arguments of `survives`}
    for operation, (tests, bugs) in MUTATIONS.items():
        trials[f"{operation}: no bug"] = (tests, source)
        for name, (replaced, by) in bugs.items():
            if source.count(replaced) != 1:
                raise SystemExit(f"not once in kernels.py: {replaced!r}")
            trials[f"{operation}: {name}"] = (tests, source, replaced, by)
    trials = {name: trial for name, trial in trials.items() if words in name}
    if not trials:
        raise SystemExit(f"no planted bug is called {words!r}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = pool.map(lambda trial: survives(*trial), trials.values())
        verdicts = tqdm(verdicts, total=len(trials), unit="bug")
        survived = dict(zip(trials, verdicts))
    sound = [name for name in trials if name.endswith(": no bug")]
    bugs = [name for name in trials if name not in sound]
    survivors = [name for name in bugs if survived[name]]
    failed = [name for name in sound if not survived[name]]
    print(f"{len(bugs) - len(survivors)} of {len(bugs)} bugs caught")
    for name in survivors:
        print(f"survived: {name}")
    for name in failed:
        print(f"{name}, and yet the tests fail")
    return int(bool(survivors or failed))


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
