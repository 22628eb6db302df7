"""Fine-tuning: each kind of task learns, opens elsewhere, goes on with the same bits, and bad data
is refused in one line."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import tokenizers
import torch
import torch.multiprocessing as mp
import transformers
from conftest import ROOT, assert_refused, program
from hypothesis import example, given
from hypothesis import strategies as st
from seqeval.metrics import f1_score

from bench import tasks
from corpus.tokenizer import Tokenizer, train_tokenizer
from finetune import loop, records, scores, search, use
from finetune.batches import sequence_of
from finetune.export import framed
from finetune.tokens import spans_of
from starencoder import (
    StarEncoder,
    StarEncoderForSequenceClassification,
    embed,
)
from training import step
from training.ranks import Ranks

KINDS = ["label", "labels", "score", "fragments", "pair", "code"]


def read(path):
    with open(path, "rb") as f:
        return f.read()


def metrics_of(out):
    """The lines of a run, without what depends on the clock."""
    lines = [json.loads(line) for line in read(os.path.join(out, "metrics.jsonl")).splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def word(letters, generator):
    return "".join(generator.choices(letters, k=5))


def line_of(kind, generator):
    """A line of data, from which the kind of task can be learned."""
    number = generator.randrange(3)
    text = "x = " + " + ".join(word(["abcd", "efgh", "uvwx"][number], generator) for _ in range(3))
    if kind == "label":
        return {"text": text, "label": number}
    if kind == "labels":
        return {"text": text, "labels": [["left"], ["right", "left"], []][number]}
    if kind == "score":
        return {"text": text, "score": 50 * number + generator.random()}
    if kind == "fragments":
        name = word("uvwxyz", generator)
        text = f"x = {word('abcdef', generator)}\nname = {name}\n"
        fragment = {"category": "NAME", "position": [len(text) - 6, len(text) - 1]}
        return {"text": text, "fragments": [fragment]}
    if kind == "pair":
        a = word(["abcd", "uvwx"][number % 2], generator)
        b = word(generator.choice(["abcd", "uvwx"]), generator)
        return {"text_a": a, "text_b": b, "label": "both low" if max(a + b) < "e" else "not"}
    name = word("abcdefghijklmnop", generator)
    return {"query": f"the {name}", "code": f"def f():\n    return {name}"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of each kind."""
    directory = tmp_path_factory.mktemp("data")
    for kind in KINDS:
        generator = random.Random(0)
        lines = [json.dumps(line_of(kind, generator)) for _ in range(300)]
        (directory / f"{kind}.jsonl").write_text("\n".join(lines))
    return str(directory)


def config_of(encoder, data, kind, out, **fields):
    settings = dict(
        steps=48,
        batch_size=8,
        micro_batch_size=4,
        eval_every=24,
        learning_rate=7e-3,
        warmup_steps=5,
        dtype="float32",
        device="cpu",
    )
    train = os.path.join(data, f"{kind}.jsonl")
    return loop.FinetuneConfig(train=train, encoder=encoder, out=str(out), **(settings | fields))


@pytest.fixture(scope="module")
def trained(encoder, data, tmp_path_factory):
    """{kind: (its run, its best figure)}."""
    directory = tmp_path_factory.mktemp("runs")
    runs = {}
    for kind in KINDS:
        out = str(directory / kind)
        # Of two evaluations one is halfway, for the run that is stopped between them.
        fields = {} if kind == "code" else {"eval_every": 48}
        runs[kind] = out, loop.train(config_of(encoder, data, kind, out, **fields))
    return runs


# ---- what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, least, baseline",
    [
        ("label", 0.9, "majority_macro_f1"),
        ("labels", 0.9, "majority_macro_f1"),
        ("score", 0.8, "mean_spearman"),
        ("fragments", 0.8, None),
        ("pair", 0.8, "majority_macro_f1"),
        ("code", 0.3, "before_mrr"),
    ],
)
def test_each_kind_of_task_learns(trained, kind, least, baseline):
    out, best = trained[kind]
    assert best > least
    line = metrics_of(out)[-1]
    if baseline:
        assert best > line[baseline] + 0.1
    assert os.path.exists(os.path.join(out, "curves.png"))


