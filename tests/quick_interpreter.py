"""Triton's interpreter without the work that changes nothing: the same bits in half the time.

The interpreter runs a kernel's Python line by line, and nearly all of its time is bookkeeping. What
is left out here is of Triton 3.7.1. `test_the_quick_interpreter_is_tritons` compares the two.
"""

import dataclasses
import functools

import triton.language as tl
from triton.runtime import interpreter


def hurry(patch):
    """Makes the interpreter of this process faster, up to `patch.undo()`.

    patch: a pytest.MonkeyPatch.
    """
    patch_the_language_once(patch)
    leave_out_overflow_checks(patch)
    keep_the_table_of_dtypes(patch)


class _AnyKernel:
    """Stands for a kernel that sees the language by both of its names."""

    __globals__ = {"tl": tl, "core": tl.core}


def patch_the_language_once(patch):
    """A launch patches the language for all that its kernel calls.

    Triton's patches what the kernel's own file sees of it. Then each call of another function looks
    through all names again, for any that are not patched yet.
    """
    patch_language = interpreter._patch_lang

    def patch_all(function):
        return patch_language(_AnyKernel)

    def call(self, *arguments, **keywords):
        try:
            return self.rewrite()(*arguments, **keywords)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    patch.setattr(interpreter, "_patch_lang", patch_all)
    patch.setattr(interpreter.InterpretedFunction, "__call__", call)


def leave_out_overflow_checks(patch):
    """No sum of integers is computed a second time in 64 bits to see whether it overflows.

    The verdict is a device_assert, which the interpreter ignores unless it debugs.
    """
    builder = interpreter.interpreter_builder
    unchecked = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    patch.setattr(builder, "options", unchecked)


def keep_the_table_of_dtypes(patch):
    """NumPy's dtypes are looked up in one table, instead of a new one each time."""
    numpy_dtype = interpreter._get_np_dtype
    dtype_of_scalar = functools.cache(numpy_dtype)

    def dtype_of(kind):
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if isinstance(element, tl.pointer_type):  # it cannot be the key of a cache
            return numpy_dtype(element)
        return dtype_of_scalar(element)

    patch.setattr(interpreter, "_get_np_dtype", dtype_of)
