"""The architecture of a language model."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from jaxlm.config.base import Validated, check_at_least, check_rate
from jaxlm.errors import UserError

Family = Literal["transformer", "bigram", "embedding_bigram", "recurrent"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"]
Window = int | tuple[int | None, ...] | None

_TRANSFORMER = {"read_by": ("transformer",)}
_RECURRENT = {"read_by": ("recurrent",)}
_LAYERED = {"read_by": ("transformer", "recurrent")}
_EMBEDDING = {"read_by": ("transformer", "embedding_bigram", "recurrent")}


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
    """Activation of the MLP. gelu is the exact (erf) form, gelu_tanh the approximation; swiglu and geglu (erf) have a
    gate, which needs a third matrix."""
    norm: Literal["layernorm", "rmsnorm", "none"] = dataclasses.field(default="layernorm", metadata=_TRANSFORMER)
    """Kind of normalisation. Its moments are computed in at least float32."""
    norm_eps: float = dataclasses.field(default=1e-5, metadata=_TRANSFORMER)
    """Added to the variance (layernorm) or mean square (rmsnorm) inside the root."""
    norm_order: Literal["pre", "post"] = dataclasses.field(default="pre", metadata=_TRANSFORMER)
    """pre: normalise the input of each sublayer, and once more before the head; post: normalise after each residual
    sum."""
    residual: bool = dataclasses.field(default=True, metadata=_TRANSFORMER)
    """Add each sublayer's input to its output."""
    use_bias: bool = dataclasses.field(default=True, metadata=_TRANSFORMER)
    """Biases in linear layers and layer norms."""
    qkv_bias: bool | None = dataclasses.field(default=None, metadata=_TRANSFORMER)
    """Biases in the query, key and value projections; None = use_bias."""
    head_bias: bool = dataclasses.field(default=False, metadata=_EMBEDDING)
    """A bias in the vocabulary head (GPT-2 has none)."""
    attention_out_proj: bool = dataclasses.field(default=True, metadata=_TRANSFORMER)
    """A linear layer after the heads are concatenated."""
    init: Literal["gpt2", "normal", "torch"] = "gpt2"
    """Initialisation. gpt2: N(0, 0.02), with residual projections scaled by 1/sqrt(2L); normal: N(0, 0.02); torch:
    PyTorch's defaults. Choose torch for recurrent cells and sinusoidal positions: with 0.02 they learn late."""
    tie_embeddings: bool = dataclasses.field(default=True, metadata=_EMBEDDING)
    """Use the transposed embedding table as the vocabulary head."""
    position: Literal["learned", "sinusoidal", "rope", "none"] = dataclasses.field(
        default="learned", metadata=_TRANSFORMER
    )
    """How the model knows positions: a learned table, sinusoids (both added to the embedding), RoPE, or not at all."""
    rope_theta: float = dataclasses.field(default=10000.0, metadata=_TRANSFORMER)
    """Base of the RoPE frequencies. It and rope_layout matter only with position = "rope"."""
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
    qk_norm: bool = dataclasses.field(default=False, metadata=_TRANSFORMER)
    """RMS norm of queries and keys over H, with learned scales, before RoPE."""
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
        check_at_least(self, 1, "head_dim", "value_head_dim", "score_dim")
        check_at_least(self, 0, "mlp_dim", "norm_eps")
        check_rate(self, "dropout", "attention_dropout", "embedding_dropout")
        for name in ("rope_theta", "attention_softcap", "final_softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} = {value!r} is out of range: give a finite number above 0")
        if self.family == "transformer":
            self._check_attention()
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
        if self.position == "rope" and self.resolved.head_dim % 2:
            raise UserError(
                f"head_dim = {self.resolved.head_dim} is odd, but position = 'rope' rotates pairs: give an even one"
            )
        if self.position == "sinusoidal" and self.embed_dim % 2:
            raise UserError(
                f"embed_dim = {self.embed_dim} is odd, but position = 'sinusoidal' needs pairs: give an even one"
            )
        windows = self.window_period
        if not windows or any(w is not None and w < 1 for w in windows):
            raise UserError(f"window = {self.window!r} has no key to see: give at least 1 (the query itself), or None")
        if self.scan_layers and self.num_layers % len(windows):
            raise UserError(
                f"num_layers = {self.num_layers} is not a multiple of the period {len(windows)} of "
                f"window = {self.window!r}, as scan_layers needs: change one"
            )
        if self.score_dim is not None and self.attention_score != "additive":
            raise UserError(
                f"score_dim = {self.score_dim} is the width of additive scores, but attention_score = "
                f"{self.attention_score!r}: leave score_dim out"
            )
        if self.attention_impl == "cudnn" and (obstacle := cudnn_obstacle(self)):
            raise UserError(f"attention_impl = 'cudnn' {obstacle}, or attention_impl = 'auto'")

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
        return self.window if isinstance(self.window, tuple) else (self.window,)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each of the L layers."""
        period = self.window_period
        return tuple(period[i % len(period)] for i in range(self.num_layers))

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
