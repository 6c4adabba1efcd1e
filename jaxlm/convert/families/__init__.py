"""The families of Hugging Face models that come in and go out, one small file each."""

from jaxlm.convert.families.family import Family
from jaxlm.convert.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxlm.convert.families.gpt2 import GPT2
from jaxlm.convert.families.gpt_neo import GPT_NEO
from jaxlm.convert.families.gpt_neox import GPT_NEOX
from jaxlm.convert.families.granite import GRANITE
from jaxlm.convert.families.llama import LLAMA
from jaxlm.convert.families.mistral import MINISTRAL, MISTRAL
from jaxlm.convert.families.olmo2 import OLMO2
from jaxlm.convert.families.phi import PHI, PHI3
from jaxlm.convert.families.qwen import QWEN2, QWEN3
from jaxlm.convert.families.stablelm import STABLELM
from jaxlm.convert.families.starcoder2 import STARCODER2

FAMILIES = {
    family.model_type: family
    for family in (
        *(LLAMA, GPT2, MISTRAL, QWEN3, QWEN2, STARCODER2, OLMO2, GPT_NEO, GPT_NEOX, PHI, PHI3, STABLELM, GRANITE),
        *(GEMMA, GEMMA2, GEMMA3, MINISTRAL),
    )
}
"""By model_type. A model that several families can hold goes out as the first of them."""


def by_model_type(name: str) -> Family:
    """The family of a model_type that is in FAMILIES."""
    return FAMILIES[name]
