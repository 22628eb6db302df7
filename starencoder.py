"""StarEncoder: a BERT encoder for code, its heads, and Hugging Face files in and out.

    h = dropout(LN(word[token] + position[place in its sequence] + type[0]))
    in each layer, post-LayerNorm (normalize after the residual addition):
        a = attention(h W_qkv) W_o;    h <- LN(dropout(a) + h)
        f = GELU(h W_up) W_down;       h <- LN(dropout(f) + h)
    MLM logits = LN(GELU(h W_t)) E^T           E: the word embeddings again (tied)
    NSP logits = tanh(h[<cls>] W_p) W_n        label 1: B follows A; 0: B is from another document
    token logits = dropout(h) W_c              the classes of each token, as in StarPII
    sequence logits = dropout(tanh(h[<cls>] W_p)) W_c    the classes, or numbers, of a sequence

Every product has a bias, not shown. The NSP labels are the original StarEncoder's; transformers
documents the reverse. `fill_mask` uses the MLM head; `embed` averages h into a vector of a text.

The published model has 12 layers, hidden size 768, 12 heads, intermediate size 3072, 1,024
positions and a vocabulary of 49,156: 124.8 M parameters. They are fp32. Under autocast, matrix
products and activations are bf16; statistics (LayerNorm, softmax) and losses stay fp32.

There is no padding. The sequences of a micro-batch stand end to end, and `cu_seqlens` says where
each begins. Letters in shapes: B sequences, T tokens in the micro-batch, H hidden, N heads,
D = H / N, I intermediate, L layers, V vocabulary, M masked positions, C classes, R rows asked for.

References: Devlin et al., BERT, 2018; Li et al., StarCoder: may the source be with you!, 2023,
section 4; the model card of bigcode/starencoder. Left out: decoding, cross attention, relative
positions, and token types: all tokens have type 0, as in the original.
"""

import contextlib
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import kernels
from common import weights as weight_files
from common.command_line import CommandLine, run_command, speed_of
from common.dtypes import multiplies_bfloat16
from common.files import read_json, write_whole, written_whole

# ---- the config ----------------------------------------------------------------------------------

# BertConfig's defaults that differ from ours, for fields missing from config.json.
BERT_DEFAULTS = {"vocab_size": 30522, "max_position_embeddings": 512, "pad_token_id": 0}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass
class StarEncoderConfig:
    """The shape of a model, in BertConfig's field names; the defaults are the published model's."""

    vocab_size: int = 49156
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"  # the exact one, with erf; no other is supported
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: as hidden_dropout_prob
    max_position_embeddings: int = 1024
    type_vocab_size: int = 2
    initializer_range: float = 0.02  # standard deviation of the initial weights
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 49152  # not used here; transformers asks for it
    tie_word_embeddings: bool = True
    id2label: dict | None = None  # {class: its name}; None: two classes, as in transformers
    problem_type: str | None = None  # see PROBLEM_TYPES; None: decided from the labels

    def __post_init__(self):
        check_config(self)

    @property
    def num_labels(self):
        """Number of classes of a classification head."""
        return len(self.label_names)

    @property
    def label_names(self):
        """The names of the classes, by number."""
        if self.id2label is None:
            return ["LABEL_0", "LABEL_1"]  # transformers' default
        return [self.id2label[number] for number in range(len(self.id2label))]

    def save(self, directory, architecture):
        """Writes config.json for the class `architecture` of transformers, such as BertModel."""
        entries = {"model_type": "bert", "architectures": [architecture]}
        for name, value in asdict(self).items():
            # None is left out, unless a missing field would be read as something else.
            if value is not None or name in BERT_DEFAULTS:
                entries[name] = value
        if self.id2label is not None:
            entries["label2id"] = {label: number for number, label in self.id2label.items()}
        write_whole(os.path.join(directory, "config.json"), json.dumps(entries, indent=2))

    @classmethod
    def load(cls, directory):
        """Reads config.json of a Bert model. Raises ValueError if it is damaged or unsupported."""
        path = os.path.join(directory, "config.json")
        entries = BERT_DEFAULTS | read_json(path)
        position_type = entries.get("position_embedding_type", "absolute")
        try:
            if entries.get("model_type", "bert") != "bert" or entries.get("is_decoder"):
                raise ValueError("not a Bert encoder")
            if position_type != "absolute":
                raise ValueError(f"position_embedding_type must be absolute, got {position_type}")
            labels = entries.get("id2label")
            if isinstance(labels, dict):  # the keys of a JSON object are strings
                numbers = (int(key) if key.isdecimal() else key for key in labels)
                entries["id2label"] = dict(zip(numbers, labels.values()))
            return cls(**{f.name: entries[f.name] for f in fields(cls) if f.name in entries})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def check_config(config):
    """Raises ValueError for a value of a wrong type or size: config.json may hold anything."""
    # By the annotated type: an int is a size, a float a probability or another small number.
    for f in fields(config):
        value = getattr(config, f.name)
        kind = type(value)  # not isinstance: it would take true for an int
        if f.type is int and (kind is not int or value < 1):
            raise ValueError(f"{f.name} must be a positive integer, got {value!r}")
        if f.type is bool and kind is not bool:
            raise ValueError(f"{f.name} must be true or false, got {value!r}")
        if f.type == float | None and value is None:
            continue
        if f.type in (float, float | None) and (kind not in (int, float) or not 0 <= value < 1):
            raise ValueError(f"{f.name} must be a number in [0, 1), got {value!r}")

    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            "hidden_size must be divisible by num_attention_heads, "
            f"got {config.hidden_size} and {config.num_attention_heads}"
        )
    if config.hidden_act != "gelu":
        raise ValueError(f'hidden_act must be "gelu", got {config.hidden_act!r}')
    labels = config.id2label
    if labels is not None:
        named = isinstance(labels, dict) and all(type(name) is str for name in labels.values())
        if not named or not labels or set(labels) != set(range(len(labels))):
            raise ValueError(f"id2label must name the classes 0, 1, ..., got {str(labels)[:60]}")

    problem_type = config.problem_type
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {PROBLEM_TYPES}, got {problem_type!r}")
    if problem_type == "single_label_classification" and config.num_labels == 1:
        raise ValueError(f"{problem_type} needs two classes or more, id2label names one")


