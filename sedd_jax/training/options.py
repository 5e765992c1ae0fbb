"""What a config says of the run itself: its sections `train`, `eval` and `sampling`."""

from dataclasses import dataclass

from jax.sharding import Mesh

from sedd_jax import sampling
from sedd_jax.devices.sharding import batch_shards
from sedd_jax.errors import InputError, check_fields
from sedd_jax.likelihood import ESTIMATORS

MOST = 1 << 20  # held or counted for each sequence; no figure asks for more, and a slip of the finger does


@dataclass(frozen=True)
class TrainOptions:
    """steps: updates in total; 0 for weights from elsewhere, of which nothing more is known. batch_size: sequences per
    update, over all devices; microbatches: parts that it is computed in. ..._every: in steps; 0 for never.
    keep_last, keep_period: see `Checkpoints`; 0 for no period."""

    steps: int = 0
    batch_size: int = 512
    microbatches: int = 1
    seed: int = 0
    ema_decay: float = 0.9999
    log_every: int = 50
    eval_every: int = 5000
    sample_every: int = 5000
    checkpoint_every: int = 1000
    keep_last: int = 3
    keep_period: int = 0

    def __post_init__(self):
        spans = dict.fromkeys(("batch_size", "microbatches"), f"[1, {MOST}]")
        spans |= dict.fromkeys(("log_every", "checkpoint_every", "keep_last"), "[1, 2^31)")
        spans |= dict.fromkeys(("steps", "eval_every", "sample_every", "keep_period"), "[0, 2^31)")
        check_fields("train", vars(self), **spans, seed="[0, 2^32)", ema_decay="[0, 1)")

    def due(self, step: int) -> set[str]:
        """Which of 'log', 'eval', 'sample' and 'checkpoint' are due after this step; all are after the last."""
        every = {what: getattr(self, f"{what}_every") for what in ("log", "eval", "sample", "checkpoint")}
        return {what for what, steps in every.items() if steps and (step == self.steps or step % steps == 0)}

    def check(self, mesh: Mesh) -> None:
        """Raises InputError if nothing can be trained with these options on the mesh."""
        check_fields("train", vars(self), steps="[1, 2^31)")
        shards = batch_shards(mesh)
        if self.batch_size % (shards * self.microbatches):
            parts = f"{shards} batch shards (mesh.data x mesh.fsdp) times train.microbatches={self.microbatches}"
            raise InputError(f"train.batch_size={self.batch_size} must be a multiple of {parts}")


@dataclass(frozen=True)
class EvalOptions:
    """num_times: draws of noise per sequence, or orders. num_sequences: of the validation part during training, 0 for
    all. batch_size: sequences per network call. estimator: one of `likelihood.ESTIMATORS`."""

    num_times: int = 1000
    num_sequences: int = 0
    batch_size: int = 32
    estimator: str = "auto"

    def __post_init__(self):
        spans = dict.fromkeys(("num_times", "batch_size"), f"[1, {MOST}]")
        check_fields("eval", vars(self), **spans, num_sequences="[0, 2^31)", estimator=ESTIMATORS)


@dataclass(frozen=True)
class SamplingOptions(sampling.Sampler):
    """num: samples during training, and by default. steps: see `sampling.simulate`. label: class of the samples, or
    None. guidance: towards it, 1 for as the model has it: see `network.guided`."""

    num: int = 4
    steps: int = 128
    label: int | None = None
    guidance: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        spans = dict.fromkeys(("steps", "corrector_steps", "remask"), f"[0, {MOST}]")
        check_fields("sampling", vars(self), num=f"[1, {MOST}]", **spans)
        if not abs(self.guidance) <= 1e4 or (self.guidance != 1 and self.label is None):
            raise InputError(f"sampling guidance={self.guidance} is to be a number up to 10000, and needs a label")

    def check_label(self, num_classes: int) -> None:
        """Raises InputError for a label that the model does not know."""
        if self.label is not None and not 0 <= self.label < num_classes:
            raise InputError(f"sampling label={self.label} is unknown: the model has model.num_classes={num_classes}")
