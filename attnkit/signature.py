"""What a call looks like, without what its tensors hold: one frozen record an op.

A signature is all that a kernel may choose by. It holds shapes, strides, dtypes and options, never a
value that lives on the device, so choosing needs no synchronisation and a captured graph stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionSig:
    """paged_prefill and paged_decode.

    Decode sees q as [B, Q, Hq, D] (Q query tokens a sequence); prefill as [T, Hq, D] and Q = 0.
    Strides count elements. Scales given as Python floats are folded into ``scale`` and ``out_scale``.
    """

    op: str
    device: torch.device
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    B: int
    T: int
    Q: int
    Hq: int
    Hkv: int
    D: int
    Dv: int
    P: int
    S: int
    W: int
    q_stride: tuple[int, ...]
    k_stride: tuple[int, ...]  # page, slot, head, element
    v_stride: tuple[int, ...]
    pages_stride: int  # between rows of the table
    out_stride: tuple[int, ...]
    aligned: bool  # q, k, v and out: base pointers and every stride but the last are multiples of 16 bytes
    scale: float
    out_scale: float
    causal: bool
    window: int  # keys a query sees, itself included; 0 is no window
    softcap: float
    sinks: torch.dtype | None
    k_scale: bool  # a float32 tensor expanded to [Hkv] comes along
    v_scale: bool
    tree_mask: bool
    lse: bool
    batch_invariant: bool

    @property
    def G(self) -> int:
        return self.Hq // self.Hkv


@dataclass(frozen=True, slots=True)
class MlaSig:
    """mla_decode: q [B, Q, H, C+R] against a latent cache [P, S, C+R]; values are its first C columns."""

    op: str
    device: torch.device
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    B: int
    Q: int
    H: int
    C: int
    R: int
    P: int
    S: int
    W: int
    q_stride: tuple[int, ...]
    kv_stride: tuple[int, ...]  # page, slot, element
    pages_stride: int
    out_stride: tuple[int, ...]
    aligned: bool
    scale: float
    causal: bool
    window: int
    softcap: float
    sinks: torch.dtype | None
    tree_mask: bool
    lse: bool
    batch_invariant: bool


@dataclass(frozen=True, slots=True)
class RaggedSig:
    """mla_prefill: ragged q [T, H, D], k [N, Hk, D], v [N, Hk, Dv], no pages."""

    op: str
    device: torch.device
    dtype: torch.dtype
    B: int
    T: int
    N: int
    H: int
    Hk: int
    D: int
    Dv: int
    q_stride: tuple[int, ...]
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    out_stride: tuple[int, ...]
    aligned: bool
    scale: float
    causal: bool
    window: int
    softcap: float
    sinks: torch.dtype | None
    lse: bool
    batch_invariant: bool


@dataclass(frozen=True, slots=True)
class GemmSig:
    """w8a8_gemm: a [M, K] x w [N, K]^T, both int8 or both e4m3."""

    op: str
    device: torch.device
    dtype: torch.dtype
    out_dtype: torch.dtype
    M: int
    N: int
    K: int
    a_stride: tuple[int, int]
    w_stride: tuple[int, int]
    out_stride: tuple[int, int]
    operands_aligned: bool  # a and w: base pointers and row strides are multiples of 16 bytes
    aligned: bool  # out too
    a_scale_per_token: bool  # float32 [M], else [1]
    w_scale_per_channel: bool  # float32 [N], else [1]
    bias: torch.dtype | None


@dataclass(frozen=True, slots=True)
class QuantSig:
    """quantize_per_token (and quantize_weight): x [M, K] to int8 or e4m3 with one scale a row."""

    op: str
    device: torch.device
    dtype: torch.dtype
    out_dtype: torch.dtype
    M: int
    K: int
    x_stride: tuple[int, int]
    aligned: bool


@dataclass(frozen=True, slots=True)
class RmsNormQuantSig:
    """rms_norm_quantize: the RMSNorm of x [M, K], or of residual + x, to int8 or e4m3 with one scale a row."""

    op: str
    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    out_dtype: torch.dtype
    M: int
    K: int
    x_stride: tuple[int, int]
    residual_stride: tuple[int, int] | None  # None: no residual
    eps: float
    aligned: bool


@dataclass(frozen=True, slots=True)
class SiluMulQuantSig:
    """silu_mul_quantize: silu(gate) * up of x [M, 2 K] to int8 or e4m3 with one scale a row."""

    op: str
    device: torch.device
    dtype: torch.dtype
    out_dtype: torch.dtype
    M: int
    K: int
    x_stride: tuple[int, int]
    aligned: bool


@dataclass(frozen=True, slots=True)
class SampleSig:
    """sample: logits [B, V].

    Each option is a Python number (the number stands here) or a tensor [B] (None stands here and the
    tensor comes along).
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    B: int
    V: int
    logits_stride: tuple[int, int]
    aligned: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    offset: int | None
    counts: bool  # output_counts int32 [B, V]
    prompt_mask: bool  # bool [B, V]
    logit_bias: bool  # float32 [B, V] (a shared [V] arrives with row stride 0)
    allowed: bool  # int32 bitmask [B, ceil(V / 32)]
    logprobs: int | None  # None: none; n: the chosen token's and the n highest


@dataclass(frozen=True, slots=True)
class HiddenSig:
    """sample_from_hidden: hidden [B, H] x weight [V, H]^T, and a draw from each row of it."""

    op: str
    device: torch.device
    dtype: torch.dtype
    B: int
    V: int
    H: int
    hidden_stride: tuple[int, int]
    weight_stride: tuple[int, int]
    aligned: bool  # base pointers and row strides are multiples of 16 bytes
    draw: SampleSig  # the second step's record: the same draw from float32 logits


@dataclass(frozen=True, slots=True)
class WriteSig:
    """write_kv: k, v [T, Hkv, D] into cache slots, quantising where the cache is e4m3 or int8."""

    op: str
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    T: int
    Hkv: int
    D: int
    Dv: int
    P: int
    S: int
    k_in_stride: tuple[int, ...]
    v_in_stride: tuple[int, ...]
    k_stride: tuple[int, ...]  # cache: page, slot, head, element
    v_stride: tuple[int, ...]
    k_scale: bool
    v_scale: bool
    aligned: bool  # 16 bytes of k and v, and what the cache keeps of them, start at whole multiples of their size


@dataclass(frozen=True, slots=True)
class WriteLatentSig:
    """write_latent: latent [T, 512] and rope [T, 64] into slots of an fp8 latent cache uint8 [P, S, 656]."""

    op: str
    device: torch.device
    dtype: torch.dtype
    T: int
    P: int
    S: int
    latent_stride: tuple[int, ...]
    rope_stride: tuple[int, ...]
    cache_stride: tuple[int, ...]  # page, slot, byte
    aligned: bool  # the cache: its base and every stride but the last are multiples of 16 bytes
    sources_aligned: bool  # latent and rope likewise


@dataclass(frozen=True, slots=True)
class MergeSig:
    """merge_states: two partial attentions [..., H, Dv] and their lse [..., H], flattened to rows."""

    op: str
    device: torch.device
    dtype: torch.dtype
    rows: int
    Dv: int
    aligned: bool


Sig = (
    AttentionSig
    | MlaSig
    | RaggedSig
    | GemmSig
    | QuantSig
    | RmsNormQuantSig
    | SiluMulQuantSig
    | SampleSig
    | HiddenSig
    | WriteSig
    | WriteLatentSig
    | MergeSig
)