# ---- the encoder ---------------------------------------------------------------------------------


def dropout_seeds(seed, layers, device):
    """A seed for each dropout mask of a step: (3 L + 2,) int64, counting up from `seed`.

    In order: the embeddings; three in each layer (attention weights, attention output,
    feed-forward); the classifier. seed: int or 0-d int64 tensor; None: a random one. layers: L.

    Space the seeds of different steps by at least 3 L + 2, or neighbouring steps share masks.
    train.py hashes them.
    """
    if seed is None:
        seed = torch.randint(2**62, (), device=device)
    # A tensor and not ints, which torch.compile would build into its code.
    return seed + torch.arange(3 * layers + 2, device=device)


def fused_norm(norm, x, residual=None, dropout_p=0.0, seed=0):
    """LN(dropout(x) + residual) in one kernel, with the weights of the nn.LayerNorm `norm`."""
    return kernels.layer_norm(
        x, norm.weight, norm.bias, norm.eps, residual=residual, dropout_p=dropout_p, seed=seed
    )


class Layer(nn.Module):
    """One post-LayerNorm block: attention, then feed-forward."""

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.qkv = nn.Linear(H, 3 * H)  # queries, keys and values of all heads
        self.attention_output = nn.Linear(H, H)
        self.attention_norm = nn.LayerNorm(H, config.layer_norm_eps)
        self.feed_forward_up = nn.Linear(H, config.intermediate_size)  # (I, H)
        self.feed_forward_down = nn.Linear(config.intermediate_size, H)  # (H, I)
        self.feed_forward_norm = nn.LayerNorm(H, config.layer_norm_eps)

    def forward(self, h, cu_seqlens, max_seqlen, seeds, rows=None):
        """h: (T, H). Returns (T, H), or (R, H) with rows.

        seeds: three, for the dropout of attention weights, attention output and feed-forward. rows:
        None, or (R,) int64, the only tokens whose output is wanted. They attend to all tokens of
        their sequence; what follows attention is computed for them alone.
        """
        config = self.config
        attention_p = config.attention_probs_dropout_prob if self.training else 0.0
        hidden_p = config.hidden_dropout_prob if self.training else 0.0
        attention_seed, output_seed, feed_forward_seed = seeds

        # Attention, residual, LayerNorm.
        qkv = self.qkv(h).unflatten(-1, (3, config.num_attention_heads, -1))  # (T, 3, N, D)
        a = kernels.attention(
            qkv, cu_seqlens, max_seqlen, dropout_p=attention_p, seed=attention_seed
        )
        a = a.flatten(1)  # (T, N, D) -> (T, H)
        if rows is not None:
            a = a[rows]  # (R, H)
            h = h[rows]  # (R, H)
        a = self.attention_output(a)  # (T or R, H)
        h = fused_norm(self.attention_norm, a, h, hidden_p, output_seed)  # (T or R, H)

        # Feed-forward, residual, LayerNorm.
        f = F.gelu(self.feed_forward_up(h))  # (T or R, I)
        f = self.feed_forward_down(f)  # (T or R, H)
        return fused_norm(self.feed_forward_norm, f, h, hidden_p, feed_forward_seed)


