"""The MSA of a skipped block that is kept in part: for its prefix tokens, or at a lower resolution."""

from __future__ import annotations

from typing import Any

from .carrying import Box, RunsPhi, first_argument
from .cluster_attention import attend_clusters
from .clusters import Clustered
from .family import Family
from .grafting import Grafted
from .packed import Packed, laid_out, packed_again
from .padding import attended_tokens
from .prefix_attention import attend
from .tokens import Special


class KeptAttention(RunsPhi, Grafted):
    """Stays in its slot, with its weights under their own names, and gives Φ what that reads beside Z."""

    skipat_family: Family

    def forward(self, *args: Any, skipat_box: Box, **kwargs: Any) -> Any:
        packed, phi, grid = first_argument(args, kwargs), skipat_box.phi, skipat_box.grid
        family, training = self.skipat_family, self.training  # type: ignore[attr-defined]
        attended, within, by_image = None, grid, None
        if isinstance(grid, Packed):
            within = grid.attended_in(kwargs)
            by_image = None if within is grid else lambda patches: laid_out(grid, packed_again(within, patches, packed))
            args, kwargs = within.arguments(args, kwargs)
        elif not family.maps:  # which have no padding
            attended = attended_tokens(args, kwargs)
        h, msa = laid_out(None, first_argument(args, kwargs)), family.projections(self, *args, **kwargs)
        x = h if within is grid else laid_out(grid, packed)
        given: dict[str, Any] = {"x": x if phi.reads_x else None, "attended": attended}
        if phi.attends:
            given["rows"] = attend(msa, h, Special(phi.num_prefix_tokens, phi.num_suffix_tokens), training)
        if phi.pool:
            clusters = phi.clusters(h, within, attended)
            tokens = clusters.means(h)
            z = attend_clusters(msa, tokens, clusters, training, h if phi.queries == "patches" else None)
            given["clustered"] = Clustered(clusters, tokens[:, clusters.special :], z, by_image)
        z = packed_again(grid, phi(laid_out(grid, skipat_box.empty()), grid, **given), like=packed)
        return (z, None) if family.returns_tuple else z
