"""Counts the multiply-adds of a function from its jaxpr, loop trips included.

XLA's own cost analysis counts the body of a scan once and knows nothing inside a kernel; fvcore,
which the paper's figures come from, leaves out the products inside attention. Here
`count(f, x).linear + count(f, x).convolution` is what fvcore prints, `.total` is the truth.

Only matrix products and convolutions are counted. What a remat recomputes is counted where the
jaxpr recomputes it, so count the forward pass and take it three times for a training step's model
FLOPs. Attention is known by its marks (see `attention`), counts two products forward and four
backward, and so the same whatever its implementation pads or recomputes; and so are convolutions
that spare products (see `convolution`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from cmd_jax.models import attention, convolution

PRODUCTS = {attention.FORWARD: 2, attention.BACKWARD: 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Multiply-adds by kind. `linear` are all matrix products outside `attention`."""

    linear: int = 0
    attention: int = 0
    convolution: int = 0

    @property
    def total(self) -> int:
        """Multiply-adds of all kinds."""
        return self.linear + self.attention + self.convolution

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiply-add is two."""
        return 2 * self.total

    def __add__(self, other: 'Flops') -> 'Flops':
        return Flops(
            linear=self.linear + other.linear,
            attention=self.attention + other.attention,
            convolution=self.convolution + other.convolution,
        )

    def __mul__(self, times: int) -> 'Flops':
        return Flops(
            linear=self.linear * times,
            attention=self.attention * times,
            convolution=self.convolution * times,
        )


def count(fn: Callable, *args, **kwargs) -> Flops:
    """The multiply-adds of `fn(*args, **kwargs)` over all devices; nothing is computed.

    Arguments are trees of arrays or ShapeDtypeStructs. A branch counts as its most expensive case.
    Raises ValueError where a while loop (its trips are unknown) or a kernel without a mark holds
    products.
    """
    return _count(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def _count(jaxpr: Jaxpr) -> Flops:
    return sum((_count_equation(eqn) for eqn in jaxpr.eqns), Flops())


def _count_equation(eqn) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
        return Flops(linear=out.size * math.prod(lhs.shape[i] for i in contracted))
    if name == 'conv_general_dilated':
        rhs, out = eqn.invars[1].aval, eqn.outvars[0].aval
        output_features = rhs.shape[params['dimension_numbers'].rhs_spec[0]]
        # Zeros between the elements of a dilated input (a strided convolution's gradient) are no
        # work.
        idle = math.prod(params['lhs_dilation'])
        return Flops(convolution=out.size * rhs.size // (output_features * idle))
    if params.get('name') == convolution.MARK:
        kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
        return Flops(convolution=out.size * kernel.size // kernel.shape[-1])
    mark, _, keys = str(params.get('name')).rpartition('_')
    if mark in PRODUCTS:
        arrays = [v.aval for v in eqn.invars if v.aval.ndim >= 4]
        if not arrays or not eqn.outvars:  # what a remat computed ahead, or left behind
            return Flops()
        like_q = arrays[0 if mark == attention.FORWARD else -1]
        return Flops(attention=PRODUCTS[mark] * like_q.size * int(keys))

    inner = [_count(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == 'cond':
        return max(inner, key=lambda flops: flops.total)
    inside = sum(inner, Flops())
    if name == 'scan':
        return inside * params['length']
    if name == 'shard_map':
        axes = params['newly_manual_axes' if 'newly_manual_axes' in params else 'manual_axes']
        return inside * math.prod(params['mesh'].shape[axis] for axis in axes)
    if name in ('while', 'pallas_call') and inside.total:
        raise ValueError(
            f'cannot count the matrix products inside {name}: use lax.scan, or a fori_loop with '
            'static bounds; only attention may call kernels'
        )
    return inside


def _inner_jaxprs(params: dict) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
