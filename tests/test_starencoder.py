"""The model against transformers' Bert*: outputs, gradients, files both ways, and refusals."""

import json
import os
import shutil
from typing import NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import assert_refused, program
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from bench.embed_speed import contenders_of
from starencoder import (
    StarEncoder,
    StarEncoderConfig,
    StarEncoderForPreTraining,
    StarEncoderForSequenceClassification,
    StarEncoderForTokenClassification,
    Window,
    bert_names,
    cross_entropy,
    dropout_seeds,
    embed,
    fill_mask,
    micro_batches,
)

SMALL = dict(
    vocab_size=211,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=64,
)
PAIRS = {
    StarEncoder: transformers.BertModel,
    StarEncoderForPreTraining: transformers.BertForPreTraining,
    StarEncoderForTokenClassification: transformers.BertForTokenClassification,
    StarEncoderForSequenceClassification: transformers.BertForSequenceClassification,
}


def small_config(**overrides):
    return StarEncoderConfig(**(SMALL | dict(pad_token_id=0, initializer_range=0.2) | overrides))


def bert_config(**overrides):
    return transformers.BertConfig(
        **(SMALL | dict(initializer_range=0.2, attn_implementation="eager") | overrides)
    )


def packed(lengths, vocab, generator):
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return torch.randint(vocab, (sum(lengths),), generator=generator), cu_seqlens


def padded(packed_values, lengths, fill):
    return torch.nn.utils.rnn.pad_sequence(
        packed_values.split(lengths), batch_first=True, padding_value=fill
    )


def unpad(values, lengths):
    return torch.cat([row[:n] for row, n in zip(values, lengths)])


def copy_weights(bert, ours):
    """Gives our model the weights of one of transformers."""
    theirs = bert.state_dict()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(torch.cat([theirs[n] for n in bert_names(name)]))


def compare_gradients(ours, bert, tolerance):
    """Every gradient of the one is the gradient of the other, relative to its norm."""
    theirs = {n: p.grad for n, p in bert.named_parameters()}
    compared = set()
    for name, parameter in ours.named_parameters():
        names = bert_names(name)
        for their_name, gradient in zip(names, parameter.grad.chunk(len(names))):
            # The bias of the keys shifts all scores of a query alike. Its true gradient is 0, so
            # it is measured by that of the queries.
            scale = theirs[their_name.replace("key.bias", "query.bias")].norm()
            assert (gradient - theirs[their_name]).norm() <= tolerance * scale, their_name
            compared.add(their_name)
    assert compared == set(theirs)