@pytest.mark.parametrize("kind", ["label", "labels", "score", "pair"])
def test_transformers_says_the_same(trained, data, tmp_path, kind):
    """Its tokenizer puts <cls> and <sep> where they belong; its model has names and kind."""
    out, _ = trained[kind]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    lines = [json.loads(line) for line in read(os.path.join(data, f"{kind}.jsonl")).splitlines()]
    lines = lines[:6]
    text = "text_a" if kind == "pair" else "text"
    lines[5][text] = "abcd efgh " * 50  # longer than the model's positions

    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = program("finetune", "predict", out, str(path))
    assert "6 texts" in result.stderr, result.stderr
    answers = [json.loads(answer) for answer in result.stdout.splitlines()]
    for line, answer in zip(lines, answers, strict=True):
        pieces = [line[name] for name in (("text_a", "text_b") if kind == "pair" else ("text",))]
        with torch.no_grad():
            logits = model(**tokenizer(*pieces, truncation=True, return_tensors="pt")).logits[0]
        if kind == "score":
            assert abs(answer["score"] - logits.item()) < 0.01
            assert abs(answer["score"] - line["score"]) < 25 or line is lines[5]
            continue
        probabilities = logits.sigmoid() if kind == "labels" else logits.softmax(0)
        names = [model.config.id2label[number] for number in range(len(probabilities))]
        assert list(answer["scores"]) == names
        theirs = probabilities.tolist()  # bfloat16, where this CPU is fast at it, has 8 bits
        assert np.allclose(list(answer["scores"].values()), theirs, atol=0.05)


@pytest.mark.parametrize(
    "problem_type, bias, answer",
    [
        ("regression", [3.25e-7], {"score": 3.25e-7}),
        ("multi_label_classification", [-1e-5, 1e-5], {"labels": ["b"]}),
        ("single_label_classification", [0.0, 1e-5], {"label": "b"}),
        ("single_label_classification", [0.0] * 30_000 + [1e-5], {"label": "30000"}),
    ],
)
def test_rounding_does_not_choose(encoder, tokenizer, problem_type, bias, answer):
    names = ["score"] if len(bias) == 1 else ["a", "b"]
    names = names if len(bias) < 3 else list(map(str, range(len(bias))))
    fields = {"id2label": dict(enumerate(names)), "problem_type": problem_type}
    model = StarEncoderForSequenceClassification.from_pretrained(encoder, **fields)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor(bias))
    (given,) = use.classified(model, tokenizer, [use.Text({}, ("a",))], contextlib.nullcontext)
    assert {name: given[name] for name in answer} == answer


def test_found_fragments(trained, data, tmp_path):
    out, _ = trained["fragments"]
    lines = read(os.path.join(data, "fragments.jsonl")).splitlines()[:20]
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b"\n".join(lines))
    result = program("finetune", "predict", out, str(path))
    answers = [json.loads(answer)["fragments"] for answer in result.stdout.splitlines()]
    expected = [json.loads(line)["fragments"] for line in lines]
    right = [answer == fragments for answer, fragments in zip(answers, expected, strict=True)]
    assert sum(right) > 15
    theirs = transformers.BertForTokenClassification.from_pretrained(out)
    assert theirs.config.label2id == {"O": 0, "B-NAME": 1, "I-NAME": 2}
    assert_refused(program("finetune", "predict", trained["code"][0], str(path)), "holds BertModel")


def test_search_in_a_repository(trained, tmp_path):
    out, _ = trained["code"]
    (tmp_path / "a.py").write_text("import os\n\n\ndef f():\n    return abcde\n")
    (tmp_path / "b.py").write_text("class A:\n    def g(self):\n        return ponml\n")
    for query, place in (("the abcde", "a.py:4  f"), ("the ponml", "b.py:2  A.g")):
        result = program("finetune", "search", out, query, str(tmp_path), "--top", "1")
        assert result.stdout.strip().endswith(place), result.stderr
        assert "2 functions" in result.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(program("finetune", "search", out, "x", str(empty)), "no source files")
    assert_refused(program("finetune", "search", out, " ", str(tmp_path)), "empty")
    assert_refused(program("finetune", "search", out, "x", "/nowhere"), "/nowhere")


def test_sentence_transformers_makes_the_same_vectors(trained):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    out, _ = trained["code"]
    texts = ["the abcde", "def f():\n    return x", "", "  é\t<mask>", "1234 " * 8]
    theirs = sentence_transformers.SentenceTransformer(out, device="cpu").encode(texts)
    ours = embed(StarEncoder.from_pretrained(out), Tokenizer.from_pretrained(out), texts, "float32")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@given(a=st.integers(1, 80), b=st.integers(1, 80), positions=st.integers(8, 60), pair=st.booleans())
