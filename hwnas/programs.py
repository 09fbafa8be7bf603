"""Compiled functions of which nothing is kept but what runs."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Programs:
    """Functions, each compiled once for the shapes that it is called with.

    A function is one that `jax.jit` made. Its first arguments may be functions; these are static. It is compiled here,
    not when it is called: jax would keep what it compiles from, too, which for a thousand small programs takes more
    memory than all that they compute.

    Args:
        compiles: whether they are compiled; otherwise, they are only counted.
    """

    def __init__(self, *, compiles: bool = True) -> None:
        self.compiles = compiles
        self._programs: dict[Any, tuple[Any, Future[Any]]] = {}
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._begun: set[Any] = set()

    def shapes(self, function: Any, *arguments: Any) -> Any:
        """The shapes of what a call would return; if it is new, its program begins to be compiled, beside others.

        Of the arguments, too, only the shapes count.
        """
        return self._program(function, arguments)[0]

    def __call__(self, function: Any, *arguments: Any) -> Any:
        """Calls a function."""
        program = self._program(function, arguments)[1]
        self.wait()
        return program.result()(*(argument for argument in arguments if not callable(argument)))

    def __len__(self) -> int:
        """How many programs there are."""
        return len(self._programs)

    def wait(self) -> None:
        """Until all is compiled that has begun."""
        if not self._begun:
            return
        for _, compiling in self._programs.values():
            compiling.result()
        for function in self._begun:
            function.clear_cache()
        self._begun.clear()

    def _program(self, function: Any, arguments: tuple[Any, ...]) -> tuple[Any, Future[Any]]:
        leaves, tree = jax.tree.flatten(arguments)
        static = tuple(leaf for leaf in leaves if callable(leaf))
        key = function, static, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves[len(static) :])
        if key not in self._programs:
            traced = function.trace(*arguments)
            if self.compiles:
                compiling = self._pool.submit(lambda: traced.lower().compile())
                self._begun.add(function)
            else:
                compiling = Future()
                compiling.cancel()  # or a call would wait for ever
            self._programs[key] = traced.out_info, compiling
        return self._programs[key]
