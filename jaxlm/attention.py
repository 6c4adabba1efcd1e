"""Attention as plain functions of arrays: one head with its derivative written by hand, and grouped attention."""

from jaxlm.ops.attention import attend as attend
from jaxlm.ops.attention import masked_softmax as masked_softmax
from jaxlm.ops.self_attention import self_attention as self_attention
from jaxlm.ops.self_attention import self_attention_grads as self_attention_grads
from jaxlm.ops.self_attention import self_attention_values as self_attention_values
