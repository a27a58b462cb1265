"""Modules that stand in a pruned network where others were: the bypass of a block, and attention with its projections apart."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

__all__ = ["Bypass", "SeparateAttention", "plain_facts"]


class Bypass(nn.Module):
    """Stands where a block was: returns its first input, in the form in which the block returned its first output.

    Surgery gives it the block's `plain_facts`, which the network around it may read.

    Args:
        elements: length of the tuple that the block returned, whose other values become None; None for a tensor.
    """

    def __init__(self, elements: int | None = None) -> None:
        super().__init__()
        self.elements = elements

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first input; everything else is ignored."""
        first = args[0] if args else next(iter(kwargs.values()))
        return first if self.elements is None else (first, *[None] * (self.elements - 1))

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return "" if self.elements is None else f"elements={self.elements}"


def plain_facts(block: nn.Module) -> dict[str, Any]:
    """Return the plain public attributes (text, numbers, tuples) of a block, such as the kind of mask that it wants.

    What `forward` sets is no fact about the block but about the last batch, and is left out.
    """
    set_by_call = _set_in_forward(type(block))
    return {
        name: value
        for name, value in vars(block).items()
        if isinstance(value, (str, int, float, tuple))
        and not name.startswith("_")
        and name != "training"
        and name not in set_by_call
    }


def _set_in_forward(kind: type[nn.Module]) -> frozenset[str]:
    """Return the attributes that the code of `forward`, and of the methods that it calls, assigns to."""
    found: set[str] = set()
    seen, waiting = set(dir(nn.Module)), ["forward"]
    while waiting:
        name = waiting.pop()
        methods: list[Any] = [getattr(base, name) for base in kind.__mro__ if name in vars(base)]
        for code in (
            inner for method in methods for inner in _codes(getattr(inspect.unwrap(method), "__code__", None))
        ):
            found |= {str(step.argval) for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
            called = [other for other in code.co_names if other not in seen and callable(getattr(kind, other, None))]
            seen.update(called)
            waiting += called
    return frozenset(found)


def _codes(code: object) -> Iterator[CodeType]:
    """Yield the code of a function and of the functions inside it."""
    if isinstance(code, CodeType):
        yield code
        for inner in code.co_consts:
            yield from _codes(inner)


class SeparateAttention(nn.Module):
    """What `torch.nn.MultiheadAttention` computes, with four linear layers, so that heads can go.

    Torch's module needs its heads to fill the width of its input; this one does not. It is called as torch's is.

    Args:
        original: the module to stand for; its projections' values are copied. It has no `bias_k`, no `add_zero_attn`.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        source: Any = original
        self.num_heads, self.head_dim, self.dropout = original.num_heads, original.head_dim, original.dropout
        self.batch_first = original.batch_first
        # Torch's encoder layers look at these two before they take their fused path, which is not for this module.
        self.in_proj_bias, self._qkv_same_embed_dim = None, False
        width = original.embed_dim
        apart = source.in_proj_weight is None
        weights = (
            (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
            if apart
            else source.in_proj_weight.split(width)
        )
        biases = (None, None, None) if source.in_proj_bias is None else source.in_proj_bias.split(width)
        trained = next(original.parameters()).requires_grad
        for name, weight, offset in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            setattr(self, name, _linear(weight, offset, trained))
        out = original.out_proj
        self.out_proj = _linear(out.weight, out.bias, out.weight.requires_grad)
        self.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002 - only a hint: torch's callers give the mask too
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, if asked for, the attention weights; see `torch.nn.MultiheadAttention.forward`."""
        batched = query.ndim == 3
        if not batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        n, length = query.shape[:2]
        q, k, v = (
            layer(tensor).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, tensor in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(key_padding_mask, attn_mask, n, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            mixed = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(mixed.transpose(1, 2).reshape(n, length, -1))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _mask(self, padding: Tensor | None, mask: Tensor | None, n: int, dtype: torch.dtype) -> Tensor | None:
        """Return both masks as one that is added to the scores, broadcastable to (n, heads, query, key)."""
        parts = []
        if mask is not None:
            shaped = mask.unflatten(0, (n, -1)) if mask.ndim == 3 else mask[None, None]
            parts.append(_additive(shaped, dtype))
        if padding is not None:
            parts.append(_additive(padding[:, None, None, :], dtype))
        return None if not parts else sum(parts[1:], parts[0])


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
    return layer


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
