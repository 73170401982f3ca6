"""Running the TPU kernel on the CPU, under JAX's TPU interpreter."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from jax_ifa import incre_flash_attention
from pallas_kernels.tpu import lowering, plan
from pallas_kernels.tpu.tuning import Tuning


def small_tiles(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cores: int = 1,
    tile_bytes: int = 1 << 16,
    int8_products: bool = True,
    turns_int8: bool = False,
) -> None:
    """Tiles of 128 positions, so that a few hundred make several, some of them whole."""
    tuning = Tuning(
        cores=cores,
        slots=3,
        matrix_width=128,
        tile_bytes=tile_bytes,
        vmem_limit_bytes=1 << 24,
        int8_products=int8_products,
        turns_int8=turns_int8,
    )
    monkeypatch.setattr(lowering, "tuning_for", lambda kind: tuning)


def tiles_in_stages(monkeypatch: pytest.MonkeyPatch, *, many_copies: bool) -> None:
    """Tiles of 512 positions, in two stages of two cuts where copies are many."""
    small_tiles(monkeypatch, tile_bytes=1 << 19)
    monkeypatch.setattr(plan, "MANY_COPIES", 1 if many_copies else 1 << 30)


def interpret(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    function: Callable[..., Any] | None = None,
    return_lse: bool = True,
    **parameters: Any,
) -> tuple[Any, ...]:
    """(out, lse) of a call of the public function on the kernel; `parameters` are those of `pltpu.InterpretParams`."""

    def call(query: Any, key: Any, value: Any) -> Any:
        found = incre_flash_attention(query, key, value, implementation="mosaic_tpu", return_lse=return_lse, **kwargs)
        return found if return_lse else (found,)

    jax.clear_caches()  # what was traced with other tiles, or planted faults, must not be used again
    printed = io.StringIO()
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**parameters)), contextlib.redirect_stdout(printed):
            result = jax.block_until_ready(jax.jit(function or call)(*args))
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()
        raise
    # JAX 0.12 raises when it sees a race; before, it prints and goes on.
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()
    return result