class PretrainedModel(nn.Module):
    """What the models share: initial weights, and files that transformers reads and writes."""

    architecture = None  # the class of transformers that has the same files

    def initialize(self, *modules):
        """BERT's initial weights: matrices normal with a small deviation, biases 0."""
        for module in modules:
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors, as `architecture` of transformers does."""
        weights = weight_files.of_module(self, bert_names)
        # transformers' untied decoder has its own bias. A clone: safetensors refuses shared memory.
        if DECODER in weights:
            weights[DECODER_BIAS] = weights[MLM_BIAS].clone()
        os.makedirs(directory, exist_ok=True)
        self.config.save(directory, self.architecture)
        weight_files.write(directory, weights)

    @classmethod
    def from_pretrained(cls, directory, **overrides):
        """Reads any Bert directory of transformers: safetensors or pickled, whole or in shards.

        directory: its path, or its name on the Hugging Face hub. overrides: fields of the config to
        replace; with other classes, `id2label={0: "O", ...}`, the classifier is a new one. Returns
        the model in evaluation mode, as transformers does.

        A missing pooler, next-sentence head or classifier starts from random weights, and a line on
        stderr says so; a missing MLM head is an error. Raises ValueError if weights and config do
        not fit together, FileNotFoundError if there are none.
        """
        directory = weight_files.local_directory(directory)
        saved = StarEncoderConfig.load(directory)
        config = replace(saved, **overrides)
        weights = weight_files.read(directory)
        weights = {short_name(name): value for name, value in weights.items()}
        if config.label_names != saved.label_names:
            weights = {n: value for n, value in weights.items() if not n.startswith("classifier.")}
        try:
            config.tie_word_embeddings = decoder_is_tied(weights, config)
            rename_decoder(weights, config.tie_word_embeddings)
            check_sizes(weights, config)  # before a model is built: the sizes may be huge
            model = cls(config)
            new = weight_files.fill_module(model, weights, short_bert_names, OPTIONAL)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        if new:
            names = ", ".join(new)
            print(f"{directory}: new weights for {names} (not in the files)", file=sys.stderr)
        return model.eval()


class StarEncoder(PretrainedModel):
    """The encoder without heads (transformers' BertModel)."""

    architecture = "BertModel"

    def __init__(self, config, add_pooling_layer=True):
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, H)  # (V, H)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, H)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, H)  # only [0] is used
        self.embeddings_norm = nn.LayerNorm(H, config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        # For the heads that read <cls>. It is here because BertModel's files hold it.
        self.pooler = nn.Linear(H, H) if add_pooling_layer else None
        self.initialize(*self.modules())

    def forward(self, input_ids, cu_seqlens, *, max_seqlen=None, seed=None, rows=None):
        """The last hidden states of a packed micro-batch: (T, H), or (R, H) with rows.

        input_ids: (T,) int64. cu_seqlens: (B+1,) int32, from 0 to T. max_seqlen: int, no sequence
        is longer; None: max_position_embeddings. seed: int or 0-d int64 tensor, fixes the dropout
        masks, see `dropout_seeds`; None: drawn from torch's generator. Dropout acts in training
        mode only.

        rows: (R,) int64, the only tokens whose states are wanted; None: all. The other tokens skip
        the second half of the last layer, see `Layer`.

        Raises ValueError for inputs that do not fit together or exceed the positions. On a GPU,
        cu_seqlens is not checked: reading it would stall the step until the GPU has caught up.
        """
        config = self.config
        max_seqlen = max_seqlen or config.max_position_embeddings
        check_inputs(input_ids, cu_seqlens, max_seqlen, config)
        # Without dropout no seed is needed, and none is drawn from torch's generator.
        seed = seed if self.training else 0
        seeds = dropout_seeds(seed, len(self.layers), input_ids.device).unbind()

        # The position of each token in its sequence, without a GPU sync. Pass all of cu_seqlens:
        # torch.compile mishandles the offset of cu_seqlens[1:] on a GPU (PyTorch issue 160964).
        indices = torch.arange(len(input_ids), device=input_ids.device, dtype=torch.int32)  # (T,)
        sequences = torch.bucketize(indices, cu_seqlens, right=True) - 1  # (T,)
        positions = indices - cu_seqlens[sequences]  # (T,)

        h = self.word_embeddings(input_ids) + self.position_embeddings(positions)  # (T, H)
        h = fused_norm(self.embeddings_norm, h + self.token_type_embeddings.weight[0])  # (T, H)
        p = config.hidden_dropout_prob if self.training else 0.0
        h = kernels.dropout(h, p, seeds[0])
        for i, layer in enumerate(self.layers):
            last = layer is self.layers[-1]
            layer_seeds = seeds[1 + 3 * i : 4 + 3 * i]
            h = layer(h, cu_seqlens, max_seqlen, layer_seeds, rows if last else None)
        return h


def check_inputs(input_ids, cu_seqlens, max_seqlen, config):
    """Raises ValueError unless these are packed sequences that fit the model."""
    if input_ids.dim() != 1:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids must be (T,), end to end without padding, got {shape}")
    if not kernels.lengths_visible(cu_seqlens):
        return

    T = len(input_ids)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != T:
        ends = f"{int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        raise ValueError(f"cu_seqlens must go from 0 to T = {T}, got {ends}")
    lengths = cu_seqlens.diff()  # (B,)
    if (lengths < 1).any():
        raise ValueError("empty sequence: cu_seqlens must be strictly increasing")
    longest = int(lengths.max()) if len(lengths) else 0
    if longest > config.max_position_embeddings:
        room = f"the model's {config.max_position_embeddings} positions"
        raise ValueError(f"a sequence of {longest} tokens is longer than {room}")
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen = {max_seqlen} is below the longest sequence, {longest}")


# ---- the heads -----------------------------------------------------------------------------------

CHUNK = 256  # rows of logits for which an fp32 copy is made at a time

# On a CPU, MKL chooses its exp at the first call. Two threads that race there can get other bits in
# that one call, so have it here, where there is one thread.
torch.ones(1).exp()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies that overwrites the logits with their gradient already in forward.

    So no second (M, V) tensor is needed; F.cross_entropy would copy the logits, the largest tensor
    of a step, to fp32 four times. `kernels.CrossEntropy` is its Triton twin.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        total = torch.zeros((), device=logits.device)
        gradient = logits.detach()  # the same memory
        for rows, targets in zip(gradient.split(CHUNK), labels.split(CHUNK), strict=True):
            counted = (targets != -100).unsqueeze(1)  # (CHUNK, 1)
            # Not clamp(min=0): a label of -7 must stay an error.
            targets = targets.unsqueeze(1).masked_fill(~counted, 0)  # (CHUNK, 1)
            log_p = rows.float().log_softmax(1)  # (CHUNK, V)
            total -= (log_p.gather(1, targets) * counted).sum()

            # The gradient of the sum: softmax - one-hot.
            p = log_p.exp_()
            p.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=p.dtype))
            rows.copy_(p)
            rows[~counted.squeeze(1)] = 0
        ctx.save_for_backward(logits)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        for rows in gradient.split(CHUNK):
            # In fp32: the rounding error of a bf16 factor would scale the whole gradient.
            rows.copy_(rows.float() * grad_output)
        return gradient, None


