"""Captures of llama.cpp: every stage follows from its captured inputs, as the manifest says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

import llama_cpp  # noqa: E402
from emulation import LlamaCpp  # noqa: E402

import aprt  # noqa: E402
from aprt import ggml, llama_plan  # noqa: E402
from aprt.cli import main  # noqa: E402
from aprt.stages import STAGES  # noqa: E402

FIXTURES = Path(__file__).parents[2] / "fixtures"
FILES = {
    **{
        f"{name}-F16": f"tiny/{name}/{name}-F16.gguf"
        for name in ("qwen2", "qwen3", "qwen3-moe", "llama", "llama3-rope")
    },
    "pycoder-Q8_0": "pycoder-3m/pycoder-3m-Q8_0.gguf",
    "pycoder-Q4_K_M": "pycoder-3m/pycoder-3m-Q4_K_M.gguf",
}
# The only kind of mixture that llama.cpp's graph has.
ALL_SPARSE = dict(norm_topk_prob=True, mlp_only_layers=[])
TOKENS = [3, 17, 40, 5, 5, 61, 22, 9, 33, 12]
HIDDEN = {"ffn_silu", "moe_expert_silu"}
DENSE = {"ffn_gate", "ffn_up", "ffn_swigl"}
SCORES = {"attn_scores", "attn_softmax"}

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"{FIXTURES} is not there")


@pytest.fixture(params=FILES)
def path(request):
    return FIXTURES / FILES[request.param]


@pytest.fixture
def pycoder():
    return FIXTURES / FILES["pycoder-Q8_0"]


@pytest.fixture
def capture(tmp_path):
    """Captures a file with one thread, and reads the capture."""
    counter = iter(range(99))

    def run(path, *arguments, tokens=TOKENS):
        out = tmp_path / f"capture-{next(counter)}"
        given = ["--tokens", ",".join(map(str, tokens))] if tokens else []
        assert llama(path, out, "--threads", 1, *given, *arguments) == 0
        return aprt.read(out)

    return run


def llama(path, out, *arguments):
    return main(["llama-cpp", str(path), "--output", str(out), *map(str, arguments)])


def error(value, expected):
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def assert_explained(capture):
    """Compares every stage with its recomputation, within the bound of its arithmetic."""
    emulation = LlamaCpp(Path(capture.manifest["model"]["path"]), capture.manifest)
    for step in capture.steps:
        expected = dict(emulation.step(step))
        assert set(expected) == set(step)
        for name, value in expected.items():
            stage = name.rpartition(".")[2]
            if stage == "moe_router_indices":
                assert (step[name] == value).all(), name
                continue
            assert error(step[name], value) <= _bound(stage, step, name, emulation), name


def _bound(stage, step, name, emulation):
    """What may be left, relative, of a stage in F32: roundings to 24 bits, by the kernel's code."""
    unit = 2.0**-24
    if stage == "embedding":
        return 2 * unit
    if stage in ("qkv_bias", "post_attn_residual", "post_ffn_residual"):
        return unit
    if stage.endswith("norm"):  # squares, mean, root, quotient, two products
        return 4 * unit
    if stage in ("q_post_rope", "k_post_rope"):
        # The angle of pair i is a product of i + 1 factors, each rounded (twice: it is a power).
        turns = np.multiply.outer(step.manifest["positions"], emulation.frequencies)
        return unit * (4 + (turns * 2 * np.arange(turns.shape[1])).max())
    if stage == "attn_softmax":  # the argument of exp is rounded, and exp to 2 units
        return unit * (8 + np.ptp(step[name.replace("softmax", "scores")]))
    if stage == "moe_router_weights":  # a softmax, then a sum and a quotient
        return unit * (12 + np.ptp(step[name.removesuffix("_weights")]))
    if stage == "attention" and emulation.attention["accumulation"] == "f16":
        # An error of 2^-24 flips a rounding to f16 here and there: less than one for each channel.
        return 2.0**-12
    return 5e-7  # sums in F32, in an order that is not declared


