import hashlib
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from conftest import TOKENS, make_model  # noqa: E402

import aprt  # noqa: E402
from aprt.cli import main  # noqa: E402


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Hugging Face directory with a word tokenizer, whose ids are those of the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("hf")
    make_model("qwen3").save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}w3",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def hf(model, out, *arguments):
    return main(["hf", str(model), "--output", str(out), *map(str, arguments)])


def test_a_prefill_and_greedy_steps_are_captured(directory, tmp_path, capsys):
    assert hf(directory, tmp_path / "c", "--tokens", "3,17 40", "--decode", "2", "--json") == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert "3 steps" in err and "MB" in err
    capture = aprt.read(tmp_path / "c")
    greedy = [int(step["lm_head"][-1].argmax()) for step in capture.steps]
    assert summary["decoded_ids"] == greedy
    steps = capture.manifest["steps"]
    assert [s["phase"] for s in steps] == ["prefill", "decode", "decode"]
    assert [s["token_ids"] for s in steps] == [[3, 17, 40], [greedy[0]], [greedy[1]]]
    assert summary["bytes"] == sum(v.nbytes for step in capture.steps for v in step.values())


def test_the_manifest_identifies_the_model(directory, tmp_path):
    hf(directory, tmp_path / "c", "--tokens", "1", "--stages", "lm_head")
    model = aprt.read(tmp_path / "c").manifest["model"]
    stored = (directory / "model.safetensors").read_bytes()
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    header.pop("__metadata__", None)
    lines = (
        f"{n} {t['dtype']} {','.join(map(str, t['shape']))}\n" for n, t in sorted(header.items())
    )
    assert model["index_sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert (model["format"], model["architecture"]) == ("safetensors", "qwen3")
    assert model["config"]["head_dim"] == 16 and model["config"]["qk_norm"] is True


def test_a_capture_is_replayed_token_by_token(directory, tmp_path):
    hf(directory, tmp_path / "a", "--tokens", "3,17", "--decode", "3")
    hf(directory, tmp_path / "b", "--tokens-from", tmp_path / "a")
    a, b = aprt.read(tmp_path / "a"), aprt.read(tmp_path / "b")
    assert a.manifest["steps"] == b.manifest["steps"]


def test_prefill_chunks_are_replayed_as_one_prefill(tmp_path):
    from conftest import forward

    model = make_model("qwen3")
    model.save_pretrained(tmp_path / "hf")
    with aprt.capture(model, tmp_path / "a"):
        cache = forward(model, TOKENS[:3], use_cache=True).past_key_values
        forward(model, TOKENS[3:6], past_key_values=cache)
        forward(model, TOKENS[6:], past_key_values=cache)
    hf(tmp_path / "hf", tmp_path / "b", "--tokens-from", tmp_path / "a")
    steps = aprt.read(tmp_path / "b").manifest["steps"]
    assert [(s["phase"], s["token_ids"]) for s in steps] == [
        ("prefill", TOKENS[:6]),
        ("decode", TOKENS[6:]),
    ]


def test_text_goes_through_the_tokenizer_and_chat_through_the_template(directory, tmp_path):
    hf(directory, tmp_path / "text", "-p", "w7 w9", "--stages", "lm_head")
    hf(directory, tmp_path / "chat", "-p", "w7 w9", "--chat", "--stages", "lm_head")
    text, chat = aprt.read(tmp_path / "text").manifest, aprt.read(tmp_path / "chat").manifest
    assert text["steps"][0]["token_ids"] == [7, 9]
    assert text["steps"][0]["tokens_text"] == ["w7", "w9"]
    assert chat["steps"][0]["token_ids"] == [1, 7, 9, 2, 3]
    assert chat["prompt"] == {"mode": "chat", "text": "w7 w9"}


def test_lower_precision_is_declared_and_close(directory, tmp_path):
    hf(directory, tmp_path / "f32", "--tokens", "3,17,40")
    hf(directory, tmp_path / "bf16", "--tokens", "3,17,40", "--dtype", "bfloat16")
    full, low = aprt.read(tmp_path / "f32"), aprt.read(tmp_path / "bf16")
    assert {op["output"] for op in low.manifest["plan"]["ops"]} == {"BF16"}
    value = low.steps[0]["layers.0.ffn_gate"]
    assert not (value.view(np.uint32) & 0xFFFF).any()  # bfloat16 values, widened
    np.testing.assert_allclose(value, full.steps[0]["layers.0.ffn_gate"], atol=0.2)
    assert (value != full.steps[0]["layers.0.ffn_gate"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1,x"], "expected token ids like 1,2,3"),
        (["--tokens", ""], "the prompt is empty"),
        (["--tokens", "64"], "vocabulary has ids 0..64"),
        (["--tokens", "1", "--stages", "qkv_bias"], "it has embedding, attn_norm"),
        (["--tokens", "1", "--layers", "2"], "layers 0..2"),
        (["--tokens", "1", "--chat"], "--chat goes with -p"),
        (["--tokens", "1", "--decode", "-1"], "expected a number of steps"),
        (["--tokens", "1", "--threads", "0"], "expected at least 1"),
        (["--tokens", "1", "--hf-config", "x"], "--hf-config is for GGUF files"),
        (["--tokens-from", "nowhere"], "nowhere/manifest.json: missing"),
        (["--tokens-from", "nowhere", "--decode", "1"], "give one of the two"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(directory, arguments, message, tmp_path, capsys):
    assert hf(directory, tmp_path / "c", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("apr-oracle: ")]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gemma3"},
            "'gemma3' is not supported, only qwen2, qwen3, qwen3_moe, llama",
        ),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints"),
        ({"intermediate_size": 57}, "another shape than config.json says"),
        ({"num_hidden_layers": 3}, "missing from the files: model.layers.2"),
        ({"num_hidden_layers": 1}, "belong to no parameter of the model: model.layers.1"),
    ],
)
def test_directories_that_do_not_fit_are_refused(change, message, tmp_path, capsys):
    make_model("qwen3").save_pretrained(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    settings = json.loads(config.read_text()) | change
    settings.pop("layer_types")  # its length would contradict num_hidden_layers
    config.write_text(json.dumps(settings))
    assert hf(tmp_path / "hf", tmp_path / "c", "--tokens", "1") == 2
    assert message in capsys.readouterr().err


def test_a_missing_expert_is_refused_by_name(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    make_model("qwen3_moe").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert hf(tmp_path / "hf", tmp_path / "c", "--tokens", "1") == 2
    missing = "are missing from the files: model.layers.1.mlp.experts.4.up_proj.weight"
    assert missing in capsys.readouterr().err


def test_a_gguf_takes_tokens_and_no_text(tmp_path, capsys):
    gguf = pytest.importorskip("test_gguf")
    path = gguf.write_gguf(tmp_path / "m.gguf", make_model("llama"))
    assert hf(path, tmp_path / "a", "-p", "hello") == 2
    assert "give --tokens or --tokens-from" in capsys.readouterr().err
    assert hf(path, tmp_path / "c", "--tokens", "3,17", "--decode", "1") == 0
    model = aprt.read(tmp_path / "c").manifest["model"]
    assert (model["format"], model["path"]) == ("gguf", str(path))


def test_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "m.bin").write_bytes(b"PK\x03\x04")
    assert hf(tmp_path / "m.bin", tmp_path / "c", "--tokens", "1") == 2
    assert hf(tmp_path / "none", tmp_path / "c", "--tokens", "1") == 2
    err = capsys.readouterr().err
    assert "neither a GGUF file nor" in err and "no such file" in err


def test_a_directory_that_is_not_empty_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x").touch()
    assert hf(tmp_path / "no-model", tmp_path / "c", "--tokens", "1") == 2
    assert "not empty" in capsys.readouterr().err


def test_a_killed_run_leaves_nothing_that_reads_as_a_capture(directory, tmp_path):
    out = tmp_path / "c"
    command = [sys.executable, "-m", "aprt.cli", "hf", directory, "--output", out]
    process = subprocess.Popen([*command, "--tokens", "1", "--decode", "100000"])
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("c.partial-*/step-0003*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    (partial,) = tmp_path.iterdir()
    assert re.fullmatch(r"c\.partial-\d+", partial.name)
    with pytest.raises(aprt.AprtError, match="interrupted"):
        aprt.read(partial)