def cross_entropy(logits, labels, may_overwrite=True):
    """Mean cross-entropy in nats over the labels that are not -100; 0 if there are none.

    logits: (M, V). labels: (M,) int64. may_overwrite: bf16 or fp16 logits may be overwritten with
    their gradient; then do not read them afterwards, and run only one backward pass. Returns (),
    fp32, or fp64 for fp64 logits.
    """
    half = logits.dtype in (torch.bfloat16, torch.float16)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    # Not a leaf: that is the caller's own tensor. Not under torch.compile: it fuses PyTorch's
    # formula without copies.
    in_place = may_overwrite and half and needs_grad and not logits.is_leaf
    if in_place and not torch.compiler.is_compiling():
        triton = kernels.backend(logits) == "triton"
        function = kernels.CrossEntropy if triton else ChunkedCrossEntropy
        total = function.apply(logits, labels)
    else:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, labels, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)  # a batch may have no mask: not 0 / 0


class PreTrainingOutput(NamedTuple):
    """What `StarEncoderForPreTraining` returns: losses if labels are given, or else logits."""

    loss: torch.Tensor | None = None  # mlm_loss + nsp_loss
    mlm_loss: torch.Tensor | None = None  # mean over the masked tokens, in nats; 0 if none
    nsp_loss: torch.Tensor | None = None  # mean over the pairs
    mlm_logits: torch.Tensor | None = None  # (T, V), or (M, V) at masked_positions
    nsp_logits: torch.Tensor | None = None  # (B, 2)


