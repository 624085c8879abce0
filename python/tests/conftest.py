"""Tiny random models of each architecture, with no weight left at its trivial initial value."""

import pytest

ARCHITECTURES = ("qwen2", "qwen3", "qwen3_moe", "llama")
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# One layer of each kind, and an odd number of experts.
EXPERTS = dict(
    num_experts=5,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    norm_topk_prob=False,
    mlp_only_layers=[0],
)
TOKENS = [3, 17, 40, 5, 5, 61, 22]


def make_model(architecture, *, seed=0, **changes):
    """A float32 model with eager attention; `changes` go into its configuration."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
    )
    if architecture != "qwen2":
        settings["head_dim"] = 16  # not hidden / heads
    if architecture == "qwen3_moe":
        settings |= EXPERTS
    config = transformers.AutoConfig.for_model(architecture, **(settings | changes))
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, **eager)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model.eval()


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return make_model(request.param)


def forward(model, ids, **kwargs):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **kwargs)
