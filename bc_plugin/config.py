"""What to compensate, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

from .errors import BiasCompensationError

SITES = ("linear", "block")
BY = ("model", "block")
TRAIN = ("vectors", "scales", "norms")
MEAN_TOKENS = 8192  # enough for means
DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")


class Settings:
    """Settings that check themselves, so that a slip is an error where it was made."""

    what: ClassVar[str]

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise BiasCompensationError(
                f"{self.what}: {name}={getattr(self, name)!r}; expected {expected}."
            )

    def _require_number(
        self, name: str, within: Callable[[Any], bool], expected: str, kind: type = Integral
    ) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        self._require(is_number and within(value), name, expected)

    def _require_some(self, name: str, known: tuple[str, ...], or_auto: bool = False) -> None:
        """Any of some words, each once; one alone may be given as it is."""
        value = getattr(self, name)
        if or_auto and value in ("auto", ["auto"], ("auto",)):
            object.__setattr__(self, name, "auto")
            return
        chosen = (value,) if isinstance(value, str) else tuple(value)
        object.__setattr__(self, name, chosen)
        once = len(set(chosen)) == len(chosen)
        self._require(bool(chosen) and set(chosen) <= set(known) and once, name, f"any of {known}")

    def _require_bool(self, name: str) -> None:
        self._require(isinstance(getattr(self, name), bool), name, "True or False")


@dataclass(frozen=True)
class BiasCompensationConfig(Settings):
    """Settings of the compensation pass.

    Args:
        positions: How many leading tokens of a sequence get a vector of their own; all later
            tokens share one. 1 sets the attention sink apart, 0 is a plain bias that export can
            merge, ``"all"`` gives one vector per position up to the calibration length, which is
            the setting of Gong et al. (arXiv 2404.01892). In image models these are the class
            token and, with ``"all"``, every patch. A convolution has one vector per channel, or
            with ``"all"`` one per patch if it cuts images into patches. Models with several lists
            of blocks (Swin, DETR), and sites that see tokens in windows, need 0.
        sites: ``"linear"`` (outputs of quantized linears, and of quantized convolutions outside
            of the blocks), ``"block"`` (outputs of transformer blocks) or both. Linears come
            first; blocks are measured with those in place. Heads are no sites.
        joint: Let the toolkit's GPTQ know that a bias will follow: it minimises the error that is
            left once the mean is taken out. Only where linears are compensated, and where the
            toolkit quantizes with plain GPTQ; otherwise it changes nothing.
        scales: Give the quantized linears, too, the group scales that are best with a bias, in
            closed form; integers and zero points stay. They are set in the quantized model's own
            tensors, and rely on the vectors as joint weights do.
        integers: Choose the integers of the quantized linears again, and their scales with them, as
            joint quantization does (coordinate descent on the covariance of the inputs); zero
            points stay. For checkpoints that somebody else has quantized, by whatever method. They
            are written where scales are, and rely on the vectors in the same way.
        blocks: Dotted path of the ``ModuleList`` of blocks, e.g. ``"model.layers"``, or several.
            Found when not given; see ``bc_plugin.models.blocks.find_block_lists``.
        held_out: Share of the calibration sequences kept apart to measure the error on tokens
            that the vectors were not fitted to. 0 keeps none.
        keep_only_if_better: Drop a site whose held-out error rises.
        max_tokens: Calibration tokens used, spread over the data; None for all. ``"auto"`` is
            8,192, since a mean needs few (4,096 gave the same perplexity as 16,384 on a 135M
            model), but all for ``integers``, which need a covariance. Images and sounds are all
            used, since a class token, or a patch, is seen but once in each.
        batch_tokens: Tokens per forward pass; an image counts as patches of 16 x 16 pixels, a
            sound as its frames. Changes speed and memory, not the result.
        offload_activations: Keep what passes from block to block in temporary files (in the folder
            that ``TMPDIR`` names). Changes speed and memory, not the result.
        refine_steps: Train the vectors so many steps against the float model, starting from the
            closed form; see ``bc_plugin.refine``. 0 leaves them as they are.
        refine: What the training compares, ``"model"`` or ``"block"``.
        refine_train: What is trained: any of ``"vectors"``, ``"scales"`` and ``"norms"``;
            ``"auto"`` is what can be, see ``bc_plugin.RefinementConfig``.
        dtype: Type the vectors are stored in. ``"auto"`` takes two bytes per value: bfloat16 for
            bfloat16 models, float16 otherwise, float32 for a vector that float16 cannot hold.

    Raises:
        BiasCompensationError: a value is out of range.
    """

    what = "bias_compensation"

    positions: int | Literal["all"] = 1
    sites: tuple[str, ...] = SITES
    joint: bool = True
    scales: bool = False
    integers: bool = False
    blocks: str | tuple[str, ...] | None = None
    held_out: float = 0.125
    keep_only_if_better: bool = False
    max_tokens: int | Literal["auto"] | None = "auto"
    batch_tokens: int = 4096
    offload_activations: bool = False
    refine_steps: int = 0
    refine: Literal["model", "block"] = "model"
    refine_train: tuple[str, ...] | Literal["auto"] = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.blocks, list):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        paths = (self.blocks,) if isinstance(self.blocks, str) else self.blocks
        if self.positions != "all":
            self._require_number(
                "positions", lambda n: n >= 0, 'a whole number from 0 up, or "all"'
            )
        self._require_some("sites", SITES)
        self._require_some("refine_train", TRAIN, or_auto=True)
        for name in ("scales", "integers"):
            self._require(
                not getattr(self, name) or "linear" in self.sites,
                "sites",
                f"linear among them where {name} is set, since {name} rely on the linears' vectors",
            )
        self._require(
            paths is None
            or (
                isinstance(paths, tuple) and bool(paths) and all(isinstance(p, str) for p in paths)
            ),
            "blocks",
            "the path of a list of blocks, or several",
        )
        self._require_number("held_out", lambda n: 0 <= n < 1, "a share from 0 to below 1", Real)
        for name in ("joint", "scales", "integers", "keep_only_if_better", "offload_activations"):
            self._require_bool(name)
        self._require(
            not (self.keep_only_if_better and self.held_out == 0),
            "held_out",
            "above 0 when keep_only_if_better is set, since that is what decides",
        )
        if self.max_tokens not in (None, "auto"):
            self._require_number(
                "max_tokens", lambda n: n > 0, 'a whole number above 0, "auto" or None'
            )
        self._require_number("batch_tokens", lambda n: n > 0, "a whole number above 0")
        self._require_number("refine_steps", lambda n: n >= 0, "a whole number from 0 up")
        self._require(self.refine in BY, "refine", f"one of {BY}")
        self._require(self.dtype in DTYPES, "dtype", f"one of {DTYPES}")

    @classmethod
    def parse(
        cls, value: BiasCompensationConfig | Mapping[str, Any] | bool | None
    ) -> BiasCompensationConfig | None:
        """Read the value of a toolkit's ``bias_compensation`` keyword.

        Returns:
            The settings, or None for ``None`` and ``False``.

        Raises:
            BiasCompensationError: the value is of another type or has an unknown key.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise BiasCompensationError(
                f"bias_compensation={value!r} is of type {type(value).__name__}; expected True, "
                "a dict or a BiasCompensationConfig."
            )
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise BiasCompensationError(
                f"bias_compensation: unknown keys {unknown}; known are {known}."
            )
        return cls(**value)

    @property
    def token_limit(self) -> int | None:
        """What ``max_tokens`` comes to; None for all tokens."""
        if self.max_tokens == "auto":
            return None if self.integers else MEAN_TOKENS
        return self.max_tokens

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values; ``parse`` reads them back."""
        trained = self.refine_train
        return {
            **asdict(self),
            "sites": list(self.sites),
            "refine_train": trained if trained == "auto" else list(trained),
        }
