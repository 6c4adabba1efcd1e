"""The architecture of a language model."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from jaxlm.config.base import Validated, check_at_least, check_at_most, check_rate
from jaxlm.errors import UserError

Family = Literal["transformer", "bigram", "embedding_bigram", "recurrent"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "geglu_tanh"]
Window = int | tuple[int | None, ...] | None
PerLayer = float | tuple[float, ...]

_TRANSFORMER = {"read_by": ("transformer",)}
_RECURRENT = {"read_by": ("recurrent",)}
_LAYERED = {"read_by": ("transformer", "recurrent")}
_EMBEDDING = {"read_by": ("transformer", "embedding_bigram", "recurrent")}


class LayerSettings(NamedTuple):
    """What may differ from layer to layer. The names are those of ModelConfig's fields."""

    window: int | None
    rope_theta: float
    rope_factor: float


class ResolvedSizes(NamedTuple):
    """Sizes that ModelConfig derives from other fields where they are None. The names are those of its fields."""

    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    mlp_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Validated):
    """The architecture of the model.

    Two equal configs describe the same function of the parameters. A field whose metadata has `read_by` is read by
    these families alone; in a config of another family it must keep its default. None means "derived from other
    fields"; `resolved` has the numbers.
    """

    family: Family = "transformer"
    """transformer; bigram: a V x V table of logits; embedding_bigram: embedding and head, no context; recurrent: cells
    on top of an embedding."""
    vocab_size: int
    """V, the number of tokens in the vocabulary."""
    max_seq_len: int
    """Training context in tokens, and the size of a learned position table."""
    num_layers: int = dataclasses.field(default=4, metadata=_LAYERED)
    """L, blocks (or recurrent layers)."""
    embed_dim: int = dataclasses.field(default=128, metadata=_EMBEDDING)
    """D, model width."""
    num_heads: int = dataclasses.field(default=4, metadata=_TRANSFORMER)
    """N, query heads."""
    num_kv_heads: int | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """K, key/value heads; None = N, 1 = multi-query attention. N must be divisible by K."""
    head_dim: int | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """H, width of a query and key head; None = D / N."""
    value_head_dim: int | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """Width of a value head; None = H."""
    mlp_dim: int | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """F, feed-forward width; None = 4 D, 0 = no MLP sublayer."""
    activation: Activation = dataclasses.field(default="gelu", metadata=_TRANSFORMER)
    """Activation of the MLP. gelu is the exact (erf) form, gelu_tanh the approximation; swiglu, geglu (erf) and
    geglu_tanh have a gate, which needs a third matrix."""
    block_layout: Literal["sequential", "parallel", "parallel_one_norm"] = dataclasses.field(
        default="sequential", metadata=_TRANSFORMER
    )
    """sequential: the MLP reads what attention has changed; parallel: both read the input of the block, each through a
    norm of its own (GPT-NeoX), or both through one norm (parallel_one_norm: GPT-J, Phi)."""
    norm: Literal["layernorm", "rmsnorm", "none"] = dataclasses.field(default="layernorm", metadata=_TRANSFORMER)
    """Kind of normalisation. Its moments are computed in at least float32."""
    norm_eps: float = dataclasses.field(default=1e-5, metadata=_TRANSFORMER)
    """Added to the variance (layernorm) or mean square (rmsnorm) inside the root."""
    norm_order: Literal["pre", "post", "reordered", "sandwich"] = dataclasses.field(
        default="pre", metadata=_TRANSFORMER
    )
    """What is normalised. pre: the input of each sublayer; reordered: its output, before the residual sum (OLMo 2);
    sandwich: both (Gemma 2); post: the residual sum. All but post normalise once more before the head."""
    norm_unit_offset: bool = dataclasses.field(default=False, metadata=_TRANSFORMER)
    """Norms multiply by 1 + scale instead of scale (Gemma), so that weight decay pulls the factor to 1."""
    norm_bias: bool | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """Biases in layer norms; None = use_bias."""
    residual: bool = dataclasses.field(default=True, metadata=_TRANSFORMER)
    """Add each sublayer's input to its output."""
    residual_scale: float = dataclasses.field(default=1.0, metadata=_TRANSFORMER)
    """Each sublayer's output is multiplied by it before the residual sum."""
    use_bias: bool = dataclasses.field(default=True, metadata=_TRANSFORMER)
    """Biases in linear layers and layer norms."""
    qkv_bias: bool | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """Biases in the query, key and value projections; None = use_bias."""
    attention_out_bias: bool | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """A bias in the projection after the heads are concatenated; None = use_bias."""
    head_bias: bool = dataclasses.field(default=False, metadata=_EMBEDDING)
    """A bias in the vocabulary head (GPT-2 has none)."""
    attention_out_proj: bool = dataclasses.field(default=True, metadata=_TRANSFORMER)
    """A linear layer after the heads are concatenated."""
    init: Literal["gpt2", "normal", "torch"] = "gpt2"
    """Initialisation. gpt2: N(0, 0.02), with residual projections scaled by 1/sqrt(2L); normal: N(0, 0.02); torch:
    PyTorch's defaults. Choose torch for recurrent cells and sinusoidal positions: with 0.02 they learn late."""
    tie_embeddings: bool = dataclasses.field(default=True, metadata=_EMBEDDING)
    """Use the transposed embedding table as the vocabulary head."""
    embedding_scale: float = dataclasses.field(default=1.0, metadata=_TRANSFORMER)
    """Embedding vectors are multiplied by it (Gemma: the root of D), but not the table as the head."""
    logit_divisor: float = dataclasses.field(default=1.0, metadata=_TRANSFORMER)
    """Logits are divided by it, before final_softcap (Granite)."""
    position: Literal["learned", "sinusoidal", "rope", "none"] = dataclasses.field(
        default="learned", metadata=_TRANSFORMER
    )
    """How the model knows positions: a learned table, sinusoids (both added to the embedding), RoPE, or not at all."""
    rope_theta: PerLayer = dataclasses.field(default=10000.0, metadata=_TRANSFORMER)
    """Base of the RoPE frequencies; a tuple is cycled over the layers. All fields rope_... and rotary_dim matter only
    with position = "rope"."""
    rotary_dim: int | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """Features of each head that RoPE rotates, the first ones; even; None = H."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = dataclasses.field(default="none", metadata=_TRANSFORMER)
    """How the frequencies change for a context longer than rope_original_len. linear: all are divided by rope_factor
    (Chen et al. 2023, arXiv 2306.15595); llama3 and yarn (Peng et al. 2023, arXiv 2309.00071): only those that turn
    seldom, see rope_ramp."""
    rope_factor: PerLayer = dataclasses.field(default=1.0, metadata=_TRANSFORMER)
    """What rope_scaling divides by; a tuple is cycled over the layers, 1 = a layer without scaling."""
    rope_original_len: int | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """Context in tokens before it was extended; None = max_seq_len."""
    rope_ramp: tuple[float, float] | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """(slow, fast): a frequency that turns less often than `slow` times in rope_original_len tokens is divided by
    rope_factor, one that turns more often than `fast` times stays, and between them lies a ramp. None = (1, 4) with
    llama3, (1, 32) with yarn."""
    rope_attention_factor: float | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """yarn multiplies the rotated features of queries and keys by it; None = 1 + 0.1 ln(rope_factor)."""
    rope_layout: Literal["half", "interleaved"] = dataclasses.field(default="half", metadata=_TRANSFORMER)
    """half rotates (x[:H/2], x[H/2:]) as Hugging Face does; interleaved rotates (x[2i], x[2i+1]) as Meta does."""
    window: Window = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """Sliding window: how many keys a query sees, itself included; None = all. A tuple is cycled over the layers.
    (In CMU 10-423 a window w means w/2 + 1 keys: its example w = 4 is window=3.)"""
    kv_sharing: Literal["grouped", "mean_pooled", "summed_scores"] = dataclasses.field(
        default="grouped", metadata=_TRANSFORMER
    )
    """How G = N/K query heads share a key/value head. grouped: each query head attends with it; mean_pooled: N key and
    value heads are projected, then averaged in groups (as many parameters as full attention, a cache of K heads);
    summed_scores: the scores of a group are added before one softmax, so there are K attention maps."""
    attention_score: Literal["dot", "multiplicative", "concat", "additive"] = dataclasses.field(
        default="dot", metadata=_TRANSFORMER
    )
    """dot: k^T q / sqrt(H); multiplicative: k^T W q / sqrt(H); concat: w^T [k; q]; additive: w^T tanh(W [k; q]). Each
    query head has its own weights. (In concat the query's term cancels in the softmax, unless there is a soft cap.)"""
    score_dim: int | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """Width of the additive score's hidden layer; None = H."""
    attention_scale: float | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """Dot and multiplicative scores are multiplied by it; None = 1 / sqrt(H)."""
    qk_norm: bool = dataclasses.field(default=False, metadata=_TRANSFORMER)
    """RMS norm of queries and keys, with learned scales, before RoPE."""
    qk_norm_over: Literal["head", "projection"] = dataclasses.field(default="head", metadata=_TRANSFORMER)
    """head: qk_norm over the H features of each head (Qwen 3, Gemma 3); projection: over those of all heads together
    (OLMo 2)."""
    attention_softcap: float | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """Soft cap c of the scores: they become c tanh(scores / c)."""
    final_softcap: float | None = None
    """Soft cap c of the logits: they become c tanh(logits / c)."""
    dropout: float = dataclasses.field(default=0.0, metadata=_EMBEDDING)
    """Dropout rate after the embedding sum and after each sublayer."""
    attention_dropout: float = dataclasses.field(default=0.0, metadata=_TRANSFORMER)
    """Dropout rate on the attention weights."""
    embedding_dropout: float = dataclasses.field(default=0.0, metadata=_EMBEDDING)
    """Dropout rate on whole word types: a dropped one is zero wherever it occurs (Gal & Ghahramani 2016)."""
    cell: Literal["elman", "lstm", "gru"] = dataclasses.field(default="elman", metadata=_RECURRENT)
    """Cell of the recurrent family. Every cell has biases."""
    cell_activation: Literal["tanh", "relu", "slide"] = dataclasses.field(default="tanh", metadata=_RECURRENT)
    """Activation of the Elman cell; slide(a) = min(1, max(0, a))."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the activations. float64 needs JAX_ENABLE_X64=1."""
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the parameters."""
    attention_impl: Literal["auto", "reference", "local", "cudnn"] = dataclasses.field(
        default="auto", metadata=_TRANSFORMER
    )
    """Which implementation computes attention; the result is the same. reference: with the whole T x T mask; local: in
    blocks of queries, in memory O(T), with a window in time and memory O(T W); cudnn: the fused kernel of an NVIDIA GPU
    (bfloat16, no attention dropout, no score variants; not with a cache); auto: cudnn on a GPU that can, else local for
    whole sequences and reference after a cache."""
    scan_layers: bool = dataclasses.field(default=False, metadata=_LAYERED)
    """Compile one block and scan it over stacked parameters: deep models compile faster."""
    remat: bool = dataclasses.field(default=False, metadata=_LAYERED)
    """Recompute each block in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "vocab_size", "max_seq_len", "num_layers", "embed_dim", "num_heads", "num_kv_heads")
        check_at_least(self, 1, "head_dim", "value_head_dim", "score_dim", "rope_original_len")
        check_at_least(self, 2, "rotary_dim")
        check_at_most(self, 10_000, "num_layers")
        check_at_least(self, 0, "mlp_dim", "norm_eps")
        check_rate(self, "dropout", "attention_dropout", "embedding_dropout")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not all(0 < item < math.inf for item in _as_tuple(value)):
                raise UserError(f"{name} = {value!r} is out of range: give a finite number above 0")
        if self.family == "transformer":
            self._check_attention()
            self._check_rope()
            self._check_block()
        self._check_fields_of_family()

    def _check_attention(self) -> None:
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise UserError(
                f"num_heads = {self.num_heads} does not divide embed_dim = {self.embed_dim}: "
                "change one, or give head_dim"
            )
        if self.num_heads % self.resolved.num_kv_heads:
            raise UserError(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}: change one"
            )
        joined = self.attention_maps * self.resolved.value_head_dim
        if not self.attention_out_proj and joined != self.embed_dim:
            raise UserError(
                f"attention_out_proj = False leaves the heads' {joined} features (attention maps x value head width) "
                f"where embed_dim = {self.embed_dim} are needed: make them equal, or give the projection back"
            )
        if self.position == "sinusoidal" and self.embed_dim % 2:
            raise UserError(
                f"embed_dim = {self.embed_dim} is odd, but position = 'sinusoidal' needs pairs: give an even one"
            )
        windows = self.window_period
        if not windows or any(w is not None and w < 1 for w in windows):
            raise UserError(f"window = {self.window!r} has no key to see: give at least 1 (the query itself), or None")
        if not all(map(_as_tuple, (self.rope_theta, self.rope_factor))):
            raise UserError(
                "rope_theta and rope_factor need a number for each layer of their period: give one at least"
            )
        if self.scan_layers and self.num_layers % len(self.layer_period):
            raise UserError(
                f"num_layers = {self.num_layers} is not a multiple of the period {len(self.layer_period)} of "
                f"{self.periodic}, as scan_layers needs: change one"
            )
        if self.score_dim is not None and self.attention_score != "additive":
            raise UserError(
                f"score_dim = {self.score_dim} is the width of additive scores, but attention_score = "
                f"{self.attention_score!r}: leave score_dim out"
            )
        if self.attention_scale is not None and self.attention_score not in ("dot", "multiplicative"):
            raise UserError(
                f"attention_scale = {self.attention_scale} is for dot and multiplicative scores, but attention_score = "
                f"{self.attention_score!r}: change one"
            )
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise UserError(f"qk_norm_over = {self.qk_norm_over!r} needs qk_norm: give qk_norm = True, or leave it out")
        if self.attention_impl == "cudnn" and (obstacle := cudnn_obstacle(self)):
            raise UserError(f"attention_impl = 'cudnn' {obstacle}, or attention_impl = 'auto'")

    def _check_rope(self) -> None:
        if self.position != "rope":
            return
        width = self.resolved.head_dim
        if self.rotary_dim is None and width % 2:
            raise UserError(f"head_dim = {width} is odd, but position = 'rope' rotates pairs: give an even one")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > width):
            raise UserError(
                f"rotary_dim = {self.rotary_dim} must be even and at most the head width {width}: change one"
            )
        if self.rope_scaling == "none" and set(_as_tuple(self.rope_factor)) != {1.0}:
            raise UserError(f"rope_factor = {self.rope_factor!r} needs a rope_scaling: give one, or leave it out")
        if self.rope_ramp is not None and not 0 <= self.rope_ramp[0] < self.rope_ramp[1] < math.inf:
            raise UserError(f"rope_ramp = {self.rope_ramp!r} must be two numbers, 0 <= slow < fast: change them")
        if self.rope_scaling == "yarn" and min(*_as_tuple(self.rope_theta), math.inf) <= 1:
            raise UserError(
                f"rope_theta = {self.rope_theta!r} is too small for rope_scaling = 'yarn': give more than 1"
            )

    def _check_block(self) -> None:
        plain = self.norm_order == "pre" and self.residual and self.resolved.mlp_dim
        if self.block_layout != "sequential" and not plain:
            raise UserError(
                f"block_layout = {self.block_layout!r} needs norm_order = 'pre', residual = True and an MLP, not "
                f"{self.norm_order!r}, {self.residual} and mlp_dim = {self.mlp_dim}: change one"
            )

    def _check_fields_of_family(self) -> None:
        idle = [f"{name} = {getattr(self, name)!r}" for name in idle_fields(self, self.family)]
        if idle:
            raise UserError(f"family = {self.family!r} does not read {', '.join(idle)}: leave it out")
        if self.cell_activation != "tanh" and self.cell != "elman":
            raise UserError(
                f"cell_activation = {self.cell_activation!r} is for cell = 'elman', not {self.cell!r}: leave it out"
            )

    @property
    def resolved(self) -> "ResolvedSizes":
        """The sizes that may be None in a config, as the numbers that they stand for."""
        head_dim = self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim
        return ResolvedSizes(
            num_kv_heads=self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
            head_dim=head_dim,
            value_head_dim=head_dim if self.value_head_dim is None else self.value_head_dim,
            mlp_dim=4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim,
        )

    @property
    def attention_maps(self) -> int:
        """Attention maps of a layer: K where a group's scores are summed, else N."""
        return self.resolved.num_kv_heads if self.kv_sharing == "summed_scores" else self.num_heads

    @property
    def window_period(self) -> tuple[int | None, ...]:
        """The windows that repeat over the layers."""
        return _as_tuple(self.window)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each of the L layers."""
        return tuple(layer.window for layer in self.layer_settings)

    @property
    def layer_period(self) -> tuple[LayerSettings, ...]:
        """The settings that repeat over the layers: a period of window, rope_theta and rope_factor together."""
        parts: tuple[Any, ...] = (self.window_period, _as_tuple(self.rope_theta), _as_tuple(self.rope_factor))
        length = math.lcm(*map(len, parts))
        return tuple(LayerSettings(*(part[i % len(part)] for part in parts)) for i in range(length))

    @property
    def layer_settings(self) -> tuple[LayerSettings, ...]:
        """The settings of each of the L layers."""
        period = self.layer_period
        return tuple(period[i % len(period)] for i in range(self.num_layers))

    @property
    def periodic(self) -> str:
        """The fields that differ from layer to layer, with their values, for messages."""
        names = [name for name in LayerSettings._fields if isinstance(getattr(self, name), tuple)] or ["window"]
        return " and ".join(f"{name} = {getattr(self, name)!r}" for name in names)

    @property
    def has_position_table(self) -> bool:
        """Whether positions come from a learned table, so that the model ends at max_seq_len."""
        return self.family == "transformer" and self.position == "learned"

    def within_reach(self, num_tokens: int) -> int:
        """How many of `num_tokens` the model has positions for: all, but at most max_seq_len with a learned table."""
        return min(num_tokens, self.max_seq_len) if self.has_position_table else num_tokens

    def check_reach(self, num_tokens: int, fix: str = "give fewer") -> None:
        """Refuses more tokens than a learned position table has places; other models read any number.

        Args:
          fix: what the user can do, besides using a model with other positions.
        """
        if self.within_reach(num_tokens) < num_tokens:
            raise UserError(
                f"{num_tokens} tokens are beyond the learned position table, max_seq_len = {self.max_seq_len}: "
                f"{fix}, or use a model with other positions"
            )


POSITIVE = (
    *("rope_theta", "rope_factor", "rope_attention_factor", "attention_scale", "attention_softcap", "final_softcap"),
    *("embedding_scale", "residual_scale", "logit_divisor"),
)
"""Fields that must be finite and above 0."""


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def cudnn_obstacle(cfg: ModelConfig) -> str | None:
    """What keeps cuDNN's fused attention from computing a transformer, and the fix; None = nothing.

    The limits are those of `jax.nn.dot_product_attention(implementation="cudnn")`.
    """
    needed = {
        "dtype": "bfloat16",
        "kv_sharing": "grouped",
        "attention_score": "dot",
        "attention_softcap": None,
        "attention_dropout": 0.0,
        "value_head_dim": None,
    }
    for name, value in needed.items():
        if getattr(cfg, name) != value:
            return f"cannot compute {name} = {getattr(cfg, name)!r}: give {value!r}"
    width = cfg.resolved.head_dim
    if width % 8 or width > 128:
        return f"needs a head width that is a multiple of 8 up to 128, not {width}: change head_dim"
    return None


def idle_fields(cfg: ModelConfig, family: str) -> dict[str, Any]:
    """The fields that a family does not read and that a config sets to other values, with their defaults."""
    return {
        field.name: field.default
        for field in dataclasses.fields(cfg)
        if family not in field.metadata.get("read_by", (family,)) and getattr(cfg, field.name) != field.default
    }
