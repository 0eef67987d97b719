"""The MSA of a skipped block that is kept in part: for its prefix tokens, or at a lower resolution."""

from __future__ import annotations

from typing import Any

from .carrying import box_of, first_argument
from .cluster_attention import attend_clusters
from .clusters import Clustered
from .family import Family
from .grafting import Grafted
from .prefix_attention import attend
from .tokens import Special


class KeptAttention(Grafted):
    """Stays in its slot, with its weights under their own names, and gives Φ what that reads beside Z."""

    skipat_family: Family

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        h = first_argument(args, kwargs)
        box, family, training = box_of(h), self.skipat_family, self.training  # type: ignore[attr-defined]
        msa, phi = family.projections(self, *args, **kwargs), box.phi
        given: dict[str, Any] = {"x": h} if phi.reads_x else {}
        if phi.attends:
            given["rows"] = attend(msa, h, Special(phi.num_prefix_tokens, phi.num_suffix_tokens), training)
        if phi.pool:
            clusters = phi.clusters(h, box.grid)
            tokens = clusters.means(h)
            z = attend_clusters(msa, tokens, clusters, training, h if phi.queries == "patches" else None)
            given["clustered"] = Clustered(clusters, tokens[:, clusters.special :], z)
        box.z = phi(box.empty(), box.grid, **given)
        return (box.z, None) if family.returns_tuple else box.z
