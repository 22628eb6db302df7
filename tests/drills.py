"""Crash drills: `python tests/drills.py [COUNT]`, 50 by default.

Each starts a run of two, three or four ranks, disturbs it at a random moment as a cluster would,
starts it again by the same command, and compares the end bit for bit with that of a run that nobody
touched. Exits with status 1 if they differ.
"""

import argparse
import functools
import glob
import json
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WAYS = (
    "kill rank 0",
    "kill last rank",
    "kill all",
    "SIGTERM",
    "SIGTERM while evaluating",
    "disk full",
    "checkpoint cut",
)
WORLD_SIZES = (2, 3, 4)  # two numbers add up to the same in either order, three may not
STEPS, SAVE_EVERY, EVAL_EVERY = 300, 20, 50
FLAGS = (
    "--device cpu --dtype float32 --hidden-size 32 --num-hidden-layers 2 --num-attention-heads 4 "
    "--intermediate-size 64 --max-length 48 --batch-size 4 --micro-batch-size 1 "
    "--learning-rate 1e-2 --warmup-steps 20 --hidden-dropout-prob 0.1 "
    "--attention-probs-dropout-prob 0.1 --eval-examples 64 --log-every 7 --timeout 60 --workers 1 "
    f"--eval-every {EVAL_EVERY} --steps {STEPS} --save-every {SAVE_EVERY}"
)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(corpus, out, most_bytes=None, world_size=2, flags=""):
    """The ranks as processes. most_bytes: of any file, as on a full disk. flags: over FLAGS."""
    port = str(free_port())
    limit = (
        functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        if most_bytes
        else None
    )
    command = [
        sys.executable,
        "train.py",
        *FLAGS.split(),
        "--data",
        corpus,
        "--out",
        out,
        *flags.split(),
    ]
    common = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit)
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    return [subprocess.Popen(command, cwd=ROOT, env=common | rank, **pipes) for rank in ranks]


def finish(processes, timeout=120):
    """[(exit status, standard output, standard error)] of the ranks."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def ends_of(out):
    """What a run leaves: its metrics without speeds, its model, its last checkpoint."""
    with open(os.path.join(out, "metrics.jsonl")) as f:
        lines = [
            {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in f
        ]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1)), (
        "a step is missing in metrics.jsonl, or is there twice"
    )
    with open(os.path.join(out, "model.safetensors"), "rb") as f:
        model = f.read()
    return (
        lines,
        model,
        torch.load(os.path.join(out, "checkpoints", f"{STEPS:08d}.pt"), weights_only=True),
    )


def equal(a, b):
    """Equality of nested lists and dicts of tensors and plain values, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@functools.cache
def undisturbed(corpus, out, world_size=2):
    """What a run leaves that nobody touches, and the seconds it takes."""
    begin = time.time()
    results = finish(start(corpus, out, world_size=world_size))
    assert all(status == 0 for status, *_ in results), results
    return ends_of(out), time.time() - begin


def saved_steps(out):
    return sorted(
        int(os.path.basename(path)[:-3])
        for path in glob.glob(os.path.join(glob.escape(out), "checkpoints", "*.pt"))
    )


def last_step(out):
    with open(os.path.join(out, "metrics.jsonl"), "rb") as f:
        return max((json.loads(line)["step"] for line in f if line.endswith(b"}\n")), default=0)


def wait_for_evaluation(step, out, process):
    """Waits for the metrics of a step, after which an evaluation follows, or for the end."""
    path = os.path.join(out, "metrics.jsonl")
    while process.poll() is None and not (os.path.exists(path) and last_step(out) >= step):
        time.sleep(0.002)


def drill(corpus, out, way, expected, seconds, generator, world_size=2):
    """One drill; raises AssertionError where the run does not come out as the undisturbed one."""
    full = 150_000  # below a checkpoint's size
    processes = start(corpus, out, full if way == "disk full" else None, world_size)
    if way == "SIGTERM while evaluating":
        wait_for_evaluation(generator.randrange(EVAL_EVERY, STEPS, EVAL_EVERY), out, processes[0])
    else:
        time.sleep(generator.uniform(0.2, 1.0) * seconds)
    if "rank" in way:
        victim = 0 if way == "kill rank 0" else world_size - 1
        before = saved_steps(out)
        processes[victim].kill()
        others = [result for rank, result in enumerate(finish(processes)) if rank != victim]
        words = "\n".join(words for *_, words in others)
        assert "Traceback" not in words, words
        if before and last_step(out) < STEPS - SAVE_EVERY:  # not while it began or ended
            assert all(status == 1 for status, *_ in others), others
            assert (
                words.count("error:") == 1 and f"rank {victim} of {world_size} is gone" in words
            ), words
    elif way.startswith("SIGTERM"):
        # A scheduler may signal all ranks, or the first process alone.
        for process in processes[:1] if way == "SIGTERM while evaluating" else processes:
            process.terminate()
        results = finish(processes)
        assert all("Traceback" not in words for *_, words in results)
        if way == "SIGTERM while evaluating":
            assert (
                all(status == 0 for status, *_ in results)
                and "the same command goes on" in results[0][1]
            ), results
    else:
        for process in processes:
            process.kill()
        words = finish(processes)[0][2]
        if way == "disk full" and f" {SAVE_EVERY + 8}/{STEPS}" in words:
            assert "cannot be written" in words and not saved_steps(out), words
    saved = saved_steps(out)
    if way == "checkpoint cut" and saved:
        newest = os.path.join(out, "checkpoints", f"{saved[-1]:08d}.pt")
        os.truncate(newest, generator.randrange(os.path.getsize(newest)))
        if len(saved) == 1:  # all are damaged: that is said, not begun anew in silence
            results = finish(start(corpus, out, world_size=world_size))
            assert results[0][0] == 2 and "all of its checkpoints are damaged" in results[0][2], (
                results
            )
            os.remove(newest + ".damaged")  # by hand: only then does it begin anew
        saved.pop()
    results = finish(start(corpus, out, world_size=world_size))
    words = results[0][1]
    assert all(status == 0 for status, *_ in results), results
    assert not saved or f"after step {saved[-1]}." in words, words  # nothing that was saved is lost
    assert equal(ends_of(out), expected)


def main():
    import corpus

    parser = argparse.ArgumentParser(description="Disturb runs, and compare their ends.")
    parser.add_argument("count", nargs="?", type=int, default=50, help="drills (default: 50)")
    count = parser.parse_args().count
    failures = []
    with tempfile.TemporaryDirectory() as directory:
        data = os.path.join(directory, "corpus")
        library = os.path.dirname(os.__file__)
        corpus.prepare(
            [os.path.join(library, name) for name in ("asyncio", "email", "json", "unittest")],
            data,
            vocab_size=600,
        )
        generator, bar = random.Random(0), tqdm(range(count), unit="drill")
        for i in bar:
            way = WAYS[i % len(WAYS)]
            world_size = WORLD_SIZES[i % len(WORLD_SIZES)]  # in 21 drills, each way with each
            bar.set_postfix_str(f"{way}, {world_size} ranks")
            try:
                expected, seconds = undisturbed(
                    data, os.path.join(directory, f"undisturbed {world_size}"), world_size
                )
                drill(
                    data,
                    os.path.join(directory, str(i)),
                    way,
                    expected,
                    seconds,
                    generator,
                    world_size,
                )
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failures.append(f"drill {i}, {way}, {world_size} ranks: {error}")
                bar.write(failures[-1][-3000:])
    print(f"{count - len(failures)} of {count} drills ended with the bits of the undisturbed run")
    return bool(failures)


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    sys.exit(main())
