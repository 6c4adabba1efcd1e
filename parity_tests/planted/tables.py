"""All bugs, by kind."""

from planted import (
    attention,
    cache,
    converters,
    dropout,
    exports,
    extension,
    gradients,
    lengths,
    model,
    optimizers,
    precision,
    sampling,
    schedules,
)
from planted.bugs import Bug

KINDS: dict[str, list[Bug]] = {
    "model": model.BUGS,
    "attention": attention.BUGS,
    "precision": precision.BUGS,
    "gradients": gradients.BUGS,
    "optimizers": optimizers.BUGS,
    "cache": cache.BUGS,
    "lengths": lengths.BUGS,
    "dropout": dropout.BUGS,
    "schedules": schedules.BUGS,
    "sampling": sampling.BUGS,
    "extension": extension.BUGS,
    "converters": converters.BUGS,
    "exports": exports.BUGS,
}
BUGS: list[Bug] = [bug for bugs in KINDS.values() for bug in bugs]
