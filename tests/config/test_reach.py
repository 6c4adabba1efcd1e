"""How far a model's positions reach."""

import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError


def config(**fields):
    return ModelConfig(vocab_size=11, max_seq_len=7, **fields)


@pytest.mark.parametrize("fields", [{"position": "rope"}, {"position": "none"}, {"family": "recurrent"}], ids=str)
def test_only_a_learned_table_ends(fields):
    config(**fields).check_reach(1000)
    assert config(**fields).within_reach(1000) == 1000


def test_a_learned_table_ends_at_max_seq_len():
    learned = config()
    learned.check_reach(7)
    assert [learned.within_reach(tokens) for tokens in (6, 7, 8)] == [6, 7, 7]
    words = "8 tokens are beyond the learned position table, max_seq_len = 7: give fewer, or use a model with other pos"
    with pytest.raises(UserError, match=words):
        learned.check_reach(8)
    with pytest.raises(UserError, match="= 7: cut it, or use a model"):
        learned.check_reach(8, "cut it")
