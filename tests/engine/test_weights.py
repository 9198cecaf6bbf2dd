"""CASES.md, bad input 11: a bad checkpoint is one clear error that names file and tensor, before memory is taken."""

from __future__ import annotations

import json
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnkit.integrations.engine import LLM, CheckpointError
from attnkit.integrations.engine import weights as weights_module

EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def no_memory(monkeypatch):
    """Fails where a tensor is read before the checkpoint was found good."""

    def read(self, name, *shape):
        raise AssertionError(f"{name} was read from a bad checkpoint")

    monkeypatch.setattr(weights_module.Reader, "__call__", read)


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_header(directory, change):
    """Rewrite the header alone; the data stays as it is."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    new = (json.dumps(header) if text is None else text).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def shard(directory, names=("a.safetensors", "b.safetensors")):
    """Cut model.safetensors in two, with an index. Returns the index's weight_map, to be changed and saved."""
    tensors = load_file(directory / "model.safetensors")
    half = len(tensors) // 2
    weight_map = {name: names[i >= half] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    save_index(directory, weight_map)
    return weight_map


def save_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def failure(directory, **options):
    with pytest.raises(CheckpointError) as caught:
        LLM(directory, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_copy_loads(copy):
    assert LLM(copy, device="cpu").generate("abc")[0].finish_reason in ("stop", "length")


def test_shards_give_the_same_tokens(copy, tiny):
    shard(copy)
    ours, plain = (LLM(d, device="cpu").generate("some text")[0].token_ids for d in (copy, tiny))
    assert ours == plain


def test_missing_tensor(copy, no_memory):
    change_tensors(copy, lambda t: t.pop(QUERY))
    assert failure(copy) == f"{copy / 'model.safetensors'}: {QUERY} [64, 64] is missing"


def test_extra_tensor(copy, no_memory):
    change_tensors(copy, lambda t: t.update({"model.layers.2.extra": torch.zeros(3)}))
    assert failure(copy) == f"{copy / 'model.safetensors'}: model.layers.2.extra [3] is not part of this model"


def test_misshapen_tensor(copy, no_memory):
    change_tensors(copy, lambda t: t.update({QUERY: torch.zeros(64, 32)}))
    assert failure(copy) == f"{copy / 'model.safetensors'}: {QUERY} has shape [64, 32], config.json wants [64, 64]"


def test_integer_tensor(copy, no_memory):
    change_tensors(copy, lambda t: t.update({QUERY: torch.zeros(64, 64, dtype=torch.int8)}))
    assert f"{QUERY} has dtype I8" in failure(copy)


def test_old_rotary_buffers_and_a_tied_head_are_let_pass(copy):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "lm_head.weight": torch.zeros(259, 64)}
    change_tensors(copy, lambda t: t.update(extra))
    assert LLM(copy, device="cpu").generate("abc")[0].error is None


@pytest.mark.parametrize("cut", [0, 5, 8, 40, -1, -4000])
def test_truncated_file(copy, no_memory, cut):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    message = failure(copy)
    assert message.startswith(f"{path}: ") and "truncated" in message


def test_bytes_behind_the_last_tensor(copy, no_memory):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"1234")
    assert failure(copy) == f"{path}: 4 bytes behind the last tensor belong to none"


def lie_overlap(header):
    header[QUERY]["data_offsets"] = header[EMBEDDING]["data_offsets"]
    header[QUERY]["shape"] = header[EMBEDDING]["shape"]


