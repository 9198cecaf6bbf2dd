"""Trains the two bundled checkpoints: a byte-level Qwen2 model of about 5 M parameters and a draft of about 0.5 M.

The text is the Python standard library's sources (whatever the installation carries), held out by file. The draft is
trained on the text and on the main model's distribution, which is what speculative decoding asks of it.

    python perf/train_checkpoint.py --out integrations/engine/checkpoints     # minutes on one H200
    python perf/train_checkpoint.py --out /tmp/smoke --seconds 5 --device cpu  # a smoke test

Architecture: Qwen2 (Yang et al. 2024, arXiv 2407.10671): RMSNorm, RoPE, grouped-query attention with biases on q, k
and v, SwiGLU, tied embeddings. Parameter names are those of the Hugging Face layout, so the state dict saves as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

END_OF_TEXT = 256  # ids 0..255 are the bytes themselves
VOCAB = 264  # padded to a multiple of 8, as Qwen2 pads its own
STDLIB = Path(sysconfig.get_paths()["stdlib"])
# Byte tables, and sources that are broken on purpose.
EXCLUDED = ("site-packages", "dist-packages", "encodings", "lib2to3/tests/data", "test/encoded_modules", "__pycache__")


@dataclass(frozen=True)
class Shape:
    """Sizes of one model; head size is always 64."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 64
    rope_theta: float = 1e6
    eps: float = 1e-6
    max_position: int = 4096


TINY = Shape(hidden=256, layers=6, heads=4, kv_heads=2, intermediate=896)
DRAFT = Shape(hidden=128, layers=3, heads=2, kv_heads=1, intermediate=288)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        f = x.float()
        return self.weight * (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + self.eps))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [B, H, L, D] by cos and sin [L, D/2], halves rotated together."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (p(x).view(B, L, -1, self.s.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.down_proj = nn.Linear(s.intermediate, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.input_layernorm = RMSNorm(s.hidden, s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps)
        self.mlp = MLP(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Trunk(nn.Module):
    def __init__(self, s: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, s.hidden)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(s, dropout) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps)


