"""StarEncoder: a BERT encoder for code, its pretraining heads, and Hugging Face files in and out.

    h = dropout(LN(word[token] + position[place in its sequence] + type[0]))
    in each layer, post-LayerNorm (the sum is normalized, not the branch):
        a = attention(h W_qkv) W_o;    h <- LN(dropout(a) + h)
        f = GELU(h W_up) W_down;       h <- LN(dropout(f) + h)
    MLM logits = LN(GELU(h W_t)) E^T + b       E: the word embeddings again (tied)
    NSP logits = tanh(h[<cls>] W_p) W_n        label 1: B follows A; 0: B is from another document

The published model has 12 layers, hidden size 768, 12 heads, intermediate size 3072, 1,024
positions and a vocabulary of 49,156: 124.8 M parameters.

There is no padding. The sequences of a micro-batch stand end to end, and `cu_seqlens` says where
each begins. Letters in shapes: B sequences, T tokens in the micro-batch, H hidden, N heads,
D = H / N, V vocabulary, M masked positions, C classes, R rows asked for.

References: Devlin et al., BERT, 2018; Li et al., StarCoder: may the source be with you!, 2023,
section 4; the model card of bigcode/starencoder. Left out: decoding, cross attention, relative
positions, and the second type embedding, which the original never uses either.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from common import weights as weight_files
from common.command_line import CommandLine, run_command
from common.files import read_json, write_whole

# ---- the config ----------------------------------------------------------------------------------


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
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    max_position_embeddings: int = 1024
    type_vocab_size: int = 2
    initializer_range: float = 0.02  # standard deviation of the first weights
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 49152  # not used here; transformers asks for it
    tie_word_embeddings: bool = True
    id2label: dict | None = None  # the classes' names; None: two classes, as in transformers

    def __post_init__(self):
        check_config(self)

    @property
    def num_labels(self):
        """Number of classes of a token-classification head."""
        return 2 if self.id2label is None else len(self.id2label)

    def save(self, directory, architecture):
        """Writes config.json for the class `architecture` of transformers, such as BertModel."""
        entries = {"model_type": "bert", "architectures": [architecture]}
        entries |= {name: value for name, value in asdict(self).items() if value is not None}
        if self.id2label is not None:
            entries["label2id"] = {label: number for number, label in self.id2label.items()}
        write_whole(os.path.join(directory, "config.json"), json.dumps(entries, indent=2))

    @classmethod
    def load(cls, directory):
        """Reads config.json of a Bert model; raises ValueError for what is not supported here."""
        path = os.path.join(directory, "config.json")
        entries = BERT_DEFAULTS | read_json(path)
        positions = entries.get("position_embedding_type", "absolute")
        try:
            if entries.get("model_type", "bert") != "bert" or entries.get("is_decoder"):
                raise ValueError("not a Bert encoder")
            if positions != "absolute":
                raise ValueError(f"position_embedding_type must be absolute, got {positions}")
            labels = entries.get("id2label")
            if isinstance(labels, dict):  # the keys of a JSON object are strings
                numbers = (int(key) if key.isdecimal() else key for key in labels)
                entries["id2label"] = dict(zip(numbers, labels.values()))
            return cls(**{f.name: entries[f.name] for f in fields(cls) if f.name in entries})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


# Where BertConfig's defaults are not StarEncoder's: transformers leaves defaults out of the file.
BERT_DEFAULTS = {"vocab_size": 30522, "max_position_embeddings": 512, "pad_token_id": 0}


def check_config(config):
    """Raises ValueError for a value of a wrong type or size: config.json may hold anything."""
    # By the annotated type: an int is a size, a float a probability or another small number.
    for f in fields(config):
        value = getattr(config, f.name)
        kind = type(value)  # and not isinstance, which takes true for an int
        if f.type is int and (kind is not int or value < 1):
            raise ValueError(f"{f.name} must be at least 1, got {value!r}")
        if f.type is bool and kind is not bool:
            raise ValueError(f"{f.name} must be true or false, got {value!r}")
        if f.type == float | None and value is None:
            continue
        if f.type in (float, float | None) and (kind not in (int, float) or not 0 <= value < 1):
            raise ValueError(f"{f.name} must be a number in [0, 1), got {value!r}")

    if config.hidden_size % config.num_attention_heads:
        sizes = f"{config.hidden_size} and {config.num_attention_heads}"
        raise ValueError(f"hidden_size must be divisible by num_attention_heads, got {sizes}")
    if config.hidden_act != "gelu":
        raise ValueError(f'hidden_act must be "gelu", got {config.hidden_act!r}')
    labels = config.id2label
    if labels is not None:
        named = isinstance(labels, dict) and all(type(name) is str for name in labels.values())
        if not named or not labels or set(labels) != set(range(len(labels))):
            raise ValueError(f"id2label must name the classes 0, 1, ..., got {str(labels)[:60]}")


# ---- the encoder ---------------------------------------------------------------------------------


class LayerSeeds(NamedTuple):
    """The seeds of the three dropout masks of a layer."""

    attention: torch.Tensor  # of the attention weights; (), int64, as all seeds
    attention_output: torch.Tensor
    feed_forward: torch.Tensor


class DropoutSeeds(NamedTuple):
    """The seeds of all dropout masks of a step."""

    embeddings: torch.Tensor
    layers: list[LayerSeeds]
    classifier: torch.Tensor  # of a token-classification head


def dropout_seeds(seed, layers, device):
    """Gives each dropout mask of a step a seed of its own: seed, seed + 1, ... in order of use.

    seed: int or 0-d int64 tensor; None: a random one. layers: int, how many. Returns a
    `DropoutSeeds`.
    """
    if seed is None:
        seed = torch.randint(2**62, (), device=device)
    # Tensors and not ints, which torch.compile would build into its code.
    seeds = (seed + torch.arange(3 * layers + 2, device=device)).unbind()
    by_layer = [LayerSeeds(*seeds[1 + 3 * i : 4 + 3 * i]) for i in range(layers)]
    return DropoutSeeds(seeds[0], by_layer, seeds[-1])


def fused_norm(norm, x, residual=None, dropout_p=0.0, seed=0):
    """LN(dropout(x) + residual) in one kernel, with the weights of the nn.LayerNorm `norm`."""
    return kernels.layer_norm(
        x, norm.weight, norm.bias, norm.eps, residual=residual, dropout_p=dropout_p, seed=seed
    )


class Layer(nn.Module):
    """One post-LayerNorm block: attention, then feed-forward. (T, H) -> (T, H)."""

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.qkv = nn.Linear(H, 3 * H)  # queries, keys and values of all heads
        self.attention_output = nn.Linear(H, H)
        self.attention_norm = nn.LayerNorm(H, config.layer_norm_eps)
        self.feed_forward_up = nn.Linear(H, config.intermediate_size)  # (T, H) -> (T, 4 H)
        self.feed_forward_down = nn.Linear(config.intermediate_size, H)  # and back
        self.feed_forward_norm = nn.LayerNorm(H, config.layer_norm_eps)

    def forward(self, h, cu_seqlens, max_seqlen, seeds, rows=None):
        """h: (T, H). seeds: a `LayerSeeds`. The others: as in `StarEncoder`."""
        config = self.config
        attention_p = config.attention_probs_dropout_prob if self.training else 0.0
        hidden_p = config.hidden_dropout_prob if self.training else 0.0

        # Attention, residual, LayerNorm.
        qkv = self.qkv(h).unflatten(-1, (3, config.num_attention_heads, -1))  # (T, 3, N, D)
        a = kernels.attention(
            qkv, cu_seqlens, max_seqlen, dropout_p=attention_p, seed=seeds.attention
        )
        a = a.flatten(1)  # (T, N, D) -> (T, H)
        if rows is not None:  # all tokens were attended to; only these go on, so T is R from here
            a = a[rows]  # (R, H)
            h = h[rows]  # (R, H)
        a = self.attention_output(a)  # (T, H)
        h = fused_norm(self.attention_norm, a, h, hidden_p, seeds.attention_output)

        # Feed-forward, residual, LayerNorm.
        f = F.gelu(self.feed_forward_up(h))  # (T, 4 H), as in the published model
        f = self.feed_forward_down(f)  # (T, H)
        return fused_norm(self.feed_forward_norm, f, h, hidden_p, seeds.feed_forward)


class PretrainedModel(nn.Module):
    """What the models share: first weights, and the files of transformers."""

    architecture = None  # the class of transformers that reads and writes the same files

    def initialize(self, *modules):
        """BERT's first weights: matrices normal with a small deviation, biases 0."""
        for module in modules:
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors, as `architecture` of transformers does."""
        weights = weight_files.of_module(self, bert_names)
        unread_bias = getattr(self, "unread_bias", None)
        # The reverse of `settle_decoder`: in a file, an untied decoder has a bias of its own.
        if DECODER in weights or unread_bias is not None:
            weights[DECODER_BIAS] = weights[BIAS]
            weights[BIAS] = weights[BIAS].clone() if unread_bias is None else unread_bias
        os.makedirs(directory, exist_ok=True)
        self.config.save(directory, self.architecture)
        weight_files.write(directory, weights)

    @classmethod
    def from_pretrained(cls, directory, **overrides):
        """Reads any Bert directory of transformers: safetensors or pickled, whole or in shards.

        directory: its path, or its name on the Hugging Face hub. overrides: fields of the config to
        replace, such as the classes of a new head, `id2label={0: "O", ...}`. A head or pooler that
        the files lack starts from random weights, and a line on stderr says so. Returns the model
        in evaluation mode, as transformers does. Raises ValueError if weights and config do not fit
        together, FileNotFoundError if there are none.
        """
        directory = weight_files.local_directory(directory)
        config = replace(StarEncoderConfig.load(directory), **overrides)
        weights = weight_files.read(directory)
        weights = {short_name(name): value for name, value in weights.items()}
        try:
            unread_bias = settle_decoder(weights, config)
            check_sizes(weights, config)  # before a model is built: they may be huge
            model = cls(config)
            # A model with heads has its encoder's parameters under bert., an encoder does not.
            weights |= {"bert." + name: value for name, value in weights.items()}
            new = weight_files.fill_module(model, weights, bert_names, OPTIONAL)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        if cls is StarEncoderForPreTraining:
            model.unread_bias = unread_bias
        if new:
            words = f"new weights for {', '.join(new)} (not in the files)"
            print(f"{directory}: {words}", file=sys.stderr)
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
        # Only the next-sentence head uses it; it stands here since BertModel's files hold it.
        self.pooler = nn.Linear(H, H) if add_pooling_layer else None
        self.initialize(*self.modules())

    def forward(self, input_ids, cu_seqlens, *, max_seqlen=None, seed=None, rows=None):
        """The last hidden states of a packed micro-batch: (T, H), or (R, H) with rows.

        input_ids: (T,) int64. cu_seqlens: (B+1,) int32, from 0 to T. max_seqlen: int, no sequence
        is longer; None: max_position_embeddings. seed: int or 0-d int64 tensor, fixes the dropout
        masks; None: drawn from torch's generator. Dropout acts in training mode only.

        rows: (R,) int64, the tokens whose states are wanted; None: all. In the last layer these
        still attend to all tokens of their sequence, but what follows is computed for them alone.

        Raises ValueError for an empty sequence or one longer than the positions, unless cu_seqlens
        is on a GPU: to look at it would be to wait for the GPU.
        """
        config = self.config
        check_inputs(input_ids, cu_seqlens, config)
        max_seqlen = max_seqlen or config.max_position_embeddings
        # Evaluation uses no seed, and leaves torch's generator alone.
        seed = seed if self.training else 0
        seeds = dropout_seeds(seed, len(self.layers), input_ids.device)

        # The place of each token in its sequence, without a GPU sync. bucketize gets cu_seqlens
        # whole: torch.compile forgets where the slice cu_seqlens[1:] starts on a GPU (PyTorch
        # issue 160964).
        token = torch.arange(len(input_ids), device=input_ids.device, dtype=torch.int32)
        sequence = torch.bucketize(token, cu_seqlens, right=True) - 1  # (T,)
        position = token - cu_seqlens[sequence]  # (T,)

        h = self.word_embeddings(input_ids) + self.position_embeddings(position)  # (T, H)
        h = fused_norm(self.embeddings_norm, h + self.token_type_embeddings.weight[0])  # (T, H)
        p = config.hidden_dropout_prob if self.training else 0.0
        h = kernels.dropout(h, p, seeds.embeddings)
        for layer, layer_seeds in zip(self.layers, seeds.layers):
            last = layer is self.layers[-1]
            h = layer(h, cu_seqlens, max_seqlen, layer_seeds, rows if last else None)
        return h


def check_inputs(input_ids, cu_seqlens, config):
    """Raises ValueError for inputs that are no packed sequences for this model."""
    if input_ids.dim() != 1:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids must be (T,), end to end without padding, got {shape}")
    if kernels.lengths_visible(cu_seqlens) and len(cu_seqlens) > 1:
        lengths = cu_seqlens.diff()  # (B,)
        if lengths.min() < 1:
            raise ValueError("every sequence needs a token, its <cls>: cu_seqlens must rise")
        longest = int(lengths.max())
        room = f"the model's {config.max_position_embeddings} positions"
        if longest > config.max_position_embeddings:
            raise ValueError(f"a sequence of {longest} tokens is longer than {room}")


# ---- the heads -----------------------------------------------------------------------------------


class ChunkedCrossEntropy(torch.autograd.Function):
    """`kernels.CrossEntropy` in PyTorch: the sum of cross-entropies in fp32, 256 rows at a time.

    The logits, of 49,156 columns, are the largest tensor of a step, and F.cross_entropy would copy
    them to fp32 four times. Here their gradient takes their place, already in the forward pass.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        total = torch.zeros((), device=logits.device)
        gradient = logits.detach()  # the same memory
        for rows, targets in zip(gradient.split(256), labels.split(256)):
            counted = (targets != -100).unsqueeze(1)  # (256, 1)
            # Not clamp(min=0): a label of -7 must stay an error.
            targets = targets.unsqueeze(1).masked_fill(~counted, 0)
            log_p = rows.float().log_softmax(1)  # (256, V)
            total -= (log_p.gather(1, targets) * counted).sum()

            # The gradient of the sum: softmax - one-hot.
            p = log_p.exp_()
            p.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=p.dtype))
            rows.copy_(p.mul_(counted))
        ctx.save_for_backward(logits)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        for rows in gradient.split(256):
            # In fp32: the rounding error of a factor in bf16 would scale the whole gradient.
            rows.copy_(rows.float() * upstream)
        return gradient, None


