import json

import numpy as np
import pytest
import safetensors.numpy

from aprt import AprtError, read
from aprt.store import CaptureWriter, StepInfo, TensorSpec

HEAD = {"tool": {"name": "test", "version": "0"}}
VALUE = np.array([[1.5, -0.0, np.nan], [np.inf, 1e-42, 3.0]], dtype=np.float32)


def spec(name="final_norm", shape=(2, 3)):
    return TensorSpec(name, name, None, shape, ("row", "channel"), (0, 1))


def begin(out, *specs, **kwargs):
    writer = CaptureWriter(out, **kwargs)
    return writer, writer.step(StepInfo("prefill", [7, 8], [0, 1]), specs or [spec()])


def write(out, value=VALUE, **kwargs):
    writer, step = begin(out, **kwargs)
    step.put("final_norm", value)
    step.close()
    writer.finish(HEAD)
    return out


def test_values_come_back_to_the_bit(tmp_path):
    (step,) = read(write(tmp_path / "c")).steps
    assert step["final_norm"].tobytes() == VALUE.tobytes()
    assert step.manifest["token_ids"] == [7, 8]


def test_a_step_is_a_plain_safetensors_file_whatever_order_the_values_came_in(tmp_path):
    writer, step = begin(tmp_path / "c", spec("embedding"), spec("final_norm"))
    step.put("final_norm", VALUE + 1)
    step.put("embedding", VALUE)
    step.close()
    writer.finish(HEAD)
    stored = safetensors.numpy.load_file(tmp_path / "c" / "step-0000.safetensors")
    np.testing.assert_array_equal(stored["embedding"], VALUE)
    np.testing.assert_array_equal(stored["final_norm"], VALUE + 1)


def test_complete_is_the_last_thing_in_the_manifest(tmp_path):
    manifest = json.loads((write(tmp_path / "c") / "manifest.json").read_text())
    assert list(manifest)[-1] == "complete" and manifest["complete"] is True


def test_a_capture_that_was_interrupted_is_recognised(tmp_path):
    writer, step = begin(tmp_path / "c")
    step.put("final_norm", VALUE)
    assert not (tmp_path / "c").exists()
    with pytest.raises(AprtError, match="interrupted"):
        read(writer.partial)


def test_a_manifest_that_is_not_complete_is_refused(tmp_path):
    path = write(tmp_path / "c") / "manifest.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(AprtError, match="incomplete"):
        read(tmp_path / "c")


def test_a_changed_byte_is_noticed(tmp_path):
    path = write(tmp_path / "c") / "step-0000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AprtError, match="blake3"):
        read(tmp_path / "c")


def test_a_truncated_step_is_refused(tmp_path):
    path = write(tmp_path / "c") / "step-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AprtError, match="not a readable step"):
        read(tmp_path / "c")


def test_a_value_that_never_came_is_an_error(tmp_path):
    _, step = begin(tmp_path / "c")
    with pytest.raises(AprtError, match="did not compute final_norm"):
        step.close()


@pytest.mark.parametrize("value", [VALUE[:1], VALUE.T])
def test_a_value_of_another_shape_is_an_error(tmp_path, value):
    _, step = begin(tmp_path / "c")
    with pytest.raises(AprtError, match="expected"):
        step.put("final_norm", value)


def test_a_directory_that_holds_something_is_kept_unless_forced(tmp_path):
    write(tmp_path / "c")
    with pytest.raises(AprtError, match="not empty"):
        write(tmp_path / "c")
    write(tmp_path / "c", VALUE * 2, force=True)
    np.testing.assert_array_equal(read(tmp_path / "c").steps[0]["final_norm"], VALUE * 2)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_force_does_not_remove_what_is_no_capture(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "precious").touch()
    with pytest.raises(AprtError, match="replaces captures only"):
        write(tmp_path / "c", force=True)
    assert (tmp_path / "c" / "precious").exists()
