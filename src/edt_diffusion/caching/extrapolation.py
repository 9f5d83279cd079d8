"""Features as a polynomial of the step, through the last computed ones."""

from torch import Tensor


class Extrapolation:
    """Newton's form of the polynomial through the last `order` + 1 recorded tensors.

    p(k) = f[k0] + (k - k0) f[k0, k1] + (k - k0)(k - k1) f[k0, k1, k2] + ..., k0 the latest step, f[...] divided
    differences. Steps need not be evenly spaced. Features that are polynomials of the step, of degree up to `order`,
    are predicted exactly; the truncated Taylor series of TaylorSeer (arXiv 2503.06923) with the same differences taken
    for derivatives is the same for order 0 and 1, and off by a term of the spacing beyond.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._steps: list[int] = []  # latest first
        self._differences: list[Tensor] = []  # f[k0], f[k0, k1], ...

    @property
    def complete(self) -> bool:
        """Whether `order` + 1 tensors were recorded."""
        return len(self._differences) > self.order

    def record(self, step: int, features: Tensor) -> None:
        """Take in the features of a step later than those before."""
        differences = [features]
        for old, earlier in zip(self._differences[: self.order], self._steps, strict=False):
            differences.append((differences[-1] - old).div_(step - earlier))
        self._differences = differences
        self._steps = [step, *self._steps[: self.order]]

    def at(self, step: int) -> Tensor:
        """The prediction; of degree less than `order` while fewer tensors were recorded. With one it is that tensor."""
        out, weight = self._differences[0], 1.0
        for difference, earlier in zip(self._differences[1:], self._steps, strict=False):
            weight *= step - earlier
            out = out.add(difference, alpha=weight)
        return out
