"""Derive llama.cpp's model and context parameters from llama_cpp.Llama's arguments without loading a model."""

from __future__ import annotations

from typing import Any

from llama_cpp import Llama


class _NotLoadedError(Exception):
    pass


class _Parameters(Llama):  # type: ignore[misc]  # llama_cpp is not strictly typed
    """Captures the parameters: the patched llama_cpp.Llama calls _configure before it loads anything."""

    _redirect_output = False

    def _configure(self, model_params: Any, context_params: Any) -> None:
        raise _NotLoadedError(model_params, context_params)


def native_parameters(model_path: str, **options: Any) -> tuple[Any, Any]:
    """Return llama_model_params and llama_context_params for arguments of llama_cpp.Llama, all layers on the GPU."""
    try:
        _Parameters(model_path, n_gpu_layers=-1, verbose=False, **options)
    except _NotLoadedError as made:
        return made.args[0], made.args[1]
    raise AssertionError("llama_cpp.Llama calls _configure before it loads")
