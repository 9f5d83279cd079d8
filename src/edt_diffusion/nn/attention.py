"""Self-attention over a token grid, with relative-position bias and an optional Attention Modulation Matrix.

Plain blocks call diffusers' `dispatch_attention_fn` (SDPA by default, `set_attention_backend` chooses another) or, on a
CPU in bfloat16, the in-place form, which is the faster one there; blocks with AMM use the forms of
`modulated_attention.py`, whose `form_for` says which is used where.
"""

from collections.abc import Callable
from typing import cast

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from .cubic import cubic_weights
from .modulated_attention import (
    explicit_attention,
    form_for,
    modulated_attention,
    modulated_attention_in_place,
    padded_to_alignment,
)


def relative_position_index(height: int, width: int) -> Tensor:
    """Row of the bias table for each (query, key) pair of an (height, width) grid.

    (dy + h - 1) (2 w - 1) + dx + w - 1, with dy, dx = query position minus key position.

    Returns:
        int64 tensor of shape (N, N), N = height * width, tokens in row-major order.
    """
    row = torch.arange(height).repeat_interleave(width)
    column = torch.arange(width).repeat(height)
    dy = row[:, None] - row[None, :] + height - 1
    dx = column[:, None] - column[None, :] + width - 1
    return dy * (2 * width - 1) + dx


def resample_bias_table(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A relative-position bias table for another grid, by bicubic interpolation over the relative positions, per head.

    Relative positions correspond as fractions of the picture, not as counts of cells: d cells of n on the target are
    d n_source / n cells on the source, in each axis. The same picture at a higher resolution has the same objects at
    the same fractions, so a head that looked at the eye beside the nose still does.

    A finer grid reaches beyond the source's last offset by less than one cell; there the last two entries are continued
    in a straight line (`cubic_weights`).

    Args:
        table: ((2 h - 1) (2 w - 1), heads) of the source grid.
        source: (h, w).
        target: (h', w').

    Returns:
        ((2 h' - 1) (2 w' - 1), heads), of the table's dtype; for equal grids the table itself.
    """
    if source == target:
        return table
    rows, columns = (_cubic_offsets(n, m).to(table.device) for n, m in zip(source, target, strict=True))
    grid = table.double().unflatten(0, (2 * source[0] - 1, 2 * source[1] - 1))
    return torch.einsum("yr,rch,xc->yxh", rows, grid, columns).flatten(0, 1).to(table.dtype)


def _cubic_offsets(source: int, target: int) -> Tensor:
    """Weights (2 target - 1, 2 source - 1) that take values at offsets 1 - source ... source - 1 to the target's."""
    offsets = torch.arange(1 - target, target, dtype=torch.float64)
    return cubic_weights(offsets * source / target + source - 1, 2 * source - 1)


class RelativePositionBias(nn.Module):
    """Learned bias per head and per relative position (Swin, arXiv 2103.14030).

    In eval mode, when no gradient is wanted, the gathered (1, heads, N, N) tensor is kept; it is rebuilt after any
    change of the table's values, dtype or device.

    Args:
        height, width: the token grid.
        heads: number of attention heads.
        keep_gathered: whether the gathered tensor may be kept; the model says no to blocks beyond its memory budget.
        unused_rows: rows at the table's end that no pair of tokens has (MDTv2's tables have three).
    """

    index: Tensor

    def __init__(self, height: int, width: int, heads: int, keep_gathered: bool = True, unused_rows: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.grid = (height, width)
        self.unused_rows = unused_rows
        self.tokens = height * width
        self.keep_gathered = keep_gathered
        self.table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1) + unused_rows, heads))
        nn.init.trunc_normal_(self.table, std=0.02, a=-2.0, b=2.0)
        self.register_buffer("index", relative_position_index(height, width).flatten(), persistent=False)
        self._kept: Tensor | None = None
        self._kept_for: tuple | None = None
        self._kept_table: Tensor | None = None

    def gather(self) -> Tensor:
        """The bias as (1, heads, N, N), differentiable in the table."""
        # index_select, not advanced indexing: the latter's backward sums in an order that varies with threads.
        # The transposed table gives a contiguous result, which fused kernels ask for.
        return self.table.t().index_select(1, self.index).view(1, self.heads, self.tokens, self.tokens)

    def gather_for(self, kept: Tensor) -> Tensor:
        """The bias among some tokens of each image, those numbered by `kept` (B, K): (B, heads, K, K)."""
        pairs = (kept.unsqueeze(2) * self.tokens + kept.unsqueeze(1)).flatten()  # row of `index` of each pair
        rows = self.index.index_select(0, pairs)
        bias = self.table.t().index_select(1, rows).unflatten(1, (kept.shape[0], kept.shape[1], kept.shape[1]))
        return bias.transpose(0, 1)

    def forward(self, dtype: torch.dtype) -> Tensor:
        wants_grad = torch.is_grad_enabled() and self.table.requires_grad
        if self.training or wants_grad or not self.keep_gathered or torch.compiler.is_compiling():
            return self.gather().to(dtype)
        table = self.table.detach()
        version = 0 if self.table.is_inference() else self.table._version  # inference tensors keep no version
        key = (table.data_ptr(), version, table.dtype, table.device, dtype)
        # `.data.copy_()` changes values without a version bump; on the CPU a comparison of the small table is cheap.
        stale = key != self._kept_for or (table.device.type == "cpu" and not torch.equal(table, self._kept_table))  # pyright: ignore[reportArgumentType]
        # What was kept under `inference_mode` cannot take part in a later backward to the model's input.
        stale = stale or (cast(Tensor, self._kept).is_inference() and not torch.is_inference_mode_enabled())
        if stale:
            self._kept = self.gather().to(dtype).contiguous()
            self._kept_for = key
            self._kept_table = table.clone() if table.device.type == "cpu" else None
        return cast(Tensor, self._kept)

    def train(self, mode: bool = True) -> "RelativePositionBias":
        if mode:
            self._kept = self._kept_for = self._kept_table = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.update(_kept=None, _kept_for=None, _kept_table=None)
        return state


