"""The benchmarks run, at a size that takes seconds, and say what they must; speeds themselves are never asserted."""

import json

import torch
from conftest import assert_refused, program

from bench import kernel_speed, model_speed
from starencoder import StarEncoderConfig


def test_model_bench_compares_the_same_tokens(small_corpus, tmp_path):
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = StarEncoderConfig(
        vocab_size=600, max_position_embeddings=48, pad_token_id=596, **shape
    )
    model_speed.bench_model(
        str(tmp_path / "model.json"), config, sizes=(2, 3), directory=small_corpus, repetitions=2
    )
    result = json.loads((tmp_path / "model.json").read_text())
    rows = result["rows"]
    assert {row["by"] for row in rows} >= {
        "transformers BertForPreTraining, sdpa",
        "StarEncoder",
        "ModernBERT-base, sdpa",
    }
    assert (
        len({row["lengths"] for row in rows}) == 2
        and result["versions"]["torch"]
        and result["commit"]
    )
    assert all(float(row["tokens/s"].replace(",", "")) > 0 for row in rows)
    model_speed.bench_model(
        str(tmp_path / "ablation.json"),
        config,
        sizes=(2, 3),
        directory=small_corpus,
        repetitions=2,
        ablate=True,
    )
    assert len(json.loads((tmp_path / "ablation.json").read_text())["rows"]) == 8


def test_profile_splits_the_whole_step(tmp_path, monkeypatch):
    # The large products of bf16 that it measures take minutes on a CPU without instructions for them.
    monkeypatch.setattr(
        kernel_speed, "measure_ceilings", lambda device: {"matmul": 1e11, "copy": 1e10}
    )
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
    model_speed.bench_profile(
        str(tmp_path / "profile.json"),
        StarEncoderConfig(vocab_size=600, max_position_embeddings=256, pad_token_id=596, **shape),
        1,
        repetitions=2,
    )
    *parts, whole = json.loads((tmp_path / "profile.json").read_text())["rows"]
    milliseconds = {row["part"]: float(row["ms"].replace(",", "")) for row in parts}
    assert (
        milliseconds.keys() == {*model_speed.PARTS, "gaps"} and whole["part"] == "step, by itself"
    )
    assert all(milliseconds[part] > 0 for part in model_speed.PARTS)


def test_original_lengths_are_quantiles(small_corpus):
    lengths = model_speed.original_lengths(small_corpus, 48, 8)
    assert lengths == sorted(lengths) and len(lengths) == 8 and 1 <= lengths[0] <= lengths[-1] <= 48


def test_refusals():
    if not torch.cuda.is_available():
        assert_refused(program("bench", "kernels", "--tune"), "needs a CUDA device")
    assert_refused(program("bench", "speed"), "invalid choice")
    assert_refused(program("bench", "model", "--tune"), "takes --ablate or --profile")
