"""The packages that build engines, and what differs between them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from seqc.errors import MissingExtraError, UsageError


@dataclass(frozen=True)
class Package:
    """A package that builds engines.

    ``module`` is imported, ``distribution`` installed, by seqc's ``extra``. ``sms`` are the compute capabilities that can be
    named (89 is 8.9), for which it builds without a GPU; one without any builds for the GPU that is there.
    """

    module: str
    distribution: str
    extra: str
    title: str
    sms: tuple[int, ...]

    def version(self) -> str:
        """The version installed. Raises MissingExtraError, which names the extra."""
        if importlib.util.find_spec(self.module) is None:
            raise MissingExtraError(
                f"building engines needs the package {self.distribution}: pip install 'seqc[{self.extra}]' "
                "(--opt engines=off writes the ONNX that engines are built of, and needs no package)"
            )
        return importlib.metadata.version(self.distribution)

    def check_sms(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        """The compute capabilities to build for: ``asked``, or all. Raises UsageError for those it does not know."""
        if unknown := [sm for sm in asked if sm not in self.sms]:
            known = f"it knows {', '.join(map(str, self.sms))}" if self.sms else "it builds for the GPU that is there"
            raise UsageError(f"{self.title} builds no engine for sm={','.join(map(str, unknown))}: {known}")
        return tuple(sorted(asked)) or self.sms


PACKAGES: dict[str, Package] = {
    package.module: package
    for package in (
        Package("tensorrt_rtx", "tensorrt-rtx", "rtx", "TensorRT for RTX", (75, 80, 86, 89, 120, 121)),
        Package("tensorrt", "tensorrt", "tensorrt", "TensorRT", ()),
    )
}
"""By the name under which they are imported."""
