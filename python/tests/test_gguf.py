"""A GGUF of a model gives the model's capture: files are written here, by llama.cpp's rules."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from conftest import ARCHITECTURES, LLAMA3_SCALING, TOKENS, forward, make_model  # noqa: E402
from recompute import rope_frequencies  # noqa: E402

import aprt  # noqa: E402
from aprt.cli import main  # noqa: E402
from aprt.gguf_file import open_file, unpermute  # noqa: E402
from aprt.oracle import load  # noqa: E402
from aprt.store import index_sha256  # noqa: E402

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def gguf_name(name):
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{GGUF_NAMES[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def stored_parameters(model):
    """The tensors of a file by the names of parameters: those of experts are not fused."""
    for name, parameter in model.named_parameters():
        value, experts = parameter.detach().numpy(), name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(value, 2, axis=1)
            yield f"{experts}.gate_proj.weight", gate
            yield f"{experts}.up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", value
        else:
            yield name, value


def interleave(weight, heads):
    """The row order of llama files: the two halves of each head take turns."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(path, model, *, metadata=None, tensors=None, drop=(), quantise=None):
    """Writes `model` as GGUF, with metadata and tensors added, and names dropped."""
    config, architecture = model.config, model.config.model_type.replace("_", "")
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = model.model.layers[0].self_attn.head_dim
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if architecture == "qwen3moe":
        keys |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_weights_norm": config.norm_topk_prob,
        }
    for key, value in (keys | (metadata or {})).items():
        if value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}.get(
            type(value), writer.add_string
        )
        own = key.startswith(("general.", "split.", "tokenizer."))
        add(key if own else f"{architecture}.{key}", value)

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in stored_parameters(model):
        module = name.split(".")[-2]
        if architecture == "llama" and module in heads:
            value = interleave(value, heads[module])
        if gguf_name(name) in drop:
            continue
        exact = value.ndim == 1 or module == "gate" or value.shape[-1] % 32
        if quantise and not exact:
            writer.add_tensor(
                gguf_name(name), gguf.quants.quantize(value, quantise), raw_dtype=quantise
            )
        else:
            writer.add_tensor(gguf_name(name), value)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def captured(model, out, ids=TOKENS):
    with aprt.capture(model, out):
        forward(model, ids)
    return aprt.read(out).steps[0]


def assert_same_capture(expected, actual, tmp_path, ids=TOKENS):
    expected, actual = (
        captured(expected, tmp_path / "a", ids),
        captured(actual, tmp_path / "b", ids),
    )
    assert list(expected) == list(actual)
    assert [n for n in expected if expected[n].tobytes() != actual[n].tobytes()] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_f32_file_gives_the_same_bits_as_the_directory(architecture, tmp_path):
    model = make_model(architecture)
    model.save_pretrained(tmp_path / "hf")
    from_directory, _ = load(tmp_path / "hf", "float32")
    from_gguf, provenance = load(write_gguf(tmp_path / "m.gguf", model), "float32")
    assert provenance.format == "gguf"
    assert_same_capture(from_directory, from_gguf, tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_biases_are_loaded_and_of_llama_unpermuted(architecture, tmp_path):
    model = make_model(architecture, attention_bias=True)
    assert_same_capture(model, load(write_gguf(tmp_path / "m", model), "float32")[0], tmp_path)


def test_a_file_without_output_has_tied_embeddings(tmp_path):
    model = make_model("qwen2", tie_word_embeddings=True)
    path = write_gguf(tmp_path / "m.gguf", model)
    assert "output.weight" not in {t.name for t in gguf.GGUFReader(path).tensors}
    loaded, provenance = load(path, "float32")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert provenance.weight_types["lm_head.weight"] == "F32"
    assert_same_capture(model, loaded, tmp_path)


def test_rope_freqs_divide_the_rotary_frequencies(tmp_path):
    scaled = make_model("llama", rope_parameters=LLAMA3_SCALING)
    default = {"rope_type": "default", "rope_theta": LLAMA3_SCALING["rope_theta"]}
    factors = rope_frequencies(16, default) / rope_frequencies(16, LLAMA3_SCALING)
    path = write_gguf(
        tmp_path / "m.gguf", scaled, tensors={"rope_freqs.weight": factors.astype(np.float32)}
    )
    loaded, _ = load(path, "float32")
    expected, actual = (
        captured(scaled, tmp_path / "a", TOKENS * 5),
        captured(loaded, tmp_path / "b", TOKENS * 5),
    )
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=1e-4, err_msg=name)
    unscaled, _ = load(write_gguf(tmp_path / "n.gguf", scaled), "float32")
    off = captured(unscaled, tmp_path / "c", TOKENS * 5)["layers.0.q_post_rope"]
    assert np.abs(off - expected["layers.0.q_post_rope"]).max() > 0.1