HEADER_LIES = {
    "not json": (lambda h: "{" * 50, "its header is not readable"),
    "too deep": (lambda h: '{"a":' * 100_000, "its header is not readable"),
    "not an object": (lambda h: "[1, 2]", "its header is a list"),
    "twice": (lambda h: json.dumps(h)[:-1] + f', "{QUERY}": {json.dumps(h[QUERY])}}}', f"{QUERY} appears twice"),
    "no shape": (lambda h: h[QUERY].pop("shape") and None, f"the header's entry of {QUERY} is malformed"),
    "dtype": (lambda h: h[QUERY].update(dtype="X7"), f"the header's entry of {QUERY} is malformed"),
    "negative": (lambda h: h[QUERY].update(shape=[-64, -64]), f"{QUERY} is F32 [-64, -64] but has bytes"),
    "larger shape": (lambda h: h[QUERY].update(shape=[64, 65]), f"{QUERY} is F32 [64, 65] but has bytes"),
    "huge shape": (lambda h: h[QUERY].update(shape=[2**40, 2**40]), f"{QUERY} is F32"),
    "text shape": (lambda h: h[QUERY].update(shape="ab"), f"{QUERY}"),
    "overlap": (lie_overlap, "begins at byte"),
    "bare number": (lambda h: h.update({QUERY: 3}), f"the header's entry of {QUERY} is malformed"),
}  # fmt: skip


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_header_lies(copy, no_memory, lie):
    change, wanted = HEADER_LIES[lie]
    change_header(copy, change)
    message = failure(copy)
    assert message.startswith(f"{copy / 'model.safetensors'}: ") and wanted in message


def test_header_that_claims_exabytes(copy, no_memory):
    path = copy / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    assert f"the header claims {2**62}" in failure(copy)


def test_index_with_a_missing_shard(copy, no_memory):
    shard(copy)
    (copy / "b.safetensors").unlink()
    message = failure(copy)
    assert "model.safetensors.index.json: " in message and "in b.safetensors, which does not exist" in message


@pytest.mark.parametrize(
    "where", ["../out.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", 7, "a.bin", "c:\\a.safetensors"]
)
def test_index_pointing_outside(copy, no_memory, where):
    weight_map = shard(copy)
    save_index(copy, weight_map | {QUERY: where})
    message = failure(copy)
    assert f"{QUERY} is said to be in {where!r}" in message and "same directory" in message


def test_index_naming_a_tensor_its_shard_has_not(copy, no_memory):
    weight_map = shard(copy)
    save_index(copy, {n: "a.safetensors" for n in weight_map})
    message = failure(copy)
    assert message.startswith(f"{copy / 'a.safetensors'}: ") and "is not in it" in message


def test_tensor_in_two_shards(copy, no_memory):
    shard(copy)
    both = load_file(copy / "a.safetensors") | load_file(copy / "b.safetensors")
    save_file(both, copy / "b.safetensors")
    assert "is also in a.safetensors" in failure(copy)


def test_empty_index(copy, no_memory):
    save_index(copy, {})
    assert "weight_map is missing or empty" in failure(copy)


def test_pickled_weights_are_refused_and_not_opened(copy):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the checkpoint was unpickled",))

    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = failure(copy)
    assert message.startswith(f"{copy / 'pytorch_model.bin'}: pickled weights are not loaded")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file(copy, no_memory, name):
    (copy / name).unlink()
    assert failure(copy).startswith(f"{copy / name}: no such file")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"7"])
def test_unreadable_json(copy, no_memory, name, content):
    (copy / name).write_bytes(content)
    assert failure(copy).startswith(f"{copy / name}: ")


def test_no_directory(tmp_path):
    assert failure(tmp_path / "nowhere").startswith(str(tmp_path / "nowhere"))


def test_without_tokenizer_token_ids_still_work(copy):
    (copy / "tokenizer.json").unlink()
    llm = LLM(copy, device="cpu", tokenizer=False)
    assert llm.generate([[5, 6, 7]])[0].token_ids
    assert "has no tokenizer" in (llm.generate("text")[0].error or "")


def test_dtype(copy, tiny):
    assert LLM(copy, device="cpu").dtype == torch.float32
    assert LLM(copy, device="cpu", dtype="bfloat16").dtype == LLM(copy, device="cpu", dtype="bf16").dtype == torch.bfloat16
    assert LLM(copy, device="cpu", dtype=torch.float16).model.embedding.dtype == torch.float16
    with pytest.raises(ValueError, match="dtype is 'int8', wanted 'auto'"):
        LLM(copy, device="cpu", dtype="int8")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"torch_dtype": None}))
    change_tensors(copy, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    assert LLM(copy, device="cpu").dtype == torch.bfloat16
