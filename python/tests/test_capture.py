import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conftest import ARCHITECTURES, LLAMA3_SCALING, TOKENS, forward, make_model  # noqa: E402
from recompute import Recomputation  # noqa: E402

import aprt  # noqa: E402
from aprt.hf import model_dims  # noqa: E402
from aprt.stages import STAGES  # noqa: E402

HEAD_NORMS = {"q_norm", "k_norm"}
EXPERT_STAGES = {s.name for s in STAGES if s.name.startswith("moe_")}
COMMON = {s.name for s in STAGES} - {"qkv_bias"} - HEAD_NORMS - EXPERT_STAGES
OWN_STAGES = {
    "qwen2": {"qkv_bias"},
    "qwen3": HEAD_NORMS,
    "qwen3_moe": HEAD_NORMS | EXPERT_STAGES,
    "llama": set(),
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def captured(model, out, ids=TOKENS, **kwargs):
    with aprt.capture(model, out, **kwargs):
        result = forward(model, ids)
    return aprt.read(out), result


def bits(tensor):
    return tensor.to(torch.float32).contiguous().numpy().tobytes()


def assert_recomputable(model, capture, rope):
    weights = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    for name in [n for n in weights if n.endswith("experts.gate_up_proj")]:
        experts = name.removesuffix(".gate_up_proj")
        gate, up = np.split(weights.pop(name), 2, axis=1)
        weights[f"{experts}.gate_proj.weight"], weights[f"{experts}.up_proj.weight"] = gate, up
        weights[f"{experts}.down_proj.weight"] = weights.pop(f"{experts}.down_proj")
    check = Recomputation(weights, capture.manifest["model"]["config"], rope)
    for step in capture.steps:
        expected = dict(check.step(step))
        assert set(expected) == set(step)
        for name, value in expected.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(step[name], value, rtol=0, atol=5e-6 * scale, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_stage_of_the_architecture_is_there(architecture, tmp_path):
    model = make_model(architecture)
    capture, _ = captured(model, tmp_path / "c")
    tensors = capture.manifest["steps"][0]["tensors"]
    assert {t["stage"] for t in tensors} == COMMON | OWN_STAGES[architecture]
    layers = {t["layer"] for t in tensors if t["stage"] == "attn_softmax"}
    assert layers == set(range(model_dims(model).layers))


def test_tensors_have_the_shapes_and_positions_of_the_format(model, tmp_path):
    capture, _ = captured(model, tmp_path / "c")
    d, n = model_dims(model), len(TOKENS)
    step = capture.steps[0]
    assert step["layers.1.qkv_matmul"].shape == (n, d.qkv)
    assert step["layers.1.q_post_rope"].shape == (n, d.heads, d.head_dim)
    assert step["layers.1.k_post_rope"].shape == (n, d.kv_heads, d.head_dim)
    assert step["layers.1.attn_scores"].shape == (d.heads, n, n)
    assert step["layers.1.attention"].shape == (n, d.heads * d.head_dim)
    assert step["lm_head"].shape == (n, d.vocab)
    assert all(t["positions"] == list(range(n)) for t in step.manifest["tensors"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_looking_does_not_change_a_bit_of_the_logits(model, dtype, tmp_path):
    model = model.to(dtype)
    before = forward(model, TOKENS).logits
    capture, during = captured(model, tmp_path / "c")
    after = forward(model, TOKENS).logits
    assert bits(before) == bits(during.logits) == bits(after)
    assert capture.steps[0]["lm_head"].tobytes() == bits(before[0])


def test_the_residual_stream_is_the_models_hidden_states(model, tmp_path):
    capture, _ = captured(model, tmp_path / "c")
    hidden = forward(model, TOKENS, output_hidden_states=True).hidden_states
    step, last = capture.steps[0], len(hidden) - 1
    assert step["embedding"].tobytes() == bits(hidden[0][0])
    for i in range(1, last):
        assert step[f"layers.{i - 1}.post_ffn_residual"].tobytes() == bits(hidden[i][0])
    assert step["final_norm"].tobytes() == bits(hidden[last][0])


def test_the_softmax_is_the_models_attention_weights(model, tmp_path):
    capture, _ = captured(model, tmp_path / "c")
    weights = forward(model, TOKENS, output_attentions=True).attentions
    for i, layer in enumerate(weights):
        assert capture.steps[0][f"layers.{i}.attn_softmax"].tobytes() == bits(layer[0])


def test_every_stage_follows_from_its_captured_inputs(model, tmp_path):
    with aprt.capture(model, tmp_path / "c"):
        cache = forward(model, TOKENS[:4], use_cache=True).past_key_values  # a prefill chunk,
        forward(model, TOKENS[4:6], past_key_values=cache)  # another,
        forward(model, TOKENS[6:], past_key_values=cache)  # and a decode step
    capture = aprt.read(tmp_path / "c")
    steps = [(s["phase"], s["chunk"], s["positions"]) for s in capture.manifest["steps"]]
    assert steps == [("prefill", 0, [0, 1, 2, 3]), ("prefill", 1, [4, 5]), ("decode", 0, [6])]
    assert_recomputable(model, capture, DEFAULT_ROPE)


def test_llama3_rope_scaling_follows_from_its_formula(tmp_path):
    model = make_model("llama", rope_parameters=LLAMA3_SCALING)
    capture, _ = captured(model, tmp_path / "c", TOKENS * 5)
    assert_recomputable(model, capture, LLAMA3_SCALING)
    assert capture.manifest["model"]["config"]["rope_scaling"]["factor"] == 8.0


def test_a_bias_on_every_projection_is_in_its_stage(tmp_path):
    model = make_model("llama", attention_bias=True)
    capture, _ = captured(model, tmp_path / "c")
    assert "layers.0.qkv_bias" in capture.steps[0]
    assert_recomputable(model, capture, DEFAULT_ROPE)


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, {"num_experts_per_tok": 1}])
def test_experts_of_other_kinds_follow_from_their_inputs(changes, tmp_path):
    model = make_model("qwen3_moe", **changes)
    capture, _ = captured(model, tmp_path / "c")
    config = capture.manifest["model"]["config"]
    assert config["mlp_only_layers"] == [0] and config["num_experts"] == 5
    assert {key: config[key] for key in changes} == changes
    assert_recomputable(model, capture, DEFAULT_ROPE)


def test_each_layer_has_the_stages_of_its_kind(tmp_path):
    capture, _ = captured(make_model("qwen3_moe"), tmp_path / "c")
    step, n = capture.steps[0], len(TOKENS)
    assert "layers.0.ffn_gate" in step and "layers.0.moe_router" not in step
    assert "layers.1.ffn_gate" not in step and "layers.1.ffn_out" in step
    assert step["layers.1.moe_router"].shape == (n, 5)
    assert step["layers.1.moe_expert_gate"].shape == (n, 3, 24)
    assert step["layers.1.moe_expert_out"].shape == (n, 3, 32)
    indices = step["layers.1.moe_router_indices"]
    assert indices.dtype == np.int32 and indices.shape == (n, 3)
    assert (np.diff(np.sort(indices, axis=-1)) > 0).all()  # no expert twice
    assert (np.diff(step["layers.1.moe_router_weights"], axis=-1) < 0).all()


def test_a_stage_that_no_chosen_layer_has_is_refused(tmp_path):
    for stage, layer, have in (("moe_router", "0", "1"), ("ffn_gate", "1", "0")):
        with pytest.raises(aprt.AprtError, match=f"only layers {have} of this model"):
            captured(make_model("qwen3_moe"), tmp_path / "c", stages=stage, layers=layer)
    assert not list(tmp_path.iterdir())


def test_the_output_is_the_same_bits_as_without_the_experts_watched(tmp_path):
    model = make_model("qwen3_moe")
    whole, _ = captured(model, tmp_path / "whole")
    part, _ = captured(model, tmp_path / "part", stages="moe_router_weights,moe_ffn_out")
    assert list(part.steps[0]) == [
        "layers.0.ffn_out",
        "layers.1.moe_router_weights",
        "layers.1.ffn_out",
    ]
    for name, value in part.steps[0].items():
        assert value.tobytes() == whole.steps[0][name].tobytes()


def test_a_loop_over_experts_that_is_not_known_is_refused(tmp_path, monkeypatch):
    model = make_model("qwen3_moe")
    monkeypatch.setattr(model.model.layers[1].mlp.experts, "act_fn", torch.nn.GELU())
    with pytest.raises(aprt.AprtError, match="in an unknown way"):
        captured(model, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_masked_scores_and_softmax_are_exactly_zero(model, tmp_path):
    capture, _ = captured(model, tmp_path / "c")
    future = np.triu(np.ones((len(TOKENS), len(TOKENS)), bool), k=1)
    for stage in ("attn_scores", "attn_softmax"):
        value = capture.steps[0][f"layers.0.{stage}"]
        assert not value[:, future].any()
        assert value[:, ~future].all()


def test_generate_is_captured_step_by_step(model, tmp_path):
    ids = torch.tensor([TOKENS])
    with aprt.capture(model, tmp_path / "c"):
        generated = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    steps = aprt.read(tmp_path / "c").steps
    assert [s.manifest["phase"] for s in steps] == ["prefill", "decode", "decode"]
    assert [int(s["lm_head"][-1].argmax()) for s in steps] == generated[0, -3:].tolist()
    # generate() asks for the logits of the last row only, and the manifest says so
    assert steps[0].manifest["tensors"][-1]["positions"] == [len(TOKENS) - 1]


def test_a_module_from_no_file_is_named_by_what_it_is(tmp_path):
    # Readers require a path: it is what a comparison calls the model.
    capture, _ = captured(make_model("qwen2"), tmp_path / "c")
    assert capture.manifest["model"]["path"] == "Qwen2ForCausalLM"


def test_embeddings_as_input_need_declared_token_ids(model, tmp_path):
    embeddings = model.model.embed_tokens(torch.tensor([TOKENS]))
    with pytest.raises(aprt.AprtError, match="give the capture token_ids"):
        with aprt.capture(model, tmp_path / "c"):
            model(inputs_embeds=embeddings)
    with aprt.capture(model, tmp_path / "c", TOKENS):
        model(inputs_embeds=embeddings)
    expected, _ = captured(model, tmp_path / "d")
    (step,) = aprt.read(tmp_path / "c").steps
    assert step.manifest["token_ids"] == TOKENS
    assert step["lm_head"].tobytes() == expected.steps[0]["lm_head"].tobytes()


def test_chosen_rows_stages_and_layers_are_those_of_the_full_capture(model, tmp_path):
    full = captured(model, tmp_path / "full")[0].steps[0]
    selection = dict(stages="attn_scores,ffn_out,logits", layers="last", rows="2..5")
    part = captured(model, tmp_path / "part", **selection)[0].steps[0]
    assert list(part) == ["layers.1.attn_scores", "layers.1.ffn_out", "lm_head"]
    assert all(t["positions"] == [2, 3, 4] for t in part.manifest["tensors"])
    np.testing.assert_array_equal(
        part["layers.1.attn_scores"], full["layers.1.attn_scores"][:, 2:5]
    )
    np.testing.assert_array_equal(part["lm_head"], full["lm_head"][2:5])


def test_rows_that_no_step_has_are_refused(model, tmp_path):
    with pytest.raises(aprt.AprtError, match="no forward computed any of the rows"):
        captured(model, tmp_path / "c", rows="90..99")
    assert not list(tmp_path.iterdir())


def test_hooks_are_gone_after_a_capture_and_after_a_failure(model, tmp_path):
    def watched():
        source = __import__("sys").modules[type(model.model.layers[0].self_attn).__module__]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        wrapped = ["forward" in vars(m) for m in model.modules()]
        return source.eager_attention_forward, hooks, wrapped

    before = watched()
    captured(model, tmp_path / "c")
    assert watched() == before
    with pytest.raises(ZeroDivisionError), aprt.capture(model, tmp_path / "d"):
        forward(model, TOKENS)
        _ = 1 / 0
    assert watched() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_another_model_in_the_same_process_is_not_captured(tmp_path):
    watched, other = make_model("qwen3"), make_model("qwen3", seed=1)
    with aprt.capture(watched, tmp_path / "c"):
        forward(other, TOKENS)
        forward(watched, TOKENS)
    alone, _ = captured(watched, tmp_path / "d")
    (step,) = aprt.read(tmp_path / "c").steps
    assert all(step[name].tobytes() == alone.steps[0][name].tobytes() for name in step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[1, 2], [3, 4]])}, "batch of 2"),
        ({"position_ids": torch.tensor([[5, 6]])}, "position_ids"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "padding"),
        ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep"),
    ],
)
def test_calls_that_a_capture_cannot_describe_are_refused(model, arguments, message, tmp_path):
    with pytest.raises(aprt.AprtError, match=message), aprt.capture(model, tmp_path / "c"):
        model(**({"input_ids": torch.tensor([[1, 2]])} | arguments))
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_looked_into_are_refused(tmp_path):
    model = make_model("qwen2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(aprt.AprtError, match="attn_implementation='eager'"):
        captured(model, tmp_path / "c")
    experts = make_model("qwen3_moe")
    experts.set_experts_implementation("grouped_mm")
    with pytest.raises(aprt.AprtError, match="experts_implementation='eager'"):
        captured(experts, tmp_path / "c")
    with pytest.raises(aprt.AprtError, match="training mode"):
        captured(make_model("qwen2").train(), tmp_path / "c")
    sliding = make_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(aprt.AprtError, match="sliding window"):
        captured(sliding, tmp_path / "c")
    mistral = make_model("mistral")
    with pytest.raises(aprt.AprtError, match="MistralForCausalLM.*Qwen3ForCausalLM"):
        captured(mistral, tmp_path / "c")


def test_the_plan_names_every_captured_site_once(model, tmp_path):
    capture, _ = captured(model.to(torch.bfloat16), tmp_path / "c")
    ops = capture.manifest["plan"]["ops"]
    assert [site for op in ops for site in op["sites"]] == list(capture.steps[0])
    assert {op["activations"] for op in ops} == {"BF16"}
    assert capture.manifest["kv"] == "bf16"