def cross_entropy(logits, labels, overwrite=True):
    """Mean cross-entropy in nats over the labels that are not -100; 0 if there are none.

    logits: (M, V). labels: (M,) int64. overwrite: may overwrite logits of half precision with their
    gradient; nobody may then read them, and there is one backward pass. Returns (), fp32 at least.
    """
    half = logits.dtype in (torch.bfloat16, torch.float16)
    # A leaf is the caller's own tensor and not ours to overwrite.
    trained = torch.is_grad_enabled() and logits.requires_grad and not logits.is_leaf
    # torch.compile fuses PyTorch's formula by itself, and makes no copies either.
    if overwrite and half and trained and not torch.compiler.is_compiling():
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
        self.unread_bias = None  # of files that hold two, see `settle_decoder`
        self.nsp = nn.Linear(H, 2)  # W_n; W_p is the encoder's pooler
        self.initialize(self.mlm_transform, self.mlm_decoder, self.nsp)
        if config.tie_word_embeddings:
            self.mlm_decoder.weight = self.bert.word_embeddings.weight

    def mlm_head(self, h):
        """(M, H) -> logits (M, V); on a GPU, columns of -inf round V up to a multiple of 64."""
        h = fused_norm(self.mlm_norm, F.gelu(self.mlm_transform(h)))  # (M, H)
        weight = self.mlm_decoder.weight  # (V, H)
        bias = self.mlm_bias.to(h.dtype)
        # The fastest matrix products need rows of a multiple of 16 bytes, unlike 49,156 columns.
        missing = -len(bias) % 64
        if h.is_cuda and missing:
            weight = F.pad(weight.to(h.dtype), (0, 0, 0, missing))
            bias = F.pad(bias, (0, missing), value=float("-inf"))
        return F.linear(h, weight, bias)

    def forward(
        self,
        input_ids,  # (T,) int64
        cu_seqlens,  # (B+1,) int32
        labels=None,  # (M,) int64 at masked_positions, or without those (T,), -100: no label
        next_sentence_label=None,  # (B,) int64, 1 if B follows A
        masked_positions=None,  # (M,) int64, the tokens to predict
        *,
        max_seqlen=None,  # as in `StarEncoder`
        seed=None,
    ):
        """A `PreTrainingOutput`: the losses for the given labels, or logits if there are none."""
        if labels is not None and masked_positions is None:
            # Convenient, but nonzero waits for a GPU: the training loop passes the positions.
            masked_positions = (labels != -100).nonzero().squeeze(1)
            labels = labels[masked_positions]

        # The heads need only <cls> and masked tokens. The second half of the last layer and the MLM
        # head, a quarter of the model's work, skip all others.
        cls = cu_seqlens[:-1].long()  # (B,): each sequence begins with its <cls>
        rows = None if masked_positions is None else torch.cat([cls, masked_positions])  # (B + M,)
        h = self.bert(input_ids, cu_seqlens, max_seqlen=max_seqlen, seed=seed, rows=rows)
        h_cls = h[cls] if rows is None else h[: len(cls)]  # (B, H)
        h_masked = h if rows is None else h[len(cls) :]  # (M, H), or (T, H)

        nsp_logits = self.nsp(torch.tanh(self.bert.pooler(h_cls)))  # (B, 2)
        mlm_logits = self.mlm_head(h_masked)  # (M, V), or a few more columns
        if labels is None and next_sentence_label is None:
            mlm_logits = mlm_logits[:, : self.config.vocab_size]
            return PreTrainingOutput(mlm_logits=mlm_logits, nsp_logits=nsp_logits)
        mlm_loss = None
        if labels is not None:
            mlm_loss = cross_entropy(mlm_logits, labels)
        nsp_loss = None
        if next_sentence_label is not None:
            nsp_loss = cross_entropy(nsp_logits, next_sentence_label)
        loss = sum(part for part in (mlm_loss, nsp_loss) if part is not None)
        return PreTrainingOutput(loss, mlm_loss, nsp_loss)


