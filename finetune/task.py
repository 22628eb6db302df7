"""What the training loop asks of a task. A new kind of task is a class with these methods."""

from starencoder import StarEncoder


class Task:
    """Training examples, their loss, and figures on held-out examples.

    A class is called with (data, tokenizer, positions, config): a `records.Data`, the encoder's
    tokenizer and number of positions, and the arguments of the run. It raises ValueError for data
    from which nothing can be learned.
    """

    measure = ""  # the figure by which models are compared; more is better
    model_class = StarEncoder
    overrides = {}  # fields of the model's config

    def __len__(self):
        """The number of training examples."""
        raise NotImplementedError

    def batch(self, examples, device):
        """A `Batch` of examples, by their numbers."""
        raise NotImplementedError

    def loss(self, model, batch, total, seed, aim):
        """This micro-batch's part of the mean over the `total` labels of a global batch.

        aim: what `compare` says of it. Returns a scalar with the gradient, and the loss to report.
        """
        out = model(batch.input_ids, batch.cu_seqlens, batch.labels, seed=seed)
        loss = out.loss * (batch.count / max(total, 1))
        return loss, loss.detach()

    def compare(self, model, batches, seeds, examples, first, autocast, ranks):
        """For each micro-batch of a step, what `loss` has to know of the other examples.

        batches, seeds: this rank's. examples: the numbers of all examples of the global batch.
        first: the place among them of this rank's first. None: each example is on its own.
        """
        return [None] * len(batches)

    def prepare(self, model):
        """Changes a new model before it is trained."""

    def publish(self, model, directory):
        """Writes the model for use."""
        model.save_pretrained(directory)

    def evaluate(self, model, autocast, ranks):
        """{name: figure} on the held-out examples, the same on all ranks."""
        raise NotImplementedError

    def baselines(self, model, autocast, ranks):
        """{name: figure} of something simpler, or of the encoder before it is fine-tuned."""
        return {}
