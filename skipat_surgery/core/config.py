"""What a Φ looks like, and which blocks have one: frozen, validated, stored as versioned JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

FORMAT_VERSION = 3
WITHOUT_WIDTHS = 2  # what is written where no MLP is narrower: libraries of that version read it
OPTIONAL = ("base_model", "results", "tower")
# No grid is as wide, and no Φ of use: beyond these are only typing errors.
WIDEST, LONGEST = 64, 1023
PREFIX_MODES = ("attend", "mix", "pass")
QUERIES = ("clusters", "patches")
# What a file that does not say has: fields that came later.
BEFORE = {"pool": 0, "reads_x": False, "queries": "clusters"}


@dataclass(frozen=True, kw_only=True)
class PhiConfig:
    """The shape of one Φ (paper §3.2, Eq. 5-8).

    The defaults come from docs/ablation.md, and are the cheapest that convert a pretrained model equally well: an
    expansion of 0.25 does as well as 2 (0.125 is worse on the patches), a kernel of 3 as well as 5 and 7, and ECA adds
    nothing, while mapping the prefix tokens is worth more than all the rest.

    Args:
        expansion: Hidden width of Φ as a multiple of the model's width, at least 0.125. The paper uses 2.
        kernel_size: Side of the depthwise convolution over the patch grid, odd: along every axis of the grid, or for a
            video a triple (time, height, width). The paper uses 5.
        channel_attention: Whether efficient channel attention (ECA) gates the output, as in the paper.
        prefix: What becomes of the prefix tokens (CLS, distillation, registers) and of suffix tokens. ``"attend"``
            gives them exactly what the MSA would: their rows of it are kept, with its weights and the norm before it,
            at about a hundredth of its cost. ``"mix"`` maps [own Z, mean patch Z] linearly, at one token's cost.
            ``"pass"`` hands their Z on unchanged, as in the paper.
        pool: Side p along every axis of the grid: the block's own MSA still runs over clusters of alike patches, as
            many as p×p (of a video p×p×p) goes into the grid, and their Z is copied to their patches; 0 for none, as in
            the paper. A side of 2 takes a quarter of the MSA's projections and a sixteenth of its attention, on a video
            an eighth and a sixty-fourth.
        queries: Who asks, where there are clusters. ``"clusters"``: they do, and their patches share what they read.
            ``"patches"``: every patch does, by itself, among the clusters' keys and values: several times as close,
            for the MSA's queries, output projection and 1/p² (1/p³) of its attention.
        reads_x: Whether Φ reads LN(X), the input of the MSA that it stands for, beside the Z of the block before; with
            clusters, its means over them too.

    Raises:
        ValueError: A value is out of range; the message says which ones are allowed.

    Examples:
        >>> PhiConfig.paper() == PhiConfig(
        ...     expansion=2, kernel_size=5, channel_attention=True, prefix="pass", pool=0, reads_x=False
        ... )
        True
    """

    expansion: float = 0.25
    kernel_size: int | tuple[int, ...] = 3
    channel_attention: bool = False
    prefix: str = "attend"
    pool: int = 2
    queries: str = "clusters"
    reads_x: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.expansion, bool) or not isinstance(self.expansion, (int, float)):
            raise ValueError(f"expansion must be a number, got {self.expansion!r}")
        if not 0.125 <= self.expansion <= WIDEST:
            raise ValueError(f"expansion must be from 0.125 to {WIDEST}, got {self.expansion}")
        object.__setattr__(self, "expansion", float(self.expansion))
        object.__setattr__(self, "kernel_size", _checked_kernel(self.kernel_size))
        if not isinstance(self.channel_attention, bool):
            raise ValueError(f"channel_attention must be True or False, got {self.channel_attention!r}")
        if self.prefix not in PREFIX_MODES:
            raise ValueError(f"prefix must be one of {PREFIX_MODES}, got {self.prefix!r}")
        sides = (0, *range(2, LONGEST + 1))
        if isinstance(self.pool, bool) or not isinstance(self.pool, int) or self.pool not in sides:
            raise ValueError(f"pool must be 0, or a side from 2 to {LONGEST}, got {self.pool!r}")
        if self.queries not in QUERIES:
            raise ValueError(f"queries must be one of {QUERIES}, got {self.queries!r}")
        if self.queries == "patches" and not self.pool:
            raise ValueError("queries='patches' is about clusters: give pool as well, a side from 2 up")
        if not isinstance(self.reads_x, bool):
            raise ValueError(f"reads_x must be True or False, got {self.reads_x!r}")

    @classmethod
    def paper(cls) -> PhiConfig:
        """Φ as published: expansion 2, 5×5 depthwise convolution, ECA, prefix tokens passed through, Z read alone."""
        return cls(expansion=2.0, kernel_size=5, channel_attention=True, prefix="pass", pool=0, reads_x=False)

    def kernel(self, axes: int) -> tuple[int, ...]:
        """The sides of the depthwise convolution over a grid of so many axes.

        Raises:
            ValueError: They are given for another number of axes.
        """
        if isinstance(self.kernel_size, int):
            return (self.kernel_size,) * axes
        if len(self.kernel_size) != axes:
            raise ValueError(
                f"kernel_size {self.kernel_size} is for a grid of time, height and width, and this model's patches "
                "form one of height and width: give one odd integer"
            )
        return self.kernel_size


def _checked_kernel(given: Any) -> int | tuple[int, ...]:
    """The sides of a kernel: one for all axes, or a triple.

    Raises:
        ValueError: They are none; the message says what is allowed.
    """
    triple = isinstance(given, (tuple, list))  # a list where it was read from JSON
    if triple and len(given) != 3:
        raise ValueError(f"kernel_size must be an integer, or for videos (time, height, width), got {given!r}")
    for side in given if triple else (given,):
        if isinstance(side, bool) or not isinstance(side, int):
            raise ValueError(f"kernel_size must be an integer, or for videos three, got {given!r}")
        if not 1 <= side <= LONGEST or side % 2 == 0:
            raise ValueError(f"kernel_size must be odd, from 1 to {LONGEST}, got {given}")
    return tuple(given) if triple else given


@dataclass(frozen=True)
class SkipatConfig:
    """Which blocks are skipped, each with its Φ: what ``config.skipat`` of a checkpoint holds.

    Args:
        phi: A mapping from block index (counted from 0) to the Φ that replaces its MSA.
        base_model: Name of the model that was cut, where it is known.
        results: How it was distilled and what was measured, as the recipe writes it.
        tower: Path of the vision transformer that was cut, where the model holds several.
        others: The same of others in that model that were cut too, each with its `tower`.
        mlp_widths: A mapping from block index to the number of hidden units that `skipat_surgery.narrow` left to its
            MLP. `apply` keeps the first ones, which are as good as any where a checkpoint is to be loaded.

    Examples:
        >>> config = SkipatConfig({3: PhiConfig(), 4: PhiConfig(expansion=0.25)})
        >>> SkipatConfig.from_dict(config.to_dict()) == config
        True
        >>> config.skip
        (3, 4)
    """

    phi: Mapping[int, PhiConfig] = field(default_factory=dict)
    base_model: str | None = None
    results: Mapping[str, Any] | None = None
    tower: str | None = None
    others: tuple[SkipatConfig, ...] = ()
    mlp_widths: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, phi in self.phi.items():
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"skip must hold block indices (integers), got {index!r}")
            if not isinstance(phi, PhiConfig):
                raise TypeError(f"the Φ of block {index} must be a PhiConfig, got {phi!r}")
        if not isinstance(self.base_model, str | None):
            raise TypeError(f"base_model must be a name or None, got {self.base_model!r}")
        if not isinstance(self.results, Mapping | None):
            raise TypeError(f"results must be a mapping or None, got {self.results!r}")
        if not isinstance(self.tower, str | None):
            raise TypeError(f"tower must be a path or None, got {self.tower!r}")
        numbers = (*self.mlp_widths, *self.mlp_widths.values()) if isinstance(self.mlp_widths, Mapping) else (None,)
        if not all(map(_is_count, numbers)):
            raise TypeError(f"mlp_widths must map block indices to numbers of hidden units, got {self.mlp_widths!r}")
        object.__setattr__(self, "phi", dict(sorted(self.phi.items())))
        object.__setattr__(self, "mlp_widths", dict(sorted(self.mlp_widths.items())))

    @classmethod
    def parse(
        cls, skip: Iterable[int] | Mapping[int, PhiConfig] | SkipatConfig, phi: PhiConfig | None = None
    ) -> SkipatConfig:
        """Read the arguments of `skipat_surgery.apply`.

        Args:
            skip: Block indices, or a mapping from block index to `PhiConfig`.
            phi: The Φ of every block when `skip` gives only indices; ``PhiConfig()`` when left out.

        Raises:
            TypeError: `skip` is not an iterable of integers or a mapping to `PhiConfig`.
            ValueError: `skip` names a block twice, or both `skip` and `phi` give a Φ.
        """
        if isinstance(skip, (SkipatConfig, Mapping)):
            if phi is not None:
                raise ValueError("skip already gives a PhiConfig for each block; leave phi out")
            return skip if isinstance(skip, SkipatConfig) else cls(skip)
        if isinstance(skip, (str, bytes)) or not isinstance(skip, Iterable):
            raise TypeError(
                "skip must be an iterable of block indices such as range(3, 9), or a mapping from index to "
                f"PhiConfig, got {skip!r}"
            )
        if phi is not None and not isinstance(phi, PhiConfig):
            raise TypeError(f"phi must be a PhiConfig, got {phi!r}")
        indices = list(skip)
        repeated = sorted({index for index in indices if indices.count(index) > 1}, key=repr)
        if repeated:
            raise ValueError(f"skip names these blocks more than once: {repeated}")
        return cls(dict.fromkeys(indices, phi or PhiConfig()))

    @property
    def towers(self) -> tuple[SkipatConfig, ...]:
        """What was cut, tower by tower; most models hold one."""
        return (replace(self, others=()), *self.others)

    @property
    def skip(self) -> tuple[int, ...]:
        """The skipped blocks, in order."""
        return tuple(self.phi)

    @property
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """The skipped blocks as runs of neighbours; each run starts from the MSA output of the block before it."""
        runs: list[list[int]] = []
        for index in self.skip:
            if runs and index == runs[-1][-1] + 1:
                runs[-1].append(index)
            else:
                runs.append([index])
        return tuple(tuple(run) for run in runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the version of the format."""
        data: dict[str, Any] = {
            "version": FORMAT_VERSION if self.mlp_widths else WITHOUT_WIDTHS,
            "phi": {str(index): _plain(phi) for index, phi in self.phi.items()},
        }
        if self.mlp_widths:
            data["mlp_widths"] = {str(index): width for index, width in self.mlp_widths.items()}
        data |= {name: getattr(self, name) for name in OPTIONAL if getattr(self, name) is not None}
        return data | ({"others": [other.to_dict() for other in self.others]} if self.others else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SkipatConfig:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: The data is of a newer version than this library reads, holds unknown entries, or is no
                configuration.
            TypeError: A value is of the wrong type.
        """
        version = data.get("version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"not a skipat configuration: version is {version!r}, expected an integer ≥ 1")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint's skipat configuration is of version {version}, this library reads up to "
                f"{FORMAT_VERSION}: upgrade skipat-surgery"
            )
        phis = data.get("phi")
        if not isinstance(phis, Mapping) or not all(
            isinstance(phi, Mapping) and str(index).isdecimal() for index, phi in phis.items()
        ):
            raise ValueError(f"phi of a skipat configuration must map block indices to Φ's, got {phis!r}")
        widths = data.get("mlp_widths", {})
        if not isinstance(widths, Mapping) or not all(str(index).isdecimal() for index in widths):
            raise ValueError(f"mlp_widths of a skipat configuration must map block indices to numbers, got {widths!r}")
        unknown = sorted(set(data) - {"version", "phi", "others", "mlp_widths", *OPTIONAL})
        allowed = {f.name for f in fields(PhiConfig)}
        for index, phi in phis.items():
            unknown += [f"phi.{index}.{name}" for name in sorted(set(phi) - allowed)]
        if unknown:
            raise ValueError(f"unknown entries in the skipat configuration: {unknown}; Φ knows {sorted(allowed)}")
        blocks = {int(index): PhiConfig(**{**BEFORE, **phi}) for index, phi in phis.items()}
        others = data.get("others", [])
        if not isinstance(others, list) or not all(isinstance(other, Mapping) for other in others):
            raise ValueError(f"others of a skipat configuration must list configurations, got {others!r}")
        return cls(
            blocks,
            **{name: data.get(name) for name in OPTIONAL},
            others=tuple(cls.from_dict(other) for other in others),
            mlp_widths={int(index): width for index, width in widths.items()},
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _plain(phi: PhiConfig) -> dict[str, Any]:
    """The fields of a Φ as JSON holds them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(phi).items()}
