"""The forms in which attention with relative-position bias and an Attention Modulation Matrix (AMM) is computed.

    out_i = sum_j softmax_j(q_i k_j / sqrt(d) + B_ij) M_ij v_j

M multiplies the probabilities after the softmax and nothing is renormalised, so that no fused kernel has it as an
argument, and log M added to the bias would be another function. `FORMS` has the forms that compute it, `form_for` says
which is used where.

In half precision the softmax takes its maximum and sum in float32 in every form: torch's kernels do so inside, and
autocast on an accelerator makes the whole operation float32. Casting the scores as well costs 2 to 5 % of a bfloat16
training step on a CPU and leaves the error of the gradients as it is.

Shapes: query, key, value and the result are (B, N, heads, d); bias is (1, heads, N, N), of their dtype; the modulation
is (N, N), best of their dtype, or it is cast in each call. The explicit form also takes what broadcasts to these, so
that tokens may differ from image to image: bias (B, heads, N, N), modulation (B, 1, N, N).
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..util.lookup import lookup

logger = logging.getLogger(__name__)

# Scores held at a time by the in-place form, in bytes. Several images share a buffer up to the first limit, for a call
# of a kernel costs more than the arithmetic of a small grid; one image is cut into rows beyond the second.
IMAGE_BYTES = {"cpu": 2 * 2**20}
ROW_BYTES = {"cpu": 4 * 2**20}
ACCELERATOR_BYTES = 256 * 2**20
# Tokens from which the two-pass form is used on CUDA.
TWO_PASS_TOKENS = 1024
# Stands for log 0: its exponential is 0 in every dtype, and kernels that see whole rows of it make no nan.
LOG_ZERO = -1e4


def form_for(query: Tensor, bias: Tensor, modulated: bool) -> str:
    """The form of a block's attention: a name of `FORMS`, or "sdpa" for torch's fused attention.

                            plain                             with AMM
    gradients wanted        sdpa; on a CPU explicit in        explicit
                            bfloat16 (3 times as fast) and
                            where the bias has a gradient,
                            since SDPA falls back to the
                            slower of two explicit forms there
    traced (torch.compile)  sdpa                              explicit (the compiler fuses softmax and product)
    CPU, bfloat16           in-place                          in-place
    CPU, other dtypes       sdpa                              in-place
    CUDA                    sdpa                              in-place; two-pass from 1024 tokens on
    other devices           sdpa                              in-place
    """
    device = query.device.type
    eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())
    if not modulated:
        if device == "cpu" and bias.requires_grad:
            return "explicit"
        if device != "cpu" or query.dtype != torch.bfloat16 or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "sdpa"
        return "in-place" if eager else "explicit"
    if not eager:
        return "explicit"
    return "two-pass" if device == "cuda" and query.shape[1] >= TWO_PASS_TOKENS else "in-place"


def modulated_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, modulation: Tensor, form: str | None = None
) -> Tensor:
    """Attention with AMM in the form named, or in the one that suits device, dtype and size.

    Only "explicit" is differentiable. Where a form that was not asked for by name turns out to be unavailable (no such
    kernel for this device, dtype or head width), the in-place form is used.
    """
    if form is not None:
        return lookup(FORMS, form, "form of modulated attention")(query, key, value, bias, modulation)
    chosen = form_for(query, bias, modulated=True)
    tried = (chosen, query.device.type, query.dtype)
    if chosen in ALWAYS_THERE or tried in _unavailable:
        return FORMS[chosen if chosen in ALWAYS_THERE else "in-place"](query, key, value, bias, modulation)
    try:
        return FORMS[chosen](query, key, value, bias, modulation)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        logger.info("%s attention in %s on %s is unavailable, in-place instead: %s", chosen, tried[2], tried[1], error)
        _unavailable.add(tried)
        return modulated_attention_in_place(query, key, value, bias, modulation)


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, modulation: Tensor | None
) -> Tensor:
    """Attention written out; the reference of every faster form, and the differentiable form with AMM.

    `bias` and `modulation` None leave them out.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, heads, N, d)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(dim=-1)
    if modulation is not None:
        probabilities = probabilities * modulation.to(probabilities.dtype)
    return (probabilities @ value).transpose(1, 2)