@pytest.mark.parametrize("flash", ["auto", "off"])
def test_every_stage_follows_from_its_inputs_in_the_declared_arithmetic(path, flash, capture):
    found = capture(path, "--decode", 3, "--flash-attention", flash)
    assert [step.manifest["phase"] for step in found.steps] == ["prefill"] + ["decode"] * 3
    assert_explained(found)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_other_weights_and_long_heads_are_explained_too(kind, tmp_path, capture):
    path = random_file(tmp_path, kind, head_dim=128, intermediate_size=64)
    for flash in ("on", "off"):
        found = capture(path, "--flash-attention", flash, "--decode", 1)
        kinds = {weight for op in found.manifest["plan"]["ops"] for weight in op["weights"]}
        assert kinds == {kind, "F32"}
        assert_explained(found)


def test_a_stage_has_its_bias(tmp_path, capture):
    path = random_file(tmp_path, "F32", attention_bias=True, mlp_bias=True)
    found = capture(path)
    assert "layers.1.qkv_bias" in found.steps[0]
    assert_explained(found)


def random_file(directory, kind, architecture="llama", **changes):
    """A file with weights of a type, and without a tokenizer."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import gguf
    from conftest import make_model
    from test_gguf import write_gguf

    model = make_model(architecture, **changes)
    metadata = {"tokenizer.ggml.model": "none", "vocab_size": model.config.vocab_size}
    quantise = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
    return write_gguf(directory / "m.gguf", model, metadata=metadata, quantise=quantise)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("used", [1, 3])
def test_experts_of_other_weights_and_numbers_are_explained_too(kind, used, tmp_path, capture):
    shape = dict(num_experts_per_tok=used, moe_intermediate_size=64)
    path = random_file(tmp_path, kind, "qwen3_moe", **ALL_SPARSE, **shape)
    # Enough rows that an expert has more than a tile of them.
    found = capture(path, "--decode", 2, tokens=[i * 7 % 64 for i in range(40)])
    ops = [op for op in found.manifest["plan"]["ops"] if op["op"] == "expert_linear"]
    assert [len(op["sites"]) for op in ops] == [1] * 6
    assert {weight for op in ops for weight in op["weights"]} == {kind}
    assert found.steps[0]["layers.0.moe_expert_out"].shape == (40, used, 32)
    assert_explained(found)


def test_experts_are_weighted_and_then_added_in_the_order_of_their_slots(tmp_path, capture):
    path = random_file(tmp_path, "F32", "qwen3_moe", **ALL_SPARSE)
    step = capture(path).steps[0]
    weights = step["layers.0.moe_router_weights"][..., None]
    first, second, third = np.moveaxis(weights * step["layers.0.moe_expert_out"], 1, 0)
    assert ((first + second) + third).tobytes() == step["layers.0.ffn_out"].tobytes()
    assert (first + (second + third)).tobytes() != step["layers.0.ffn_out"].tobytes()


def test_dense_layers_and_weights_that_are_not_divided_are_no_file_of_llama_cpp(tmp_path, capsys):
    for changes in ({"norm_topk_prob": True}, {"mlp_only_layers": []}):
        path = random_file(tmp_path, "F32", "qwen3_moe", **changes)
        assert llama(path, tmp_path / "c", "--tokens", "1") == 2
        assert "always divides their weights by the sum" in capsys.readouterr().err


@pytest.mark.parametrize("flash", ["on", "off"])
def test_a_cache_of_f32_is_declared_as_it_is_read(flash, capture):
    found = capture(FIXTURES / FILES["llama-F16"], "--kv", "f32", "--flash-attention", flash)
    assert found.manifest["kv"] == ("f16" if flash == "on" else "f32")
    assert_explained(found)


@pytest.mark.parametrize("threads", [1, 3])
def test_each_kernel_of_flash_attention_is_declared_for_its_steps(threads, capture):
    path = FIXTURES / FILES["qwen3-F16"]
    tokens = [i % 60 for i in range(257)]
    found = capture(path, "--decode", 1, "--threads", threads, tokens=tokens)
    ops = [op for op in found.manifest["plan"]["ops"] if "layers.0.attention" in op["sites"]]
    kernels = [op["kernel"].removeprefix("ggml_flash_attn_ext/") for op in ops]
    assert kernels[0] == "tiled" and kernels[1].startswith("split")
    assert [op["steps"] for op in ops] == [[0], [1]]
    assert_explained(found)


@pytest.mark.parametrize(
    ("rows", "keys", "kernel"),
    [
        (63, 63, "vector"),
        (64, 64, "tiled"),
        (1, 256, "vector"),
        (1, 257, "split"),
        (2, 999, "vector"),
    ],
)
def test_flash_attention_chooses_its_kernel_by_rows_and_padded_cache(rows, keys, kernel):
    assert llama_plan.flash_kernel(rows, keys) == kernel


def test_every_stage_of_the_graph_is_there_in_every_layer(path, capture):
    for flash, hidden in (("off", HIDDEN), ("on", HIDDEN | SCORES)):
        found = capture(path, "--flash-attention", flash)
        config = found.manifest["model"]["config"]
        absent = {"qkv_bias"} if not config["attention_bias"] else set()
        absent |= {"q_norm", "k_norm"} if not config["qk_norm"] else set()
        experts = {s.name for s in STAGES if s.name.startswith("moe_")}
        absent |= DENSE if "num_experts" in config else experts
        expected = {s.name for s in STAGES} - hidden - absent
        tensors = found.steps[0].manifest["tensors"]
        assert {t["stage"] for t in tensors} == expected
        layers = range(config["num_hidden_layers"])
        assert {t["layer"] for t in tensors if t["stage"] == "attention"} == set(layers)
        declared = [site for op in found.manifest["plan"]["ops"] for site in op["sites"]]
        assert sorted(declared) == sorted(t["name"] for t in tensors)


@pytest.mark.parametrize("name", FILES)
def test_stages_line_up_with_those_of_hugging_face(name, tmp_path, capture):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    path = FIXTURES / FILES[name]
    found = capture(path, "--decode", 2, "--flash-attention", "off")
    out = tmp_path / "hf"
    arguments = ["--tokens-from", str(found.path), "--output", str(out)]
    assert main(["hf", str(path), *arguments]) == 0
    reference = aprt.read(out)
    # What 8 bits of activations, or 11, may make of the last stage; other channels make it 1.
    tolerance = 5e-2 if "Q" in name else 5e-3
    for step, expected in zip(found.steps, reference.steps, strict=True):
        assert step.manifest["positions"] == expected.manifest["positions"]
        assert set(expected) - set(step) == {n for n in expected if n.endswith("_silu")}
        for site in step:
            assert error(step[site], expected[site]) < tolerance, site


def test_masked_entries_are_zero_and_the_padding_of_the_cache_is_cut_off(pycoder, capture):
    found = capture(pycoder, "--flash-attention", "off", "--decode", 1)
    hidden = np.triu(np.ones((len(TOKENS), len(TOKENS)), bool), 1)
    for stage in ("attn_scores", "attn_softmax"):
        value = found.steps[0][f"layers.1.{stage}"]
        assert value.shape[1:] == hidden.shape
        assert (value[:, hidden] == 0).all() and (value[:, ~hidden] != 0).all()
        assert found.steps[1][f"layers.1.{stage}"].shape[1:] == (1, len(TOKENS) + 1)


@pytest.mark.parametrize("flash", ["on", "off"])
def test_looking_does_not_change_a_bit_of_the_logits(path, flash, capture):
    found = capture(path, "--decode", 2, "--flash-attention", flash, "--threads", 2)
    ids = [step.manifest["token_ids"] for step in found.steps]
    for step, logits in zip(found.steps, unwatched_logits(path, ids, flash), strict=True):
        assert step["lm_head"].tobytes() == logits.tobytes()


def unwatched_logits(path, steps, flash):
    """The logits of each step, by llama.cpp without a callback."""
    model = llama_cpp.llama_model_load_from_file(
        bytes(path), llama_cpp.llama_model_default_params()
    )
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 64, 2, 2
    parameters.flash_attn_type = {"on": 1, "off": 0}[flash]
    context = llama_cpp.llama_init_from_model(model, parameters)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    position = 0
    for ids in steps:
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position + i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama_cpp.llama_decode(context, batch) == 0
        logits = llama_cpp.llama_get_logits(context)
        yield np.ctypeslib.as_array(logits, (len(ids), vocab)).copy()
        llama_cpp.llama_batch_free(batch)
        position += len(ids)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


def test_decode_steps_are_greedy_and_one_token_each(pycoder, capture):
    found = capture(pycoder, "--decode", 3)
    greedy = [int(step["lm_head"][-1].argmax()) for step in found.steps]
    ids = [step.manifest["token_ids"] for step in found.steps]
    assert ids == [TOKENS, *([token] for token in greedy[:3])]
    positions = [step.manifest["positions"] for step in found.steps]
    assert positions == [list(range(10)), [10], [11], [12]]


def test_a_selection_is_the_same_bits_as_in_the_whole(capture):
    path = FIXTURES / FILES["llama-F16"]
    whole = capture(path, "--flash-attention", "off").steps[0]
    stages = "qkv_matmul,k_post_rope,attn_scores,lm_head"
    part = capture(
        path, "--flash-attention", "off", "--stages", stages, "--layers", "1", "--rows", "2..5"
    ).steps[0]
    names = ["qkv_matmul", "k_post_rope", "attn_scores"]
    assert list(part) == [f"layers.1.{name}" for name in names] + ["lm_head"]
    for tensor in part.manifest["tensors"]:
        name, axis = tensor["name"], tensor["axes"].index("row")
        assert tensor["positions"] == [2, 3, 4]
        assert part[name].tobytes() == whole[name].take([2, 3, 4], axis).tobytes()


def test_a_capture_is_replayed_token_by_token(pycoder, capture):
    first = capture(pycoder, "--decode", 2)
    again = capture(pycoder, "--tokens-from", first.path, tokens=None)
    assert first.manifest["steps"] == again.manifest["steps"]


def test_text_goes_through_the_tokenizer_of_the_file(pycoder, capture):
    tokenizers = pytest.importorskip("tokenizers")
    text = "def add(a, b):\n    return"
    found = capture(pycoder, "-p", text, "--stages", "lm_head", tokens=None).manifest
    tokenizer = tokenizers.Tokenizer.from_file(str(pycoder.parent / "tokenizer.json"))
    assert found["steps"][0]["token_ids"] == tokenizer.encode(text).ids
    assert "".join(found["steps"][0]["tokens_text"]) == text
    assert found["prompt"] == {"mode": "text", "text": text}


def test_chat_goes_through_the_template_of_the_file(pycoder, capture):
    oracle = pytest.importorskip("aprt.oracle")
    found = capture(pycoder, "-p", "hello", "--chat", "--stages", "lm_head", tokens=None).manifest
    expected = oracle.prompt_from_text(pycoder.parent, "hello", chat=True)
    assert found["steps"][0]["token_ids"] == expected.ids
    assert found["prompt"] == {"mode": "chat", "text": "hello"}


def test_the_manifest_says_what_each_weight_rounds(capture):
    found = capture(FIXTURES / FILES["pycoder-Q4_K_M"], "--flash-attention", "off").manifest
    ops = {site: op for op in found["plan"]["ops"] for site in op["sites"]}
    head, qkv = ops["lm_head"], ops["layers.0.qkv_matmul"]
    assert (head["op"], head["accumulation"], head["output"]) == ("linear", "f32", "F32")
    assert len(qkv["weights"]) == 3 and set(qkv["weights"]) <= {"Q4_K", "Q6_K"}
    assert qkv["activations"] == "Q8_K"
    assert ops["layers.0.attn_scores"]["activations"] == "F16"
    assert ops["layers.0.attention"]["op"] == "attn_values"
    assert (found["backend"]["name"], found["kv"]) == ("llama.cpp", "f16")


def test_interleaved_heads_are_recorded_as_captured_in_halves(capture):
    llama_file = capture(FIXTURES / FILES["llama-F16"], "--stages", "lm_head").manifest
    qwen_file = capture(FIXTURES / FILES["qwen2-F16"], "--stages", "lm_head").manifest
    assert llama_file["backend"]["rope_pairs"] == "neighbours"
    assert "rope_pairs" not in qwen_file["backend"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1", "--stages", "ffn_silu"], "computes it together with ffn_swigl"),
        (["--tokens", "1", "--stages", "attn_scores"], "give --flash-attention off"),
        (["--tokens", "1", "--stages", "q_norm"], "it has embedding, attn_norm"),
        (["--tokens", "1", "--layers", "9"], "this model has layers 0..4"),
        (["--tokens", "1", "--rows", "5..9"], "nothing to capture"),
        (["--tokens", "999999"], "vocabulary has ids 0.."),
        (["--tokens", ""], "the prompt is empty"),
        (["--tokens", "1", "--threads", "0"], "expected at least 1"),
        (["--tokens", "1", "--chat"], "--chat goes with -p"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(pycoder, arguments, message, tmp_path, capsys):
    assert llama(pycoder, tmp_path / "c", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("apr-oracle: ")]) == 1
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_supported_model_are_refused(tmp_path, capsys):
    (tmp_path / "m.bin").write_bytes(b"PK\x03\x04")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00rest")
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path, message in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "not a GGUF file"),
        (tmp_path / "m.bin", "not a GGUF file"),
        (tmp_path / "m.gguf", "not a readable GGUF file"),
        (tmp_path / "other.gguf", "'gemma3' is not supported, only qwen2, qwen3, qwen3_moe"),
    ):
        assert llama(path, tmp_path / "c", "--tokens", "1") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_missing_library_is_named_with_the_extra_that_has_it(
    pycoder, tmp_path, monkeypatch, capsys
):
    for module in [m for m in sys.modules if m.startswith("aprt.llama") or m == "aprt.ggml"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(aprt, "llama_oracle", raising=False)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert llama(pycoder, tmp_path / "c", "--tokens", "1") == 2
    assert "pip install 'apr-oracle[llama-cpp]'" in capsys.readouterr().err


def test_another_memory_layout_is_refused(pycoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ggml, "_OBJECT_BYTES", 40)
    assert llama(pycoder, tmp_path / "c", "--tokens", "1") == 2
    assert "another memory layout" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failure_in_the_callback_ends_the_capture(pycoder, tmp_path, monkeypatch, capsys):
    def broken(_tensor):
        raise aprt.AprtError("cannot read this")

    monkeypatch.setattr(ggml, "values", broken)
    assert llama(pycoder, tmp_path / "c", "--tokens", "1,2") == 2
    assert "apr-oracle: cannot read this" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_accelerator_leaves_the_arithmetic_undeclared(pycoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ggml, "accelerators", lambda: ["BLAS"])
    assert llama(pycoder, tmp_path / "c", "--tokens", "1,2", "--json") == 0
    out, err = capsys.readouterr()
    assert "BLAS" in err and json.loads(out)["steps"] == 1
    assert aprt.read(tmp_path / "c").manifest["plan"] is None
