"""How fast source code becomes vectors, beside sentence-transformers and transformers.

All have the same weights and read the same texts, none longer than the model's positions: the peers
would truncate a longer text, which is read in windows here. So texts are cut beforehand, and each
piece is a text of its own. The peers pad: sentence-transformers to the longest of 32 texts that it
has sorted by length, transformers to the longest of 32 as they come, or sorted as well.

Each computes in the dtype that a user gets without asking, and in the other one. Here the default
is bf16 by autocast, on a CPU that is fast at it; the peers' default is fp32.
"""

import tempfile
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from bench.measure import medians, python_files, report
from corpus.tokenizer import Tokenizer
from finetune.export import framed, write_modules
from finetune.functions import functions_of
from starencoder import StarEncoder, StarEncoderConfig, embed

BATCH_SIZE = 32  # texts that the peers pad to one length; sentence-transformers' default
SAMPLE = 300_000  # bytes of a workload that is embedded several times
LARGE_TEXTS = 32  # for the model of the original's shape, which is far slower
# How the names begin of those contenders that embed everything, and with the large model.
LONG_RACE = ("starencoder", "sentence-transformers")


class Workload(NamedTuple):
    """Texts to embed."""

    name: str
    texts: list  # str, each of which fits the model
    tokens: int  # of all texts, without <cls> and <sep>

    @property
    def megabytes(self):
        """Of all texts, in UTF-8."""
        return sum(len(text.encode()) for text in self.texts) / 1e6


def bench_embed(path=None, run="runs/tiny", size=10_000_000, sample=SAMPLE, repetitions=5):
    """Embeds samples of functions and of files several times in turns, then `size` bytes once.

    Last come a few functions and random weights in the original's shape: long texts, much padding.
    run: a run directory. Prints the figures and writes them to `path`, see `report`.
    """
    tokenizer = Tokenizer.from_pretrained(run)
    model = StarEncoder.from_pretrained(run)
    files, _ = python_files(2 * size)  # functions are half of it
    sources = [read(file) for file in files]
    functions = [f.text for file, text in zip(files, sources) for f in functions_of(file, text)]
    positions = model.config.max_position_embeddings

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        contenders = contenders_of(model, tokenizer, directory)
        for name, texts in {"functions": functions, "files": sources}.items():
            workload = workload_of(name, texts, tokenizer, positions, sample)
            rows += raced(workload, contenders, repetitions)
        workload = workload_of("functions, all", functions, tokenizer, positions, size)
        rows += raced(workload, long_race(contenders), 1)
    rows += raced_large(functions, tokenizer)

    facts = dict(run=run, batch_size=BATCH_SIZE, repetitions=repetitions)
    report(path, "embed", rows, threads=torch.get_num_threads(), **facts)