@example(a=30, b=30, positions=48, pair=True)
def test_what_is_too_long_is_cut_as_by_transformers(tokenizer, a, b, positions, pair):
    texts = ["1" * a, "2" * b] if pair else ["1" * a]  # a digit is a token
    ids = sequence_of([tokenizer.encode(text) for text in texts], tokenizer, positions)
    library = tokenizers.Tokenizer.from_str(framed(tokenizer, 48).json)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library)
    assert ids.tolist() == theirs(*texts, truncation=True, max_length=positions)["input_ids"]


# ---- search --------------------------------------------------------------------------------------


def naive_loss(model, batch, same, temperature):
    """InfoNCE in both directions by loops, for pairs in one batch."""
    h = model(batch.input_ids, batch.cu_seqlens)
    means = [states.mean(0) for states in h.split(batch.lengths.tolist())]
    vectors = [mean / mean.norm() for mean in means]
    queries, code = vectors[: batch.count], vectors[batch.count :]
    total = 0.0
    for i in range(batch.count):
        for left, right in ((queries, code), (code, queries)):
            kept = [j for j in range(batch.count) if j == i or (i, j) not in same]
            scores = torch.stack([left[i] @ right[j] / temperature for j in kept])
            total = total - scores.log_softmax(0)[kept.index(i)] / (2 * batch.count)
    return total


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_two_passes_have_the_gradient_of_one(encoder, tokenizer, micro_batch):
    """GradCache, whatever the micro-batches; a query that is there twice is no negative."""
    texts = [(f"the {i % 7}", f"return {i}") for i in range(8)]  # queries 0 and 7 are equal
    pairs = [records.Record(pair, None) for pair in texts]
    data = records.Data(None, pairs, pairs, {})
    task = search.Search(data, tokenizer, 48, loop.FinetuneConfig(temperature=0.1))
    model = StarEncoder.from_pretrained(encoder)
    task.prepare(model)
    whole = task.batch(range(8), "cpu")
    loss = naive_loss(model, whole, {(0, 7), (7, 0)}, 0.1)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    examples = np.arange(8)
    parts = [range(at, min(8, at + micro_batch)) for at in range(0, 8, micro_batch)]
    batches = [task.batch(part, "cpu") for part in parts]
    seeds = [0] * len(batches)
    aims = task.compare(model, batches, seeds, examples, 0, torch.no_grad, Ranks())
    value = 0.0
    for batch, aim in zip(batches, aims):
        objective, part = task.loss(model, batch, 8, 0, aim)
        objective.backward()
        value += part.item()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in expected.items():
        ours = model.get_parameter(name).grad
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)


# ---- scores --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=30))
def test_spearman_is_the_correlation_of_ranks(pairs):
    truth, predicted = np.array(pairs, float).T

    def rank(values):
        smaller = [sum(other < value for other in values) for value in values]
        equal = [sum(other == value for other in values) for value in values]
        return np.array([s + (e - 1) / 2 for s, e in zip(smaller, equal)])

    result = scores.number_scores(truth, predicted)
    a, b = rank(truth), rank(predicted)
    constant = len(set(truth)) == 1 or len(set(predicted)) == 1
    expected = 0.0 if constant else np.corrcoef(a, b)[0, 1]
    assert result["spearman"] == pytest.approx(expected, abs=1e-9)
    assert result["mse"] == pytest.approx(np.mean((truth - predicted) ** 2))


@given(st.data())
def test_places_are_counted_one_by_one(drawn):
    n = drawn.draw(st.integers(1, 8))
    rows = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    similarities = np.array(drawn.draw(st.lists(rows, min_size=n, max_size=n)))
    places = scores.place_of_right(similarities)
    for i, row in enumerate(similarities):
        others = [value for j, value in enumerate(row) if j != i]
        better = sum(value > row[i] for value in others)
        equal = sum(value == row[i] for value in others)
        assert places[i] == 1 + better + equal / 2  # the mean place, if equal ones are shuffled


def test_a_diverged_model_finds_nothing():
    similarities = np.eye(4)
    similarities[1] = np.nan
    assert scores.place_of_right(similarities).tolist() == [1, 4, 1, 1]


def test_pools_of_candidates():
    assert scores.pools(999) == [range(999)]
    assert scores.pools(2999) == [range(1000), range(1000, 2000)]