def test_rope_freqs_are_not_applied_on_top_of_a_scaled_configuration(tmp_path):
    scaled = make_model("llama", rope_parameters=LLAMA3_SCALING)
    scaled.config.save_pretrained(tmp_path / "hf")
    default = {"rope_type": "default", "rope_theta": LLAMA3_SCALING["rope_theta"]}
    factors = rope_frequencies(16, default) / rope_frequencies(16, LLAMA3_SCALING)
    tensors = {"rope_freqs.weight": factors.astype(np.float32)}
    loaded, _ = load(
        write_gguf(tmp_path / "m", scaled, tensors=tensors), "float32", tmp_path / "hf"
    )
    np.testing.assert_allclose(
        loaded.model.rotary_emb.inv_freq, scaled.model.rotary_emb.inv_freq, rtol=1e-6
    )
    tensors = {"rope_freqs.weight": factors.astype(np.float32) * 2}
    with pytest.raises(aprt.AprtError, match="rope_freqs.weight and the configuration"):
        load(write_gguf(tmp_path / "n", scaled, tensors=tensors), "float32", tmp_path / "hf")


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16])
def test_stored_weights_are_dequantised_as_they_are(kind, tmp_path):
    model = make_model("qwen3")
    loaded, provenance = load(write_gguf(tmp_path / "m.gguf", model, quantise=kind), "float32")
    original = model.model.layers[0].self_attn.o_proj.weight.detach().numpy()
    stored = gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind)
    np.testing.assert_array_equal(loaded.model.layers[0].self_attn.o_proj.weight, stored)
    assert provenance.weight_types["model.layers.0.self_attn.o_proj.weight"] == kind.name