class NoPositionBias(nn.Module):
    """In the place of `RelativePositionBias` in networks without one (DiT): zeros, which cost no memory."""

    index: Tensor  # as there, tells the device

    def __init__(self, tokens: int, heads: int) -> None:
        super().__init__()
        self.shape = (1, heads, tokens, tokens)
        self.register_buffer("index", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Zeros of the shape (1, heads, N, N)."""
        return self.index.new_zeros(1, 1, 1, 1, dtype=dtype).expand(self.shape)


class GridAttnProcessor:
    """Computes `GridAttention`.

    The back end chosen by `set_attention_backend`, or by diffusers' `attention_backend` around a call, computes the
    blocks without AMM. No back end can multiply probabilities after the softmax: blocks with AMM keep their own forms,
    of which `form` names one (for tests and benchmarks; None = the one that suits).
    """

    _attention_backend = None
    _parallel_config = None
    form: str | None = None

    def __call__(
        self, attn: "GridAttention", hidden_states: Tensor, modulate: bool = True, kept: Tensor | None = None
    ) -> Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))  # (B, N, heads, d)
        biased, modulated = attn.has_position_bias, modulate and attn.modulation is not None
        if kept is not None and (biased or modulated):
            out = self._among(attn, query, key, value, kept, modulated)
        elif modulated:
            bias = attn.position_bias(query.dtype)
            out = modulated_attention(query, key, value, bias, attn.modulation_in(query.dtype), self.form)
        else:
            out = self._plain(query, key, value, attn.position_bias(query.dtype), biased)
        return attn.to_out[0](out.flatten(2))

    def _among(
        self, attn: "GridAttention", query: Tensor, key: Tensor, value: Tensor, kept: Tensor, modulated: bool
    ) -> Tensor:
        """Attention among the tokens `kept` (B, K) of the grid, others in each image."""
        bias = None
        if isinstance(attn.position_bias, RelativePositionBias):
            bias = attn.position_bias.gather_for(kept).to(query.dtype)
        modulation = None
        if modulated:
            modulation = attn.modulation_in(query.dtype)[kept.unsqueeze(2), kept.unsqueeze(1)].unsqueeze(1)
        return explicit_attention(query, key, value, bias, modulation)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, biased: bool) -> Tensor:
        backend = self._attention_backend
        if backend is None and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE:
            form = form_for(query, bias, modulated=False)
            if form == "explicit":
                return explicit_attention(query, key, value, bias if biased else None, None)
            if form != "sdpa":
                return modulated_attention_in_place(query, key, value, bias, None)
        width = query.shape[-1]
        query, key, value = padded_to_alignment(query, key, value)
        out = dispatch_attention_fn(
            query, key, value, attn_mask=bias if biased else None, scale=width**-0.5, backend=backend
        )
        return out[..., :width]


class GridAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention on an (height, width) grid: (B, N, dim) -> (B, N, dim).

    Separate q, k, v projections carry the names that diffusers' hooks, peft and torchao expect.

    Args:
        dim: channels, divisible by `heads`.
        heads: attention heads.
        grid: (height, width) of the tokens.
        keep_bias: see `RelativePositionBias`.
        position_bias: whether there is a learned relative-position bias.
        unused_rows: see `RelativePositionBias`.

    Attributes:
        modulation: the AMM matrix (N, N), or None. Of float32 whatever dtype the module is cast to, so that casting it
            back loses nothing.
    """

    _default_processor_cls = GridAttnProcessor
    _available_processors = [GridAttnProcessor]
    is_cross_attention = False

    modulation: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        keep_bias: bool = True,
        position_bias: bool = True,
        unused_rows: int = 0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.has_position_bias = position_bias
        self.use_bias = True
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.position_bias: RelativePositionBias | NoPositionBias = (
            RelativePositionBias(*grid, heads, keep_bias, unused_rows)
            if position_bias
            else NoPositionBias(grid[0] * grid[1], heads)
        )
        self.register_buffer("modulation", None, persistent=False)
        self._kept_modulation: tuple[tuple, Tensor] | None = None
        for linear in (self.to_q, self.to_k, self.to_v):
            # Xavier on the joint (3 dim, dim) matrix of the authors: a gain of sqrt(1/2) on each (dim, dim) third.
            nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.to_out[0].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.to_out[0].bias)  # pyright: ignore[reportArgumentType]
        # diffusers types processors as a union of its own, not as the protocol that this is.
        self.set_processor(GridAttnProcessor())  # pyright: ignore[reportArgumentType]

    def forward(self, hidden_states: Tensor, modulate: bool = True, kept: Tensor | None = None) -> Tensor:
        """Attention among all tokens (B, N, dim); or among those of the grid numbered by `kept` (B, K), (B, K, dim)."""
        return cast(GridAttnProcessor, self.processor)(self, hidden_states, modulate, kept)

    def modulation_in(self, dtype: torch.dtype) -> Tensor:
        """The modulation matrix in the dtype that the products are computed in, kept from one call to the next."""
        matrix = cast(Tensor, self.modulation)
        if matrix.dtype == dtype or torch.compiler.is_compiling():
            return matrix.to(dtype)
        version = 0 if matrix.is_inference() else matrix._version
        key = (id(matrix), matrix.data_ptr(), version, matrix.device, dtype)
        # What was made under `inference_mode` cannot take part in a later backward.
        if (
            self._kept_modulation is None
            or self._kept_modulation[0] != key
            or (self._kept_modulation[1].is_inference() and not torch.is_inference_mode_enabled())
        ):
            self._kept_modulation = key, matrix.to(dtype)
        return self._kept_modulation[1]

    def _apply(self, fn: Callable, recurse: bool = True) -> "GridAttention":
        exact = self.modulation
        super()._apply(fn, recurse)
        if exact is not None and not exact.is_meta:
            self.modulation = exact.to(cast(Tensor, self.modulation).device)
        self._kept_modulation = None
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept_modulation": None}
