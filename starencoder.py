"""StarEncoder, whole: a BERT encoder for code, its pretraining heads, and the way in and out of Hugging Face's file layout.

    h_0      = dropout(LN(word[token] + position[place in its sequence] + type[0]))
    a        = h W_qkv -> attention -> W_o;   h  <- LN(dropout(a) + h)            post-LayerNorm: the sum is normalized, not the branch
    f        = GELU(h W_up) W_down;           h  <- LN(dropout(f) + h)
    MLM      = LN(GELU(h W_t)) E^T + b        E: the word embeddings again (tied)
    NSP      = tanh(h[<cls>] W_p) W_n         label 1: B follows A; 0: B is from another document

The published model has 12 layers, hidden 768, 12 heads, intermediate 3072, 1,024 positions, a vocabulary of 49,156: 124.8 M parameters.

There is no padding. The sequences of a micro-batch stand end to end, and `cu_seqlens` says where each begins. Letters in shapes:
B sequences, T tokens in the micro-batch, H hidden, N heads, D = H / N, V vocabulary, M masked positions, C classes.

References: Devlin et al., BERT, 2018; Li et al., StarCoder: may the source be with you!, 2023, section 4 (StarEncoder); the model card
of bigcode/starencoder. Left out: decoding, cross attention, relative positions, second segment embeddings (the original never uses them).
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from common.weights import download, read_weights


def _check_classes(id2label):
    """Raises ValueError unless `id2label` gives the classes 0, 1, ... a name each."""
    names = id2label.values() if isinstance(id2label, dict) else []
    named = names and all(isinstance(name, str) for name in names)
    if not named or set(id2label) != set(range(len(names))):
        raise ValueError(f"id2label must name the classes 0, 1, ..., got {str(id2label)[:60]}")


@dataclass
class StarEncoderConfig:
    """The shape of the model, under the field names of Hugging Face's BertConfig; the defaults are StarEncoder's."""

    vocab_size: int = 49156
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"  # the exact one, with erf; no other
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    max_position_embeddings: int = 1024
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 49152
    tie_word_embeddings: bool = True
    id2label: dict | None = (
        None  # the classes of a token-classification head; None: two of them, as in transformers
    )

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "max_position_embeddings", "type_vocab_size"):  # fmt: skip
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number from 0 up, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act != "gelu":
            raise ValueError(f'hidden_act must be "gelu", got "{self.hidden_act}"')
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
        if type(self.tie_word_embeddings) is not bool:
            value = self.tie_word_embeddings
            raise ValueError(f"tie_word_embeddings must be true or false, got {value!r}")
        if type(self.pad_token_id) not in (int, type(None)):
            raise ValueError(
                f"pad_token_id must be the number of a token, got {self.pad_token_id!r}"
            )
        if self.id2label is not None:
            _check_classes(self.id2label)

    @property
    def num_labels(self):
        """Number of classes of a token-classification head."""
        return 2 if self.id2label is None else len(self.id2label)

    def save(self, directory, architecture):
        """Writes config.json as transformers reads it; `architecture` is the name of the Bert* class to load it with."""
        entries = {"model_type": "bert", "architectures": [architecture]} | {
            k: v for k, v in asdict(self).items() if v is not None
        }
        if self.id2label is not None:
            entries["label2id"] = {label: int(i) for i, label in self.id2label.items()}
        path = os.path.join(directory, "config.json")
        with open(path + ".tmp", "w") as f:
            json.dump(entries, f, indent=2)
        os.replace(path + ".tmp", path)

    @classmethod
    def load(cls, directory):
        """Reads config.json of a Bert model; raises ValueError for what this encoder cannot compute."""
        path = os.path.join(directory, "config.json")
        with open(path) as f:
            try:
                entries = json.load(f)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: damaged ({error})") from None
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: damaged (not the entries of a model)")
        if entries.get("model_type", "bert") != "bert" or entries.get("is_decoder"):
            raise ValueError(f"{path}: not a Bert encoder (model_type {entries.get('model_type')})")
        if entries.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"{path}: position_embedding_type must be absolute, got {entries['position_embedding_type']}"
            )
        defaults = {
            "max_position_embeddings": 512,
            "vocab_size": 30522,
            "pad_token_id": 0,
        }  # where BertConfig's are not StarEncoder's
        known = {f.name for f in fields(cls)}
        arguments = {name: value for name, value in (defaults | entries).items() if name in known}
        if isinstance(arguments.get("id2label"), dict):  # JSON has no numbers for keys
            labels = arguments["id2label"].items()
            arguments["id2label"] = {int(i) if i.isdecimal() else i: label for i, label in labels}
        arguments["id2label"] = arguments.get("id2label") or None
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


# ---- the model -------------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One post-LayerNorm block: attention, then feed-forward, each followed by dropout + residual + LayerNorm. (T, H) -> (T, H).

    With `rows` (R,), (T, H) -> (R, H): every token is attended to, but only these go on from there.
    """

    def __init__(self, config):
        super().__init__()
        H, self.config = config.hidden_size, config
        self.qkv = nn.Linear(H, 3 * H)
        self.attention_output = nn.Linear(H, H)
        self.attention_norm = nn.LayerNorm(H, config.layer_norm_eps)
        self.feed_forward_up = nn.Linear(H, config.intermediate_size)
        self.feed_forward_down = nn.Linear(config.intermediate_size, H)
        self.feed_forward_norm = nn.LayerNorm(H, config.layer_norm_eps)

    def forward(self, h, cu_seqlens, max_seqlen, dropout, seeds, rows=None):
        N = self.config.num_attention_heads
        qkv = self.qkv(h).unflatten(-1, (3, N, -1))  # (T, 3, N, D)
        p = self.config.attention_probs_dropout_prob * dropout
        a = kernels.attention(qkv, cu_seqlens, max_seqlen, dropout_p=p, seed=seeds[0]).flatten(
            1
        )  # (T, H)
        if rows is not None:
            a, h = a[rows], h[rows]  # (R, H)
        h = _norm(
            self.attention_norm,
            self.attention_output(a),
            h,
            self.config.hidden_dropout_prob * dropout,
            seeds[1],
        )
        f = self.feed_forward_down(F.gelu(self.feed_forward_up(h)))  # (T, 4H) -> (T, H)
        return _norm(
            self.feed_forward_norm, f, h, self.config.hidden_dropout_prob * dropout, seeds[2]
        )


