"""import attnkit is enough, before or after transformers; and torch.compile sees one node a layer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.transformers.models import prompts, tiny

transformers = pytest.importorskip("transformers")

CHECK = "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as f; assert 'attnkit' in f.valid_keys()"
QUIET = "import sys; assert not any(m.split('.')[0] == 'transformers' for m in sys.modules)"


@pytest.mark.parametrize(
    "lines",
    [["import attnkit", QUIET, CHECK], ["import transformers.modeling_utils", "import attnkit", CHECK]],
    ids=["attnkit-first", "transformers-first"],
)
def test_either_order_registers(lines):
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_transformers_still_imports(monkeypatch):
    from attnkit import hook
    from attnkit.integrations import transformers as integration

    monkeypatch.setattr(integration, "register", lambda: (_ for _ in ()).throw(ImportError("gone")))
    with pytest.warns(UserWarning, match="could not register with transformers"):
        hook.install()


@pytest.mark.parametrize("pads", [(), (3,)], ids=["unpadded", "left-padded"])
def test_static_decode_compiles_whole(pads):
    """One step of decoding, compiled with fullgraph, against the same step eagerly: with the mask generate() makes."""
    model, inputs = tiny("qwen2-window"), prompts(2, 8, pads)
    results = []
    for compiled in (False, True):
        model.set_attn_implementation("attnkit")
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            step = torch.tensor([[5], [6]])
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
            made = model.prepare_inputs_for_generation(
                step, past_key_values=cache, attention_mask=mask, is_first_iteration=False, next_sequence_length=1
            )
            forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager") if compiled else model.forward
            results.append(forward(**made).logits)
    torch.testing.assert_close(*results)
