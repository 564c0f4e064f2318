"""llama.cpp's parameters of model and context, as llama_cpp.Llama makes them of its arguments, without a load."""

from __future__ import annotations

from typing import Any

from llama_cpp import Llama


class _NotLoadedError(Exception):
    pass


class _Parameters(Llama):  # type: ignore[misc]  # llama_cpp is not strictly typed
    """The patched llama_cpp.Llama calls _configure with its parameters before it loads anything."""

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