def _norm(norm, x, residual=None, dropout_p=0.0, seed=0):
    return kernels.layer_norm(
        x, norm.weight, norm.bias, norm.eps, residual=residual, dropout_p=dropout_p, seed=seed
    )


def _check_length(tokens, config):
    if tokens > config.max_position_embeddings:
        raise ValueError(
            f"a sequence of {tokens} tokens is longer than the model's {config.max_position_embeddings} positions"
        )


class _Bert(nn.Module):
    """What the three models share: their first weights, and files in the layout of transformers."""

    architecture = None  # the class of transformers that reads and writes the same files

    def _initialize(self, *modules):
        for module in modules:
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors into `directory`, as `architecture`.save_pretrained of transformers does."""
        _write_files(self, directory)

    @classmethod
    def from_pretrained(cls, directory, **overrides):
        """Reads any Bert directory of transformers: model.safetensors or pytorch_model.bin, whole or in shards.

        A name that is no directory is fetched from the Hugging Face hub. `overrides` replace fields of
        its config (the classes of a new head: `id2label={0: "O", ...}`). A classification head, pooler
        or next-sentence head that the files lack starts from new weights, and that is said (a
        BertForMaskedLM has neither pooler nor next-sentence head). As in transformers, the model comes
        back in evaluation mode, without dropout.

        Raises ValueError where files and config do not fit together, FileNotFoundError where they are missing.
        """
        return _read_files(cls, directory, overrides)


class StarEncoder(_Bert):
    """The encoder without heads (transformers' BertModel)."""

    architecture = "BertModel"

    def __init__(self, config, add_pooling_layer=True):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embeddings_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        # Not used in `forward`; it stands here because BertModel's files hold it.
        self.pooler = (
            nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        )
        self._initialize(*self.modules())

    def forward(self, input_ids, cu_seqlens, *, max_seqlen=None, seed=None, rows=None):
        """Encodes a packed micro-batch.

        input_ids: (T,) int64. cu_seqlens: (B+1,) int32, from 0 to T. max_seqlen: int, an upper bound on the lengths; the config's
        max_position_embeddings where None. seed: int or 0-d int64 tensor that fixes the dropout masks; None draws one from torch's
        generator. Dropout acts in training mode only. rows: (R,) int64, the tokens whose states are asked for; all where None.
        Returns (T, H), or (R, H) with rows. Raises ValueError for a sequence longer than the positions (looked at where that makes no
        GPU wait: on a CPU).
        """
        if input_ids.dim() != 1:
            raise ValueError(
                f"input_ids must be (T,), sequences end to end without padding, got {tuple(input_ids.shape)}"
            )
        config, T = self.config, len(input_ids)
        if kernels.lengths_visible(cu_seqlens) and len(cu_seqlens) > 1:
            _check_length(int(cu_seqlens.diff().max()), config)
        max_seqlen = max_seqlen or config.max_position_embeddings
        dropout = float(self.training)  # 0 or 1, times each probability
        if seed is None:
            seed = torch.randint(2**62, (), device=input_ids.device) if self.training else 0
        seeds = seed + torch.arange(
            3 * len(self.layers) + 1, device=input_ids.device
        )  # each mask of the step has a Philox key of its own
        token = torch.arange(T, device=input_ids.device, dtype=torch.int32)
        # Which sequence each token is in, without a GPU sync: (T,). Not by the slice cu_seqlens[1:], of which torch.compile forgets on a
        # GPU where it starts (PyTorch issue 160964).
        sequence = torch.bucketize(token, cu_seqlens, right=True) - 1
        position = token - cu_seqlens[sequence]  # (T,)
        h = (
            self.word_embeddings(input_ids)
            + self.position_embeddings(position)
            + self.token_type_embeddings.weight[0]
        )  # (T, H)
        h = kernels.dropout(
            _norm(self.embeddings_norm, h), config.hidden_dropout_prob * dropout, seeds[0]
        )
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            h = layer(
                h,
                cu_seqlens,
                max_seqlen,
                dropout,
                seeds[3 * i + 1 : 3 * i + 4],
                rows if last else None,
            )
        return h


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies in fp32, 256 rows at a time: the logits are never copied to fp32 whole, and their gradient takes their place.

    Of a vocabulary of 49,156 the logits are the largest tensor of the step, and F.cross_entropy of bf16 makes four more, of fp32.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        total = torch.zeros((), device=logits.device)
        gradient = logits.detach()
        for rows, targets in zip(gradient.split(256), labels.split(256)):
            counted = (targets != -100).unsqueeze(1)  # (256, 1)
            targets = targets.unsqueeze(1).masked_fill(
                ~counted, 0
            )  # not clamp: another negative is an error
            log_p = rows.float().log_softmax(1)
            total -= (log_p.gather(1, targets) * counted).sum()
            rows.copy_(
                log_p.exp_()
                .scatter_add_(1, targets, torch.full_like(targets, -1, dtype=log_p.dtype))
                .mul_(counted)
            )  # softmax - one-hot
        ctx.save_for_backward(logits)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        for rows in gradient.split(256):
            rows.copy_(
                rows.float() * upstream
            )  # upstream in bf16 would scale the whole gradient by its rounding error
        return gradient, None


def cross_entropy(logits, labels, overwrite=True):
    """Mean over the labels that are not -100, in fp32 at least; 0 where there is none (a batch may have no mask), not 0 / 0.

    overwrite: nobody needs logits of half precision any more.
    """
    half = (
        logits.dtype in (torch.bfloat16, torch.float16)
        and torch.is_grad_enabled()
        and logits.requires_grad
        and not logits.is_leaf
    )
    if (
        overwrite and half and not torch.compiler.is_compiling()
    ):  # torch.compile fuses the formula itself, and makes no copy either
        summed = (
            kernels.CrossEntropy if kernels.backend(logits) == "triton" else _SummedCrossEntropy
        )
        total = summed.apply(logits, labels)
    else:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, labels, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


class PreTrainingOutput(NamedTuple):
    """What `StarEncoderForPreTraining` returns; None where it was not asked for."""

    loss: torch.Tensor | None = None  # mlm_loss + nsp_loss
    mlm_loss: torch.Tensor | None = (
        None  # mean cross-entropy over the masked tokens, in nats; 0 where there is none
    )
    nsp_loss: torch.Tensor | None = None  # mean cross-entropy over the pairs
    mlm_logits: torch.Tensor | None = None  # (T, V), or (M, V) at masked_positions
    nsp_logits: torch.Tensor | None = None  # (B, 2)


class StarEncoderForPreTraining(_Bert):
    """The encoder with its two pretraining heads, masked tokens and next sentence (transformers' BertForPreTraining)."""

    architecture = "BertForPreTraining"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = StarEncoder(config)
        self.mlm_transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlm_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlm_decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        # Where nothing is tied, the files of transformers hold a second bias, which no forward pass
        # reads: kept, to be written back.
        self.register_buffer("unread_bias", None, persistent=False)
        self.nsp = nn.Linear(config.hidden_size, 2)
        self._initialize(self.mlm_transform, self.mlm_decoder, self.nsp)
        if config.tie_word_embeddings:
            self.mlm_decoder.weight = self.bert.word_embeddings.weight

    def mlm_head(self, h):
        """(M, H) -> logits (M, V), on a GPU with columns of -inf behind them, up to a multiple of 64.

        The fastest matrix products need rows of a multiple of 16 bytes, which 49,156 columns are not.
        """
        h = _norm(self.mlm_norm, F.gelu(self.mlm_transform(h)))
        weight, bias = self.mlm_decoder.weight, self.mlm_bias.to(h.dtype)
        missing = -len(bias) % 64
        if h.is_cuda and missing:
            weight = F.pad(weight.to(h.dtype), (0, 0, 0, missing))
            bias = F.pad(bias, (0, missing), value=float("-inf"))
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
        """Logits, or losses where there are labels.

        input_ids, cu_seqlens, max_seqlen, seed: as in `StarEncoder`. masked_positions: (M,) int64, the rows to predict at.
        labels: (M,) with masked_positions, else (T,) with -100 where nothing is to be predicted. next_sentence_label: (B,) int64,
        1 where B follows A. Returns a `PreTrainingOutput`.
        """
        if kernels.lengths_visible(cu_seqlens) and (cu_seqlens.diff() < 1).any():
            raise ValueError(
                "every sequence needs a token, its <cls>: cu_seqlens must rise at each step"
            )
        if (
            labels is not None and masked_positions is None
        ):  # convenient; on a GPU this waits, so the training loop names the positions
            masked_positions = (labels != -100).nonzero().squeeze(1)
            labels = labels[masked_positions]
        cls, rows = cu_seqlens[:-1].long(), None  # (B,): each sequence begins with its <cls>
        if (
            masked_positions is not None
        ):  # the head is a quarter of the model's work, the last layer's second half a twentieth, and
            rows = torch.cat(
                [cls, masked_positions]
            )  # what they compute of other tokens nobody reads
        h = self.bert(
            input_ids, cu_seqlens, max_seqlen=max_seqlen, seed=seed, rows=rows
        )  # (T, H) or (B + M, H)
        pooled = torch.tanh(self.bert.pooler(h[cls] if rows is None else h[: len(cls)]))  # (B, H)
        nsp_logits = self.nsp(pooled)  # (B, 2)
        mlm_logits = self.mlm_head(h if rows is None else h[len(cls) :])
        if labels is None and next_sentence_label is None:
            return PreTrainingOutput(
                mlm_logits=mlm_logits[:, : self.config.vocab_size], nsp_logits=nsp_logits
            )
        mlm_loss = nsp_loss = None
        if labels is not None:
            mlm_loss = cross_entropy(mlm_logits, labels)
        if next_sentence_label is not None:
            nsp_loss = cross_entropy(nsp_logits, next_sentence_label)
        loss = sum(part for part in (mlm_loss, nsp_loss) if part is not None)
        return PreTrainingOutput(loss, mlm_loss, nsp_loss)


class TokenClassificationOutput(NamedTuple):
    """What `StarEncoderForTokenClassification` returns."""

    loss: torch.Tensor | None  # mean cross-entropy over the labelled tokens, in nats
    logits: torch.Tensor  # (T, C)


class StarEncoderForTokenClassification(_Bert):
    """The encoder with one linear layer per token, as in StarPII (transformers' BertForTokenClassification)."""

    architecture = "BertForTokenClassification"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = StarEncoder(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._initialize(self.classifier)

    def forward(self, input_ids, cu_seqlens, labels=None, *, max_seqlen=None, seed=None):
        """input_ids, cu_seqlens, max_seqlen, seed: as in `StarEncoder`. labels: (T,) int64, -100 where a token does not count.
        Returns a `TokenClassificationOutput`."""
        if seed is None:
            seed = torch.randint(2**62, (), device=input_ids.device) if self.training else 0
        h = self.bert(input_ids, cu_seqlens, max_seqlen=max_seqlen, seed=seed)  # (T, H)
        p = (
            self.config.hidden_dropout_prob
            if self.config.classifier_dropout is None
            else self.config.classifier_dropout
        )
        h = kernels.dropout(
            h, p * float(self.training), seed + 3 * self.config.num_hidden_layers + 1
        )
        logits = self.classifier(h)  # (T, C)
        return TokenClassificationOutput(
            None if labels is None else cross_entropy(logits, labels, overwrite=False), logits
        )


# ---- files -----------------------------------------------------------------------------------------------------------------------

# Names here -> names in the files of transformers' Bert*. Queries, keys and values are one matrix here and three there.
BERT_NAMES = {
    "layers.": "encoder.layer.",
    "attention_output.": "attention.output.dense.",
    "attention_norm.": "attention.output.LayerNorm.",
    "feed_forward_up.": "intermediate.dense.",
    "feed_forward_down.": "output.dense.",
    "feed_forward_norm.": "output.LayerNorm.",
    "embeddings_norm.": "embeddings.LayerNorm.",
    "word_embeddings.": "embeddings.word_embeddings.",
    "position_embeddings.": "embeddings.position_embeddings.",
    "token_type_embeddings.": "embeddings.token_type_embeddings.",
    "pooler.": "pooler.dense.",
    "mlm_transform.": "cls.predictions.transform.dense.",
    "mlm_norm.": "cls.predictions.transform.LayerNorm.",
    "mlm_bias": "cls.predictions.bias",
    "mlm_decoder.": "cls.predictions.decoder.",
    "nsp.": "cls.seq_relationship.",
}
WORDS, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
QKV = ("attention.self.query.", "attention.self.key.", "attention.self.value.")


def _bert_names(name):
    """The name(s) in a Bert file of the parameter `name` of a model here: three for a fused qkv, one otherwise."""
    for ours, theirs in BERT_NAMES.items():
        name = ("." + name).replace("." + ours, "." + theirs, 1)[1:]
    return [name.replace("qkv.", part) for part in QKV] if "qkv." in name else [name]


def _write_files(model, directory):
    from safetensors.torch import save

    os.makedirs(directory, exist_ok=True)
    weights = {}
    for name, parameter in model.named_parameters():  # a tied decoder is counted, and written, once
        names = _bert_names(name)
        weights |= {
            n: part.detach().cpu().contiguous()
            for n, part in zip(names, parameter.chunk(len(names)))
        }
    unread = getattr(model, "unread_bias", None)
    if DECODER in weights or unread is not None:
        # Not tied: transformers then reads the decoder's bias, under its own name.
        weights[DECODER_BIAS] = weights[BIAS].clone()
    if unread is not None:
        weights[BIAS] = unread.detach().cpu().contiguous()
    model.config.save(directory, model.architecture)
    path = os.path.join(directory, "model.safetensors")
    with open(path + ".tmp", "wb") as f:
        f.write(save(weights, metadata={"format": "pt"}))
    os.replace(
        path + ".tmp", path
    )  # whoever reads sees the old weights or the new ones, never half


def _read_files(cls, directory, overrides):
    if not os.path.isdir(directory):
        directory = download(directory)
    config = replace(StarEncoderConfig.load(directory), **overrides)
    weights = read_weights(directory)
    weights = {
        n.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): w
        for n, w in weights.items()
    }
    if not any(
        name.startswith("bert.") for name in weights
    ):  # BertModel is saved without the prefix that models with heads have
        weights = {
            name if name.startswith("classifier.") else "bert." + name: w
            for name, w in weights.items()
        }
    _check_shapes(weights, config, directory)
    unread = _untie(weights, config)

    model, new, used = cls(config), [], set()
    for name, parameter in model.named_parameters():
        names = _bert_names("bert." + name if cls is StarEncoder else name)
        used.update(names)
        parts = [weights.get(n) for n in names]
        if any(part is None for part in parts):
            if not name.startswith(("classifier.", "pooler.", "bert.pooler.", "nsp.")):
                raise ValueError(f"{directory}: the weights lack {names[0]}")
            new.append(name)
            continue
        for n, part, place in zip(names, parts, parameter.data.chunk(len(names))):
            if not part.is_floating_point():
                raise ValueError(f"{directory}: {n} is not made of floating-point numbers")
            if part.shape != place.shape:
                words = f"{n} is {tuple(part.shape)}, its config.json asks for {tuple(place.shape)}"
                raise ValueError(f"{directory}: {words}")
            place.copy_(part)
    if extra := [name for name in weights if name.startswith("bert.encoder.") and name not in used]:
        raise ValueError(f"{directory}: config.json has no place for the weights {extra[0]}")
    if unread is not None and cls is StarEncoderForPreTraining:
        model.unread_bias = unread
    if new:
        print(f"{directory}: new weights for {', '.join(new)} (not in the files)", file=sys.stderr)
    return model.eval()


def _check_shapes(weights, config, directory):
    """Raises ValueError where config.json does not fit the weights, before a model is made.

    Its sizes may be huge.
    """
    H = config.hidden_size
    expected = {
        WORDS: (config.vocab_size, H),
        "bert.embeddings.position_embeddings.weight": (config.max_position_embeddings, H),
        "bert.embeddings.token_type_embeddings.weight": (config.type_vocab_size, H),
        "bert.encoder.layer.0.intermediate.dense.weight": (config.intermediate_size, H),
        f"bert.encoder.layer.{config.num_hidden_layers - 1}.output.dense.bias": (H,),
    }
    for name, shape in expected.items():
        if name == WORDS and name not in weights:
            name = DECODER  # tied, and stored under the other name
        if name not in weights:
            raise ValueError(f"{directory}: the weights lack {name}")
        if weights[name].shape != shape:
            words = f"{name} is {tuple(weights[name].shape)}, its config.json asks for {shape}"
            raise ValueError(f"{directory}: {words}")


def _untie(weights, config):
    """Puts the decoder's weight and bias where they are looked for here, tied or not.

    As transformers: what the files hold twice, and differently, is not tied, whatever the config
    says. The forward pass reads the decoder's bias; `cls.predictions.bias` is its other name, and
    where the two differ, is not read. Returns it then, else None. Changes `weights` and `config`.
    """
    if DECODER in weights and WORDS in weights and not _same(weights[DECODER], weights[WORDS]):
        config.tie_word_embeddings = False
    if config.tie_word_embeddings:  # the files may hold either name
        weights.setdefault(WORDS, weights.get(DECODER))
        weights.setdefault(DECODER, weights[WORDS])

    if DECODER_BIAS not in weights:  # transformers 4 writes one bias, tied or not
        return None
    decoder_bias, other = weights.pop(DECODER_BIAS), weights.get(BIAS)
    weights[BIAS] = decoder_bias
    if other is None or other.shape != decoder_bias.shape:
        return None
    tied = config.tie_word_embeddings and _same(decoder_bias, other)
    return None if tied else other


def _same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


# ---- use -------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill_mask(model, tokenizer, text, top_k=5):
    """What the model would write at each `<mask>` of `text`.

    model: a `StarEncoderForPreTraining`. tokenizer: a `data.Tokenizer`. Returns one list for each `<mask>`, of its `top_k` candidates,
    best first: dicts with `token` (id), `token_str` and `score` (probability), as transformers' fill-mask pipeline has them.
    Raises ValueError for a text without `<mask>`, or longer than the model's positions, or a top_k below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    pieces = [tokenizer.encode(piece) for piece in text.split("<mask>")]
    if len(pieces) == 1:
        raise ValueError("the text has no <mask>")
    ids, masked = [tokenizer.cls_id, *pieces[0]], []
    for piece in pieces[1:]:
        masked.append(len(ids))
        ids += [tokenizer.mask_id, *piece]
    ids.append(tokenizer.sep_id)
    _check_length(len(ids), model.config)
    training, device = model.training, model.mlm_bias.device
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
    model.eval()
    try:
        out = model(
            torch.tensor(ids, device=device),
            cu_seqlens,
            masked_positions=torch.tensor(masked, device=device),
        )
    finally:
        model.train(training)
    probabilities = out.mlm_logits.float().softmax(-1)[
        :, : tokenizer.vocab_size
    ]  # some models pad their vocabulary
    scores, tokens = probabilities.topk(min(top_k, tokenizer.vocab_size))
    return [
        [
            {"score": score, "token": token, "token_str": tokenizer.decode([token])}
            for score, token in zip(*rows)
        ]
        for rows in zip(scores.tolist(), tokens.tolist())
    ]


@torch.no_grad()
def embed(model, tokenizer, texts):
    """One vector for each text: the mean of its last hidden states, scaled to length 1, so that a dot product is a cosine.

    model: any of the three models here. A text longer than the model's positions is read in windows, and all its tokens count.
    Returns (len(texts), H) fp32 on the CPU. (The original takes the state of the last `<sep>` instead; the mean needs no fine-tuning.)
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list of str, got one str")
    model = getattr(model, "bert", model)
    if model.config.max_position_embeddings < 3:
        positions = model.config.max_position_embeddings
        raise ValueError(f"the model's {positions} positions leave no room for text")
    device, training, room = (
        model.word_embeddings.weight.device,
        model.training,
        model.config.max_position_embeddings - 2,
    )
    vectors = torch.zeros(len(texts), model.config.hidden_size)
    model.eval()
    try:
        for vector, text in zip(vectors, texts):
            ids = tokenizer.encode(text)
            for start in range(
                0, max(len(ids), 1), room
            ):  # an empty text still has its <cls> and <sep>
                window = torch.tensor(
                    [tokenizer.cls_id, *ids[start : start + room], tokenizer.sep_id], device=device
                )
                vector += (
                    model(window, torch.tensor([0, len(window)], dtype=torch.int32, device=device))
                    .float()
                    .sum(0)
                    .cpu()
                )
    finally:
        model.train(training)
    return F.normalize(vectors, dim=-1)


def main(argv=None):
    """The command line: `fill-mask RUN TEXT`, `embed RUN FILE...`."""
    from common.command_line import CommandLine
    from corpus.tokenizer import (
        Tokenizer,  # for the command line only: the model itself rests on the kernels alone
    )

    parser = CommandLine(prog="starencoder.py", description="Use a trained StarEncoder.")
    commands = parser.add_subparsers(dest="command", required=True)
    fill = commands.add_parser(
        "fill-mask", help="what the model would write at each <mask> of a text"
    )
    fill.add_argument(
        "run", help="a run directory, any Hugging Face Bert directory, or a name on the hub"
    )
    fill.add_argument("text", help='such as "def add(a, b): return a <mask> b"')
    fill.add_argument(
        "--top-k",
        type=int,
        default=5,
        metavar="N",
        help="tokens to show for each mask (default: 5)",
    )
    vectors = commands.add_parser("embed", help="one JSON line with a unit vector for each file")
    vectors.add_argument("run", help="as for fill-mask")
    vectors.add_argument("files", nargs="+", metavar="FILE", help="text files")
    arguments = parser.parse_args(argv)

    directory = arguments.run if os.path.isdir(arguments.run) else download(arguments.run)
    tokenizer = Tokenizer.from_pretrained(directory)
    model = (
        StarEncoderForPreTraining if arguments.command == "fill-mask" else StarEncoder
    ).from_pretrained(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{directory}: its tokenizer has {tokenizer.vocab_size} tokens, its model {model.config.vocab_size}"
        )
    if arguments.command == "fill-mask":
        for candidates in fill_mask(model, tokenizer, arguments.text, arguments.top_k):
            print(
                "\n".join(f"{c['score']:7.2%}  {c['token_str']!r}" for c in candidates), end="\n\n"
            )
        return
    for path in arguments.files:
        with open(path, encoding="utf-8") as f:
            try:
                text = f.read()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 text ({error})") from None
        print(json.dumps({"file": path, "embedding": embed(model, tokenizer, [text])[0].tolist()}))


if __name__ == "__main__":
    from common.command_line import run_command

    run_command(main)
