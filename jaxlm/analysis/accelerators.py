"""What data sheets say of accelerators: peak speed, memory, and the bandwidth between them."""

import dataclasses

from jaxlm.config.train import MatmulPrecision
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of accelerator, by its data sheet. Speeds are without sparsity; bandwidths are of one direction."""

    title: str
    bfloat16: float
    """Peak FLOP/s of products of bfloat16."""
    tensorfloat32: float | None
    """Peak FLOP/s of products of TF32; None = it has none."""
    float32: float | None
    """Peak FLOP/s in float32; None = none is published."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes a second between memory and processor."""
    node: int
    """How many accelerators the fast links connect: those of a server with NVLink, those of a TPU pod."""
    link: float
    """Bytes a second that one sends to others of its node."""
    network: float | None
    """Bytes a second that one sends beyond its node; None = none is published."""
    sources: tuple[str, ...]
    kinds: tuple[str, ...]
    """What JAX calls such devices (`device_kind`)."""

    def peak(self, dtype: str, precision: MatmulPrecision) -> float:
        """FLOP/s of products of this type, as JAX computes them by default or at this precision of float32.

        Raises:
          UserError: no data sheet says.
        """
        if dtype == "bfloat16":
            return self.bfloat16
        # By default JAX computes products of float32 in TF32 on these GPUs, and in one pass of bfloat16 on a TPU.
        default = self.bfloat16 if self.tensorfloat32 is None else self.tensorfloat32
        found = {"default": default, "tensorfloat32": self.tensorfloat32, "float32": self.float32}[precision]
        if dtype != "float32" or found is None:
            raise UserError(
                f"no peak of {self.title} is known for model.dtype = {dtype!r} with train.matmul_precision = "
                f"{precision!r}: give model.dtype = 'bfloat16'"
            )
        return found


_DGX = "https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/"
_HOPPER = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_TPU = "https://docs.cloud.google.com/tpu/docs/"

ACCELERATORS = {
    "a100": Accelerator(
        title="A100 80GB SXM",
        bfloat16=312e12,
        tensorfloat32=156e12,
        float32=19.5e12,
        memory=80e9,
        memory_bandwidth=2039e9,
        node=8,
        link=300e9,  # NVLink: 600 GB/s, both directions together
        network=25e9,  # 200 Gb/s for each GPU of a DGX A100
        sources=(
            "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
            "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
            "https://docs.nvidia.com/dgx/dgxa100-user-guide/",
        ),
        kinds=("NVIDIA A100-SXM4-80GB",),
    ),
    "h100": Accelerator(
        title="H100 SXM",
        bfloat16=989.4e12,
        tensorfloat32=494.7e12,
        float32=66.9e12,
        memory=80e9,
        memory_bandwidth=3350e9,
        node=8,
        link=450e9,  # NVLink: 900 GB/s, both directions together
        network=50e9,  # 400 Gb/s for each GPU of a DGX H100
        sources=(_HOPPER, _DGX),
        kinds=("NVIDIA H100 80GB HBM3",),
    ),
    "h200": Accelerator(
        title="H200 SXM",
        bfloat16=989.4e12,
        tensorfloat32=494.7e12,
        float32=66.9e12,
        memory=141e9,
        memory_bandwidth=4800e9,
        node=8,
        link=450e9,
        network=50e9,
        sources=("https://www.nvidia.com/en-us/data-center/h200/", _DGX),
        kinds=("NVIDIA H200",),
    ),
    "v4": Accelerator(
        title="TPU v4",
        bfloat16=275e12,
        tensorfloat32=None,
        float32=None,
        memory=32 * 2**30,
        memory_bandwidth=1200e9,
        node=4096,
        link=300e9,  # 6 links of 50 GB/s
        network=None,
        sources=(f"{_TPU}v4", "https://arxiv.org/abs/2304.01433"),
        kinds=("TPU v4",),
    ),
    "v5e": Accelerator(
        title="TPU v5e",
        bfloat16=197e12,
        tensorfloat32=None,
        float32=None,
        memory=16e9,
        memory_bandwidth=819e9,
        node=256,
        link=200e9,  # 400 GB/s, both directions together
        network=3.125e9,  # 6.4 Tb/s for a pod of 256
        sources=(f"{_TPU}v5e",),
        kinds=("TPU v5 lite", "TPU v5e"),
    ),
    "v5p": Accelerator(
        title="TPU v5p",
        bfloat16=459e12,
        tensorfloat32=None,
        float32=None,
        memory=95e9,
        memory_bandwidth=2765e9,
        node=8960,
        link=600e9,  # 1,200 GB/s, both directions together
        network=6.25e9,  # 50 Gb/s
        sources=(f"{_TPU}v5p",),
        kinds=("TPU v5", "TPU v5p"),
    ),
    "v6e": Accelerator(
        title="TPU v6e",
        bfloat16=918e12,
        tensorfloat32=None,
        float32=None,
        memory=32e9,
        memory_bandwidth=1638e9,
        node=256,
        link=400e9,  # 800 GB/s, both directions together
        network=None,
        sources=(f"{_TPU}v6e",),
        kinds=("TPU v6 lite", "TPU v6e"),
    ),
}
"""The accelerators that a plan can be made for, by the name that `jaxlm info --on NAME` takes."""


def accelerator(name: str) -> Accelerator:
    """The accelerator of this name.

    Raises:
      UserError: it is not in the table.
    """
    if name not in ACCELERATORS:
        raise UserError(f"accelerator {name!r} is unknown: choose one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]


def accelerator_of(kind: str) -> Accelerator | None:
    """The accelerator that JAX calls by this `device_kind`; None = no data sheet here is its own."""
    return next((found for found in ACCELERATORS.values() if kind in found.kinds), None)
