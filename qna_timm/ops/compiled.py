"""What of this package was compiled for this processor: what results may depend on."""

from qna_timm.ops.qna import native as qna_native
from qna_timm.ops.span import native as span_native


def compiled_attention() -> str:
    """The instruction set of the compiled functions, of each if they differ; '' without any."""
    libraries = {"qna": qna_native.LIBRARY, "span": span_native.LIBRARY}
    kinds = {name: library.kind for name, library in libraries.items()}
    if len(set(kinds.values())) == 1:
        return kinds["qna"]
    return ", ".join(f"{name} {kind or 'not compiled'}" for name, kind in kinds.items())
