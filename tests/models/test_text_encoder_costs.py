"""Operations of text encoders that are language models, against those that PyTorch counts."""

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from uniref_fast.models.text_encoder_costs import language_cost


@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3Model", "SmolLM3ForCausalLM"])
@pytest.mark.parametrize("head_dim", [8, 40])
def test_heads_need_not_fill_the_width(kind, head_dim):
    """Heads are as wide as the configuration says; a model without a head for tokens has no operations of one."""
    config = getattr(transformers, kind.replace("ForCausalLM", "Config").replace("Model", "Config"))(
        vocab_size=60, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=head_dim, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    lengths = [21, 8]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for length in lengths:
            model(torch.ones(1, length, dtype=torch.long))
    flops, peak = language_cost(model, lengths)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert peak == language_cost(model, [21])[1] > language_cost(model, [8])[1]
