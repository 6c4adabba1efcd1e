"""ModelConfig: the architecture. Import it from jaxlm.config."""

import dataclasses
import math
from typing import Any, Literal

from jaxlm.config.base import Validated, check_at_least, check_rate
from jaxlm.errors import UserError

Family = Literal["transformer", "bigram", "embedding_bigram", "recurrent"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"]
Window = int | tuple[int | None, ...] | None

_EVERY_FAMILY = {"family", "vocab_size", "max_seq_len", "init", "final_softcap", "dtype", "param_dtype"}
_WITH_EMBEDDING = {"embed_dim", "tie_embeddings", "head_bias", "dropout", "embedding_dropout"}
_WITH_CELLS = {"num_layers", "cell", "cell_activation", "scan_layers", "remat"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Validated):
    """The architecture of a language model. Any two equal configs name the same function of the parameters.

    None means "derived": the properties at the end give the resolved values.
    """

    family: Family = "transformer"
    """transformer; bigram: a V x V table of logits; embedding_bigram: embedding and head, no context; recurrent: cells
    on embeddings. A field that a family does not read must stay at its default."""
    vocab_size: int
    """V, entries of the vocabulary."""
    max_seq_len: int
    """Training context in tokens, and the size of a learned position table."""
    num_layers: int = 4
    """L, blocks (or recurrent layers)."""
    embed_dim: int = 128
    """D, model width."""
    num_heads: int = 4
    """N, query heads."""
    num_kv_heads: int | None = None
    """K, key/value heads; None = N, 1 = multi-query attention. N must be divisible by K."""
    head_dim: int | None = None
    """H, width of a query and key head; None = D / N."""
    value_head_dim: int | None = None
    """Width of a value head; None = H."""
    mlp_dim: int | None = None
    """F, feed-forward width; None = 4 D, 0 = no MLP sublayer."""
    activation: Activation = "gelu"
    """Of the MLP. gelu is the exact (erf) form, gelu_tanh its approximation; swiglu and geglu (erf) gate with a third
    matrix."""
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """Normalisation; moments in at least float32."""
    norm_eps: float = 1e-5
    """Added to the variance (layernorm) or mean square (rmsnorm) inside the root."""
    norm_order: Literal["pre", "post"] = "pre"
    """pre normalises each sublayer's input and has a final norm; post normalises after each residual sum."""
    residual: bool = True
    """Add each sublayer's input to its output."""
    use_bias: bool = True
    """Biases in linear layers and layer norms."""
    qkv_bias: bool | None = None
    """Biases of the query, key and value projections; None = use_bias."""
    head_bias: bool = False
    """A bias in the vocabulary head (GPT-2 has none)."""
    attention_out_proj: bool = True
    """A linear layer after the heads are joined."""
    init: Literal["gpt2", "normal", "torch"] = "gpt2"
    """gpt2: N(0, 0.02), residual projections scaled by 1/sqrt(2L); normal: N(0, 0.02); torch: PyTorch's defaults.
    Recurrent cells and sinusoidal positions want torch: with 0.02 they begin to learn late."""
    tie_embeddings: bool = True
    """The vocabulary head is the embedding table, transposed."""
    position: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    """How positions enter."""
    rope_theta: float = 10000.0
    """Base of the RoPE frequencies; like rope_layout read with position = "rope" alone."""
    rope_layout: Literal["half", "interleaved"] = "half"
    """half rotates (x[:H/2], x[H/2:]) as Hugging Face does; interleaved rotates (x[2i], x[2i+1]) as Meta does."""
    window: Window = None
    """Keys a query sees, itself included; None = all. A tuple is cycled over the layers. (CMU 10-423's window w
    means w/2 + 1 keys: its example w = 4 is window=3.)"""
    kv_sharing: Literal["grouped", "mean_pooled", "summed_scores"] = "grouped"
    """How G = N/K query heads share a key/value head. grouped: each attends with it; mean_pooled: N key/value heads are
    projected and averaged in groups (parameters of full attention, cache of K heads); summed_scores: a group's scores
    are added before one softmax, so there are K attention maps and K value heads."""
    attention_score: Literal["dot", "multiplicative", "concat", "additive"] = "dot"
    """dot: k^T q / sqrt(H); multiplicative: k^T W q / sqrt(H); concat: w^T [k; q]; additive: w^T tanh(W [k; q]); with
    weights of each query head's own. (In concat the query's term cancels in the softmax, unless a soft cap comes
    between.)"""
    score_dim: int | None = None
    """Width of the additive score's hidden layer; None = H."""
    qk_norm: bool = False
    """RMS norm over H of queries and keys, with learned scales, before positions are rotated in."""
    attention_softcap: float | None = None
    """c: scores become c tanh(scores / c)."""
    final_softcap: float | None = None
    """c: logits become c tanh(logits / c)."""
    dropout: float = 0.0
    """Rate after the embedding sum and after each sublayer."""
    attention_dropout: float = 0.0
    """Rate on the attention weights."""
    embedding_dropout: float = 0.0
    """Rate at which whole word types vanish for a pass (Gal & Ghahramani 2016)."""
    cell: Literal["elman", "lstm", "gru"] = "elman"
    """Cell of the recurrent family; each has its biases."""
    cell_activation: Literal["tanh", "relu", "slide"] = "tanh"
    """Activation of the Elman cell; slide(a) = min(1, max(0, a))."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the activations. float64 needs JAX_ENABLE_X64=1."""
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the parameters."""
    attention_impl: Literal["auto", "reference", "local", "cudnn"] = "auto"
    """Which implementation computes attention; the result is the same. reference: the whole T x T mask; local: windowed
    layers in blocks, time and memory O(T W), the others as with reference; auto: local where it is faster; cudnn: the
    fused kernel of an NVIDIA GPU (bfloat16, no attention dropout, no score variants; training only, cached decoding
    uses auto)."""
    scan_layers: bool = False
    """One compiled block scanned over stacked parameters: compiles faster when deep."""
    remat: bool = False
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
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}: change one"
            )
        joined = self.attention_maps * self.value_width
        if not self.attention_out_proj and joined != self.embed_dim:
            raise UserError(
                f"attention_out_proj = False leaves the heads' {joined} features (attention maps x value head width) "
                f"where embed_dim = {self.embed_dim} are needed: make them equal, or give the projection back"
            )
        if self.position == "rope" and self.head_width % 2:
            raise UserError(
                f"head_dim = {self.head_width} is odd, but position = 'rope' rotates pairs: give an even one"
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
        if self.attention_impl == "cudnn":
            self._check_cudnn()

    def _check_cudnn(self) -> None:
        needed = {
            "dtype": "bfloat16",
            "kv_sharing": "grouped",
            "attention_score": "dot",
            "attention_softcap": None,
            "attention_dropout": 0.0,
            "value_head_dim": None,
        }
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"attention_impl = 'cudnn' cannot compute {name} = {getattr(self, name)!r}: "
                    f"give {value!r}, or attention_impl = 'auto'"
                )
        if self.head_width % 8 or self.head_width > 128:
            raise UserError(
                f"attention_impl = 'cudnn' needs a head width that is a multiple of 8 up to 128, not "
                f"{self.head_width}: change head_dim, or give attention_impl = 'auto'"
            )

    def _check_fields_of_family(self) -> None:
        idle = [f"{name} = {getattr(self, name)!r}" for name in idle_fields(self, self.family)]
        if idle:
            raise UserError(f"family = {self.family!r} does not read {', '.join(idle)}: leave that out")
        if self.cell_activation != "tanh" and self.cell != "elman":
            raise UserError(
                f"cell_activation = {self.cell_activation!r} is for cell = 'elman', not {self.cell!r}: leave it out"
            )

    @property
    def kv_heads(self) -> int:
        """K, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """H, resolved."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        """Width of a value head, resolved."""
        return self.head_width if self.value_head_dim is None else self.value_head_dim

    @property
    def mlp_width(self) -> int:
        """F, resolved."""
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim

    @property
    def attention_maps(self) -> int:
        """Attention maps of a layer: K where a group's scores are summed, else N."""
        return self.kv_heads if self.kv_sharing == "summed_scores" else self.num_heads

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
        """Whether positions come from a learned table, which ends at max_seq_len."""
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


def idle_fields(cfg: ModelConfig, family: str) -> dict[str, Any]:
    """The fields of a config that a family does not read and that are not at their default, with that default."""
    fields = {field.name: field.default for field in dataclasses.fields(cfg)}
    read = {
        "transformer": fields.keys() - {"cell", "cell_activation"},
        "bigram": _EVERY_FAMILY,
        "embedding_bigram": _EVERY_FAMILY | _WITH_EMBEDDING,
        "recurrent": _EVERY_FAMILY | _WITH_EMBEDDING | _WITH_CELLS,
    }[family]
    return {name: fields[name] for name in fields if name not in read and getattr(cfg, name) != fields[name]}