class StarEncoderForPreTraining(PretrainedModel):
    """The encoder with its heads for masked tokens (MLM) and next sentence (NSP)."""

    architecture = "BertForPreTraining"

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.bert = StarEncoder(config)
        self.mlm_transform = nn.Linear(H, H)  # W_t
        self.mlm_norm = nn.LayerNorm(H, config.layer_norm_eps)
        self.mlm_decoder = nn.Linear(H, config.vocab_size, bias=False)  # E^T
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))  # b, (V,)
        self.nsp = nn.Linear(H, 2)  # W_n; W_p is the encoder's pooler
        self.initialize(self.mlm_transform, self.mlm_decoder, self.nsp)
        # A tied decoder's weight is drawn too, then dropped, so that `nsp`, drawn next, does not
        # depend on tying.
        if config.tie_word_embeddings:
            self.mlm_decoder.weight = self.bert.word_embeddings.weight

    def mlm_head(self, h):
        """(M, H) -> logits (M, V); on a GPU, columns of -inf round V up to a multiple of 64."""
        h = fused_norm(self.mlm_norm, F.gelu(self.mlm_transform(h)))  # (M, H)
        weight = self.mlm_decoder.weight  # (V, H)
        bias = self.mlm_bias.to(h.dtype)
        # Products with V are fastest if V is a multiple of 64, 128 bytes of bf16. 49,156 is not.
        padding = -len(bias) % 64
        if h.is_cuda and padding:
            weight = F.pad(weight.to(h.dtype), (0, 0, 0, padding))
            bias = F.pad(bias, (0, padding), value=float("-inf"))
        return F.linear(h, weight, bias)

    def forward(
        self,
        input_ids,
        cu_seqlens,
        labels=None,
        next_sentence_label=None,
        masked_positions=None,
        *,
        max_seqlen=None,
        seed=None,
    ):
        """The losses for the given labels, or logits if there are none: a `PreTrainingOutput`.

        masked_positions: (M,) int64, the tokens to predict; None: those that have a label, or all.
        labels: (M,) int64, the tokens that belong there; without masked_positions (T,), -100 for no
        label. next_sentence_label: (B,) int64, 1 if B follows A, as in the original StarEncoder
        (transformers documents the reverse). The other arguments: as in `StarEncoder`.
        """
        if labels is not None and masked_positions is None:
            # Convenient, but nonzero waits for a GPU: the training loop passes the positions.
            masked_positions = (labels != -100).nonzero().squeeze(1)
            labels = labels[masked_positions]

        # With masked_positions, only <cls> and masked tokens are used from here on. The rest skip
        # the second half of the last layer and the MLM head, a quarter of the model's work.
        cls = cu_seqlens[:-1].long()  # (B,): each sequence begins with its <cls>
        if masked_positions is None:
            h = self.bert(input_ids, cu_seqlens, max_seqlen=max_seqlen, seed=seed)  # (T, H)
            h_cls = h[cls]  # (B, H)
        else:
            rows = torch.cat([cls, masked_positions])  # (B + M,)
            h = self.bert(input_ids, cu_seqlens, max_seqlen=max_seqlen, seed=seed, rows=rows)
            h_cls, h = h.split([len(cls), len(masked_positions)])  # (B, H) and (M, H)

        nsp_logits = self.nsp(torch.tanh(self.bert.pooler(h_cls)))  # (B, 2)
        if labels is None and next_sentence_label is None:
            mlm_logits = self.mlm_head(h)[:, : self.config.vocab_size]  # (T or M, V)
            return PreTrainingOutput(mlm_logits=mlm_logits, nsp_logits=nsp_logits)

        loss = 0.0
        mlm_loss = None
        if labels is not None:
            mlm_loss = cross_entropy(self.mlm_head(h), labels)
            loss = loss + mlm_loss
        nsp_loss = None
        if next_sentence_label is not None:
            nsp_loss = cross_entropy(nsp_logits, next_sentence_label)
            loss = loss + nsp_loss
        return PreTrainingOutput(loss, mlm_loss, nsp_loss)


class ClassificationOutput(NamedTuple):
    """What the models for classification return."""

    loss: torch.Tensor | None  # the mean over the labels, fp32; None without labels
    logits: torch.Tensor  # (T, C) for tokens, (B, C) for sequences


def classify(model, h, seed):
    """Dropout and the classifier of a model for classification: (R, H) -> logits (R, C)."""
    p = model.config.classifier_dropout
    if p is None:
        p = model.config.hidden_dropout_prob
    h = kernels.dropout(h, p if model.training else 0.0, seed)  # (R, H)
    return model.classifier(h)  # (R, C)


