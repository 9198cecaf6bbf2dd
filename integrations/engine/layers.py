"""The pieces models are made of: plain functions and small records of tensors. T is tokens, H hidden size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Experts
from .weights import Source

#: Rows that weights on a CPU are laid out for. Other counts run too; at this one it matters most.
_PACKED_ROWS = 8


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x)."""
        return F.linear(x, self.weight, self.bias).add_(residual)

    def ready(self) -> Linear:
        """The form to compute with: on a CPU, weights in oneDNN's blocked layout (half the time at a few rows)."""
        w = self.weight
        if w.device.type != "cpu" or not _packs(w.dtype):
            return self
        with torch.inference_mode(False):
            return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(w, _PACKED_ROWS), self.bias)


@dataclass(frozen=True, slots=True)
class PackedLinear(Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


def _packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the packed form (inductor's own), and this CPU the instructions."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def linear(source: Source, name: str, out: int, inner: int, bias: bool = False) -> Linear:
    return Linear(source(f"{name}.weight", out, inner), source(f"{name}.bias", out) if bias else None)


def fused(*parts: Linear) -> Linear:
    """Linears of the same input as one, ready."""
    biases = [p.bias for p in parts if p.bias is not None]
    return Linear(torch.cat([p.weight for p in parts]), torch.cat(biases) if biases else None).ready()


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Root mean square normalisation over the last dimension (Zhang and Sennrich 2019)."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(silu(gate) * up), gate and up as one linear (SwiGLU; Shazeer 2020)."""

    gate_up: Linear
    down: Linear

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down.onto(residual, F.silu(gate).mul_(up))


def mlp(source: Source, name: str, hidden: int, intermediate: int, bias: bool = False) -> Mlp:
    gate = linear(source, f"{name}.gate_proj", intermediate, hidden, bias)
    up = linear(source, f"{name}.up_proj", intermediate, hidden, bias)
    return Mlp(fused(gate, up), linear(source, f"{name}.down_proj", hidden, intermediate, bias).ready())


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """DeepSeek's mixture: softmax routing to a few of many experts, beside shared ones that see every token.

    router float32 [E, H]; gate_up [E, 2 I, H]; down [E, H, I].
    """

    shape: Experts
    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared: Mlp | None

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x)."""
        weights, experts = self.route(x)
        T, chosen = experts.shape
        order = experts.view(-1).argsort(stable=True)  # the T * chosen (token, expert) pairs, by expert
        tokens = order // chosen
        ends = torch.searchsorted(experts.view(-1)[order], torch.arange(self.shape.count, device=x.device), right=True)
        pairs = self._grouped(x[tokens], ends) if grouped_mm_works(x) else self._looped(x[tokens], ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(T * chosen, device=x.device))
        weighted = pairs[back].view(T, chosen, -1) * weights[..., None]  # by token again: a sum in a fixed order
        out = weighted.sum(1).to(x.dtype)
        return out.add_(residual) if self.shared is None else self.shared.onto(out.add_(residual), x)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32 and expert ids, both [T, chosen]. Groups rank by their best expert."""
        s = self.shape
        scores = F.linear(x.float(), self.router).softmax(-1)
        if s.groups > 1:
            grouped = scores.view(-1, s.groups, s.count // s.groups)
            best = grouped.amax(-1).topk(s.chosen_groups, -1, sorted=False).indices
            kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, best, True)
            scores = (grouped * kept[..., None]).flatten(1)
        weights, experts = scores.topk(s.chosen, -1, sorted=False)
        return weights * s.scale, experts

    def _grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """One kernel over all experts; where they end stays on the device, so it can be captured in a graph."""
        offsets = ends.to(torch.int32)
        gate, up = F.grouped_mm(x, self.gate_up.transpose(1, 2), offs=offsets).chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=offsets)

    def _looped(self, x: Tensor, ends: Tensor) -> Tensor:
        out = torch.empty_like(x)
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                gate, up = F.linear(x[start:end], self.gate_up[expert]).chunk(2, -1)
                torch.mm(F.silu(gate).mul_(up), self.down[expert].t(), out=out[start:end])
            start = end
        return out


def grouped_mm_works(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")


def mixture(source: Source, name: str, hidden: int, shape: Experts) -> MixtureOfExperts:
    def stacked(part: str, out: int, inner: int) -> Tensor:
        return torch.stack([source(f"{name}.experts.{e}.{part}.weight", out, inner) for e in range(shape.count)])

    I = shape.intermediate
    gate_up = torch.cat((stacked("gate_proj", I, hidden), stacked("up_proj", I, hidden)), 1)
    down = stacked("down_proj", hidden, I)
    router = source(f"{name}.gate.weight", shape.count, hidden).float()
    shared = mlp(source, f"{name}.shared_experts", hidden, I * shape.shared) if shape.shared else None
    return MixtureOfExperts(shape, router, gate_up, down, shared)
