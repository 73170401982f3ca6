"""From what users pass (lists, NumPy, traced scalars) to JAX arrays, without narrowing anything in silence."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_ifa.compat import is_concrete
from jax_ifa.errors import fail

INT32_MAX = 2**31 - 1


def as_array(name: str, value: Any) -> Array | None:
    """An argument as a JAX array of the very dtype it came with; Python numbers and lists take JAX's default dtype."""
    if value is None or isinstance(value, jax.Array):
        return value
    given = getattr(value, "dtype", None)
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        fail(f"{name} must be an array", expected="numbers", got=type(value).__name__, error=TypeError)
    if given is not None and array.dtype != given:  # NumPy's 64-bit defaults, which JAX would narrow in silence
        fail(f"{name} has a dtype that JAX holds", expected=f"for example {array.dtype}", got=given, error=TypeError)
    return array


def as_integers(name: str, value: Any) -> Array | np.ndarray | None:
    """Integers as an array, kept in NumPy while concrete so that they can be checked without narrowing them first.

    Takes Python and NumPy integers, lists and tuples of them (or of traced scalars), and arrays.
    """
    array: Array | np.ndarray
    if value is None:
        return None
    if isinstance(value, jax.Array):
        array = value
    elif isinstance(value, Sequence) and any(isinstance(item, jax.Array) for item in value):
        array = jnp.stack([jnp.asarray(item) for item in value])
    else:
        try:
            array = np.asarray(value)
        except ValueError:  # lists of different lengths
            fail(f"{name} holds integers", expected="one row of them", got=repr(value))
        if array.size == 0:  # NumPy gives an empty list a floating point dtype
            array = array.astype(np.int64)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        fail(f"{name} must hold integers", expected="an integer dtype", got=array.dtype, error=TypeError)
    return array


def as_int32(integers: Array | np.ndarray) -> Array:
    """Checked integers for the device: int32, larger ones saturated (they are clamped to the cache later anyway)."""
    if isinstance(integers, np.ndarray):
        integers = np.clip(integers, -INT32_MAX, INT32_MAX).astype(np.int32)
        return jnp.asarray(integers)
    info = jnp.iinfo(integers.dtype)
    if info.max > INT32_MAX:
        integers = jnp.clip(integers, max(info.min, -INT32_MAX), INT32_MAX)
    return integers.astype(jnp.int32)


def as_static_integer(name: str, value: Any) -> int:
    """An integer that must be known when tracing."""
    try:
        return operator.index(value)
    except TypeError:
        fail(f"{name} is an integer known when tracing", expected="an integer", got=repr(value), error=TypeError)


def numpy_value(array: Any) -> np.ndarray | None:
    """The numbers in an array, or None while they are traced, or for None."""
    return np.asarray(array) if array is not None and is_concrete(array) else None