@pytest.mark.slow
def test_full_size_parity_with_bert_for_pretraining():
    """In fp32: logits within 1e-4, losses within 1e-5, every gradient within 1e-3."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1024, 1, 333]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=49156,
        max_position_embeddings=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = transformers.BertForPreTraining(config)
    ours = StarEncoderForPreTraining(
        StarEncoderConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    assert (
        sum(p.numel() for p in ours.parameters())
        == sum(p.numel() for p in bert.parameters())
        == 124_829_190
    )
    copy_weights(bert, ours)
    ids, cu_seqlens = packed(lengths, 49156, generator)
    attention_mask = padded(torch.ones_like(ids), lengths, 0)
    labels = torch.where(torch.rand(len(ids), generator=generator) < 0.15, ids, -100)
    pairs = torch.randint(2, (len(lengths),), generator=generator)

    expected = bert(
        padded(ids, lengths, 0),
        attention_mask,
        labels=padded(labels, lengths, -100),
        next_sentence_label=pairs,
    )
    with torch.no_grad():
        out = ours(ids, cu_seqlens)
        assert (out.mlm_logits - unpad(expected.prediction_logits, lengths)).abs().max() < 1e-4
        assert (out.nsp_logits - expected.seq_relationship_logits).abs().max() < 1e-4
    positions = (labels != -100).nonzero().squeeze(1)
    out = ours(ids, cu_seqlens, labels[positions], pairs, positions)
    assert abs(out.loss - expected.loss) < 1e-5
    assert abs(out.mlm_loss + out.nsp_loss - out.loss) < 1e-6
    expected.loss.backward()
    out.loss.backward()
    compare_gradients(ours, bert, 1e-3)


@pytest.mark.slow
def test_full_size_parity_with_bert_for_token_classification():
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 1024, 77]
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=49156,
        max_position_embeddings=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=13,
    )
    bert = transformers.BertForTokenClassification(config)
    ours = StarEncoderForTokenClassification(
        StarEncoderConfig(
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label={i: str(i) for i in range(13)},
        )
    )
    copy_weights(bert, ours)
    ids, cu_seqlens = packed(lengths, 49156, generator)
    labels = torch.where(
        torch.rand(len(ids), generator=generator) < 0.9,
        torch.randint(13, (len(ids),), generator=generator),
        -100,
    )
    attention_mask = padded(torch.ones_like(ids), lengths, 0)
    expected = bert(padded(ids, lengths, 0), attention_mask, labels=padded(labels, lengths, -100))
    out = ours(ids, cu_seqlens, labels)
    assert (out.logits - unpad(expected.logits, lengths)).abs().max() < 1e-4
    assert abs(out.loss - expected.loss) < 1e-5
    expected.loss.backward()
    out.loss.backward()
    compare_gradients(ours, bert, 1e-3)


NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def named(classes):
    return {i: f"class {i}" for i in range(classes)}


def sequence_classifiers(classes, problem_type):
    """Our model and that of transformers, with the same weights and no dropout."""
    entries = dict(NO_DROPOUT, problem_type=problem_type, id2label=named(classes))
    torch.manual_seed(2)
    bert = transformers.BertForSequenceClassification(bert_config(**entries))
    ours = StarEncoderForSequenceClassification(small_config(**entries))
    copy_weights(bert, ours)
    return ours, bert


@pytest.mark.parametrize(
    "problem_type, classes, labels",
    [
        ("regression", 1, [0.5, -1.25, 3.0]),
        ("regression", 1, [[0.5], [-1.25], [3.0]]),
        ("regression", 3, [[0.5, -1.0, 2.0], [0.0, 1.5, -3.0], [1.0, 1.0, 0.25]]),
        ("single_label_classification", 3, [2, 0, 1]),
        ("single_label_classification", 3, [2, -100, 1]),
        ("multi_label_classification", 3, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.25, 1.0, 0.0]]),
        ("multi_label_classification", 1, [[1.0], [0.0], [0.5]]),
        (None, 1, [0.5, -1.25, 3.0]),
        (None, 3, [2, 0, 1]),
        (None, 3, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.25, 1.0, 0.0]]),
    ],
)
def test_parity_with_bert_for_sequence_classification(problem_type, classes, labels):
    """In fp32: logits within 1e-4, the loss within 1e-5 of it, every gradient within 1e-3."""
    ours, bert = sequence_classifiers(classes, problem_type)
    lengths = [64, 1, 33]
    labels = torch.tensor(labels)
    ids, cu_seqlens = packed(lengths, 211, torch.Generator().manual_seed(2))
    attention_mask = padded(torch.ones_like(ids), lengths, 0)
    expected = bert(padded(ids, lengths, 0), attention_mask, labels=labels)
    out = ours(ids, cu_seqlens, labels)

    assert out.logits.shape == (3, classes)
    assert (out.logits - expected.logits).abs().max() < 1e-4
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    expected.loss.backward()
    out.loss.backward()
    compare_gradients(ours, bert, 1e-3)
    assert ours.config.problem_type == problem_type  # the decision is for these labels alone
    assert ours(ids, cu_seqlens).loss is None


def test_sequences_without_any_label_have_a_loss_of_0():
    ours, _ = sequence_classifiers(3, None)
    ids, cu_seqlens = packed([5, 9], 211, torch.Generator())
    loss = ours(ids, cu_seqlens, torch.tensor([-100, -100])).loss
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in ours.parameters())

    # Nor does an empty batch divide by 0.
    ids = ids[:0]
    cu_seqlens = cu_seqlens[:1]
    for labels in (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3)):
        assert ours(ids, cu_seqlens, labels).loss == 0


@pytest.mark.parametrize(
    "problem_type, classes, labels, words",
    [
        ("regression", 1, torch.zeros(2, dtype=torch.int64), "needs floating-point labels"),
        ("regression", 1, torch.zeros(3), r"of shape \(2,\), got torch.float32 of shape \(3,\)"),
        ("regression", 1, torch.zeros(1, 2), r"of shape \(2, 1\), got .* \(1, 2\)"),
        ("regression", 1, torch.zeros(()), r"of shape \(2, 1\), got .* \(\)"),
        ("regression", 2, torch.zeros(2), r"of shape \(2, 2\), got .* \(2,\)"),
        ("single_label_classification", 3, torch.zeros(2), "needs int64 labels"),
        ("single_label_classification", 3, torch.zeros(2, dtype=torch.int32), "needs int64"),
        ("single_label_classification", 3, torch.zeros(2, 3), r"of shape \(2,\)"),
        ("single_label_classification", 3, torch.zeros(1, dtype=torch.int64), r"\(2,\), got"),
        ("multi_label_classification", 3, torch.zeros(2, 3, dtype=torch.int64), "floating-point"),
        ("multi_label_classification", 3, torch.zeros(2, 3, dtype=torch.bool), "floating-point"),
        ("multi_label_classification", 3, torch.zeros(2), r"of shape \(2, 3\), got"),
        ("multi_label_classification", 3, torch.zeros(1, 3), r"of shape \(2, 3\), got"),
        (None, 1, torch.zeros(2, dtype=torch.int64), "regression needs floating-point"),
        (None, 3, torch.zeros(2, 3, dtype=torch.int64), "single_label_classification needs int64"),
        (None, 3, torch.zeros(2, dtype=torch.int32), "single_label_classification needs int64"),
        (None, 3, torch.zeros(2), "multi_label_classification needs floating-point"),
        (None, 3, torch.zeros(2, 3, dtype=torch.bool), "multi_label_classification needs"),
    ],
)
def test_labels_that_do_not_fit_the_problem_type_are_refused(problem_type, classes, labels, words):
    ours, _ = sequence_classifiers(classes, problem_type)
    with pytest.raises(ValueError, match=words) as refused:
        ours(*packed([5, 9], 211, torch.Generator()), labels)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_compiled_sequence_classification_is_eager():
    """Logits and loss, with dropout; a batch of another size as well."""
    model = StarEncoderForSequenceClassification(small_config(id2label=named(3)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for lengths in ([5, 9], [7, 1, 20]):
        ids, cu_seqlens = packed(lengths, 211, torch.Generator().manual_seed(0))
        count = len(lengths)
        for labels in (torch.arange(count) % 3, torch.rand(count, 3)):
            expected = model(ids, cu_seqlens, labels, seed=torch.tensor(4))
            out = compiled(ids, cu_seqlens, labels, seed=torch.tensor(4))
            torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_parity_on_any_lengths(lengths, seed):
    """In fp64, so that only a wrong formula can make a difference."""
    torch.manual_seed(seed)
    bert = transformers.BertForPreTraining(bert_config()).double().eval()
    ours = StarEncoderForPreTraining(small_config()).double().eval()
    copy_weights(bert, ours)
    ids, cu_seqlens = packed(lengths, 211, torch.Generator().manual_seed(seed))
    expected = bert(padded(ids, lengths, 0), padded(torch.ones_like(ids), lengths, 0))
    out = ours(ids, cu_seqlens)
    torch.testing.assert_close(
        out.mlm_logits, unpad(expected.prediction_logits, lengths), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        out.nsp_logits, expected.seq_relationship_logits, rtol=1e-9, atol=1e-9
    )
    one_by_one = [
        ours(part, torch.tensor([0, len(part)], dtype=torch.int32)).mlm_logits
        for part in ids.split(lengths)
    ]
    torch.testing.assert_close(out.mlm_logits, torch.cat(one_by_one), rtol=1e-9, atol=1e-9)


def random_bert(bert_class, **overrides):
    """No parameter at its initial 0 or 1, so that none can be forgotten."""
    bert = bert_class(bert_config(**overrides)).eval()
    for p in bert.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return bert


def compare_logits(ours, bert):
    ids, cu_seqlens = packed([20, 7], ours.config.vocab_size, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = bert(padded(ids, [20, 7], 0), padded(torch.ones_like(ids), [20, 7], 0))[0]
        torch.testing.assert_close(
            ours(ids, cu_seqlens).mlm_logits, unpad(expected, [20, 7]), rtol=1e-4, atol=1e-4
        )


def written_back(weights):
    """The weights as they come back from here: of two biases of the decoder, the one it adds."""
    bias = weights.get("cls.predictions.decoder.bias")
    return weights if bias is None else weights | {"cls.predictions.bias": bias}


@pytest.mark.parametrize("tied", [True, False])
def test_masked_lm_files_load(tied, tmp_path, capsys):
    """BertForMaskedLM has neither pooler nor next-sentence head: they are new, and that is said."""
    bert = random_bert(transformers.BertForMaskedLM, tie_word_embeddings=tied)
    bert.save_pretrained(tmp_path / "theirs")
    ours = StarEncoderForPreTraining.from_pretrained(str(tmp_path / "theirs"))
    assert (
        "new weights for bert.pooler.weight, bert.pooler.bias, nsp.weight, nsp.bias (not in"
        in capsys.readouterr().err
    )
    compare_logits(ours, bert)
    ours.save_pretrained(str(tmp_path / "ours"))
    back, info = transformers.BertForMaskedLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    expected = written_back(bert.state_dict())
    for (name, a), b in zip(expected.items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    encoder = StarEncoder.from_pretrained(str(tmp_path / "theirs"))
    assert torch.equal(encoder.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("decoder", ["absent", "equal", "different"])
@pytest.mark.parametrize("biases", ["one", "the decoder's", "equal", "different"])
def test_the_decoder_and_its_bias_are_read_and_written_as_transformers_does(
    tied, decoder, biases, tmp_path
):
    """Every way to store a decoder and its bias.

    The same files give the logits of transformers, and every tensor that it computes with is
    written back. Of two biases that is the decoder's.
    """
    weights = random_bert(transformers.BertForPreTraining, tie_word_embeddings=False).state_dict()
    words = "bert.embeddings.word_embeddings.weight"
    bias = "cls.predictions.bias"
    decoder_bias = "cls.predictions.decoder.bias"
    if decoder == "equal":
        weights["cls.predictions.decoder.weight"] = weights[words].clone()
    if decoder == "absent":
        del weights["cls.predictions.decoder.weight"]
    if biases == "equal":
        weights[bias] = weights[decoder_bias].clone()
    if biases in ("one", "the decoder's"):
        del weights[decoder_bias if biases == "one" else bias]
    directory = tmp_path / "theirs"
    bert_config(tie_word_embeddings=tied, architectures=["BertForPreTraining"]).save_pretrained(
        directory
    )
    save_file(weights, directory / "model.safetensors", {"format": "pt"})

    if not tied and decoder == "absent":
        with pytest.raises(ValueError, match="the weights lack cls.predictions.decoder.weight"):
            StarEncoderForPreTraining.from_pretrained(str(directory))
        return
    ours = StarEncoderForPreTraining.from_pretrained(str(directory))
    ours.save_pretrained(str(tmp_path / "ours"))
    back, info = transformers.BertForPreTraining.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, value in written_back(weights).items():
        assert torch.equal(back.state_dict()[name], value), name
    compare_logits(ours, back)
    bert = transformers.BertForPreTraining.from_pretrained(directory).eval()
    if not tied and biases == "one":  # what transformers 4 wrote; 5 would read the decoder's as 0
        bert.cls.predictions.decoder.bias = bert.cls.predictions.bias
    compare_logits(ours, bert)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_shards_load_and_hostile_indexes_are_refused(kind, tmp_path):
    bert = random_bert(transformers.BertForPreTraining)
    directory = tmp_path / "sharded"
    bert.save_pretrained(directory, max_shard_size="50KB")
    index = directory / f"{kind}.index.json"
    entries = json.loads((directory / "model.safetensors.index.json").read_text())
    if kind == "pytorch_model.bin":
        for shard in directory.glob("*.safetensors"):
            torch.save(load_file(shard), directory / f"pytorch_{shard.stem}.bin")
            shard.unlink()
        (directory / "model.safetensors.index.json").unlink()
        entries["weight_map"] = {
            n: f"pytorch_{os.path.splitext(s)[0]}.bin" for n, s in entries["weight_map"].items()
        }
        index.write_text(json.dumps(entries))
    assert len(set(entries["weight_map"].values())) > 3
    ours = StarEncoderForPreTraining.from_pretrained(str(directory))
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, torch.cat([bert.state_dict()[n] for n in bert_names(name)]))

    shards = entries["weight_map"]
    word = "bert.embeddings.word_embeddings.weight"
    elsewhere = shutil.copy(directory / shards[word], tmp_path / shards[word])
    for content, words in [
        ("{", "cannot be read .Expecting"),
        ("[]", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("[" * 100_000, "cannot be read"),
        (shards | {word: f"../{shards[word]}"}, "not a file name in this directory"),
        (shards | {word: str(elsewhere)}, "not a file name in this directory"),
        (shards | {word: ".."}, "not a file name in this directory"),
        (shards | {word: "a\0b"}, "not a file name in this directory"),
        (shards | {word: 7}, "cannot be read"),
        (shards | {word: "gone.safetensors"}, "cannot be read .*gone.safetensors"),
        (shards | {"bert.more": shards[word]}, "lacks bert.more, which the index says it holds"),
        ({n: s for n, s in shards.items() if n != word}, "lack embeddings.word_embeddings.weight"),
    ]:
        index.write_text(
            content if isinstance(content, str) else json.dumps({"weight_map": content})
        )
        with pytest.raises(ValueError, match=words) as refused:
            StarEncoderForPreTraining.from_pretrained(str(directory))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ours_class", PAIRS)
@pytest.mark.parametrize(
    "overrides", [{}, {"tie_word_embeddings": False}, {"type_vocab_size": 1, "vocab_size": 97}]
)
def test_files_go_both_ways_bit_for_bit(ours_class, overrides, tmp_path):
    """transformers -> here -> transformers -> here: the same bits, and the outputs agree.

    An untied BertForPreTraining has a second bias that it does not compute with, and that is lost.
    """
    bert_class = PAIRS[ours_class]
    torch.manual_seed(0)
    bert = random_bert(bert_class, **overrides)
    bert.save_pretrained(tmp_path / "theirs")
    ours = ours_class.from_pretrained(str(tmp_path / "theirs")).eval()
    ours.save_pretrained(str(tmp_path / "ours"))
    back, info = bert_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = written_back(bert.state_dict())
    for (name, a), b in zip(expected.items(), back.eval().state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    back.save_pretrained(tmp_path / "again")
    again = ours_class.from_pretrained(str(tmp_path / "again"))
    for (name, a), b in zip(ours.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    ids, cu_seqlens = packed([20, 7], ours.config.vocab_size, torch.Generator().manual_seed(0))
    theirs = bert(padded(ids, [20, 7], 0), padded(torch.ones_like(ids), [20, 7], 0))[0]
    out = ours(ids, cu_seqlens)
    if ours_class is StarEncoderForPreTraining:
        out = out.mlm_logits
    elif ours_class is not StarEncoder:
        out = out.logits
    if ours_class is not StarEncoderForSequenceClassification:
        theirs = unpad(theirs, [20, 7])
    torch.testing.assert_close(out, theirs, rtol=1e-4, atol=1e-4)


def test_old_hub_files_load(tmp_path):
    """pytorch_model.bin as transformers 4 wrote it, also for bigcode/starencoder.

    It holds the tied table under both names, and a buffer of position ids.
    """
    torch.manual_seed(0)
    bert = transformers.BertForPreTraining(bert_config())
    weights = bert.state_dict() | {"bert.embeddings.position_ids": torch.arange(64)[None]}
    weights = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma"): w for n, w in weights.items()
    }  # older still
    bert.config.save_pretrained(tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    ours = StarEncoderForPreTraining.from_pretrained(str(tmp_path))
    assert ours.mlm_decoder.weight is ours.bert.word_embeddings.weight
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, torch.cat([bert.state_dict()[n] for n in bert_names(name)]))


def test_pickles_that_run_code_are_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    bert_config().save_pretrained(tmp_path)
    torch.save({"weights": Harm()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        StarEncoder.from_pretrained(str(tmp_path))
    assert not (tmp_path / "harm").exists()


def test_decoder_that_differs_is_not_tied(tmp_path):
    """Whatever the config says, as in transformers."""
    bert = transformers.BertForPreTraining(bert_config(tie_word_embeddings=False))
    bert.config.tie_word_embeddings = True
    bert.save_pretrained(tmp_path)
    ours = StarEncoderForPreTraining.from_pretrained(str(tmp_path))
    assert torch.equal(ours.mlm_decoder.weight, bert.cls.predictions.decoder.weight)
    assert torch.equal(
        ours.bert.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight
    )


def test_a_new_head_on_a_pretrained_encoder(tmp_path, capsys):
    """What fine-tuning starts from; the new weights are said aloud, and all classes get a name."""
    pretrained = StarEncoderForPreTraining(small_config())
    pretrained.save_pretrained(str(tmp_path / "run"))
    labels = {0: "O", 1: "B-EMAIL", 2: "I-EMAIL"}
    model = StarEncoderForTokenClassification.from_pretrained(
        str(tmp_path / "run"), id2label=labels
    )
    assert "new weights for classifier.weight, classifier.bias" in capsys.readouterr().err
    assert torch.equal(model.bert.layers[2].qkv.weight, pretrained.bert.layers[2].qkv.weight)
    assert model(
        torch.zeros(5, dtype=torch.int64), torch.tensor([0, 5], dtype=torch.int32)
    ).logits.shape == (5, 3)
    model.save_pretrained(str(tmp_path / "tuned"))
    bert = transformers.BertForTokenClassification.from_pretrained(tmp_path / "tuned")
    assert bert.config.id2label == labels and bert.config.label2id == {
        v: k for k, v in labels.items()
    }
    assert (
        StarEncoderForTokenClassification.from_pretrained(str(tmp_path / "tuned")).config.id2label
        == labels
    )
    # and back to a plain encoder, whose pooler such files lack
    assert torch.equal(
        StarEncoder.from_pretrained(str(tmp_path / "tuned")).layers[0].qkv.weight,
        pretrained.bert.layers[0].qkv.weight,
    )


def test_a_new_head_for_sequences_on_a_pretrained_encoder(tmp_path, capsys):
    """It keeps the pooler, and transformers reads its problem type and the names of its classes."""
    pretrained = StarEncoderForPreTraining(small_config())
    pretrained.save_pretrained(str(tmp_path / "run"))
    entries = dict(id2label=named(3), problem_type="multi_label_classification")
    model = StarEncoderForSequenceClassification.from_pretrained(str(tmp_path / "run"), **entries)
    assert (
        "new weights for classifier.weight, classifier.bias (not in the files)"
        in capsys.readouterr().err
    )
    assert torch.equal(model.bert.pooler.weight, pretrained.bert.pooler.weight)

    model.save_pretrained(str(tmp_path / "tuned"))
    bert = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert bert.config.architectures == ["BertForSequenceClassification"]
    assert bert.config.problem_type == "multi_label_classification"
    assert bert.config.id2label == named(3)
    assert bert.config.label2id == {"class 0": 0, "class 1": 1, "class 2": 2}
    again = StarEncoderForSequenceClassification.from_pretrained(str(tmp_path / "tuned"))
    assert again.config == model.config
    assert "new weights" not in capsys.readouterr().err


@pytest.mark.parametrize("problem_type", [None, "regression"])
def test_the_problem_type_of_transformers_files_is_read(problem_type, tmp_path):
    _, bert = sequence_classifiers(1, problem_type)
    bert.save_pretrained(tmp_path)
    config = StarEncoderForSequenceClassification.from_pretrained(str(tmp_path)).config
    assert config.problem_type == problem_type
    assert config.id2label == named(1)


def test_a_missing_pooler_is_new(tmp_path, capsys):
    """BertForMaskedLM has none, and transformers starts from a new one as well."""
    random_bert(transformers.BertForMaskedLM).save_pretrained(tmp_path)
    model = StarEncoderForSequenceClassification.from_pretrained(
        str(tmp_path), id2label=named(1), problem_type="regression"
    )
    new = "bert.pooler.weight, bert.pooler.bias, classifier.weight, classifier.bias"
    assert f"new weights for {new} (not in the files)" in capsys.readouterr().err
    assert model.bert.pooler.weight.std() > 0.1 and (model.bert.pooler.bias == 0).all()
    ids, cu_seqlens = packed([5, 9], 211, torch.Generator())
    model(ids, cu_seqlens, torch.zeros(2)).loss.backward()
    assert model.bert.pooler.weight.grad.norm() > 0


def test_a_name_is_fetched_from_the_hub(tmp_path, monkeypatch):
    def snapshot_download(name, allow_patterns):
        assert name == "bigcode/starencoder" and "config.json" in allow_patterns
        StarEncoderForPreTraining(small_config()).save_pretrained(str(tmp_path))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert StarEncoderForPreTraining.from_pretrained("bigcode/starencoder").config.vocab_size == 211


def test_labels_may_be_given_by_position_or_by_token():
    torch.manual_seed(0)
    model = StarEncoderForPreTraining(small_config()).eval()
    ids, cu_seqlens = packed([30, 12], 211, torch.Generator().manual_seed(0))
    positions = torch.tensor([3, 7, 31])
    labels = torch.full_like(ids, -100)
    labels[positions] = ids[positions]
    pairs = torch.tensor([1, 0])
    a = model(ids, cu_seqlens, labels, pairs)
    b = model(ids, cu_seqlens, ids[positions], pairs, positions)
    for x, y in zip(a[:3], b[:3]):
        torch.testing.assert_close(x, y)
    at_positions = model(ids, cu_seqlens, masked_positions=positions)
    everywhere = model(ids, cu_seqlens)
    torch.testing.assert_close(at_positions.mlm_logits, everywhere.mlm_logits[positions])
    assert model(ids, cu_seqlens, next_sentence_label=pairs).mlm_loss is None
    nothing = model(ids, cu_seqlens, torch.full_like(ids, -100), pairs)
    assert nothing.mlm_loss == 0 and nothing.loss == nothing.nsp_loss  # a batch may have no mask


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_the_fast_step_is_the_plain_one(lengths, share, seed):
    fast, plain = fast_and_plain(torch.float64, lengths, share, seed)
    assert abs(fast.loss - plain.loss) <= 1e-6 * plain.loss
    assert (fast.gradient - plain.gradient).norm() <= 1e-6 * plain.gradient.norm()


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_step_is_as_good_as_the_plain_one_in_bf16(seed):
    """On batches of some size: the rounding errors of a tiny gradient are not tiny."""
    batch = ([1, 2, 40, 17, 33, 40, 5, 28], 0.3, seed)
    fast, plain = fast_and_plain(torch.bfloat16, *batch)
    _, exact = fast_and_plain(torch.float64, *batch)
    eps = torch.finfo(torch.bfloat16).eps
    for step in (fast, plain):
        assert abs(step.loss - exact.loss) <= eps * exact.loss
    fast_error = (fast.gradient - exact.gradient).norm()
    plain_error = (plain.gradient - exact.gradient).norm()
    assert fast_error <= 1.25 * plain_error < 0.05 * exact.gradient.norm()


class Step(NamedTuple):
    loss: float
    gradient: torch.Tensor  # of all parameters, end to end


def fast_and_plain(dtype, lengths, share, seed):
    """A `Step` with all savings, and one that computes everything.

    The savings: last layer and head at the masked positions alone, and cross-entropy in place.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = StarEncoderForPreTraining(
        small_config(
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1
        )
    )
    model = model.to(torch.float64 if dtype is torch.float64 else torch.float32)
    ids, cu_seqlens = packed(lengths, model.config.vocab_size, generator)
    masked = (torch.rand(len(ids), generator=generator) <= share).nonzero().squeeze(1)
    labels = ids.flip(0)[masked]
    neighbours = torch.randint(2, (len(lengths),), generator=generator)
    steps = []
    for fast in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            if fast:
                loss = model(ids, cu_seqlens, labels, neighbours, masked).loss
            else:
                out = model(ids, cu_seqlens)
                terms = [(out.mlm_logits[masked], labels), (out.nsp_logits, neighbours)]
                wide = torch.promote_types(dtype, torch.float32)
                loss = sum(
                    F.cross_entropy(logits.to(wide), targets)
                    for logits, targets in terms
                    if len(targets)
                )
        loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        steps.append(Step(loss.item(), torch.cat([gradient.flatten() for gradient in gradients])))
    return steps


