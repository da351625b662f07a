"""What a compensation consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class SiteErrors:
    """Mean squared error of one site's output, per value, against the float model.

    Attributes:
        before, after: Without and with its vectors, on the tokens they were fitted to.
        held_out_before, held_out_after: The same on tokens kept apart; None where none were.
    """

    before: float
    after: float
    held_out_before: float | None = None
    held_out_after: float | None = None


ATTRIBUTES = (
    "vectors",
    "kinds",
    "errors",
    "positions",
    "blocks",
    "digest",
    "joint",
    "scales",
    "refined",
    "float_weights",
)


class Contents:
    """Vectors, and what is known of them.

    Attributes:
        vectors: For each site, by module path, a tensor of shape (positions + 1, features). Row i
            is added to the output for token i of a sequence, the last row for all later tokens. A
            convolution's has the shape (1, channels), or (patches, channels), patches row by row.
        kinds: For each site, ``"linear"``, ``"block"`` or ``"convolution"``.
        errors: For each site, the error before and after.
        positions: Number of leading positions with a vector of their own.
        blocks: Paths of the lists of blocks; mostly there is one.
        digest: Of the quantized weights that the vectors belong to.
        float_weights: What tells their scales, norms and biases apart, a text per block.
        joint: Whether the quantizer knew that they would follow, and minimised what they leave.
        scales: Whether scales of quantized linears, their integers, or norms were fitted with them,
            in the model's own tensors.
        refined: How they were trained after the closed form, which ``errors`` are of: ``by``,
            ``steps``, and the loss ``before`` and ``after`` on held-out sequences. None if not.
        seconds: How long computing them took; None when they were loaded.
    """

    seconds: float | None = None

    def __init__(
        self,
        vectors: Mapping[str, Tensor],
        kinds: Mapping[str, str],
        errors: Mapping[str, SiteErrors],
        positions: int,
        blocks: str | Sequence[str],
        digest: str,
        joint: bool = False,
        scales: bool = False,
        refined: Mapping[str, Any] | None = None,
        float_weights: Sequence[str] = (),
    ) -> None:
        self.vectors = dict(vectors)
        self.kinds = dict(kinds)
        self.errors = dict(errors)
        self.positions = positions
        self.blocks = (blocks,) if isinstance(blocks, str) else tuple(blocks)
        self.digest = digest
        self.joint = joint
        self.scales = scales
        self.refined = refined
        self.float_weights = tuple(float_weights)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.vectors)} sites, positions={self.positions}, "
            f"{self.nbytes / 2**20:.2f} MiB)"
        )

    @property
    def nbytes(self) -> int:
        """Size of the vectors in bytes."""
        return sum(vectors.nbytes for vectors in self.vectors.values())

    def replaced(self, **changes: Any) -> Self:
        """The same but for ``changes``, named as the attributes are."""
        return type(self)(**{**{name: getattr(self, name) for name in ATTRIBUTES}, **changes})

    def only(self, names: Sequence[str]) -> Self:
        """The vectors of some sites alone."""
        return self.replaced(
            **{
                part: {name: getattr(self, part)[name] for name in names}
                for part in ("vectors", "kinds", "errors")
            }
        )

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same vectors in a model whose modules have other paths."""
        return self.replaced(
            blocks=[rename(path) for path in self.blocks],
            **{
                part: {rename(name): value for name, value in getattr(self, part).items()}
                for part in ("vectors", "kinds", "errors")
            },
        )

    def describe(self) -> list[dict[str, Any]]:
        """One row per site: its name, shape, bytes, kind and errors."""
        return [
            {
                "site": name,
                "shape": tuple(vectors.shape),
                "bytes": vectors.nbytes,
                "kind": self.kinds[name],
                **asdict(self.errors[name]),
            }
            for name, vectors in self.vectors.items()
        ]
