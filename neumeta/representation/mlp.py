"""The supplement's INR (Figure 3): a residual MLP over Fourier features. Knows no network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neumeta.coordinates import Along, Coordinates, Site
from neumeta.representation.base import Representation, module_key
from neumeta.representation.features import fourier_features, nested, whole_features

BLOCK = 1 << 19
"""Values of a hidden layer made together, 2 MB: 1,024 coordinate vectors at 512 units. They and the
result fit a cache, and a matrix product has enough rows to be at speed."""


class _Mlp(nn.Module):
    """Figure 3: a first layer over gamma(v), hidden layers with scaled residuals, k*k outputs."""

    autocast = False
    """Whether products of hidden layers are in sixteen bits in training; sampling has `lower`."""

    def __init__(
        self,
        spatial: int,
        layers: int,
        hidden: int,
        num_freq: int,
        residual: bool,
        blur: float,
        nested: bool = False,
    ) -> None:
        super().__init__()
        per_axis = (2 * num_freq + 1) * 2
        self.num_freq, self.residual = num_freq, residual
        self.blur, self.nested = blur, nested
        # One linear map of (2*num_freq+1)*6 features, kept as its three per-axis column blocks:
        # a sum of three small products broadcast over pairs instead of one product per pair.
        self.layer, self.inputs, self.outputs = (
            nn.Linear(per_axis, hidden, bias=b) for b in (True, False, False)
        )
        for part in (self.layer, self.inputs, self.outputs):
            nn.init.normal_(part.weight, std=1 / math.sqrt(3 * per_axis / 2))
        for columns in self.of_size(value=True):
            nn.init.zeros_(columns)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.scale = nn.Parameter(torch.full((max(layers - 1, 1),), 0.1))
        self.last = nn.Linear(hidden, spatial)
        for each in self.hidden:
            assert isinstance(each, nn.Linear)
            nn.init.kaiming_normal_(each.weight, nonlinearity="relu")
            nn.init.zeros_(each.bias)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def of_size(self, *, value: bool = False) -> list[Tensor]:
        """The gradients (or the values) of the first layer's columns for the sizes L/N and C/N."""
        found = []
        for part in (self.layer, self.inputs, self.outputs):
            whole = part.weight.data if value else part.weight.grad
            if whole is not None:
                found += [whole[:, 1:2], whole[:, 2 + 2 * self.num_freq :]]
        return found

    def forward(self, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        layer = self.layer(fourier_features(at.layer, self.num_freq))
        inputs = self.inputs(self._along(at.inputs, at))
        outputs = self.outputs(self._along(at.outputs, at))
        if not torch.is_grad_enabled():
            return self._blocked(inputs, layer[:, None] + outputs)
        h = torch.relu(layer[:, None, None] + inputs[:, None] + outputs[:, :, None])
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.autocast):
            for hidden, scale in zip(self.hidden, self.scale, strict=False):
                h = h + scale * torch.relu(hidden(h)) if self.residual else torch.relu(hidden(h))
        return self.last(h.to(inputs.dtype))  # type: ignore[no-any-return]

    def _along(self, axis: Along, at: Coordinates) -> Float[Tensor, "S C F"]:
        """gamma along one axis of channels."""
        blur: tuple[float, ...] = ()
        if self.blur and axis.span.morphs:
            blur = (self.blur / axis.span.full, self.blur / at.scale)
        pairs = axis.pairs
        if at.exact:
            key = (axis.span, at.scale, self.num_freq, blur, self.nested, pairs.dtype, pairs.device)
            return whole_features(*key).expand(len(pairs), -1, -1)
        return fourier_features(nested(axis) if self.nested else pairs, self.num_freq, blur)

    def _blocked(
        self, inputs: Float[Tensor, "S I H"], outputs: Float[Tensor, "S O H"]
    ) -> Float[Tensor, "S O I kk"]:
        """The same from the two first-layer terms, a BLOCK at a time and in place.

        All but the matrix products is then work on data that is still in the cache. Hidden layers in
        a lower precision (`lower`) multiply in it; what is added up stays as it was.
        """
        (samples, count, width), across = outputs.shape, inputs.shape[1]
        rows = outputs.reshape(samples * count, 1, width)
        sample = torch.arange(samples, device=rows.device).repeat_interleave(count)
        made = inputs.new_empty(samples * count, across, self.last.out_features)
        low = self.last.weight.dtype
        step = min(max(1, BLOCK // (across * width)), len(rows))
        h_, t_ = (
            inputs.new_empty(step * across, width, dtype=kind) for kind in (inputs.dtype, low)
        )
        scales = self.scale.tolist()
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            size = len(rows[part]) * across
            h, t = h_[:size], t_[:size]
            first = inputs if samples == 1 else inputs[sample[part]]
            torch.add(first, rows[part], out=h.view(-1, across, width)).relu_()
            for hidden, scale in zip(self.hidden, scales, strict=False):
                assert isinstance(hidden, nn.Linear)
                torch.addmm(hidden.bias, h.to(low), hidden.weight.t(), out=t)
                t.relu_()
                if self.residual:
                    h.add_(t, alpha=scale)
                else:
                    h.copy_(t)
            made[part] = self.last(h.to(low)).view(-1, across, made.shape[-1])
        return made.view(samples, count, across, -1)


class ResidualMLP(Representation):
    """The supplement's INR: one MLP per parameter role (block-based) or one for all.

    `layers` counts the first and the residual ones, as the supplement does: `layers` = 5 is a first
    layer, four hidden residual ones, and the last one. `blur` weights the waves of axes that morph by
    what noise of so many channels leaves of them: those that it wipes out would be noise alone. With
    `nested` a channel of a smaller size lies where the source's channel of that number does, not spread
    over the whole axis: the source's first channels, as a grid has them (beyond the source's there are
    only copies of its last). The coordinates of size have no effect before training at several sizes
    gives them one.

    The output is scaled by `scales`, the root mean square of what the regression aims at for each role,
    so that the MLP itself works at unit scale.
    """

    def __init__(
        self,
        roles: Mapping[str, Site],
        *,
        layers: int = 8,
        hidden: int = 512,
        num_freq: int = 16,
        residual: bool = True,
        block_based: bool = True,
        blur: float = 0.0,
        nested: bool = False,
    ) -> None:
        super().__init__()
        self.block_based = block_based
        self.order = {role: index for index, role in enumerate(roles)}
        self.register_buffer("scales", torch.ones(len(roles)))
        spatial = {role: math.prod(site.spatial) for role, site in roles.items()}
        self.widest = max(spatial.values())
        shared = {"all": self.widest}
        networks = spatial if block_based else shared
        self.networks = nn.ModuleDict(
            {
                module_key(role): _Mlp(size, layers, hidden, num_freq, residual, blur, nested)
                for role, size in networks.items()
            }
        )

    def lower(self, dtype: torch.dtype) -> None:
        """Multiply in this dtype when sampling: in all but the first layer, which reads features of
        high frequency. For inference only."""
        for mlp in self.networks.values():
            assert isinstance(mlp, _Mlp)
            mlp.hidden.to(dtype)
            mlp.last.to(dtype)

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates. A 1x1 kernel takes the centre of k*k."""
        index = self.order[site.role]
        if self.block_based:
            out = self.networks[module_key(site.role)](at)
        else:
            # One network for all: l/L places each role in a cell of its own.
            place = (index + at.layer[:, :1]) / len(self.order)
            layer = torch.cat((place, at.layer[:, 1:]), 1)
            at = replace(at, layer=layer)
            out = self.networks["all"](at)
            size = math.prod(site.spatial)
            if size < self.widest:
                start = (self.widest - size) // 2
                out = out[..., start : start + size]
        return out * self.scales[index]  # type: ignore[index, no-any-return]