def modulated_attention_in_place(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, modulation: Tensor | None
) -> Tensor:
    """Same function in one buffer of scores, some images or some rows of one image at a time; for inference only."""
    batch, tokens, heads, width = query.shape
    scale = width**-0.5
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, heads, N, d)
    key = key.transpose(-2, -1)
    modulation = None if modulation is None else modulation.to(query.dtype)
    out = torch.empty(batch, tokens, heads, width, dtype=value.dtype, device=value.device)
    row = heads * tokens * query.element_size()
    images = IMAGE_BYTES.get(query.device.type, ACCELERATOR_BYTES) // (tokens * row)
    if images > 1:
        for first in range(0, batch, images):
            some = slice(first, first + images)
            scores = query[some] @ key[some]
            torch.add(bias, scores, alpha=scale, out=scores)
            out[some] = _weighted_sum_in_place(scores, modulation, value[some]).transpose(1, 2)
        return out
    parts = -(-tokens * row // ROW_BYTES.get(query.device.type, ACCELERATOR_BYTES))
    rows = -(-tokens // parts)
    buffer = torch.empty(heads * rows * tokens, dtype=query.dtype, device=query.device)
    for image in range(batch):
        for first in range(0, tokens, rows):
            some = slice(first, min(first + rows, tokens))
            scores = buffer[: heads * (some.stop - first) * tokens].view(heads, -1, tokens)
            torch.baddbmm(bias[0, :, some], query[image, :, some], key[image], alpha=scale, out=scores)
            part = None if modulation is None else modulation[some]
            out[image, some] = _weighted_sum_in_place(scores, part, value[image]).transpose(0, 1)
    return out


def _weighted_sum_in_place(scores: Tensor, modulation: Tensor | None, value: Tensor) -> Tensor:
    torch.softmax(scores, dim=-1, out=scores)
    if modulation is not None:
        scores.mul_(modulation)
    return scores @ value


def two_pass_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, modulation: Tensor) -> Tensor:
    """Same function by two passes of a fused kernel, in memory linear in N beside the bias; for inference only.

    With Z the sum of exp(q_i k_j / sqrt(d) + B_ij) over j, and Z_M the same with B + log M in place of B,

        out_i = Z_M / Z  *  attention with the bias B + log M,

    since the softmax of the second has divided by Z_M where AMM divides by Z. The kernels return log Z. A row of M that
    is zero everywhere would be lost; a modulation matrix has none, its diagonal is positive.

    Raises:
        NotImplementedError: on devices without a kernel that returns log Z.
    """
    kernel = _WITH_LOG_SUM.get(query.device.type)
    if kernel is None:
        raise NotImplementedError(f"no attention kernel returns its log-sum-exp on {query.device.type}")
    width = query.shape[-1]
    query, key, value = (x.transpose(1, 2) for x in padded_to_alignment(query, key, value))  # (B, heads, N, d)
    modulated_bias = (bias + modulation.float().log().clamp(min=LOG_ZERO)).to(bias.dtype)
    out, log_sum_modulated = kernel(query, key, value, modulated_bias, width**-0.5)
    _, log_sum = kernel(query, key, value, bias, width**-0.5)
    ratio = (log_sum_modulated - log_sum).exp()  # (B, heads, N), float32
    return (out[..., :width] * ratio.unsqueeze(-1)).to(value.dtype).transpose(1, 2)


def flex_attention_two_pass(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, modulation: Tensor) -> Tensor:
    """As `two_pass_attention`, by torch's FlexAttention: compiled on CUDA, eager (and slow) elsewhere."""
    width = query.shape[-1]
    attend = _flex_attention(query.device.type == "cuda")
    if query.device.type == "cuda":  # its kernels want a power of two
        query, key, value = (F.pad(x, (0, (1 << (width - 1).bit_length()) - width)) for x in (query, key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, heads, N, d)
    scores = bias[0]
    logarithm = modulation.float().log().clamp(min=LOG_ZERO)

    def biased(score: Tensor, _image: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + scores[head, i, j]

    def modulated(score: Tensor, _image: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + scores[head, i, j] + logarithm[i, j]

    out, log_sum_modulated = attend(query, key, value, modulated, width**-0.5)
    _, log_sum = attend(query, key, value, biased, width**-0.5)
    ratio = (log_sum_modulated - log_sum).exp()
    return (out[..., :width] * ratio.unsqueeze(-1)).to(value.dtype).transpose(1, 2)


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    from torch.nn.attention import flex_attention as flex

    attend = torch.compile(flex.flex_attention, dynamic=False) if compiled else flex.flex_attention
    # `return_lse` is the older name, from torch 2.9 on deprecated.
    newer = "return_aux" in inspect.signature(flex.flex_attention).parameters
    wanted: dict[str, Any] = {"return_aux": flex.AuxRequest(lse=True)} if newer else {"return_lse": True}

    def call(query: Tensor, key: Tensor, value: Tensor, score_mod: Any, scale: float) -> tuple[Tensor, Tensor]:
        out, extra = attend(query, key, value, score_mod=score_mod, scale=scale, **wanted)
        return out, extra.lse if newer else extra

    return call


def _with_log_sum_cpu(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scale
    )


def _with_log_sum_cuda(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel, whose bias has rows that begin at multiples of 16 entries."""
    batch, heads, tokens, _ = query.shape
    bias = F.pad(bias.contiguous(), (0, -tokens % 16))[..., :tokens].expand(batch, heads, tokens, tokens)
    out, log_sum, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, False, scale=scale
    )
    return out, log_sum[..., :tokens]  # its length is a multiple of 32


def padded_to_alignment(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Zeros after the last dimension, to multiples of 16 bytes, where CUDA's fused kernels take nothing else.

    Heads of EDT have 52 channels, in half precision 56 thereafter: without it attention with a bias falls back to the
    kernel that holds all scores. Zeros change no product; the scale is to be given from the width before.
    """
    if tensors[0].device.type != "cuda":
        return tensors
    lacking = -tensors[0].shape[-1] % (16 // tensors[0].element_size())
    return tuple(F.pad(x, (0, lacking)) for x in tensors) if lacking else tensors


_WITH_LOG_SUM: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": _with_log_sum_cpu,
    "cuda": _with_log_sum_cuda,
}

FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "explicit": explicit_attention,
    "in-place": modulated_attention_in_place,
    "two-pass": two_pass_attention,
    "flex": flex_attention_two_pass,
}
ALWAYS_THERE = ("explicit", "in-place")
_unavailable: set[tuple[str, str, torch.dtype]] = set()