class TokenClassificationOutput(NamedTuple):
    """What `StarEncoderForTokenClassification` returns."""

    loss: torch.Tensor | None  # mean cross-entropy over the labelled tokens, in nats
    logits: torch.Tensor  # (T, C)


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
        """A `TokenClassificationOutput`.

        labels: (T,) int64, -100 for a token without one. The other arguments: as in `StarEncoder`.
        """
        config = self.config
        seed = seed if self.training else 0  # as in `StarEncoder`
        seeds = dropout_seeds(seed, config.num_hidden_layers, input_ids.device)
        # The encoder's masks count up from the first of these.
        h = self.bert(input_ids, cu_seqlens, max_seqlen=max_seqlen, seed=seeds.embeddings)  # (T, H)

        p = config.classifier_dropout
        if p is None:
            p = config.hidden_dropout_prob
        h = kernels.dropout(h, p if self.training else 0.0, seeds.classifier)
        logits = self.classifier(h)  # (T, C)
        loss = None if labels is None else cross_entropy(logits, labels, overwrite=False)
        return TokenClassificationOutput(loss, logits)


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
WORDS = "embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"
BIAS = "cls.predictions.bias"
DECODER_BIAS = "cls.predictions.decoder.bias"
# Parameters that a file may lack, as BertForMaskedLM's lacks some: a model then gets new ones.
OPTIONAL = ("classifier.", "pooler.", "bert.pooler.", "nsp.")


