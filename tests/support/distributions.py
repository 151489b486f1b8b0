"""Whether numbers were drawn from the distribution that is claimed: ranges and means alone let most others pass."""

from torch import Tensor


def assert_uniform(drawn: Tensor, low: float, high: float) -> None:
    """Kolmogorov's test: the sample's distribution function within 1.95/√n of the uniform one's (p = 0.001)."""
    ordered = ((drawn.double().sort().values - low) / (high - low)).tolist()
    assert ordered[0] >= -1e-5 and ordered[-1] <= 1 + 1e-5, f"{drawn.min()} … {drawn.max()} is not in {low} … {high}"
    count = len(ordered)
    gap = max(max((rank + 1) / count - value, value - rank / count) for rank, value in enumerate(ordered))
    assert gap < 1.95 / count**0.5, f"{gap:.3f} from the uniform distribution on {low} … {high}, of {count} numbers"