@given(
    rows=st.integers(0, 700),
    columns=st.integers(2, 40),
    seed=st.integers(0, 2**31),
    ignored=st.booleans(),
)
def test_cross_entropy_in_place_is_that_of_pytorch(rows, columns, seed, ignored):
    torch.manual_seed(seed)
    x = torch.randn(rows, columns).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(-1 if ignored else 0, columns, (rows,))
    labels[labels == -1] = -100
    loss = cross_entropy(x * 4, labels)
    expected = F.cross_entropy((x * 4).float(), labels) if (labels >= 0).any() else 0 * x.sum()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, x), torch.autograd.grad(3 * expected, x)):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-2, atol=1e-2 * float(theirs.abs().max() if rows else 0)
        )


@pytest.mark.parametrize("label", [-1, -7, 9])
def test_a_label_that_is_no_column_is_an_error(label):
    """In half precision as in F.cross_entropy."""
    logits = torch.randn(2, 9, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy(logits.clone(), torch.tensor([1, label]))


def test_classification_returns_its_logits_untouched():
    """In bf16, where a loss may overwrite them; the loss is fp32."""
    config = small_config(**NO_DROPOUT, id2label={0: "O", 1: "B", 2: "I"})
    ids, cu_seqlens = packed([5, 9], config.vocab_size, torch.Generator())
    for model, labels in [
        (StarEncoderForTokenClassification(config), ids % 3),
        (StarEncoderForSequenceClassification(config), torch.tensor([0, 2])),
        (StarEncoderForSequenceClassification(config), torch.rand(2, 3)),
    ]:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids, cu_seqlens, labels)
            assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
            assert torch.equal(out.logits, model(ids, cu_seqlens).logits)
    # Neither logits nor labels are rounded on the way to the last of these losses.
    expected = F.binary_cross_entropy_with_logits(out.logits.float(), labels)
    torch.testing.assert_close(out.loss, expected)


