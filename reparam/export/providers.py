"""Whether onnxruntime and its execution providers are here."""

from __future__ import annotations


def missing_provider(provider: str) -> str:
    """Why onnxruntime cannot run files with `provider`, as a sentence with what to do; empty if it can."""
    try:
        import onnxruntime
    except ImportError as error:
        return f"onnxruntime cannot be imported ({error}); install it with `pip install onnxruntime`"
    available = onnxruntime.get_available_providers()
    if provider in available:
        return ""
    package = "onnxruntime" if provider == "CPUExecutionProvider" else "onnxruntime-gpu"
    return f"onnxruntime has no {provider} here, only {', '.join(available)}; install it with `pip install {package}`"