def raced_large(functions, tokenizer):
    """The rows of a few functions and random weights in the original's shape, but for its words."""
    torch.manual_seed(0)
    config = StarEncoderConfig(
        vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id, initializer_range=0.04
    )
    model = StarEncoder(config).eval()
    texts = functions[:: max(1, len(functions) // LARGE_TEXTS)][:LARGE_TEXTS]
    positions = config.max_position_embeddings
    name = "functions, 12 layers"
    workload = workload_of(name, texts, tokenizer, positions, 10**9)
    with tempfile.TemporaryDirectory() as directory:
        contenders = contenders_of(model, tokenizer, directory)
        return raced(workload, long_race(contenders), 1)


# ---- what is embedded ----------------------------------------------------------------------------


def read(file):
    """The text of a file."""
    with open(file, encoding="utf-8", errors="replace") as f:
        return f.read()


def workload_of(name, texts, tokenizer, positions, size):
    """`size` bytes of the texts, evenly spread, in pieces that fit the model."""
    room = positions - 2  # beside <cls> and <sep>
    whole = sum(len(text) for text in texts)
    pieces = []
    total = 0
    for text in texts[:: max(1, whole // size)]:
        ids = tokenizer.encode(text)
        for start in range(0, len(ids), room):
            piece = tokenizer.decode(ids[start : start + room])
            again = len(tokenizer.encode(piece))  # cut, a text may have other tokens
            if again <= room and size > 0:
                pieces.append(piece)
                total += again
                size -= len(piece.encode())
    return Workload(name, pieces, total)


# ---- who embeds ----------------------------------------------------------------------------------


def contenders_of(model, tokenizer, directory):
    """{name: function that takes texts and returns their unit vectors, (texts, H)}."""
    model.save_pretrained(directory)
    framed(tokenizer, model.config.max_position_embeddings).save_pretrained(directory)
    write_modules(directory, model.config)
    bert = transformers.BertModel.from_pretrained(directory).eval()
    fast = transformers.AutoTokenizer.from_pretrained(directory)

    def here(texts):
        return embed(model, tokenizer, texts)

    def here_in_fp32(texts):
        return embed(model, tokenizer, texts, dtype="float32")

    def padded(texts):
        return embed_padded(bert, fast, texts)

    def padded_sorted(texts):
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = embed_padded(bert, fast, [texts[i] for i in order])
        return vectors[torch.tensor(order).argsort()]

    contenders = {"starencoder": here, "starencoder, fp32": here_in_fp32}
    peer = sentence_transformer(directory)
    if peer is not None:

        def encode(texts):
            return peer.encode(texts, batch_size=BATCH_SIZE, convert_to_tensor=True).float()

        contenders["sentence-transformers"] = encode
        contenders["sentence-transformers, bf16"] = in_bfloat16(encode)
    contenders["transformers"] = padded
    contenders["transformers, sorted"] = padded_sorted
    contenders["transformers, sorted, bf16"] = in_bfloat16(padded_sorted)
    return contenders


def long_race(contenders):
    """Those contenders that take part in what takes minutes."""
    names = [name for name in contenders if name.startswith(LONG_RACE)]
    return {name: contenders[name] for name in names}


def in_bfloat16(work):
    """`work` in autocast to bf16. The peers' weights in bf16 would save little and cost digits."""

    def call(texts):
        with torch.autocast("cpu", torch.bfloat16):
            return work(texts)

    return call


def sentence_transformer(directory):
    """A SentenceTransformer with mean pooling, or None, which one line says."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        print("sentence-transformers: not installed; pip install sentence-transformers")
        return None
    return SentenceTransformer(directory, device="cpu")


@torch.inference_mode()
def embed_padded(bert, tokenizer, texts):
    """Mean pooling over padded batches, as the model cards of such encoders show it."""
    vectors = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = texts[start : start + BATCH_SIZE]
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
        h = bert(**inputs).last_hidden_state.float()  # (texts, L, H)
        mask = inputs["attention_mask"][..., None]  # (texts, L, 1)
        vectors.append(F.normalize((h * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(vectors)


# ---- the race ------------------------------------------------------------------------------------


def raced(workload, contenders, repetitions):
    """A row for each contender: its speed, and how far its vectors are from fp32's here.

    One pass if repetitions is 1; else medians, after a pass that warms up and gives the vectors.
    """
    speeds = {}
    vectors = {}
    for name, work in tqdm(contenders.items(), desc=workload.name, unit="contender"):
        begin = time.perf_counter()
        vectors[name] = work(workload.texts)
        speeds[name] = workload.megabytes / (time.perf_counter() - begin)

    if repetitions > 1:

        def counted(work):
            def call():
                work(workload.texts)
                return workload.megabytes

            return call

        turns = {name: counted(work) for name, work in contenders.items()}
        speeds = medians(turns, repetitions)

    base = speeds.get("sentence-transformers", speeds["starencoder, fp32"])
    rows = []
    for name, speed in speeds.items():
        cosines = (vectors[name] * vectors["starencoder, fp32"]).double().sum(-1)  # (texts,)
        row = {"texts": workload.name, "MB": f"{workload.megabytes:.2f}", "by": name}
        row["MB/s"] = f"{speed:.3f}"
        row["tokens/s"] = f"{speed / workload.megabytes * workload.tokens:,.0f}"
        row["ratio"] = f"{speed / base:.2f}"
        row["1 - cosine"] = f"{max(0.0, float((1 - cosines).max())):.1e}"
        rows.append(row)
    return rows