def test_logits_are_never_copied_whole():
    """No fp32 tensor as large as the logits is made, nor a second one of bf16 for the gradient."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(
                (t.numel(), t.dtype, t.untyped_storage().data_ptr())
                for t in tree_leaves(out)
                if isinstance(t, torch.Tensor)
            )
            return out

    hidden = torch.randn(1000, 8, dtype=torch.bfloat16)
    weight = torch.randn(300, 8, dtype=torch.bfloat16, requires_grad=True)
    with Watch():
        cross_entropy(hidden @ weight.T, torch.randint(300, (1000,))).backward()
    large = [(dtype, place) for size, dtype, place in made if size >= 300_000]
    assert {dtype for dtype, _ in large} == {torch.bfloat16}
    assert len({place for _, place in large}) == 1


def test_dropout_is_a_function_of_the_seed():
    model = StarEncoderForPreTraining(small_config())
    ids, cu_seqlens = packed([30, 12], 211, torch.Generator().manual_seed(0))
    once = model(ids, cu_seqlens, seed=5).mlm_logits
    assert torch.equal(once, model(ids, cu_seqlens, seed=torch.tensor(5)).mlm_logits)
    assert not torch.equal(once, model(ids, cu_seqlens, seed=6).mlm_logits)
    torch.manual_seed(1)
    drawn = model(ids, cu_seqlens).mlm_logits
    assert not torch.equal(drawn, model(ids, cu_seqlens).mlm_logits)
    torch.manual_seed(1)
    assert torch.equal(drawn, model(ids, cu_seqlens).mlm_logits)
    assert torch.equal(model.eval()(ids, cu_seqlens).mlm_logits, model(ids, cu_seqlens).mlm_logits)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            dict(hidden_size=50),
            "must be divisible by num_attention_heads, got 50 and 4",
        ),
        (dict(hidden_act="gelu_new"), "hidden_act"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be a positive integer, got 0"),
        (dict(hidden_size=768.0), "hidden_size must be a positive integer, got 768.0"),
        (dict(hidden_dropout_prob=1.0), "hidden_dropout_prob"),
        (dict(layer_norm_eps=None), r"layer_norm_eps must be a number in \[0, 1\), got None"),
        (dict(layer_norm_eps=float("nan")), "layer_norm_eps"),
        (dict(initializer_range="0.02"), "initializer_range"),
        (dict(classifier_dropout="a"), "classifier_dropout"),
        (dict(tie_word_embeddings="no"), "tie_word_embeddings must be true or false"),
        (dict(id2label={1: "a", 2: "b"}), "id2label must name the classes 0, 1"),
        (dict(id2label={0: None}), "id2label"),
        (dict(id2label=[]), "id2label"),
        (dict(problem_type="ranking"), "problem_type must be one of .*, got 'ranking'"),
        (dict(problem_type=["regression"]), "problem_type must be one of"),
        (
            dict(problem_type="single_label_classification", id2label={0: "a"}),
            "single_label_classification needs two classes or more",
        ),
    ],
)
def test_config_refuses(overrides, words):
    with pytest.raises(ValueError, match=words):
        small_config(**overrides)


def test_files_that_do_not_fit_are_refused(tmp_path):
    StarEncoderForPreTraining(small_config()).save_pretrained(str(tmp_path / "run"))

    def changed(**entries):
        directory = shutil.copytree(tmp_path / "run", tmp_path / "changed", dirs_exist_ok=True)
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | entries))
        return str(directory)

    for entries, words in [
        (dict(vocab_size=212), "is .211,.*its config.json asks for .212,"),
        (dict(num_hidden_layers=4), "lack encoder.layer.3"),
        (dict(num_hidden_layers=2), "no place for the weights encoder.layer.2"),
        (dict(model_type="roberta"), "not a Bert"),
        (dict(is_decoder=True), "not a Bert"),
        (
            dict(position_embedding_type="relative_key"),
            "position_embedding_type must be absolute",
        ),
        (dict(hidden_act="relu"), "hidden_act"),
        (dict(id2label={"x": "a"}), "id2label"),
        (dict(id2label=["a"]), "id2label"),
        # Before so much memory is allocated:
        (dict(vocab_size=10**15), "its config.json asks for .1000000000000000,"),
        (dict(vocab_size=10**30), "its config.json asks for .1000000000000000000"),
        (dict(num_hidden_layers=10**15), "lack encoder.layer.999999999999999"),
        (dict(intermediate_size=10**15), "its config.json asks for .1000000000000000,"),
    ]:
        with pytest.raises(ValueError, match=words):
            StarEncoderForPreTraining.from_pretrained(changed(**entries))
    table = load_file(tmp_path / "run" / "model.safetensors")
    norm = "bert.embeddings.LayerNorm.bias"
    key = "bert.encoder.layer.0.attention.self.key.weight"
    key_words = "encoder.layer.0.attention.self.key.weight is .*its config.json asks for"
    for weights, words in [
        ([1, 2], "not a table of tensors"),
        ({"a": 1}, "not a table of tensors"),
        ({}, "the weights lack"),
        (table | {norm: torch.tensor(1.0)}, "embeddings.LayerNorm.bias is ..,"),
        (table | {key: table[key].flatten()}, key_words),
        (table | {key: table[key][:, :0]}, key_words),
        ({n: w.int() for n, w in table.items()}, "not made of floating-point"),
    ]:
        directory = changed()
        os.remove(os.path.join(directory, "model.safetensors"))
        torch.save(weights, os.path.join(directory, "pytorch_model.bin"))
        with pytest.raises(ValueError, match=words):
            StarEncoderForPreTraining.from_pretrained(directory)
        os.remove(os.path.join(directory, "pytorch_model.bin"))
    directory = changed()
    os.truncate(os.path.join(directory, "model.safetensors"), 5000)
    with pytest.raises(ValueError, match="cannot be read"):
        StarEncoderForPreTraining.from_pretrained(directory)
    os.remove(os.path.join(directory, "model.safetensors"))
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        StarEncoderForPreTraining.from_pretrained(directory)


@pytest.mark.parametrize("value", [None, "x", True, [], {}, -1, 2.5, float("nan")], ids=str)
def test_an_entry_of_any_kind_is_used_or_refused_in_one_line(value, tmp_path):
    """Each entry of config.json in turn."""
    StarEncoderForPreTraining(small_config()).save_pretrained(str(tmp_path))
    entries = json.loads((tmp_path / "config.json").read_text())
    for name in [
        *entries,
        "id2label",
        "classifier_dropout",
        "problem_type",
        "is_decoder",
        "position_embedding_type",
    ]:
        (tmp_path / "config.json").write_text(json.dumps(entries | {name: value}))
        try:
            StarEncoderForPreTraining.from_pretrained(str(tmp_path))
        except ValueError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
    for content in ("[]", "3", "null", "[" * 100_000, "\xff"):
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match="config.json: damaged"):
            StarEncoderForPreTraining.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "hidden_size, heads", [(1, 1), (2, 1), (2, 2), (3, 1), (6, 2), (35, 5), (66, 1)]
)
def test_odd_sizes_are_those_of_transformers(hidden_size, heads, tmp_path):
    shape = dict(
        hidden_size=hidden_size,
        num_attention_heads=heads,
        intermediate_size=1,
        max_position_embeddings=20,
    )
    bert = random_bert(transformers.BertForPreTraining, **shape)
    bert.save_pretrained(tmp_path)
    compare_logits(StarEncoderForPreTraining.from_pretrained(str(tmp_path)), bert)


def test_a_sequence_longer_than_the_model_is_refused():
    ids, cu_seqlens = packed([3, 65], 211, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="65 tokens is longer than the model's 64"):
        StarEncoder(small_config())(ids, cu_seqlens)


CLASSIFIERS = [StarEncoderForTokenClassification, StarEncoderForSequenceClassification]


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_dropout_of_a_classifier_is_a_function_of_the_seed(classifier):
    model = classifier(small_config(**NO_DROPOUT, classifier_dropout=0.5))
    ids, cu_seqlens = packed([30, 12], 211, torch.Generator().manual_seed(0))
    once = model(ids, cu_seqlens, seed=5).logits
    assert torch.equal(once, model(ids, cu_seqlens, seed=torch.tensor(5)).logits)
    assert not torch.equal(once, model(ids, cu_seqlens, seed=6).logits)
    assert not torch.equal(model(ids, cu_seqlens).logits, model(ids, cu_seqlens).logits)
    assert torch.equal(model.eval()(ids, cu_seqlens).logits, model(ids, cu_seqlens).logits)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_every_dropout_acts(classifier):
    """Each probability alone changes the output, in training only."""
    ids, cu_seqlens = packed([30, 12], 211, torch.Generator().manual_seed(0))
    off = dict(NO_DROPOUT, classifier_dropout=0.0)
    torch.manual_seed(0)
    model = classifier(small_config(**off))
    expected = model(ids, cu_seqlens, seed=1).logits
    assert torch.equal(expected, model.eval()(ids, cu_seqlens).logits)
    for name in off:
        for key, value in (off | {name: 0.2}).items():
            setattr(model.config, key, value)
        assert not torch.allclose(expected, model.train()(ids, cu_seqlens, seed=1).logits), name
        assert torch.equal(expected, model.eval()(ids, cu_seqlens, seed=1).logits)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_every_dropout_has_a_seed_of_its_own(classifier, monkeypatch):
    """The masks that a step computes have just the seeds of `dropout_seeds`."""
    seeds = set()
    halves = kernels.dropout_halves

    def watched(seed, *arguments):
        seeds.add(int(seed))
        return halves(seed, *arguments)

    monkeypatch.setattr(kernels, "dropout_halves", watched)
    model = classifier(small_config())
    model(*packed([30, 12], 211, torch.Generator().manual_seed(0)), seed=1)
    # Three in each of three layers, the embeddings' and the classifier's.
    assert seeds == set(range(1, 1 + 3 * 3 + 2))
    assert dropout_seeds(1, 3, "cpu").tolist() == sorted(seeds)


def test_embed_reads_the_whole_text(tokenizer):
    model = StarEncoder(small_config(vocab_size=600))
    text = "x = 1\n" * 60 + "def f(a):\n    return a\n" * 20
    ids = tokenizer.encode(text)
    assert len(ids) > 3 * 62
    total = torch.zeros(48)
    for start in range(0, len(ids), 62):
        window = torch.tensor([tokenizer.cls_id, *ids[start : start + 62], tokenizer.sep_id])
        total += (
            model.eval()(window, torch.tensor([0, len(window)], dtype=torch.int32)).detach().sum(0)
        )
    vector = embed(model, tokenizer, [text], dtype="float32")[0]
    torch.testing.assert_close(vector, total / total.norm())
    with pytest.raises(ValueError, match="a list"):
        embed(model, tokenizer, "one str")
    with pytest.raises(ValueError, match="auto, bfloat16 or float32, got 'half'"):
        embed(model, tokenizer, [text], dtype="half")
    with pytest.raises(ValueError, match="2 positions leave no room"):
        embed(
            StarEncoder(small_config(vocab_size=600, max_position_embeddings=2)), tokenizer, [text]
        )


def test_embed_packs_texts_of_all_lengths(tokenizer, tmp_path):
    """Each text has the vector that it has alone, whatever is packed beside it."""
    model = StarEncoder(small_config(vocab_size=600)).train()
    texts = ["x = 1\n" * n for n in (40, 0, 1, 300, 7)] + ["\u00e9"]
    together = embed(model, tokenizer, texts, dtype="float32")
    assert model.training  # as it was
    alone = torch.cat([embed(model, tokenizer, [text], dtype="float32") for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(6))
    assert embed(model, tokenizer, []).shape == (0, 48)

    # The command line writes the same, as JSON or as an array.
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    paths = []
    for i, text in enumerate(texts):
        paths.append(str(tmp_path / f"{i}.py"))
        (tmp_path / f"{i}.py").write_text(text, encoding="utf-8")
    command = ["embed", str(tmp_path), *paths, "--dtype", "float32"]
    printed = program("starencoder", *command)
    lines = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [line["file"] for line in lines] == paths
    torch.testing.assert_close(torch.tensor([line["embedding"] for line in lines]), together)
    assert "6 files, " in printed.stderr and " MB/s" in printed.stderr
    out = str(tmp_path / "vectors")
    written = program("starencoder", *command, "--out", out)
    assert written.returncode == 0 and not written.stdout
    torch.testing.assert_close(torch.from_numpy(np.load(out)), together)


def test_embed_in_bfloat16_gives_nearly_the_same_vectors(tokenizer):
    model = StarEncoder(small_config(vocab_size=600, initializer_range=0.05))
    texts = ["x = 1\n" * n for n in (40, 0, 1, 300, 7)] + ["\u00e9"]
    exact = embed(model, tokenizer, texts, dtype="float32")
    vectors = embed(model, tokenizer, texts, dtype="bfloat16")
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
    assert (vectors * exact).sum(1).min() > 0.9999
    # "auto" is one of the two, whatever this CPU is faster at.
    chosen = embed(model, tokenizer, texts)
    assert min((chosen - other).abs().max() for other in (exact, vectors)) < 1e-5


def test_embed_gives_the_vectors_of_sentence_transformers(tokenizer, tmp_path):
    pytest.importorskip("sentence_transformers")
    model = StarEncoder(small_config(vocab_size=600, pad_token_id=tokenizer.pad_id)).eval()
    texts = ["", "x = 1", "  def f(a):\n    return a\n", "caf\u00e9", "a = [1, 2]\n" * 4]
    assert max(len(tokenizer.encode(text)) for text in texts) <= 62  # a longer one is truncated
    theirs = contenders_of(model, tokenizer, str(tmp_path))["sentence-transformers"](texts)
    ours = embed(model, tokenizer, texts, dtype="float32")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_micro_batches_hold_every_window_once():
    windows = [Window(i, [0] * n) for i, n in enumerate([3, 5, 2, 9, 1, 1])]
    batches = list(micro_batches(windows, 6))
    assert [window.text for batch in batches for window in batch] == list(range(6))
    assert [len(batch) for batch in batches] == [1, 1, 1, 1, 2]  # 9 is longer than 6, and alone
    assert list(micro_batches([], 6)) == []


def test_the_command_line_reads_any_bert_directory_and_refuses_in_one_line(tokenizer, tmp_path):
    """BertForMaskedLM in shards is read; a null and an odd tokenizer: one line, exit status 2."""
    bert = random_bert(transformers.BertForMaskedLM, vocab_size=600)
    bert.save_pretrained(tmp_path, max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path)
    result = program("starencoder", "fill-mask", str(tmp_path), "a <mask>", "--top-k", "3")
    assert result.returncode == 0 and len(result.stdout.strip().splitlines()) == 3
    assert len(result.stderr.splitlines()) == 1
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": null')
    )
    words = "config.json: layer_norm_eps must be a number in [0, 1), got None"
    assert_refused(program("starencoder", "fill-mask", str(tmp_path), "a <mask>"), words)
    spec = json.loads(tokenizer.json)
    spec["model"]["continuing_subword_prefix"] = "é"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    refused = program("starencoder", "fill-mask", str(tmp_path), "a <mask>")
    assert_refused(refused, "tokenizer.json: ", "'continuing_subword_prefix' is not supported")


def test_a_padded_vocabulary_is_no_trouble(tokenizer):
    model = StarEncoderForPreTraining(small_config(vocab_size=704))
    with torch.no_grad():
        model.mlm_bias[600:] = 100.0
    assert all(c["token"] < 600 for c in fill_mask(model, tokenizer, "a <mask>", top_k=800)[0])
    with pytest.raises(ValueError, match="top_k"):
        fill_mask(model, tokenizer, "a <mask>", top_k=0)


def test_inputs_that_make_no_sense_are_refused():
    model = StarEncoderForPreTraining(small_config())
    with pytest.raises(ValueError, match="without padding"):
        model(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 5], dtype=torch.int32))
    ids = torch.zeros(5, dtype=torch.int64)
    for bounds, words in [
        ([0, 0, 5], "empty sequence"),
        ([0, 5, 5], "empty sequence"),
        ([0, 6, 5], "empty sequence"),
        ([1, 5], "from 0 to T = 5, got 1 to 5"),
        ([0, 4], "from 0 to T = 5, got 0 to 4"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(ids, torch.tensor(bounds, dtype=torch.int32))
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_seqlen = 2 is below the longest sequence, 3"):
        model(ids, bounds, max_seqlen=2)
    model(ids, bounds, max_seqlen=3)


def test_pairs_alone_need_no_mlm_head():
    """With no other label than next_sentence_label, the logits of all tokens are not computed."""
    model = StarEncoderForPreTraining(small_config()).eval()
    calls = []
    model.mlm_transform.register_forward_hook(lambda *call: calls.append(call))
    ids, cu_seqlens = packed([30, 12], 211, torch.Generator().manual_seed(0))
    pairs = torch.tensor([1, 0])
    alone = model(ids, cu_seqlens, next_sentence_label=pairs)
    assert not calls
    both = model(ids, cu_seqlens, ids, pairs)
    assert len(calls) == 1
    torch.testing.assert_close(alone.loss, both.nsp_loss)


@pytest.mark.parametrize("pad_token_id", [None, 0, 7])
def test_the_padding_token_survives(pad_token_id, tmp_path):
    """Also None: a config.json without it would mean 0."""
    config = small_config(pad_token_id=pad_token_id)
    StarEncoder(config).save_pretrained(str(tmp_path))
    assert StarEncoder.from_pretrained(str(tmp_path)).config == config
    assert transformers.BertModel.from_pretrained(tmp_path).config.pad_token_id == pad_token_id