class Model(nn.Module):
    """Tokens [B, L] -> logits [B, L, V]."""

    def __init__(self, s: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.s = s
        self.model = Trunk(s, dropout)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                depth = (2 * s.layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(p, std=0.02 * depth)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        s = self.s
        half = torch.arange(0, s.head_dim, 2, device=tokens.device) / s.head_dim
        angle = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * s.rope_theta**-half
        cos, sin = angle.cos(), angle.sin()
        x = self.model.dropout(self.model.embed_tokens(tokens))
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def count(self) -> int:
        return sum(p.numel() for p in self.parameters())


@dataclass
class Corpus:
    """Byte streams (uint8 values and 256 between files, int16) and the facts about them."""

    train: Tensor
    held_out: Tensor
    facts: dict[str, object]


def read_corpus(root: Path, held_out_percent: float = 5.0) -> Corpus:
    """Reads every UTF-8 .py file under root; a file is held out by the hash of its relative path."""
    streams: dict[bool, list[bytes]] = {False: [], True: []}
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if any(f"/{part}/" in f"/{name}" for part in EXCLUDED):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").encode()
        except UnicodeDecodeError:
            continue
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
        streams[key * 100 < held_out_percent].append(text)
        digest.update(name.encode() + b"\0" + text)
    facts: dict[str, object] = {
        "text": "the standard library's .py files that decode as UTF-8, without " + ", ".join(EXCLUDED[2:5]),
        "python": platform.python_version() if root == STDLIB else "another installation's",
        "sha256": digest.hexdigest(),
        "held_out": f"{held_out_percent:g} percent of the files, by the SHA-256 of their relative path",
    }
    joined = []
    for held in (False, True):
        parts = streams[held]
        if not parts:
            raise ValueError(f"{root} holds no {'held-out' if held else 'training'} .py files")
        facts |= {
            f"{'held_out' if held else 'train'}_files": len(parts),
            f"{'held_out' if held else 'train'}_bytes": sum(map(len, parts)),
        }
        end = torch.tensor([END_OF_TEXT], dtype=torch.int16)
        joined.append(torch.cat([t for p in parts if p for t in (_bytes(p), end)]))
    return Corpus(joined[0], joined[1], facts)


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int16)


def windows(stream: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """count random windows: inputs and targets, each [count, length] int64."""
    start = torch.randint(0, stream.numel() - length - 1, (count, 1), device=stream.device, generator=generator)
    rows = stream[start + torch.arange(length + 1, device=stream.device)].long()
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def evaluate(model: nn.Module, stream: Tensor, length: int, teacher: nn.Module | None = None) -> tuple[float, float]:
    """Mean loss in nats a byte over the whole stream in windows of `length`, and, with a teacher, the overlap
    sum(min(p, q)) of the two distributions: the acceptance rate of speculative sampling (Leviathan et al. 2023)."""
    rows = stream[: (stream.numel() - 1) // length * length].view(-1, length)
    nexts = stream[1 : rows.numel() + 1].view(-1, length)
    loss, overlap = 0.0, 0.0
    step = max(1, 131072 // length)
    for i in range(0, len(rows), step):
        x, y = rows[i : i + step].long(), nexts[i : i + step].long()
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = model(x).float()
            p = teacher(x).float().softmax(-1) if teacher is not None else None
        loss += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        if p is not None:
            overlap += torch.minimum(p, logits.softmax(-1)).sum().item()
    return loss / rows.numel(), overlap / rows.numel()


@dataclass(frozen=True)
class Recipe:
    """Half the numbers of a training run; the other half is how long."""

    seconds: float
    lr: float
    tokens_a_step: int = 131072
    short: int = 1024
    long: int = 4096
    long_from: float = 0.8  # the part of the run after which windows are long
    warmup: float = 0.02
    weight_decay: float = 0.1
    dropout: float = 0.0  # on the embedding and on what each block adds
    distil: float = 0.5  # weight of the teacher's cross entropy, when there is a teacher


def train(
    shape: Shape, recipe: Recipe, corpus: Corpus, device: str, teacher: nn.Module | None = None, seed: int = 0
) -> tuple[Model, dict[str, object]]:
    """Trains for recipe.seconds (compilation apart) and returns the model, rounded to bf16, and its numbers."""
    torch.manual_seed(seed)
    model = Model(shape, recipe.dropout).to(device)
    stream, generator = corpus.train.to(device), torch.Generator(device).manual_seed(seed)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=device != "cpu")

    def loss_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16):
            logits = model(x).flatten(0, 1).float()
            hard = F.cross_entropy(logits, y.flatten())
            if teacher is None:
                return hard, hard
            with torch.no_grad():
                p = teacher(x).flatten(0, 1).float().softmax(-1)
            soft = F.cross_entropy(logits, p)
        return torch.lerp(hard, soft, recipe.distil), hard

    run = torch.compile(loss_of, dynamic=False) if device != "cpu" else loss_of

    def batch(length: int) -> tuple[Tensor, Tensor]:
        return windows(stream, max(1, recipe.tokens_a_step // length), length, generator)

    compiling = time.perf_counter()
    for length in (recipe.short, recipe.long):
        run(*batch(length))[0].backward()
    optimiser.zero_grad(set_to_none=True)
    _sync(device)
    start = time.perf_counter()
    print(f"compiled in {start - compiling:.1f} s", flush=True)
    step, progress, recent = 0, 0.0, torch.zeros((), device=device)
    while progress < 1.0:
        rate = min(1.0, progress / recipe.warmup) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-3
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * rate
        total, hard = run(*batch(recipe.short if progress < recipe.long_from else recipe.long))
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        recent = torch.lerp(hard.detach(), recent, 0.99 if step > 100 else step / (step + 1))
        step += 1
        if step % 8 == 0 or device == "cpu":
            _sync(device)
            progress = (time.perf_counter() - start) / recipe.seconds
        if step % 400 == 0:
            print(f"step {step} at {progress:.0%}: train loss {recent.item():.4f} nats a byte", flush=True)
    seconds = time.perf_counter() - start
    facts = {
        "parameters": model.count(),
        "steps": step,
        "tokens": step * recipe.tokens_a_step,
        "seconds": round(seconds, 1),
        "device": _device_name(device),
        "recipe": asdict(recipe),
        "train_loss": round(recent.item(), 4),
    }
    return round_to_bf16(model.eval()), facts | held_out(model, corpus, device, teacher)


def held_out(model: Model, corpus: Corpus, device: str, teacher: nn.Module | None) -> dict[str, object]:
    """The losses on the held-out files, in nats and bits a byte, at both window lengths."""
    stream = corpus.held_out.to(device)
    stream = stream if device != "cpu" else stream[: 1 << 15]
    facts: dict[str, object] = {}
    for length in (1024, 4096):
        nats, overlap = evaluate(model, stream, length, teacher)
        facts[f"held_out_{length}"] = {"nats_per_byte": round(nats, 4), "bits_per_byte": round(nats / math.log(2), 4)}
        if teacher is not None:
            facts[f"held_out_{length}"] |= {"overlap_with_main": round(overlap, 4)}  # type: ignore[operator]
    return facts


def round_to_bf16(model: Model) -> Model:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def save_tokenizer(out: Path) -> None:
    """A byte-level BPE without merges: id = byte, and <|endoftext|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=dict(sorted(letters.items(), key=lambda kv: kv[1])), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False, "model_max_length": TINY.max_position,
    }  # fmt: skip
    _write_json(out / "tokenizer_config.json", config)


def save(out: Path, model: Model, facts: dict[str, object]) -> None:
    """Writes one checkpoint directory in Hugging Face format."""
    out.mkdir(parents=True, exist_ok=True)
    s = model.s
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": s.hidden,
        "intermediate_size": s.intermediate, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "hidden_act": "silu", "rms_norm_eps": s.eps,
        "rope_theta": s.rope_theta, "max_position_embeddings": s.max_position, "tie_word_embeddings": True,
        "use_sliding_window": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT, "torch_dtype": "bfloat16",
    }  # fmt: skip
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT})
    _write_json(out / "training.json", facts)
    save_tokenizer(out)


def load(directory: Path, shape: Shape) -> Model:
    """A saved model, frozen, in float32."""
    model = Model(shape)
    model.load_state_dict({k: v.float() for k, v in load_file(directory / "model.safetensors").items()})
    return model.eval().requires_grad_(False)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "integrations/engine/checkpoints")
    parser.add_argument("--stdlib", type=Path, default=STDLIB, help="where the text is")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=120.0, help="training time of the main model")
    parser.add_argument("--draft-seconds", type=float, default=60.0, help="and of the draft")
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--only", choices=("tiny", "draft"), help="train one; the draft then learns from OUT/tiny")
    parser.add_argument("--tokens-a-step", type=int, default=131072)
    args = parser.parse_args()
    corpus = read_corpus(args.stdlib)
    print(json.dumps(corpus.facts, indent=2), flush=True)
    if args.only != "draft":
        recipe = Recipe(args.seconds, 3e-3, args.tokens_a_step, weight_decay=args.weight_decay, dropout=args.dropout)
        model, facts = train(TINY, recipe, corpus, args.device)
        save(args.out / "tiny", model, {"data": corpus.facts, **facts})
        print(json.dumps(facts, indent=2), flush=True)
    if args.only != "tiny":
        teacher = load(args.out / "tiny", TINY).to(args.device)
        draft, facts = train(DRAFT, Recipe(args.draft_seconds, 4e-3, args.tokens_a_step), corpus, args.device, teacher)
        save(args.out / "draft", draft, {"data": corpus.facts, **facts})
        print(json.dumps(facts, indent=2), flush=True)


if __name__ == "__main__":
    main()