def bert_names(name):
    """The names in a Bert file of the parameter `name` here: three of a fused qkv, or else one.

    >>> bert_names("bert.layers.0.attention_norm.bias")
    ['bert.encoder.layer.0.attention.output.LayerNorm.bias']
    """
    name = ".".join(BERT_NAMES.get(part, part) for part in name.split("."))
    parts = ("query", "key", "value") if "attention.self.qkv." in name else ("qkv",)
    return [name.replace("qkv", part) for part in parts]


def short_name(name):
    """A name in a Bert file without what differs from file to file."""
    name = name.removeprefix("bert.")  # which BertModel's files lack
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # as TensorFlow has it
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def settle_decoder(weights, config):
    """Puts weight and bias of the MLM decoder where the model looks for them, as transformers does.

    Two tables that differ are not tied, whatever config.json says, and a tied table may be stored
    under either name. Of two biases the forward pass reads the decoder's; the other one is returned
    if it differs, so that it can be written back, or else None. Changes weights and config.
    """
    words = weights.get(WORDS)
    decoder = weights.get(DECODER)
    if words is not None and decoder is not None and not torch.equal(words, decoder):
        config.tie_word_embeddings = False
    if config.tie_word_embeddings and words is None and decoder is not None:
        weights[WORDS] = decoder  # the model's decoder is this table, too

    if DECODER_BIAS not in weights:  # transformers 4 writes one bias, tied or not
        return None
    bias = weights.pop(DECODER_BIAS)
    unread = weights.get(BIAS)
    weights[BIAS] = bias
    return None if unread is None or torch.equal(bias, unread) else unread