class StarEncoderForTokenClassification(PretrainedModel):
    """The encoder with one linear layer per token, as in StarPII."""

    architecture = "BertForTokenClassification"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = StarEncoder(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # (C, H)
        self.initialize(self.classifier)

    def forward(self, input_ids, cu_seqlens, labels=None, *, max_seqlen=None, seed=None):
        """A `ClassificationOutput`. Its loss is a cross-entropy in nats.

        labels: (T,) int64, -100 for a token without one. The other arguments: as in `StarEncoder`.
        """
        seed = seed if self.training else 0  # as in `StarEncoder`
        seeds = dropout_seeds(seed, self.config.num_hidden_layers, input_ids.device)
        # The encoder expands the same seed again, and leaves the last one to this head.
        h = self.bert(input_ids, cu_seqlens, max_seqlen=max_seqlen, seed=seeds[0])  # (T, H)
        logits = classify(self, h, seeds[-1])  # (T, C)
        loss = None if labels is None else cross_entropy(logits, labels, may_overwrite=False)
        return ClassificationOutput(loss, logits)


class StarEncoderForSequenceClassification(PretrainedModel):
    """The encoder with one linear layer on the pooled <cls>: classes or numbers of a sequence."""

    architecture = "BertForSequenceClassification"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = StarEncoder(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # (C, H)
        self.initialize(self.classifier)

    def forward(self, input_ids, cu_seqlens, labels=None, *, max_seqlen=None, seed=None):
        """A `ClassificationOutput`. labels: see `sequence_loss`; the rest as in `StarEncoder`."""
        seed = seed if self.training else 0  # as in `StarEncoder`
        seeds = dropout_seeds(seed, self.config.num_hidden_layers, input_ids.device)
        cls = cu_seqlens[:-1].long()  # (B,)
        h = self.bert(input_ids, cu_seqlens, max_seqlen=max_seqlen, seed=seeds[0], rows=cls)
        h = torch.tanh(self.bert.pooler(h))  # (B, H)
        logits = classify(self, h, seeds[-1])  # (B, C)
        loss = None if labels is None else sequence_loss(logits, labels, self.config.problem_type)
        return ClassificationOutput(loss, logits)


def sequence_loss(logits, labels, problem_type):
    """The mean loss of sequences with logits (B, C). Each problem type has labels of its own:

    regression: (B, C) floats, or (B,) if C is 1; the loss is the squared error.
    single_label_classification: (B,) int64, -100 for a sequence without one; cross-entropy in nats.
    multi_label_classification: (B, C) floats in [0, 1]; binary cross-entropy in nats.
    None: one of these, decided as in transformers.

    Raises ValueError for labels of another shape or dtype.
    """
    B, C = logits.shape
    if problem_type is None and C == 1:
        problem_type = "regression"
    elif problem_type is None and labels.dtype in (torch.int64, torch.int32):
        problem_type = "single_label_classification"
    elif problem_type is None:
        problem_type = "multi_label_classification"
    check_sequence_labels(labels, problem_type, B, C)

    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels, may_overwrite=False)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.dtype).view(B, C)
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels, reduction="sum") / max(B * C, 1)


def check_sequence_labels(labels, problem_type, B, C):
    """Raises ValueError for labels that do not fit: broadcasting would take some of them."""
    single = problem_type == "single_label_classification"
    kind = "int64" if single else "floating-point"
    kind_fits = labels.dtype == torch.int64 if single else labels.is_floating_point()
    flat = single or (problem_type == "regression" and C == labels.dim() == 1)
    shape = (B,) if flat else (B, C)
    if labels.shape != shape or not kind_fits:
        given = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"{problem_type} needs {kind} labels of shape {shape}, got {given}")


# ---- the names in the files of transformers ------------------------------------------------------

# Parts of a parameter's name here, and in the files of transformers' Bert*.
BERT_NAMES = {
    "layers": "encoder.layer",
    "qkv": "attention.self.qkv",  # query, key and value there
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward_up": "intermediate.dense",
    "feed_forward_down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
    "embeddings_norm": "embeddings.LayerNorm",
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "token_type_embeddings": "embeddings.token_type_embeddings",
    "pooler": "pooler.dense",
    "mlm_transform": "cls.predictions.transform.dense",
    "mlm_norm": "cls.predictions.transform.LayerNorm",
    "mlm_bias": "cls.predictions.bias",
    "mlm_decoder": "cls.predictions.decoder",
    "nsp": "cls.seq_relationship",
}
# Short names, see `short_name`, of weights that files store in several ways.
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
MLM_BIAS = "cls.predictions.bias"
# Prefixes of our names of parameters that a file may lack; see `from_pretrained`.
OPTIONAL = ("classifier.", "pooler.", "bert.pooler.", "nsp.")


def bert_names(name):
    """The names in a Bert file of the parameter `name` here: three for a fused qkv, or else one.

    >>> bert_names("bert.layers.0.attention_norm.bias")
    ['bert.encoder.layer.0.attention.output.LayerNorm.bias']
    """
    name = ".".join(BERT_NAMES.get(part, part) for part in name.split("."))
    if ".attention.self.qkv." not in name:
        return [name]
    # Our qkv is their query, key and value, stacked along the first axis.
    return [name.replace(".qkv.", f".{part}.") for part in ("query", "key", "value")]


def short_name(name):
    """A name in a Bert file without what differs from file to file: the prefix, old LayerNorms.

    >>> short_name("bert.embeddings.LayerNorm.gamma")
    'embeddings.LayerNorm.weight'
    """
    name = name.removeprefix("bert.")  # models with heads have it, BertModel does not
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # as TensorFlow has it
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def short_bert_names(name):
    """The short names of the parameter `name` here."""
    return [short_name(bert_name) for bert_name in bert_names(name)]