@pytest.mark.filterwarnings("ignore")  # seqeval's, if there is nothing
@given(st.data())
def test_f1_of_spans_is_seqevals(drawn):
    tags = st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"])
    lengths = drawn.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    truth = [drawn.draw(st.lists(tags, min_size=n, max_size=n)) for n in lengths]
    found = [drawn.draw(st.lists(tags, min_size=n, max_size=n)) for n in lengths]

    def spans(labels):
        return spans_of("x" * len(labels), [(i, i + 1) for i in range(len(labels))], labels)

    pairs = [spans(labels) for labels in truth], [spans(labels) for labels in found]
    ours = scores.span_scores(scores.span_counts(*pairs, ["A", "B"]), ["A", "B"])
    values = [value for name, value in ours.items() if name != "f1"]
    assert ours["f1"] == pytest.approx(np.mean(values) if values else 0.0)
    if values:
        assert ours["f1"] == pytest.approx(f1_score(truth, found, average="macro"))


# ---- stopped, killed, shared -----------------------------------------------------------------


def test_a_stopped_run_ends_with_the_same_bits(trained, encoder, data, tmp_path, monkeypatch):
    """Ended by a signal between two evaluations."""
    out, best = trained["code"]
    config = config_of(encoder, data, "code", tmp_path / "run")
    rate = loop.learning_rate

    def stopped(config, step):
        if step == 32:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(config, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", stopped)
        assert loop.train(config) is None
    assert loop.train(config) == best == loop.train(config)  # the last has nothing to do
    weights = "model.safetensors"
    assert read(os.path.join(config.out, weights)) == read(os.path.join(out, weights))
    assert metrics_of(config.out) == metrics_of(out)


def test_a_run_does_not_go_on_with_another_tokenizer(encoder, data, tmp_path):
    encoder = shutil.copytree(encoder, tmp_path / "encoder")
    config = config_of(str(encoder), data, "label", tmp_path / "run", steps=2)
    loop.train(config)
    train_tokenizer(["another"], 300).save_pretrained(encoder)
    with pytest.raises(ValueError, match="a run with tokenizer_sha256"):
        loop.train(config)


def test_a_full_disk_is_one_line_and_loses_nothing(trained, encoder, data, tmp_path):
    out, best = trained["label"]
    config = config_of(encoder, data, "label", tmp_path / "run", eval_every=48)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = os.path.getsize(os.path.join(out, "model.safetensors")) - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(OSError, match="run: the model cannot be written.*make room"):
            loop.train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert loop.train(config) == best
    assert metrics_of(config.out) == metrics_of(out)


def test_a_signal_stops_the_benchmark(encoder, data, tmp_path, monkeypatch):
    for split in ("train", "validation"):
        shutil.copy(f"{data}/label.jsonl", tmp_path / f"{split}.jsonl")
    task = tasks.Task("of a test", str(tmp_path), None, "accuracy", "majority_accuracy")
    rate = loop.learning_rate

    def stopped(config, step):
        if step == 3:  # once: the second would end anything
            os.kill(os.getpid(), signal.SIGINT)
        return rate(config, step)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "learning_rate", stopped)
    monkeypatch.setitem(tasks.SETTINGS, "steps", 1000)
    with pytest.raises(KeyboardInterrupt):
        tasks.run(task, encoder, "pretrained", 0)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(encoder, data, tmp_path):
    flags = "--steps 40 --eval-every 10 --batch-size 16 --learning-rate 0.005 --dtype float32"
    words = ["-m", "finetune", f"{data}/code.jsonl", "--encoder", encoder, *flags.split()]
    words += ["--device", "cpu", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(out):
        return subprocess.Popen(
            [sys.executable, *words, str(out)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    killed = tmp_path / "killed"
    process = start(killed)
    while not list(killed.glob("checkpoints/*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (killed / "checkpoints/00000040.pt").exists()
    for out in (killed, tmp_path / "whole"):
        process = start(out)
        process.communicate()
        assert process.returncode == 0
    assert read(killed / "model.safetensors") == read(tmp_path / "whole/model.safetensors")
    assert metrics_of(killed) == metrics_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind, ranks", [("fragments", 2), ("code", 3)])
def test_ranks_are_one(encoder, data, tmp_path, kind, ranks):
    """Several processes, whose shares are of unequal size: one loss, and the same figures."""
    # Without dropout, which differs from rank to rank.
    plain = shutil.copytree(encoder, tmp_path / "encoder")
    entries = json.loads((plain / "config.json").read_text())
    entries |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (plain / "config.json").write_text(json.dumps(entries))
    settings = dict(steps=6, eval_every=3, batch_size=10, micro_batch_size=4)
    config = config_of(str(plain), data, kind, tmp_path / "together", **settings)
    alone = config_of(str(plain), data, kind, tmp_path / "alone", **settings)
    mp.spawn(_rank, (config, ranks), nprocs=ranks)
    loop.train(alone)
    for ours, theirs in zip(metrics_of(config.out), metrics_of(alone.out), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def _rank(rank, config, ranks):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29653",
    }
    torch.set_num_threads(1)
    loop.train(config)


@pytest.mark.parametrize("begun, chosen", [(True, "bfloat16"), (False, "float32")])
def test_a_run_keeps_its_dtype_on_another_cpu(encoder, data, tmp_path, monkeypatch, begun, chosen):
    fields = dict(dtype="auto", steps=2, eval_every=2)
    config = config_of(encoder, data, "label", tmp_path / "run", **fields)
    monkeypatch.setattr(step, "multiplies_bfloat16", lambda: begun)
    loop.train(config)
    monkeypatch.setattr(step, "multiplies_bfloat16", lambda: not begun)
    loop.train(config)
    assert json.loads(read(os.path.join(config.out, "train.json")))["dtype"] == chosen


# ---- bad input -----------------------------------------------------------------------------------

GOOD = {"text": "a", "label": "x"}


def fragment_of(category):
    return {"text": "a", "fragments": [{"category": category, "position": [0, 1]}]}


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], ["empty"]),
        ([GOOD, "{"], [":2:", "not a line of JSON"]),
        ([GOOD, "[1]"], [":2:", "not a JSON object"]),
        ([GOOD, {"text": "a", "score": 1}], [":2:", '{"text", "score"}', '{"text", "label"}']),
        ([{"text": "a", "label": "x", "score": 1}], [":1:", "tasks:"]),
        ([{"text": "a"}], [":1:", "tasks:"]),
        ([{"text": "a", "lable": "x"}], [":1:", "tasks:"]),
        ([{"text_a": "a", "text_b": "b", "fragments": []}], [":1:", "tasks:"]),
        ([GOOD, {"text": " \n", "label": "x"}], [":2:", '"text" is empty']),
        ([{"query": "a", "code": ""}], [":1:", '"code" is empty']),
        ([{"text": 3, "label": "x"}], [":1:", '"text" must be a text']),
        ([{"text": "\ud800", "label": "x"}], [":1:", "surrogate"]),
        ([{"text": "a", "label": True}], [":1:", "string or an int"]),
        ([{"text": "a", "label": 1.0}], [":1:", "string or an int"]),
        ([{"text": "a", "labels": "x"}], [":1:", "must be a list"]),
        (['{"text": "a", "score": NaN}'], [":1:", "finite"]),
        (['{"text": "a", "score": 1e999}'], [":1:", "finite"]),
        ([{"text": "a", "score": "1"}], [":1:", "finite"]),
        ([{"text": "a", "score": 10**400}], [":1:", "finite"]),
        ([{"text": "a", "score": -1e38}], [":1:", "1e+37"]),
        ([{"text": "a", "fragments": {"x": 1}}], [":1:", '"fragments" must be']),
        ([fragment_of("")], [":1:", '"category" is empty']),
        ([fragment_of("\ud800")], [":1:", '"category" holds half']),
        ([GOOD] * 40, ["hold out a tenth"]),
        ([{"text": str(i), "label": "x"} for i in range(60)], ["all lines", "'x'"]),
        ([{"text": str(i), "score": 0.5} for i in range(60)], ["all equal"]),
        ([{"text": str(i), "score": 0.1} for i in range(60)], ["all equal"]),  # a sum is rounded
        ([{"text": str(i), "score": i * 1e-60} for i in range(60)], ["or nearly"]),
        ([{"text": str(i), "labels": []} for i in range(60)], ["no line for training has a class"]),
        ([{"text": str(i), "fragments": []} for i in range(60)], ["has a fragment"]),
    ],
)
def test_bad_data_is_refused(encoder, tmp_path, lines, words):
    path = tmp_path / "train.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts))
    out = tmp_path / "out"
    result = program("finetune", str(path), "--encoder", encoder, "--out", str(out))
    assert_refused(result, str(path), *words)
    assert not out.exists()


def test_validation_that_does_not_fit_is_refused(encoder, tmp_path):
    train = tmp_path / "train.jsonl"
    lines = [{"text": str(i), "label": i % 2} for i in range(20)]
    train.write_text("\n".join(map(json.dumps, lines)))
    other = tmp_path / "validation.jsonl"
    words = ["finetune", str(train), "--encoder", encoder, "--validation", str(other)]
    words += ["--out", str(tmp_path / "out")]
    assert_refused(program(*words), "validation.jsonl")  # missing
    other.write_text('{"text": "a", "label": 2}')
    assert_refused(program(*words), "class '2'", "no line for training")
    other.write_text('{"text": "a", "score": 2}')
    assert_refused(program(*words), "lines of", "score")
    other.write_text('{"text": "a", "fragments": []}\n{"text": "a", "label": 1}')
    assert_refused(program(*words), "validation.jsonl:2")


def test_bad_arguments_are_refused(encoder, data, tmp_path):
    path = f"{data}/label.jsonl"
    out = ["--out", str(tmp_path / "out")]
    assert_refused(program("finetune", path, "--encoder", "/nowhere", *out), "/nowhere")
    assert_refused(program("finetune", "/nowhere.jsonl", "--encoder", encoder, *out), "/nowhere")
    flags = ["--encoder", encoder, *out, "--temperature"]
    assert_refused(program("finetune", path, *flags, "0"), "temperature")
    assert_refused(program("finetune", path, *flags, "nan"), "temperature")
    assert_refused(program("finetune", "predict", encoder, path), "holds BertForPreTraining")
    assert_refused(program("finetune", "predict", str(tmp_path), path), "config.json")
    (tmp_path / "config.json").write_text('{"architectures": 5}')
    assert_refused(program("finetune", "predict", str(tmp_path), path), "holds nothing")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
keys = ["text", "text_a", "text_b", "query", "code", "label", "labels", "score", "fragments"]


@given(st.lists(st.dictionaries(st.sampled_from(keys), json_values, max_size=4), max_size=3))
@example([{"text": "a", "fragments": [{"category": "A", "position": [0, 1]}]}])
def test_any_file_is_read_or_refused(tmp_path, lines):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    try:
        data = records.read_records(path, Counter())
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert len(data.records) == len(lines)
        assert all(all(text.strip() for text in record.texts) for record in data.records)


def test_texts_alike_are_held_out_together():
    many = [records.Record((str(i % 200),), str(i % 2)) for i in range(1000)]
    training, validation = records.hold_out(many, "a.jsonl", Counter())
    assert {r.texts for r in training}.isdisjoint({r.texts for r in validation})
    assert 20 < len(validation) < 250
    assert records.hold_out(many[::-1], "a.jsonl", Counter())[1] == validation[::-1]


def test_what_is_held_out_can_be_known_and_is_not_trained_on():
    classes = [records.Record((f"text {i}",), f"class {i % 90}") for i in range(100)]
    training, validation = records.hold_out(classes, "a.jsonl", Counter())
    assert {r.target for r in validation} <= {r.target for r in training}
    assert validation and len(training) + len(validation) == 100

    pairs = [records.Record((f"query {i}", f"code {i % 50}"), None) for i in range(200)]
    skipped = Counter()
    training, validation = records.hold_out(pairs, "a.jsonl", skipped)
    assert {r.texts[1] for r in training}.isdisjoint({r.texts[1] for r in validation})
    assert skipped.total() == 200 - len(training) - len(validation) > 0
    assert validation


def test_an_encoder_that_was_fine_tuned_before(trained, data, tmp_path):
    """Its classifier is of no use for other classes, and dropped; for the same ones it is kept."""
    out, _ = trained["label"]  # three classes
    config = config_of(out, data, "pair", tmp_path / "pair", steps=2, eval_every=2)
    loop.train(config)  # two classes
    model = StarEncoderForSequenceClassification.from_pretrained(config.out)
    assert model.config.label_names == ["both low", "not"]
    before = StarEncoderForSequenceClassification.from_pretrained(out)
    names = before.config.id2label
    kept = StarEncoderForSequenceClassification.from_pretrained(out, id2label=names)
    assert torch.equal(kept.classifier.weight, before.classifier.weight)
    other = StarEncoderForSequenceClassification.from_pretrained(out, id2label={0: "a", 1: "b"})
    assert other.classifier.weight.shape == (2, 32)
