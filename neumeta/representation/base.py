"""What every continuous representation of weights is: coordinates in, weights out. Knows no network."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from neumeta.coordinates import Coordinates, Site


def module_key(role: str) -> str:
    """A role as a torch module name (which may hold no dots)."""
    return role.replace(".", "/")


class Representation(nn.Module):
    """`forward(site, coordinates)` gives the site's weights, (S, rows, columns, numbers of a kernel).

    The result is at unit gain: whoever asks multiplies by `site.gain`. It never depends on whether the
    module is in training or evaluation mode.
    """

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        raise NotImplementedError  # pragma: no cover

    def fill(self, site: Site, value: Tensor) -> bool:
        """Start from the source's tensor, where that is possible without a regression."""
        return False