def decoder_is_tied(weights, config):
    """True if the MLM decoder is the table of word embeddings.

    As in transformers, two tables that differ are not tied, whatever config.json says.
    """
    words = weights.get(WORD_EMBEDDINGS)
    decoder = weights.get(DECODER)
    if words is not None and decoder is not None and not torch.equal(words, decoder):
        return False
    return config.tie_word_embeddings


def rename_decoder(weights, tied):
    """Gives the MLM decoder's table and bias the short names that the model looks for, in place."""
    if tied and WORD_EMBEDDINGS not in weights and DECODER in weights:
        weights[WORD_EMBEDDINGS] = weights[DECODER]  # a tied table may have either name
    # transformers 4 writes MLM_BIAS alone. If both exist, transformers computes with
    # DECODER_BIAS.
    if DECODER_BIAS in weights:
        weights[MLM_BIAS] = weights[DECODER_BIAS]


def check_sizes(weights, config):
    """Raises ValueError if a size in the config is not that of the weights, by short names."""
    H = config.hidden_size
    L = config.num_hidden_layers
    expected = {  # one weight for each size
        WORD_EMBEDDINGS: (config.vocab_size, H),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, H),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, H),
        "encoder.layer.0.intermediate.dense.weight": (config.intermediate_size, H),
        f"encoder.layer.{L - 1}.output.dense.bias": (H,),
    }
    for name, shape in expected.items():
        weight_files.check_weight(weights, name, shape)
    if f"encoder.layer.{L}.output.dense.bias" in weights:
        raise ValueError(f"config.json has no place for the weights encoder.layer.{L}")


# ---- use -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model):
    """Within this block, a model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)  # as it was


@torch.no_grad()
def run_sequence(model, ids, **inputs):
    """The output of a model in evaluation mode for one sequence, a list of ids."""
    input_ids = torch.tensor(ids)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    # On a GPU, the model itself would not check them.
    check_inputs(input_ids, cu_seqlens, len(ids), model.config)
    device = next(model.parameters()).device
    with evaluating(model):
        return model(input_ids.to(device), cu_seqlens.to(device), **inputs)


def fill_mask(model, tokenizer, text, top_k=5):
    """What the model would write at each `<mask>` of a text.

    model: a `StarEncoderForPreTraining`. Returns for each `<mask>` a list of its `top_k`
    candidates, best first: dicts with `token` (id), `token_str` and `score` (probability), as
    transformers' fill-mask pipeline has them. Raises ValueError for a text without `<mask>` or
    longer than the model's positions, or a top_k below 1. Runs on the model's device.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    first, *rest = text.split("<mask>")
    if not rest:
        raise ValueError("the text has no <mask>")
    # The special tokens are put in by id, because `encode` takes "<mask>" for text.
    ids = [tokenizer.cls_id, *tokenizer.encode(first)]
    masked = []  # the positions of the masks
    for piece in rest:
        masked.append(len(ids))
        ids += [tokenizer.mask_id, *tokenizer.encode(piece)]
    ids.append(tokenizer.sep_id)

    masked_positions = torch.tensor(masked, device=model.mlm_bias.device)  # (M,)
    logits = run_sequence(model, ids, masked_positions=masked_positions).mlm_logits  # (M, V)
    # A vocabulary may be padded: its last columns are no tokens.
    probabilities = logits.float().softmax(-1)[:, : tokenizer.vocab_size]
    scores, tokens = probabilities.topk(min(top_k, tokenizer.vocab_size))  # both (M, top_k)

    answers = []
    for mask_scores, mask_tokens in zip(scores.tolist(), tokens.tolist()):
        candidates = []
        for score, token in zip(mask_scores, mask_tokens):
            token_str = tokenizer.decode([token])
            candidates.append({"score": score, "token": token, "token_str": token_str})
        answers.append(candidates)
    return answers


class Window(NamedTuple):
    """A piece of a text that fits the model."""

    text: int  # which of the texts
    ids: list  # <cls>, tokens, <sep>