def check_sizes(weights, config):
    """Raises ValueError if a size in the config is not that of the weights."""
    H = config.hidden_size
    L = config.num_hidden_layers
    expected = {  # a weight for each size
        WORDS: (config.vocab_size, H),
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


@torch.no_grad()
def run_sequence(model, ids, **inputs):
    """The output of a model in evaluation mode for one sequence, a list of ids."""
    input_ids = torch.tensor(ids)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    check_inputs(input_ids, cu_seqlens, model.config)  # while they are on the CPU
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        return model(input_ids.to(device), cu_seqlens.to(device), **inputs)
    finally:
        model.train(training)


def fill_mask(model, tokenizer, text, top_k=5):
    """What the model would write at each `<mask>` of a text.

    model: a `StarEncoderForPreTraining`. Returns for each `<mask>` a list of its `top_k`
    candidates, best first: dicts with `token` (id), `token_str` and `score` (probability), as
    transformers' fill-mask pipeline has them. Raises ValueError for a text without `<mask>` or
    longer than the model's positions, or a top_k below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    before, *others = (tokenizer.encode(piece) for piece in text.split("<mask>"))
    if not others:
        raise ValueError("the text has no <mask>")
    # The special tokens are put in by id: `encode` takes "<mask>" for text.
    ids = [tokenizer.cls_id, *before]
    masked = []  # the positions of the masks
    for piece in others:
        masked.append(len(ids))
        ids += [tokenizer.mask_id, *piece]
    ids.append(tokenizer.sep_id)

    masked_positions = torch.tensor(masked, device=model.mlm_bias.device)
    logits = run_sequence(model, ids, masked_positions=masked_positions).mlm_logits  # (M, V)
    # A vocabulary may be padded: its last columns are no tokens.
    probabilities = logits.float().softmax(-1)[:, : tokenizer.vocab_size]
    scores, tokens = probabilities.topk(min(top_k, tokenizer.vocab_size))  # both (M, top_k)
    return [
        [
            {"score": score, "token": token, "token_str": tokenizer.decode([token])}
            for score, token in zip(*candidates)
        ]
        for candidates in zip(scores.tolist(), tokens.tolist())
    ]


def embed(model, tokenizer, texts):
    """A unit vector for each text, the mean of its last hidden states: a dot product is a cosine.

    model: any of the models here. A text longer than the model's positions is read in windows, and
    all its tokens count. Returns (len(texts), H) fp32 on the CPU. The original takes the state of
    the last `<sep>` instead; the mean needs no fine-tuning. Raises ValueError for a single str.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list of str, got one str")
    model = getattr(model, "bert", model)
    room = model.config.max_position_embeddings - 2  # beside <cls> and <sep>
    if room < 1:
        raise ValueError(f"the model's {room + 2} positions leave no room for text")
    vectors = torch.zeros(len(texts), model.config.hidden_size)
    for vector, text in zip(vectors, texts):
        ids = tokenizer.encode(text)
        # An empty text still has its <cls> and <sep>.
        for start in range(0, max(len(ids), 1), room):
            window = [tokenizer.cls_id, *ids[start : start + room], tokenizer.sep_id]
            vector += run_sequence(model, window).float().sum(0).cpu()  # of (T, H)
    return F.normalize(vectors, dim=-1)


def main(argv=None):
    """The command line: `fill-mask RUN TEXT` or `embed RUN FILE...`."""
    parser = CommandLine(prog="starencoder.py", description="Use a trained StarEncoder.")
    commands = parser.add_subparsers(dest="command", required=True)
    fill = commands.add_parser("fill-mask", help="what the model would write at each <mask>")
    vectors = commands.add_parser("embed", help="one JSON line with a unit vector for each file")
    for command in (fill, vectors):
        words = "a run directory, any Hugging Face Bert directory, or a name on the hub"
        command.add_argument("run", help=words)
    fill.add_argument("text", help='such as "def add(a, b): return a <mask> b"')
    words = "tokens to show for each mask (default: 5)"
    fill.add_argument("--top-k", type=int, default=5, metavar="N", help=words)
    vectors.add_argument("files", nargs="+", metavar="FILE", help="text files")
    arguments = parser.parse_args(argv)

    from corpus.tokenizer import Tokenizer  # only here: the model itself needs none

    filling = arguments.command == "fill-mask"
    directory = weight_files.local_directory(arguments.run)
    tokenizer = Tokenizer.from_pretrained(directory)
    model = (StarEncoderForPreTraining if filling else StarEncoder).from_pretrained(directory)
    V = model.config.vocab_size
    if tokenizer.vocab_size > V:
        words = f"its tokenizer has {tokenizer.vocab_size} tokens, its model {V}"
        raise ValueError(f"{directory}: {words}")

    if filling:
        for candidates in fill_mask(model, tokenizer, arguments.text, arguments.top_k):
            for candidate in candidates:
                print(f"{candidate['score']:7.2%}  {candidate['token_str']!r}")
            print()
    else:
        for path in arguments.files:
            with open(path, encoding="utf-8", errors="replace") as f:
                (vector,) = embed(model, tokenizer, [f.read()])
            print(json.dumps({"file": path, "embedding": vector.tolist()}))


if __name__ == "__main__":
    run_command(main)