def test_the_stored_types_of_experts_are_declared(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", make_model("qwen3_moe"), quantise=gguf.GGMLQuantizationType.Q8_0
    )
    assert main(["hf", str(path), "--tokens", "1", "--output", str(tmp_path / "c")]) == 0
    manifest = aprt.read(tmp_path / "c").manifest
    weights = {s: op["weights"] for op in manifest["plan"]["ops"] for s in op["sites"]}
    assert weights["layers.1.moe_router"] == ["F32"]
    assert weights["layers.1.moe_expert_gate"] == weights["layers.1.moe_expert_up"] == ["Q8_0"]
    assert weights["layers.1.moe_expert_out"] == ["F32"]  # its rows are no multiple of 32
    assert manifest["model"]["architecture"] == "qwen3_moe"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"expert_gating_func": 2}}, "expert_gating_func = 2"),
        ({"metadata": {"expert_shared_count": 1}}, "expert_shared_count = 1"),
        ({"metadata": {"expert_weights_scale": 2.5}}, "expert_weights_scale = 2.5"),
        ({"metadata": {"expert_used_count": None}}, "expert_used_count is missing"),
        ({"metadata": {"expert_count": 6}}, "another shape.*layers.1.mlp.experts"),
        ({"drop": ["blk.1.ffn_down_exps.weight"]}, "lacks model.layers.1.mlp.experts.down_proj"),
        ({"drop": ["blk.1.ffn_up_exps.weight"]}, "gate_proj has no up_proj of its shape"),
        ({"drop": ["blk.1.ffn_gate_exps.weight"]}, "lacks model.layers.1.mlp.experts.gate_up_proj"),
        ({"drop": ["blk.1.ffn_gate_inp.weight"]}, "lacks model.layers.1.mlp.down_proj"),
    ],
)
def test_experts_that_are_not_understood_in_full_are_refused(changes, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_model("qwen3_moe"), **changes)
    with pytest.raises(aprt.AprtError, match=message):
        load(path, "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"rope.scaling.type": "yarn"}}, "rope.scaling.type = 'yarn'"),
        ({"metadata": {"attention.sliding_window": 512}}, "attention.sliding_window = 512"),
        ({"metadata": {"logit_scale": 0.5}}, "logit_scale = 0.5"),
        ({"metadata": {"expert_count": 8}}, "expert_count = 8"),
        ({"metadata": {"never_heard_of": 1}}, "never_heard_of = 1"),
        ({"metadata": {"rope.dimension_count": 8}}, "rope.dimension_count is 8"),
        ({"metadata": {"block_count": None}}, "block_count is missing"),
        ({"metadata": {"split.count": 2}}, "several parts"),
        ({"metadata": {"general.type": "adapter"}}, "holds a adapter"),
        ({"drop": ["blk.1.ffn_up.weight"]}, "the file lacks model.layers.1.mlp.up_proj.weight"),
        ({"tensors": {"blk.0.mystery.weight": np.ones(3, np.float32)}}, "blk.0.mystery.weight"),
        (
            {"tensors": {"blk.9.attn_norm.weight": np.ones(32, np.float32)}},
            "no place for.*layers.9",
        ),
        ({"metadata": {"feed_forward_length": 99}}, "another shape.*down_proj"),
        (
            {"tensors": {"rope_freqs.weight": np.ones(3, np.float32)}},
            r"shape \[3\], expected \[8\]",
        ),
    ],
)
def test_files_that_are_not_understood_in_full_are_refused(changes, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), **changes)
    with pytest.raises(aprt.AprtError, match=message):
        load(path, "float32")


def test_metadata_that_change_nothing_are_accepted(tmp_path):
    neutral = {"rope.scaling.type": "none", "expert_count": 0, "logit_scale": 1.0}
    load(write_gguf(tmp_path / "m.gguf", make_model("llama"), metadata=neutral), "float32")


def test_a_configuration_replaces_metadata_that_are_not_understood(tmp_path):
    model = make_model("llama")
    model.config.save_pretrained(tmp_path / "hf")
    path = write_gguf(tmp_path / "m.gguf", model, metadata={"never_heard_of": 1})
    assert_same_capture(model, load(path, "float32", tmp_path / "hf")[0], tmp_path)
    make_model("qwen3").config.save_pretrained(tmp_path / "other")
    with pytest.raises(aprt.AprtError, match="is of 'qwen3'"):
        load(path, "float32", tmp_path / "other")


def test_a_truncated_file_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_model("qwen2"))
    for size in (path.stat().st_size - 4096, 700, 10):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(aprt.AprtError, match="not a readable GGUF"):
            load(path, "float32")


def test_unpermuting_undoes_the_interleaving():
    weight = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    np.testing.assert_array_equal(unpermute(interleave(weight, 2), 2), weight)
    # one head of 4 rows: pairs (0, 2) and (1, 3) are stored side by side
    np.testing.assert_array_equal(unpermute(np.array([0, 2, 1, 3]), 1), [0, 1, 2, 3])


def test_the_index_hash_is_that_of_the_rust_side():
    """The same constant stands in crates/format/tests/fixtures.rs."""
    fixtures = Path(__file__).parents[2] / "fixtures"
    file = open_file(fixtures / "tiny/qwen2/qwen2-F16.gguf")
    expected = "c9380f60d23c3df1a3be6ce514ef19443acdabe0bb10435530fa8f54e326958a"
    assert index_sha256(file.tensors) == expected