def embed(model, tokenizer, texts, dtype="auto"):
    """A unit vector for each text, so that a dot product is a cosine.

    It is the direction of the mean of the text's last hidden states. A text longer than the model's
    positions is read in windows, and all its tokens count. The original takes the state of the last
    `<sep>` instead; the mean needs no fine-tuning. The windows of all texts are packed, sorted by
    length; a progress bar shows up after two seconds.

    model: any of the models here; it runs on its own device. dtype: "float32", or "bfloat16" for
    autocast to it, whose vectors have a cosine of about 0.9999 to those in fp32, or more; "auto":
    "bfloat16" on a GPU and on a CPU that is faster at it. Returns (len(texts), H) fp32 on the CPU.
    Raises ValueError for a single str or another dtype.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list of str, got one str")
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"dtype must be auto, bfloat16 or float32, got {dtype!r}")
    model = getattr(model, "bert", model)
    windows = windows_of(texts, tokenizer, model.config.max_position_embeddings)
    windows.sort(key=lambda window: len(window.ids))  # equal lengths make one batch on a CPU

    device = model.word_embeddings.weight.device
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" or multiplies_bfloat16() else "float32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    # The sum of a window's states has the direction of their mean.
    sums = [torch.zeros(0, model.config.hidden_size)]
    bar = tqdm(total=len(windows), desc="embedding", unit="window", delay=2, leave=False)
    with evaluating(model), torch.no_grad(), autocast, bar:
        for batch in micro_batches(windows, tokens_at_once(device)):
            lengths = [len(window.ids) for window in batch]
            input_ids = torch.tensor([token for window in batch for token in window.ids])  # (T,)
            cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
            h = model(input_ids.to(device), cu_seqlens.to(device))  # (T, H)
            of_batch = [states.float().sum(0) for states in h.split(lengths)]
            sums.append(torch.stack(of_batch).cpu())  # (B, H)
            bar.update(len(batch))

    # Once for all windows: `index_add_` has a high price for each call.
    vectors = torch.zeros(len(texts), model.config.hidden_size)
    texts_of_windows = torch.tensor([window.text for window in windows], dtype=torch.int64)
    vectors.index_add_(0, texts_of_windows, torch.cat(sums))
    return F.normalize(vectors, dim=-1)


def windows_of(texts, tokenizer, positions):
    """The texts in windows of at most `positions` tokens. Raises ValueError if that is too few."""
    room = positions - 2  # beside <cls> and <sep>
    if room < 1:
        raise ValueError(f"the model's {positions} positions leave no room for text")
    windows = []
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text)
        # An empty text still has its <cls> and <sep>.
        for start in range(0, max(len(ids), 1), room):
            piece = ids[start : start + room]
            windows.append(Window(i, [tokenizer.cls_id, *piece, tokenizer.sep_id]))
    return windows


def tokens_at_once(device):
    """How many tokens to compute at once: on a CPU, as many as stay in its cache."""
    return 2**12 if device.type == "cpu" else 2**16


def micro_batches(windows, tokens):
    """Neighbouring windows with at most `tokens` tokens together, or one longer window alone."""
    batch = []
    total = 0
    for window in windows:
        if batch and total + len(window.ids) > tokens:
            yield batch
            batch = []
            total = 0
        batch.append(window)
        total += len(window.ids)
    if batch:
        yield batch


def main(argv=None):
    """The command line, on the CPU: `fill-mask RUN TEXT` or `embed RUN FILE...`."""
    parser = CommandLine(prog="starencoder.py", description="Use a trained model, on the CPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    fill_parser = commands.add_parser("fill-mask", help="what the model would write at each <mask>")
    embed_parser = commands.add_parser("embed", help="a unit vector for each file, as JSON lines")
    for command in (fill_parser, embed_parser):
        command.add_argument("run", help="a run, any Bert directory, or a name on the hub")
    fill_parser.add_argument("text", help='such as "def __init__(<mask>, name):"')
    fill_parser.add_argument(
        "--top-k", type=int, default=5, metavar="N", help="tokens for each mask (default: 5)"
    )
    embed_parser.add_argument("files", nargs="+", metavar="FILE", help="text files")
    embed_parser.add_argument(
        "--out", metavar="PATH", help="write the vectors to this .npy file instead: (files, H) fp32"
    )
    help = "compute dtype; auto: bfloat16 if the CPU is fast at it"
    embed_parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help=help
    )
    arguments = parser.parse_args(argv)

    from corpus.tokenizer import Tokenizer  # only here: the model itself needs none

    model_class = StarEncoderForPreTraining if arguments.command == "fill-mask" else StarEncoder
    directory = weight_files.local_directory(arguments.run)
    tokenizer = Tokenizer.from_pretrained(directory)
    model = model_class.from_pretrained(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{directory}: its tokenizer has more tokens than its model")

    if arguments.command == "fill-mask":
        for candidates in fill_mask(model, tokenizer, arguments.text, arguments.top_k):
            for candidate in candidates:
                print(f"{candidate['score']:7.2%}  {candidate['token_str']!r}")
            print()
    else:
        embed_files(model, tokenizer, arguments.files, arguments.out, arguments.dtype)


def embed_files(model, tokenizer, paths, out, dtype):
    """Prints the vectors of files as JSON, or writes them to the .npy file `out`."""
    texts = []
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as f:
            texts.append(f.read())
    begin = time.perf_counter()
    vectors = embed(model, tokenizer, texts, dtype)  # (files, H)
    seconds = time.perf_counter() - begin
    if out:
        with written_whole(out) as f:
            np.save(f, vectors.numpy())
    else:
        for path, vector in zip(paths, vectors.tolist()):
            print(json.dumps({"file": path, "embedding": vector}))
    print(f"{len(paths):,} files, {speed_of(texts, seconds)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
